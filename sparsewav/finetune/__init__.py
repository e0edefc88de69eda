"""Training CTC models."""
