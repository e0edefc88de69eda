"""Allocation: how many weights each matrix loses."""
