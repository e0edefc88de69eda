"""The configuration of training and of the compression methods, typed: a part of :mod:`sparsewav.settings.run`.

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
        gradient_accumulation_steps: forward and backward passes that the utterances of an update are split into.
        learning_rate: peak of the schedule.
        betas: of Adam.
        epsilon: of Adam.
        warmup_steps: updates of linear warm-up before the decay; below 1, a share of all updates.
        scheduler: name of a schedule of transformers, e.g. ``linear`` or ``cosine``.
        weight_decay: decoupled, as in AdamW; 0 makes it Adam.
        max_grad_norm: largest norm of all gradients together; 0 leaves them as they are.
        precision: ``float32``, or ``bfloat16`` or ``float16`` where autocast allows it; ``auto`` for bfloat16 where the
            processor or GPU multiplies it itself, float32 elsewhere.
        checkpoint_updates: updates between two checkpoints.
    """

    batch_size: int = MISSING
    gradient_accumulation_steps: int = MISSING
    learning_rate: float = MISSING
    betas: list[float] = MISSING
    epsilon: float = MISSING
    warmup_steps: float = MISSING
    scheduler: str = MISSING
    weight_decay: float = MISSING
    max_grad_norm: float = 1.0
    precision: str = MISSING
    checkpoint_updates: int = MISSING


@dataclass
class MethodConfig:
    """Attributes: name: ``sparsewav``, or a key of :data:`sparsewav.baselines.METHODS`."""

    name: str = MISSING

    def shortened(self, factor: float) -> Self:
        """The same with every published number of updates divided by a factor."""
        return self

    def quickened(self, factor: float) -> Self:
        """The same with every published learning rate times a factor."""
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
        warmup = self.warmup_steps if self.warmup_steps < 1 else divided(self.warmup_steps, factor)
        return replace(self, updates=divided(self.updates, factor), warmup_steps=warmup)

    def quickened(self, factor: float) -> Self:
        return replace(self, learning_rate=self.learning_rate * factor)

    def faults(self) -> Iterator[str]:
        yield from at_least(1, updates=self.updates, prefix="method.")
        yield from optimization_faults(self, "method.")


@dataclass
class MagnitudeConfig(MethodConfig):
    """One-shot global magnitude pruning; the fine-tuning holds its zeros.

    Attributes:
        sparsity: share of the transformer's weights that go.
    """

    sparsity: float = MISSING

    def faults(self) -> Iterator[str]:
        yield from share(sparsity=self.sparsity, prefix="method.")


@dataclass
class ParpConfig(TrainedMethod):
    """PARP (Lai et al. 2021).

    Attributes:
        sparsity: share of the transformer's weights that go in the end.
        first_sparsity: share that goes at first; PARP-P's ramp starts here, PARP's is flat (``sparsity``).
        reprunes: how often it prunes again within its updates, the last time at their end.
    """

    sparsity: float = MISSING
    first_sparsity: float = MISSING
    reprunes: int = MISSING

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        yield from share(sparsity=self.sparsity, first_sparsity=self.first_sparsity, prefix="method.")
        if self.first_sparsity > self.sparsity:
            yield (
                f"method.first_sparsity={self.first_sparsity:g} must not be above method.sparsity={self.sparsity:g}, "
                "where its ramp ends"
            )
        yield from at_least(1, reprunes=self.reprunes, prefix="method.")


@dataclass
class DistilHubertConfig(TrainedMethod):
    """DistilHuBERT (Chang et al. 2022).

    Attributes:
        layers: of the student, of a teacher 12 deep.
        predicted: the teacher's layers that a head each predicts, of 12.
        cosine_weight: λ of the loss.
        front_end_gradient: share of the gradient that reaches the convolutions.
    """

    layers: int = MISSING
    predicted: list[int] = MISSING
    cosine_weight: float = MISSING
    front_end_gradient: float = MISSING

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if not 1 <= self.layers <= 12:
            yield f"method.layers={self.layers} must be from 1 to 12, of a teacher 12 deep"
        if not self.predicted or any(not 1 <= layer <= 12 for layer in self.predicted):
            yield f"method.predicted={self.predicted} must name layers from 1 to 12, e.g. [4, 8, 12]"
        yield from at_least(0, cosine_weight=self.cosine_weight, prefix="method.")
        yield from share(front_end_gradient=self.front_end_gradient, prefix="method.")


@dataclass
class ThinStudent(TrainedMethod):
    """A student as deep as its teacher, and thinner; sizes for a teacher of 768, 3072 and 12.

    Attributes:
        width: of the transformer.
        units: of its feed-forward networks.
        heads: of its attention.
        front_end_gradient: share of the gradient that reaches the convolutions.
    """

    width: int = MISSING
    units: int = MISSING
    heads: int = MISSING
    front_end_gradient: float = MISSING

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        yield from at_least(1, width=self.width, units=self.units, heads=self.heads, prefix="method.")
        yield from share(front_end_gradient=self.front_end_gradient, prefix="method.")


@dataclass
class FitHubertMethod(ThinStudent):
    """FitHuBERT (Lee et al. 2022).

    Attributes:
        hint_weight: of the hints at all layers but the last, whose weight is 1.
    """

    hint_weight: float = MISSING

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        yield from at_least(0, hint_weight=self.hint_weight, prefix="method.")


@dataclass
class DeepVersusWideConfig(ThinStudent):
    """12-Layer Half (Ashihara et al. 2022).

    Attributes:
        cosine_weight: λ of the loss.
    """

    cosine_weight: float = MISSING

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        yield from at_least(0, cosine_weight=self.cosine_weight, prefix="method.")


def divided(updates: float, factor: float) -> int:
    """So many updates divided by a factor, at least one."""
    return max(1, math.ceil(updates / factor - 1e-9))


@dataclass
class GatedMethod(TrainedMethod):
    """A method that learns with hard-concrete gates what to cut out.

    Attributes:
        updates: with gates; ``learning_rate`` and ``warmup_steps`` are those of the weights meanwhile.
        gated: some of ``channels`` (of the convolutions), ``heads``, ``head_dims`` (of queries and keys, and of values,
            each by itself) and ``units`` (of the feed-forward networks).
        drop_rate: how probably a gate is closed at the start.
        unit_drop_rate: the same of feed-forward units.
        straight_through: gates are hard while the gradient goes through the soft ones.
        teacher: learn the dense model's hidden states; without it, learn from transcripts by the CTC loss.
        target: share of the encoder's parameters to remove.
        ramp_updates: over which the target rises to that.
        gate_learning_rate: of log α.
        multiplier_learning_rate: of the two multipliers, which climb.
        final_updates: after the cut.
        final_learning_rate: of the weights after the cut.
        final_warmup_steps: as ``warmup_steps``, after the cut.
    """

    gated: list[str] = MISSING
    drop_rate: float = MISSING
    unit_drop_rate: float = MISSING
    straight_through: bool = MISSING
    teacher: bool = MISSING
    target: float = MISSING
    ramp_updates: int = MISSING
    gate_learning_rate: float = MISSING
    multiplier_learning_rate: float = MISSING
    final_updates: int = MISSING
    final_learning_rate: float = MISSING
    final_warmup_steps: float = MISSING

    def shortened(self, factor: float) -> Self:
        """As the others' updates; gates that have few get a higher rate, or they would stay where they start."""
        item = super().shortened(factor)
        warmup = self.final_warmup_steps
        return replace(
            item,
            ramp_updates=divided(self.ramp_updates, factor),
            gate_learning_rate=max(self.gate_learning_rate, GATE_PATH / item.updates),
            multiplier_learning_rate=max(self.multiplier_learning_rate, GATE_PATH / item.updates),
            final_updates=divided(self.final_updates, factor) if self.final_updates else 0,
            final_warmup_steps=warmup if warmup < 1 else divided(warmup, factor),
        )

    def quickened(self, factor: float) -> Self:
        """The weights' rates; those of gates and multipliers have to do with neither width nor depth."""
        return replace(super().quickened(factor), final_learning_rate=self.final_learning_rate * factor)

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        for unit in self.gated:
            yield from one_of(GATED, gated=unit, prefix="method.")
        if not self.gated or {"heads", "head_dims"} <= set(self.gated):
            yield f"method.gated={self.gated} must name some of {', '.join(GATED)}, heads or head_dims and not both"
        for key in ("drop_rate", "unit_drop_rate", "target"):
            if not 0 < getattr(self, key) < 1:
                yield f"method.{key}={getattr(self, key):g} is not between 0 and 1"
        for key in ("gate_learning_rate", "multiplier_learning_rate", "final_learning_rate"):
            if getattr(self, key) <= 0:
                yield f"method.{key}={getattr(self, key):g} must be above 0"
        yield from at_least(
            0,
            ramp_updates=self.ramp_updates,
            final_updates=self.final_updates,
            final_warmup_steps=self.final_warmup_steps,
            prefix="method.",
        )


GATED = ("channels", "heads", "head_dims", "units")
"""What can have gates."""

GATE_PATH = 30.0
"""Least product of updates and rate, of gates and multipliers: Adam moves log α by about the rate at an update, and
what starts at a drop rate of 0.01 has to go from 4.6 to below -1.6 to close."""


METHOD_SCHEMAS: dict[str, type] = {
    "method/base_gated": GatedMethod,
    "method/base_sparsewav": MethodConfig,
    "method/base_magnitude": MagnitudeConfig,
    "method/base_parp": ParpConfig,
    "method/base_distilhubert": DistilHubertConfig,
    "method/base_fithubert": FitHubertMethod,
    "method/base_deep_vs_wide": DeepVersusWideConfig,
}
"""Where Hydra's configuration store gets the schema of each method."""


def optimization_faults(settings: OptimizationConfig, prefix: str, processes: int = 1) -> Iterator[str]:
    """A sentence for every value of a schedule that cannot be; the prefix ends with a dot."""
    from transformers import SchedulerType  # not at the top: --help does not wait for it

    counts = {
        key: getattr(settings, key) for key in ("batch_size", "gradient_accumulation_steps", "checkpoint_updates")
    }
    yield from at_least(1, **counts, processes=processes, prefix=prefix)
    yield from at_least(0, warmup_steps=settings.warmup_steps, prefix=prefix)
    yield from at_least(0, weight_decay=settings.weight_decay, max_grad_norm=settings.max_grad_norm, prefix=prefix)
    for key in ("learning_rate", "epsilon"):
        if getattr(settings, key) <= 0:
            yield f"{prefix}{key}={getattr(settings, key):g} must be above 0"
    if len(settings.betas) != 2 or any(not 0 <= beta < 1 for beta in settings.betas):
        yield f"{prefix}betas={settings.betas} must be two numbers from 0 to below 1, e.g. [0.9, 0.999]"
    parts = max(settings.gradient_accumulation_steps * processes, 1)
    if settings.batch_size % parts:
        yield f"{prefix}batch_size={settings.batch_size} cannot be split into {parts} equal parts"
    yield from one_of([item.value for item in SchedulerType], scheduler=settings.scheduler, prefix=prefix)
    yield from one_of(PRECISIONS, precision=settings.precision, prefix=prefix)


def one_of(choices: Iterable[str], prefix: str = "", **values: str) -> Iterator[str]:
    """A sentence for every value that is not a choice."""
    for key, value in values.items():
        if value not in choices:
            yield f"{prefix}{key}={value} does not exist; choose one of {', '.join(choices)}"


def share(prefix: str = "", **values: float) -> Iterator[str]:
    """A sentence for every value that is not a share."""
    for key, value in values.items():
        if not 0 <= value <= 1:
            yield f"{prefix}{key}={value:g} is not between 0 and 1"


def at_least(least: float, prefix: str = "", **values: float) -> Iterator[str]:
    """A sentence for every value that is too small."""
    for key, value in values.items():
        if value < least:
            yield f"{prefix}{key}={value:g} must be at least {least:g}"
