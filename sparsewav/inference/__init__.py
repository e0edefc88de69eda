"""Using a model: word error rates, transcripts of recordings, its cost, and sparse products where they are faster.

:mod:`wer` evaluates, :mod:`transcription` transcribes recordings, :mod:`macs` counts multiply-accumulates, and
:mod:`acceleration` replaces products by those of :mod:`sparse_modules` and :mod:`kernel` where :mod:`timing` favours
it; :mod:`comparison` times the whole model beside its :mod:`alternatives`.
:mod:`exchange` writes ONNX and OpenVINO files, which :mod:`runtime` runs.
"""

from sparsewav.inference.acceleration import AcceleratedMatrix, AccelerationReport, accelerate, restore

__all__ = ["AcceleratedMatrix", "AccelerationReport", "accelerate", "restore"]
