"""The options of what a pruned model learns from the dense one, layer by layer or as a whole."""

from dataclasses import dataclass, field
from typing import ClassVar

from sparsewav.settings.options import Option, option
from sparsewav.settings.training import Optimization


@dataclass(kw_only=True)
class OutputWeighting:
    """How much the errors of the outputs of a matrix, or of a layer, count."""

    output_weighting: str = option(
        "equal",
        "errors of the outputs count alike (equal), or as the model's output depends on them (fisher: with the "
        "covariance of its gradients, from one backward pass without labels; K-FAC, Martens and Grosse 2015)",
        choices=("equal", "fisher"),
    )
    output_damping: float = option(
        0.25, "share of its mean diagonal that is added to that covariance; the larger, the nearer to equal", above=0
    )

    @property
    def weights_outputs(self) -> bool:
        """Whether the covariance of the gradients at the outputs is needed."""
        return self.output_weighting == "fisher"


@dataclass(kw_only=True)
class Recovery(Option):
    """What is left of a pruned model learns from the dense model, without labels.

    Layer by layer, what is in front of the layers (``scope=encoder``) learns nothing; the first layer learns to make up
    for it.
    """


@dataclass(kw_only=True)
class NoRecovery(Recovery):
    """The paper's: a pruned layer stays as the solver left it."""

    name: str = field(default="none", init=False)


@dataclass(kw_only=True)
class Affine(Recovery):
    """The last bias, or layer norm, of every pruned layer is solved for the dense model's output of the layer."""

    name: str = field(default="affine", init=False)


@dataclass(kw_only=True)
class Reconstruction(OutputWeighting, Recovery):
    """Kept weights, biases and layer norms of every pruned layer learn the dense model's output of the layer."""

    name: str = field(default="reconstruction", init=False)
    steps: int = option(100, "steps of Adam for every layer, one calibration batch each", least=1)
    learning_rate: float = option(3e-3, "learning rate at the first step; it falls to zero", above=0)


@dataclass(kw_only=True)
class Global(OutputWeighting, Recovery, Optimization):
    """What is left of the whole model learns the dense model's posteriors and last hidden states, after the pruning.

    The loss is the divergence KL(dense || pruned) of the characters of a frame in nats, and the squared error of the
    last hidden states as a share of their squares; an encoder without a head has the second alone. It is averaged over
    the frames of a forward pass; the passes of an update count alike, however many frames each has. Transcripts are not
    read. The model of the moment with the least loss on the utterances that are held back is kept.
    """

    name: str = field(default="global", init=False)
    group: ClassVar[str] = "recovery"
    steps: int = option(
        0,
        "steps of recovery=reconstruction in every layer before, at its learning rate and with outputs weighted so; 0: "
        "none",
        least=0,
    )
    updates: int = option(300, "updates of the whole model at most", least=1)
    utterances: int = option(
        512,
        "of the calibration set, to learn from; all, if there are no more, and transcripts are not needed",
        least=2,
    )
    held_back: float = option(0.06, "share of these that are held back, to tell when to stop", above=0, below=1)
    patience: int = option(3, "stop after so many tenths of the updates without a lower loss on these", least=1)
    hidden_states: float = option(1.0, "weight of the last hidden states in the loss", least=0)
    processes: int = option(1, "processes on this machine, one for each GPU, that share every update", least=1)
    checkpoint_updates: int | None = option(
        None,
        "updates between two checkpoints, where the loss on what is held back is measured, too; null: a tenth of all, "
        "and 500 at most",
        least=1,
    )
    batch_size: int = option(8)
    learning_rate: float = option(5e-4)
    scheduler: str = option("cosine")


@dataclass(kw_only=True)
class Elsa(Global):
    """``global``, and in its first updates the mask moves: ADMM on the same loss (ELSA, Lee et al. 2026).

    As many weights are kept as the pruning has left, to one weight, but of all matrices together, so that their
    sparsities change. All weights learn while the mask moves, and a penalty draws them to those of which the others are
    zero. Only models with the last mask are kept, or the one that was pruned.
    """

    name: str = field(default="elsa", init=False)
    penalty: float = option(0.03, "λ of the augmented Lagrangian, which rises to it while the mask moves", above=0)
    interval: int = option(10, "updates from one projection, which moves the mask, to the next", least=1)
    moving: float = option(
        0.3, "share of the updates in which the mask moves; in the others it is held", above=0, below=1
    )

    def moving_updates(self, updates: int) -> int:
        """Give the number of updates in which the mask moves, at least one."""
        return max(1, round(self.moving * updates))
