"""``python -m sparsewav.training`` is the console command ``sparsewav-train``."""

from sparsewav.cli.app import train_main

train_main()
