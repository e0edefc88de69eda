"""The options of training: how fast and how long, and the strategies of fine-tuning (section 2.4 of the paper)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import ClassVar

from sparsewav.settings.options import Option, Settings, option

SCHEDULERS = (
    *("linear", "cosine", "cosine_with_restarts", "polynomial"),
    *("constant", "constant_with_warmup", "inverse_sqrt"),
)
"""The schedules of transformers that need no further settings."""

POLYNOMIAL_END = 1e-7
"""The learning rate at which transformers lets ``polynomial`` end."""


@dataclass
class Optimization(Settings):
    """How fast to train.

    Attributes:
        group: The group that the options are in, for messages.
    """

    group: ClassVar[str] = "method"
    batch_size: int = option(16, "utterances of an update, over all processes and accumulation steps", least=1)
    gradient_accumulation_steps: int = option(1, "forward and backward passes that an update is split into", least=1)
    learning_rate: float = option(5e-4, "peak of the schedule", above=0)
    betas: list[float] = option([0.9, 0.999], "decay rates of Adam's two moments")
    epsilon: float = option(1e-8, "ε of Adam", above=0)
    warmup_steps: float = option(0.1, "updates of linear warm-up; below 1, a share of all updates", least=0)
    scheduler: str = option("linear", "name of a schedule of transformers", choices=SCHEDULERS)
    weight_decay: float = option(0.0, "decoupled weight decay, as in AdamW; 0 makes it Adam", least=0)
    max_grad_norm: float = option(1.0, "largest norm of all gradients together; 0 leaves them as they are", least=0)
    precision: str = option(
        "auto",
        "auto (bfloat16 where the hardware multiplies it), float32, bfloat16 or float16",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    checkpoint_updates: int | None = option(
        None, "updates between two checkpoints; null: a tenth of all, and 500 at most", identifies=False, least=1
    )

    def faults(self) -> Iterator[str]:
        found = list(super().faults())
        yield from found
        betas = list(self.betas) if isinstance(self.betas, Sequence) else []
        wrong = len(betas) != 2 or any(not isinstance(beta, Real) or not 0 <= beta < 1 for beta in betas)
        if wrong and self.betas is not None:
            yield f"betas={self.betas} must be two numbers from 0 to below 1, e.g. [0.9, 0.999]"
        if found:
            return  # what follows compares the values
        if self.scheduler == "polynomial" and self.learning_rate <= POLYNOMIAL_END:
            yield (
                f"learning_rate={self.learning_rate:g} must be above {POLYNOMIAL_END:g}, at which scheduler=polynomial "
                "ends"
            )
        parts = max(self.gradient_accumulation_steps * getattr(self, "processes", 1), 1)
        if self.batch_size % parts:
            yield f"batch_size={self.batch_size} cannot be split into {parts} equal parts"


@dataclass
class Training(Optimization):
    """How long and how fast to train for recognition."""

    group: ClassVar[str] = "training"
    epochs: float = option(0.16, "passes over the training set, of fine-tuning at 50 % sparsity and below", above=0)
    processes: int = option(1, "processes of a run's fine-tuning on this machine, one for each GPU", least=1)
    freeze_feature_encoder: bool = option(True, "leave the convolutions as they are")
    seed: int = option(
        0,
        "of tuning and sparsewav-train: the sample of training utterances, their order, dropout, new weights; does not "
        "follow seed",
        least=0,
        below=2**32,
    )


@dataclass
class FinetuneStrategy(Option):
    """Whether and when a pruned model is tuned."""


@dataclass
class NoFinetuning(FinetuneStrategy):
    """The one-shot model as it is."""

    name: str = field(default="none", init=False)


@dataclass
class OnePass(FinetuneStrategy):
    """Prune to the target, then tune what is left; removed weights stay zero."""

    name: str = field(default="one_pass", init=False)
    more_when_sparser: bool = option(True, "epochs grow above 50 % sparsity as 1 / (1 - sparsity)")


@dataclass
class Progressive(OnePass):
    """Prune and tune in stages; every stage calibrates and ranks again, and its mask contains the one before."""

    name: str = field(default="progressive", init=False)
    stages: list[float] = option([0.7, 0.8, 0.9], "sparsities below the target at which to stop and tune, rising")
    same_updates: bool = option(True, "the stages share the updates of one_pass; false: each stage has its own")

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        stages = self.stages
        if any(not 0 < stage < 1 for stage in stages) or stages != sorted(set(stages)):
            yield f"stages={stages} must rise, each between 0 and 1; the paper's are [0.7, 0.8, 0.9]"


STRATEGIES = (NoFinetuning, OnePass, Progressive)
