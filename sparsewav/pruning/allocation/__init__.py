"""Allocation: the sparsity of every matrix."""
