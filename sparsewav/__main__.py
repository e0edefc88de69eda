"""``python -m sparsewav`` is the console command ``sparsewav``."""

from sparsewav.cli import main

main()
