"""Multiply-accumulates of a model for each second of audio."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from sparsewav.pruning.encoder import PrunableMatrix, projections_as_modules, prunable_matrices
from sparsewav.settings.pruning import ENCODER

SECONDS_COUNTED = 10
"""Length of the utterance that is counted. The cost of attention grows with its square."""


def silence(feature_extractor: Any) -> Float[Tensor, "1 ..."]:
    """Give what a model's feature extractor makes of as much silence as is counted."""
    rate = feature_extractor.sampling_rate
    samples = np.zeros(SECONDS_COUNTED * rate, dtype=np.float32)
    inputs: Tensor = feature_extractor(samples, sampling_rate=rate, return_tensors="pt")[
        feature_extractor.model_input_names[0]
    ]
    return inputs


@torch.no_grad()  # the counter does not work in inference mode
def multiply_accumulates(model: PreTrainedModel, audio: Float[Tensor, "1 ..."]) -> tuple[int, int]:
    """Count the multiply-accumulates of a CTC model for a second of audio, in an utterance of ten seconds.

    Args:
        model: The model.
        audio: The model's input for ten seconds (:func:`silence`); only its shape matters.

    Returns:
        The count of all matrix products and convolutions as executed, and the count without products by weights that
        are zero, which hardware for sparse matrices skips.
    """
    matrices = prunable_matrices(model, ENCODER)  # a front end that is dense has no zeros to count
    rows = dict.fromkeys((matrix.name for matrix in matrices), 0)

    def hook_of(matrix: PrunableMatrix) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            rows[matrix.name] += output.numel() // len(matrix.weight)

        return hook

    hooks = [matrix.module.register_forward_hook(hook_of(matrix)) for matrix in matrices]
    try:
        executed = counted_modules(model, audio)[""]
    finally:
        for hook in hooks:
            hook.remove()
    skipped = sum((matrix.size - int(matrix.weight.count_nonzero())) * rows[matrix.name] for matrix in matrices)
    return executed // SECONDS_COUNTED, (executed - skipped) // SECONDS_COUNTED


@torch.no_grad()
def counted_modules(model: PreTrainedModel, audio: Float[Tensor, "1 ..."]) -> dict[str, int]:
    """Count the multiply-accumulates of every module of a model for one input, whose shape alone matters.

    Returns:
        The counts by the modules' names; that of the whole model is by the empty name.
    """
    was_training = model.training
    model.eval()
    counter = FlopCounterMode(display=False)
    try:
        # The counter supports this backend of attention on every device.
        with projections_as_modules(model), counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            model(audio.to(model.device, model.dtype))
    finally:
        model.train(was_training)
    prefix = f"{type(model).__name__}."
    counts = {name: sum(own.values()) // 2 for name, own in counter.get_flop_counts().items()}
    return {"": counter.get_total_flops() // 2} | {
        name.removeprefix(prefix): count for name, count in counts.items() if name.startswith(prefix)
    }
