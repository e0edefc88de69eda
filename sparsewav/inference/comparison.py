"""A whole model, dense and accelerated, timed in turns with its :mod:`alternatives` on this machine."""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sparsewav.errors import UserError
from sparsewav.inference.alternatives import Run, alternative, audio_of, run_model
from sparsewav.inference.sparse_modules import SparseModule
from sparsewav.inference.timing import check_seconds, in_turns, read_remembered, remember
from sparsewav.pruning.encoder import in_evaluation_mode, whatever_modes

ROUNDS = 3


@dataclass(frozen=True)
class Comparison:
    """Median seconds of whole forward passes, each tuple with one for every number of frames.

    Attributes:
        frames: The numbers of frames, in utterances of at most 20 seconds.
        dense: Of the dense model in float32.
        accelerated: Of the model with sparse products; the dense one's where there is none.
        alternatives: Of the dense model's alternatives, by name.
        left_out: Why an alternative was not timed, by name.
    """

    frames: tuple[int, ...]
    dense: tuple[float, ...]
    accelerated: tuple[float, ...]
    alternatives: dict[str, tuple[float, ...]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def worth_it(self) -> bool:
        """Whether the accelerated model is nowhere slower than the dense one."""
        return all(after <= before for before, after in zip(self.dense, self.accelerated, strict=True))

    @property
    def faster(self) -> list[str]:
        """The alternatives that are faster than the accelerated model at some number of frames, fastest first."""
        names = [
            name
            for name, seconds in self.alternatives.items()
            if any(one < ours for one, ours in zip(seconds, self.accelerated, strict=True))
        ]
        return sorted(names, key=lambda name: sum(self.alternatives[name]))

    def __str__(self) -> str:
        """How many times as fast as the dense model each is, in one line."""
        counts = " and ".join(map(str, self.frames))
        text = f"times as fast as dense at {counts} frames: this model {self._times(self.accelerated)}"
        slower = [name for name in self.alternatives if name not in self.faster]
        for verdict, names in (("faster", self.faster), ("not faster", slower)):
            if names:
                text += f"; {verdict}: " + ", ".join(f"{name} {self._times(self.alternatives[name])}" for name in names)
        return text + "".join(f"; {name} left out: {reason}" for name, reason in self.left_out.items())

    def _times(self, seconds: Sequence[float]) -> str:
        return " and ".join(f"{dense / own:.2f}" for dense, own in zip(self.dense, seconds, strict=True))


def compare(
    dense: PreTrainedModel, accelerated: PreTrainedModel, frames: Sequence[int], names: Sequence[str]
) -> Comparison:
    """Time a dense model, the accelerated one and alternatives, in turns on noise.

    Args:
        dense: A model in float32 on the CPU.
        accelerated: The same with sparse products, or the dense one itself.
        frames: Numbers of frames in a batch.
        names: The alternatives to time, of :data:`~sparsewav.inference.alternatives.ALTERNATIVES`. One that cannot be
            had or is hopelessly slow is left out.
    """
    runs: dict[str, Run] = {}
    left_out: dict[str, str] = {}
    with ExitStack() as stack:
        stack.enter_context(whatever_modes(torch.device("cpu")))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sparsewav-")))
        for model in (dense, accelerated):
            stack.enter_context(in_evaluation_mode(model))
        for name in names:
            try:
                runs[name] = alternative(name, dense, folder).run
            except UserError as error:
                left_out[name] = str(error)
        contestants: list[Run] = [partial(run_model, dense), *runs.values()]
        if accelerated is not dense:
            contestants.append(partial(run_model, accelerated))
        rows = []
        for count in frames:
            audio = audio_of(dense, count)
            with torch.inference_mode():
                rows.append(in_turns(ROUNDS, [partial(run, audio) for run in contestants]))
    columns = list(zip(*rows, strict=True))
    timed = dict(zip(runs, columns[1:], strict=False))
    return Comparison(tuple(frames), columns[0], columns[0 if accelerated is dense else -1], timed, left_out)


def remembered_or_compared(
    dense: PreTrainedModel,
    accelerated: PreTrainedModel,
    frames: Sequence[int],
    names: Sequence[str],
    folder: Path | None,
    setting: str,
) -> Comparison:
    """Give what :func:`compare` does, from the timings in the folder of the model if they are of the same products.

    Args:
        dense, accelerated, frames, names: As of :func:`compare`.
        folder: Of the model; None to measure anew.
        setting: All that timings depend on besides the model.
    """
    key = f"{setting}, the whole model"
    products = [f"{name} {module}" for name, module in accelerated.named_modules() if isinstance(module, SparseModule)]
    identity = blake2b(repr([*names, dense.config.to_json_string(), products]).encode(), digest_size=8).hexdigest()

    def read(entries: Any) -> Comparison | None:
        entry = entries.get(identity)
        return _read(entry, len(frames), names) if entry else None

    known = read_remembered(folder, key, read, "the whole model is timed again")
    if known is None:
        known = compare(dense, accelerated, frames, names)
        remember(folder, key, {identity: known})
    return known


def _read(entry: Any, frames: int, names: Sequence[str]) -> Comparison:
    """Give the comparison that a file holds.

    Raises:
        ValueError: It cannot have been measured.
    """
    seconds = {name: check_seconds(entry[name], frames) for name in ("dense", "accelerated")}
    alternatives = {name: check_seconds(values, frames) for name, values in entry["alternatives"].items()}
    found = Comparison(**entry | seconds | {"frames": tuple(entry["frames"]), "alternatives": alternatives})
    if sorted([*alternatives, *found.left_out]) != sorted(names):
        raise ValueError(f"timings of {', '.join([*alternatives, *found.left_out])} for {', '.join(names)}")
    return found
