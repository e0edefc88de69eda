"""The commands. The entry points and the callback that ``conf/config.yaml`` names can be imported from here."""

from sparsewav.cli.app import RememberSweep, main, train_main

__all__ = ["RememberSweep", "main", "train_main"]
