"""A run from start to finish: what it shares with others, how it is resumed, and what it leaves in its folder."""
