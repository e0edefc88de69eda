"""Time and memory that a pruned model really saves: sparse products where they are faster than dense ones."""

from sparsewav.inference.acceleration import AcceleratedMatrix, AccelerationReport, accelerate, restore

__all__ = ["AcceleratedMatrix", "AccelerationReport", "accelerate", "restore"]
