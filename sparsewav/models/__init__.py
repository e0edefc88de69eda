"""CTC models: how they are loaded and stored, and the classes that transformers does not have."""
