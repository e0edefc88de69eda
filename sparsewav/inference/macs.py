"""Multiply-accumulates of a model for each second of audio."""

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from sparsewav.pruning.encoder import encoder_layers, projections_as_modules, prunable_matrices

SECONDS_COUNTED = 10
"""Length of the utterance that is counted. The cost of attention grows with its square."""


@torch.no_grad()  # the counter does not work in inference mode
def multiply_accumulates(model: PreTrainedModel, sample_rate: int = 16_000) -> tuple[int, int]:
    """Count the multiply-accumulates of a CTC model for a second of audio, in an utterance of ten seconds.

    Returns:
        The count of all matrix products and convolutions as executed, and the count without products by weights that
        are zero, which hardware for sparse matrices skips.
    """
    samples = torch.zeros(1, SECONDS_COUNTED * sample_rate, device=model.device, dtype=model.dtype)
    rows: list[int] = []
    hook = encoder_layers(model)[0].register_forward_pre_hook(
        lambda module, args, kwargs: rows.append((args[0] if args else kwargs["hidden_states"]).shape[-2]),
        with_kwargs=True,
    )
    was_training = model.training
    model.eval()
    counter = FlopCounterMode(display=False)
    try:
        # The counter supports this backend of attention on every device.
        with projections_as_modules(model), counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            model(samples)
    finally:
        hook.remove()
        model.train(was_training)
    executed = counter.get_total_flops() // 2
    zeros = sum(matrix.size - int(matrix.weight.count_nonzero()) for matrix in prunable_matrices(model))
    return executed // SECONDS_COUNTED, (executed - zeros * rows[0]) // SECONDS_COUNTED
