"""Speech: utterances, where they come from, and the batches that a model takes."""
