"""Benchmarks: what pruning and pruned models cost in seconds, bytes and memory."""
