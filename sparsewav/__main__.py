"""``python -m sparsewav`` is the console command ``sparsewav``."""

from sparsewav.cli.app import main

main()
