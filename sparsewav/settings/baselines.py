"""The options of the compression methods that the paper compares with.

The numbers are those of each method's paper, for a teacher of the size of wav2vec2-base, HuBERT-base and WavLM-base:
12 layers of width 768, 3072 feed-forward units and 12 heads. For another teacher the sizes change in proportion.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Self

from sparsewav.settings.options import Option, option
from sparsewav.settings.training import Optimization

OURS = "sparsewav"
"""The method that is not a baseline."""


@dataclass(kw_only=True)
class Method(Option):
    """One-shot pruning: this package's own method."""

    name: str = field(default=OURS, init=False)

    def scaled(self, update_divisor: float, lr_multiplier: float) -> Self:
        """Give the same method with fewer updates and higher learning rates than were published."""
        return self


@dataclass(kw_only=True)
class TrainedMethod(Optimization, Method):
    """A method that trains before the fine-tuning for recognition."""

    updates: int = option(200_000, "updates as published", least=1)

    def scaled(self, update_divisor: float, lr_multiplier: float) -> Self:
        warmup = self.warmup_steps if self.warmup_steps < 1 else divided(self.warmup_steps, update_divisor)
        return self.changed(
            updates=divided(self.updates, update_divisor),
            warmup_steps=warmup,
            learning_rate=self.learning_rate * lr_multiplier,
        )


def divided(updates: float, divisor: float) -> int:
    """Divide a number of updates, to one at least."""
    return max(1, math.ceil(updates / divisor - 1e-9))


@dataclass(kw_only=True)
class MagnitudePruning(Method):
    """One-shot global magnitude pruning; the fine-tuning holds its zeros."""

    name: str = field(default="magnitude", init=False)
    sparsity: float = option(0.75, "share of the transformer's weights to remove", least=0, most=1)


@dataclass(kw_only=True)
class PARP(TrainedMethod):
    """PARP (Lai et al. 2021): prune, let the removed weights learn, and prune again."""

    name: str = field(default="parp", init=False)
    presets: ClassVar[tuple[str, ...]] = ("parp_p",)
    updates: int = option(80_000)
    learning_rate: float = option(3e-5)
    betas: list[float] = option([0.9, 0.98])
    max_grad_norm: float = option(0.0)
    sparsity: float = option(0.75, "share of the transformer's weights to remove in the end", least=0, most=1)
    first_sparsity: float = option(
        0.75, "share that is removed at first; PARP-P's ramp starts here, PARP's is flat", least=0, most=1
    )
    reprunes: int = option(16, "how often it prunes again within its updates, the last time at their end", least=1)

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.first_sparsity > self.sparsity:
            yield (
                f"first_sparsity={self.first_sparsity:g} must not be above method.sparsity={self.sparsity:g}, "
                "where its ramp ends"
            )


@dataclass(kw_only=True)
class DistillationMethod(TrainedMethod):
    """A method whose student learns the teacher's hidden states."""

    batch_size: int = option(24)
    learning_rate: float = option(2e-4)
    betas: list[float] = option([0.9, 0.98])
    epsilon: float = option(1e-6)
    warmup_steps: float = option(0.07)
    weight_decay: float = option(1e-6)
    max_grad_norm: float = option(5.0)
    front_end_gradient: float = option(0.1, "share of the gradient that reaches the convolutions", least=0, most=1)


@dataclass(kw_only=True)
class DistilHuBERT(DistillationMethod):
    """DistilHuBERT (Chang et al. 2022): two layers that predict three of the teacher's."""

    name: str = field(default="distilhubert", init=False)
    layers: int = option(2, "layers of the student, for a teacher of 12", least=1, most=12)
    predicted: list[int] = option([4, 8, 12], "the teacher's layers that a head each predicts, of 12")
    cosine_weight: float = option(1.0, "λ of the loss", least=0)

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if not self.predicted or any(not 1 <= layer <= 12 for layer in self.predicted):
            yield f"predicted={self.predicted} must name layers from 1 to 12, e.g. [4, 8, 12]"


@dataclass(kw_only=True)
class ThinStudent(DistillationMethod):
    """A student as deep as its teacher, and thinner; sizes for a teacher of 768, 3072 and 12."""

    width: int = option(384, "width of the student's transformer", least=1)
    units: int = option(1536, "units of its feed-forward networks", least=1)
    heads: int = option(6, "heads of its attention", least=1)


@dataclass(kw_only=True)
class FitHuBERT(ThinStudent):
    """FitHuBERT (Lee et al. 2022): thin, with hints at every layer."""

    name: str = field(default="fithubert", init=False)
    updates: int = option(1_171_840)
    learning_rate: float = option(5e-4)
    warmup_steps: float = option(0.05)
    max_grad_norm: float = option(1.0)
    width: int = option(480)
    units: int = option(480)
    heads: int = option(12)
    hint_weight: float = option(0.1, "weight of the hints at all layers but the last, whose weight is 1", least=0)


@dataclass(kw_only=True)
class DeepVersusWide(ThinStudent):
    """12-Layer Half (Ashihara et al. 2022): half as wide as the teacher."""

    name: str = field(default="deep_vs_wide", init=False)
    cosine_weight: float = option(1.0, "λ of the loss", least=0)


GATED = ("channels", "heads", "head_dims", "units")
"""What can have gates."""

GATE_PATH = 30.0
"""Least product of updates and learning rate of gates and multipliers: Adam moves log α by about the rate at an update,
and what starts at a drop rate of 0.01 has to go from 4.6 to below -1.6 to close."""


@dataclass(kw_only=True)
class Gated(TrainedMethod):
    """A method that learns with hard-concrete gates what to cut out; the defaults are DPHuBERT's (Peng et al. 2023)."""

    name: str = field(default="dphubert", init=False)
    presets: ClassVar[tuple[str, ...]] = ("dpwavlm", "wang2023", "l0_finetune")
    updates: int = option(50_000, "updates with gates", least=1)
    batch_size: int = option(52)
    learning_rate: float = option(2e-4)
    warmup_steps: float = option(15_000)
    max_grad_norm: float = option(10.0)
    gated: list[str] = option(
        ["channels", "heads", "units"],
        "some of channels (of the convolutions), heads, head_dims (of queries and keys, and of values) and units",
    )
    drop_rate: float = option(0.01, "probability that a gate is closed at the start")
    unit_drop_rate: float = option(0.5, "the same for feed-forward units")
    straight_through: bool = option(False, "gates are hard while the gradient goes through the soft ones")
    teacher: bool = option(True, "learn the dense model's hidden states; false: transcripts, by the CTC loss")
    target: float = option(0.75, "share of the encoder's parameters to remove")
    ramp_updates: int = option(5000, "updates over which the target rises to that", least=0)
    gate_learning_rate: float = option(0.02, "learning rate of log α; higher when there are few updates", above=0)
    multiplier_learning_rate: float = option(
        0.02, "learning rate of the two Lagrange multipliers, which climb", above=0
    )
    final_updates: int = option(25_000, "updates after the cut", least=0)
    final_learning_rate: float = option(1e-4, "learning rate after the cut", above=0)
    final_warmup_steps: float = option(5000, "warm-up after the cut; below 1, a share of the updates", least=0)

    def scaled(self, update_divisor: float, lr_multiplier: float) -> Self:
        """Give the same method with fewer updates and higher learning rates of the weights.

        The rates of gates and multipliers have to do with neither width nor depth and stay, but where there are few
        updates they are raised, or the gates would stay where they start.
        """
        item = super().scaled(update_divisor, lr_multiplier)
        warmup = self.final_warmup_steps
        return item.changed(
            ramp_updates=divided(self.ramp_updates, update_divisor),
            gate_learning_rate=max(self.gate_learning_rate, GATE_PATH / item.updates),
            multiplier_learning_rate=max(self.multiplier_learning_rate, GATE_PATH / item.updates),
            final_updates=divided(self.final_updates, update_divisor) if self.final_updates else 0,
            final_warmup_steps=warmup if warmup < 1 else divided(warmup, update_divisor),
            final_learning_rate=self.final_learning_rate * lr_multiplier,
        )

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        for unit in self.gated:
            if unit not in GATED:
                yield f"gated={unit} does not exist; choose one of {', '.join(GATED)}"
        if not self.gated or {"heads", "head_dims"} <= set(self.gated):
            yield f"gated={self.gated} must name some of {', '.join(GATED)}, heads or head_dims and not both"
        for key in ("drop_rate", "unit_drop_rate", "target"):
            if not 0 < getattr(self, key) < 1:
                yield f"{key}={getattr(self, key):g} is not between 0 and 1"


THRESHOLD_PATH = 16.0
"""Least product of updates and learning rate of thresholds, as :data:`GATE_PATH` is that of other gates: to remove 85 %
of a matrix of normally distributed weights a threshold has to climb from about 0 to 1.4."""


@dataclass(kw_only=True)
class SelfPinching(TrainedMethod):
    """Self-pinching gates (Xu et al. 2025): every matrix learns the threshold below which its weights are zero."""

    name: str = field(default="self_pinching", init=False)
    updates: int = option(80_000)
    learning_rate: float = option(3e-5)
    betas: list[float] = option([0.9, 0.98])
    max_grad_norm: float = option(0.0)
    sparsity: float = option(0.75, "share of the transformer's weights to remove", least=0, most=1)
    ramp_updates: int = option(40_000, "updates over which the target rises to that", least=0)
    sparsity_weight: float = option(100.0, "ω of the squared gap between the gates' sparsity and the target", above=0)
    first_threshold: float = option(0.1, "thresholds at the start, in root mean squares of their matrix", above=0)
    temperature: float = option(0.3, "τ of the soft masks, in mean squares of the matrix", above=0)
    gate_learning_rate: float = option(
        0.001, "learning rate of the thresholds; higher when there are few updates", above=0
    )

    def scaled(self, update_divisor: float, lr_multiplier: float) -> Self:
        """Give the same method with fewer updates and higher learning rates of the weights, as :class:`Gated` does."""
        item = super().scaled(update_divisor, lr_multiplier)
        return item.changed(
            ramp_updates=divided(self.ramp_updates, update_divisor) if self.ramp_updates else 0,
            gate_learning_rate=max(self.gate_learning_rate, THRESHOLD_PATH / item.updates),
        )


METHODS = (Method, DistilHuBERT, FitHuBERT, DeepVersusWide, Gated, MagnitudePruning, PARP, SelfPinching)
