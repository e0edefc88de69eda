"""How an exported model compares with the model that it was made from: its logits, and the zeros in its file."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedModel

from sparsewav.data.batches import Batch
from sparsewav.errors import UserError
from sparsewav.inference.runtime import MASK, ExportedModel, of_extra
from sparsewav.models.checkpoint import first_line
from sparsewav.models.load import SpeechModel
from sparsewav.pruning.encoder import base_of, input_key, output_counts, prunable_matrices, takes_padding
from sparsewav.pruning.families import encoder_config, family_of

TRACED = 51
"""Frames of the batch that the exporter follows."""

TOLERANCE = 1e-3
"""Largest difference of two logits, relative to the largest logit, that rounding in another order explains."""


@dataclass(frozen=True)
class Agreement:
    """How the logits of an exported model compare with those of the model that it was made from.

    Attributes:
        difference: Largest difference, relative to the largest logit.
        same: Share of the frames with the same most probable token.
        zeros_kept: Share of the pruned weights that are zero in the file, too.
        found: Share of the prunable matrices that were found in the file; one that reads nothing but positions may be
            folded into a constant.
    """

    difference: float
    same: float
    zeros_kept: float
    found: float


def noise(model: PreTrainedModel, frames: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Make a padded batch of noise that gives so many frames of logits, and its attention mask."""
    counts = output_counts(model, torch.arange(2**19))
    return noise_of([int((counts >= count).nonzero()[0]) for count in frames], model, seed)


def noise_of(lengths: list[int], model: PreTrainedModel, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Make a padded batch of noise of these lengths, in samples or feature frames, and its attention mask."""
    shape = [len(lengths), max(lengths)]
    if input_key(model) == "input_features":
        config, front = encoder_config(model.config), base_of(model).get_submodule(family_of(model).front)
        bins = getattr(config, "feature_projection_input_dim", None) or getattr(front, "in_features", None)
        shape.append(bins or config.num_mel_bins)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values * mask.view(*mask.shape, *[1] * (values.dim() - 2)), mask.long()


def check_same(speech: SpeechModel, exported: ExportedModel) -> float:
    """Compare the logits of an exported model with the model's, shorter and longer than traced, alone and in batches.

    Returns:
        The largest difference, relative to the largest logit.

    Raises:
        UserError: They differ by more than rounding, or the exported model fails.
    """
    model = speech.model
    padded = takes_padding(model)
    worst = 0.0
    for frames in ([TRACED], [3], [128], [300], *([[211, 90, 17], [50, 49]] if padded else [[90, 90, 90]])):
        inputs, mask = noise(model, frames, seed=len(frames))
        try:
            difference = _compare(model, exported, inputs, mask if padded else None)[0]
        except Exception as error:  # runtimes raise almost any error
            difference, reason = float("inf"), f"fails ({first_line(error)})"
        else:
            reason = f"differs from the model by {difference:.1e} of the largest logit"
        if not difference <= TOLERANCE:
            raise UserError(
                f"{speech.name}, of the family {model.config.model_type!r}, cannot be exported: the written model "
                f"{reason} on {'utterances' if len(frames) > 1 else 'an utterance'} of "
                f"{', '.join(map(str, frames))} frames; nothing was written"
            )
        worst = max(worst, difference)
    return worst


def agreement(speech: SpeechModel, exported: ExportedModel, batches: Sequence[Batch]) -> Agreement:
    """Compare an exported model with the model that it was made from, on batches of speech."""
    padded, key = takes_padding(speech.model), input_key(speech.model)
    worst, same, frames = 0.0, 0, 0
    for batch in batches:
        length = int(batch[MASK].sum(-1).max())
        difference, own, count = _compare(
            speech.model, exported, batch[key][:, :length], batch[MASK][:, :length] if padded else None
        )
        worst, same, frames = max(worst, difference), same + own, frames + count
    kept, found = zeros_kept(speech.model, exported)
    return Agreement(worst, same / frames, kept, found)


@torch.inference_mode()
def _compare(
    model: PreTrainedModel, exported: ExportedModel, inputs: Tensor, mask: Tensor | None
) -> tuple[float, int, int]:
    """Give the largest relative difference of the logits of valid frames, the frames with the same argmax, and all."""
    arguments = {} if mask is None else {MASK: mask}
    ours = model(inputs, **arguments).logits
    theirs = torch.from_numpy(exported.run(inputs, mask))
    if theirs.shape != ours.shape:
        raise ValueError(f"it gives logits of shape {tuple(theirs.shape)} and not {tuple(ours.shape)}")
    lengths = torch.full((len(inputs),), inputs.shape[1]) if mask is None else mask.sum(-1)
    valid = torch.arange(theirs.shape[1]) < output_counts(model, lengths)[:, None]
    ours, theirs = ours[valid], theirs[valid]
    difference = float((ours - theirs).abs().max() / ours.abs().max())
    return difference, int((ours.argmax(-1) == theirs.argmax(-1)).sum()), len(ours)


def zeros_kept(model: PreTrainedModel, exported: ExportedModel) -> tuple[float, float]:
    """Give the share of the pruned weights that are zero in an exported file, and of the matrices that are in it.

    Exporters rename and transpose matrices, so each is compared with those of its shape, and the most alike counts.
    """
    stored: dict[tuple[int, ...], list[Bool[np.ndarray, "rows cols"]]] = {}
    for zero in (_zeros_onnx if exported.path.suffix == ".onnx" else _zeros_openvino)(exported.path):
        stored.setdefault(tuple(sorted(zero.shape)), []).append(zero)
    pruned = kept = found = 0
    matrices = prunable_matrices(model)
    for matrix in matrices:
        zero = (matrix.weight == 0).cpu().numpy()
        candidates = stored.get(tuple(sorted(zero.shape)), [])
        found += bool(candidates)
        count, best = int(zero.sum()), 0
        for index, candidate in enumerate(candidates):
            for form in (candidate, candidate.T):
                best = max(best, int((zero & form).sum()) if form.shape == zero.shape else 0)
            if best == count:
                if count:  # the file has them in the model's order, so that the next one is found at once
                    del candidates[index]
                break
        if candidates or best:
            pruned, kept = pruned + count, kept + best
    return kept / pruned if pruned else 1.0, found / len(matrices)


def _zeros_onnx(path: Path) -> Iterator[Bool[np.ndarray, "rows cols"]]:
    """Give where each matrix in a file is zero; an integer is if it is the zero point of its column or matrix."""
    onnx = of_extra("onnx", "onnx")
    stored = {item.name: item for item in onnx.load(path).graph.initializer}
    for name, item in stored.items():
        if not (len(item.dims) == 2 or (len(item.dims) == 3 and item.dims[2] == 1)):
            continue
        zero = stored.get(f"{name.removesuffix('_quantized')}_zero_point") if name.endswith("_quantized") else None
        values = onnx.numpy_helper.to_array(item).reshape(item.dims[:2])
        yield values == (0 if zero is None else onnx.numpy_helper.to_array(zero))


def _zeros_openvino(path: Path) -> Iterator[Bool[np.ndarray, "rows cols"]]:
    """Give where each matrix in a file is zero; NNCF's integers are symmetric."""
    for node in of_extra("openvino", "openvino").Core().read_model(str(path)).get_ops():
        if node.get_type_name() == "Constant" and (
            len(node.shape) == 2 or (len(node.shape) == 3 and node.shape[2] == 1)
        ):
            yield node.data.reshape(node.shape[0], node.shape[1]) == 0
