"""``python -m sparsewav.finetune`` is the console command ``sparsewav-train``."""

from sparsewav.cli import train_main

train_main()
