"""Benchmarks of pruning and of pruned models in seconds, bytes and memory."""
