"""The configuration of training and of the compression methods, typed: a part of :mod:`sparsewav.config`.

A method's numbers are its paper's, for a teacher of the size of wav2vec2-base, HuBERT-base and WavLM-base: 12 layers of
width 768, 3072 units in between and 12 heads. For another teacher the sizes grow or shrink in proportion.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

MISSING: Any = "???"
"""A value that the user has to give."""

PRECISIONS = ("auto", "float32", "bfloat16", "float16")

OURS = "sparsewav"
"""The method that is not a baseline."""


@dataclass
class OptimizationConfig:
    """How fast to train.

    Attributes:
        batch_size: utterances of an update, over all processes and accumulation steps.
        accumulation: forward and backward passes that the utterances of an update are split into.
        learning_rate: peak of the schedule.
        betas: of Adam.
        epsilon: of Adam.
        warmup_steps: updates of linear warm-up before the decay; below 1, a share of all updates.
        scheduler: name of a schedule of transformers, e.g. ``linear`` or ``cosine``.
        weight_decay: decoupled, as in AdamW; 0 makes it Adam.
        clip: largest norm of all gradients together; 0 leaves them as they are.
        precision: ``float32``, or ``bfloat16`` or ``float16`` where autocast allows it; ``auto`` for bfloat16 where the
            processor or GPU multiplies it itself, float32 elsewhere.
        checkpoint_updates: updates between two checkpoints.
    """

    batch_size: int = MISSING
    accumulation: int = MISSING
    learning_rate: float = MISSING
    betas: list[float] = MISSING
    epsilon: float = MISSING
    warmup_steps: float = MISSING
    scheduler: str = MISSING
    weight_decay: float = MISSING
    clip: float = 1.0
    precision: str = MISSING
    checkpoint_updates: int = MISSING


@dataclass
class MethodConfig:
    """Attributes: name: ``sparsewav``, or a key of :data:`sparsewav.baselines.METHODS`."""

    name: str = MISSING

    def shortened(self, factor: float) -> Self:
        """The same with every published number of updates divided by a factor."""
        return self

    def faults(self) -> Iterator[str]:
        """A sentence for every value that cannot be."""
        yield from ()


@dataclass
class TrainedMethod(OptimizationConfig, MethodConfig):
    """A method that trains before the fine-tuning for recognition.

    Attributes:
        updates: as published.
    """

    updates: int = MISSING

    def shortened(self, factor: float) -> Self:
        warmup = self.warmup_steps if self.warmup_steps < 1 else shorten(self.warmup_steps, factor)
        return replace(self, updates=shorten(self.updates, factor), warmup_steps=warmup)

    def faults(self) -> Iterator[str]:
        yield from at_least(1, updates=self.updates, prefix="method.")
        yield from optimization_faults(self, "method.")


def shorten(updates: float, factor: float) -> int:
    """So many updates divided by a factor, at least one."""
    return max(1, math.ceil(updates / factor - 1e-9))


METHOD_SCHEMAS: dict[str, type] = {
    "method/base_sparsewav": MethodConfig,
}
"""Where Hydra's configuration store gets the schema of each method."""


def optimization_faults(settings: OptimizationConfig, prefix: str, processes: int = 1) -> Iterator[str]:
    """A sentence for every value of a schedule that cannot be; the prefix ends with a dot."""
    from transformers import SchedulerType  # not at the top: --help does not wait for it

    counts = {key: getattr(settings, key) for key in ("batch_size", "accumulation", "checkpoint_updates")}
    yield from at_least(1, **counts, processes=processes, prefix=prefix)
    yield from at_least(0, warmup_steps=settings.warmup_steps, prefix=prefix)
    yield from at_least(0, weight_decay=settings.weight_decay, clip=settings.clip, prefix=prefix)
    for key in ("learning_rate", "epsilon"):
        if getattr(settings, key) <= 0:
            yield f"{prefix}{key}={getattr(settings, key):g} must be above 0"
    if len(settings.betas) != 2 or any(not 0 <= beta < 1 for beta in settings.betas):
        yield f"{prefix}betas={settings.betas} must be two numbers from 0 to below 1, e.g. [0.9, 0.999]"
    parts = max(settings.accumulation * processes, 1)
    if settings.batch_size % parts:
        yield f"{prefix}batch_size={settings.batch_size} cannot be split into {parts} equal parts"
    yield from one_of([item.value for item in SchedulerType], scheduler=settings.scheduler, prefix=prefix)
    yield from one_of(PRECISIONS, precision=settings.precision, prefix=prefix)


def one_of(choices: Iterable[str], prefix: str = "", **values: str) -> Iterator[str]:
    """A sentence for every value that is not a choice."""
    for key, value in values.items():
        if value not in choices:
            yield f"{prefix}{key}={value} does not exist; choose one of {', '.join(choices)}"


def at_least(least: float, prefix: str = "", **values: float) -> Iterator[str]:
    """A sentence for every value that is too small."""
    for key, value in values.items():
        if value < least:
            yield f"{prefix}{key}={value:g} must be at least {least:g}"
