"""How much a model computes: multiply-accumulates for each second of audio."""

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from sparsewav.pruning.encoder import encoder_layers, projections_as_modules, prunable_matrices

SECONDS_COUNTED = 10
"""Length of the utterance that is counted: attention grows with the square of it."""


@torch.no_grad()  # the counter does not work in inference mode
def multiply_accumulates(model: PreTrainedModel, sample_rate: int = 16_000) -> tuple[int, int]:
    """Count what a model multiplies and adds up for a second of audio, in an utterance of ten.

    Args:
        model: CTC model.
        sample_rate: of its audio, in Hz.

    Returns:
        Multiply-accumulates of all matrix products and convolutions as they are executed, zeros and all; and without
        those by weights that are zero, which hardware made for sparse matrices leaves out.
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
        # One backend of attention that the counter knows on every device.
        with projections_as_modules(model), counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            model(samples)
    finally:
        hook.remove()
        model.train(was_training)
    executed = counter.get_total_flops() // 2
    zeros = sum(matrix.size - int(matrix.weight.count_nonzero()) for matrix in prunable_matrices(model))
    return executed // SECONDS_COUNTED, (executed - zeros * rows[0]) // SECONDS_COUNTED
