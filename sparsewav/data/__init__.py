"""Speech: utterances, their sources, and the batches that a model takes.

:mod:`sets` gives the sets that a configuration names, from :mod:`librispeech` or the generated corpus of :mod:`demo`.
"""
