"""CTC models: how they are loaded and stored, and the classes that transformers does not have.

:mod:`load` loads a model with its processor, :mod:`fairseq` reads files of fairseq, :mod:`checkpoint` reads safetensors
tensor by tensor, :mod:`bitmask` stores pruned models, and :mod:`structured` and :mod:`fithubert` define classes.
"""
