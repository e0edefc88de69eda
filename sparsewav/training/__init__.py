"""Training CTC models.

:mod:`trainer` trains anything with a loss on Hugging Face's Trainer, :mod:`masks` keeps pruned weights at zero,
:mod:`schedule` plans the stages of a run, :mod:`processes` trains in several processes, :mod:`dense` is the command
``sparsewav-train``, and :mod:`recipes` trains the demo's models on first use.
"""
