#!/usr/bin/env bash
# Regenerate the paper's tables and figures: run what is missing, then draw. Options: ./reproduce.sh --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
exec .ci/venv python -m experiments "$@"
