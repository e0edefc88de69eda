"""What tests of the command line share."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

Run = Callable[..., subprocess.CompletedProcess[str]]


def run_folder_in(tmp_path: Path) -> Path:
    """Give the folder of the one finished run below ``outputs``."""
    (metrics,) = (tmp_path / "outputs").glob("*/metrics.json")
    return metrics.parent


def assert_one_sentence(result: subprocess.CompletedProcess[str], pattern: str) -> None:
    """The message on the terminal: one line that says it, code 1, no traceback."""
    output = result.stdout + result.stderr
    assert result.returncode == 1, output
    assert "Traceback" not in output
    assert len(re.findall(r"^error: ", output, re.MULTILINE)) == 1, output
    assert re.search(pattern, output), output
