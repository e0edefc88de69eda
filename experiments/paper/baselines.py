"""The sweeps of the methods that the paper compares with, and of heads and units removed whole, beside them."""

from collections.abc import Iterable
from dataclasses import dataclass

import pandas

from experiments.sweeps import Scale, Sweep, read
from sparsewav.baselines import METHODS

DEMO = ("training.epochs=0.08",)
"""Half of the demo's fine-tuning, for every method and for ours."""

SHORT = ("l0_finetune", "parp", "parp_p", "self_pinching")
"""Methods of which a run takes minutes at demo scale. They have three seeds there, as ours has. One-shot magnitude
pruning is deterministic and needs one."""

THREE_SEEDS = ('hydra.sweeper.params.seed="0,1,2"',)


@dataclass(frozen=True)
class Row:
    """A method as a row of Table 2.

    Attributes:
        method: Its name in the group ``method``.
        role: The role of the model that it starts from.
        differs: How it differs from the original recipe.
    """

    method: str
    role: str
    differs: str


ROWS = {
    "DistilHuBERT": Row("distilhubert", "base", "a recogniser is the teacher"),
    "FitHuBERT": Row(
        "fithubert",
        "base",
        "a recogniser is the teacher; the time reduction has the activation of the other convolutions; a tenth of the "
        "gradient reaches the front end, and gradients are clipped at 1 (the authors' code: all of it, none)",
    ),
    "12-Layer Half": Row("deep_vs_wide", "base", "a recogniser is the teacher"),
    "DPHuBERT": Row("dphubert", "base", "a recogniser is the teacher"),
    "DPWavLM": Row("dpwavlm", "wavlm", "a recogniser is the teacher"),
    "Wang et al.": Row("wang2023", "base", "a recogniser is the teacher"),
    "Peng et al., L0 fine-tuning": Row("l0_finetune", "base", "starts from a recogniser"),
    "Magnitude, one shot": Row("magnitude", "base", "starts from a recogniser"),
    "PARP": Row("parp", "base", "starts from a recogniser; masked tuning follows it"),
    "PARP-P": Row("parp_p", "base", "starts from a recogniser; masked tuning follows it"),
    "Self-pinching gates": Row(
        "self_pinching",
        "base",
        "starts from a recogniser; masked tuning follows it; what the paper's abstract and reviews do not say of loss "
        "and schedule is ours",
    ),
}
"""By the name of the paper's Table 2, or our own where the paper has no such row."""


def sweep_of(method: str, role: str) -> Sweep:
    """The runs of one method on one model."""
    demo = (*DEMO, *THREE_SEEDS) if method in SHORT else DEMO
    return Sweep("paper/baseline", role, demo=demo, both=(f"method={method}",))


def registered() -> dict[str, Row]:
    """The rows whose method is implemented."""
    return {name: row for name, row in ROWS.items() if row.method in METHODS}


SWEEPS = tuple(sweep_of(row.method, row.role) for row in registered().values())


STRUCTURED = "structured"
"""What the column ``method`` says of our runs that removed heads and units whole (:func:`read_methods`)."""
OURS = ("sparsewav", STRUCTURED)


def structured(share: float) -> Sweep:
    """The runs that leave this share of the encoder's parameters, with as many updates as our runs at 85 % get."""
    longer = 0.5 / (1 - 0.85)  # than at 50 %, as finetune_strategy.more_when_sparser has it
    return Sweep(
        "paper/structured",
        "base",
        demo=(f"training.epochs={0.08 * longer:.6f}",),
        paper=(f"training.epochs={40 * longer:.6f}",),
        both=(f"sparsity.parameters={share:g}",),
        seconds=60.0,
    )


def read_methods(sweeps: Iterable[Sweep], scale: Scale) -> pandas.DataFrame:
    """Read runs as :func:`~experiments.sweeps.read` does, and tell ours that removed heads and units from the others.

    Raises:
        UserError: As there.
    """
    runs = read(sweeps, scale)
    if "target_parameters" in runs:
        runs.loc[runs["target_parameters"].notna(), "method"] = STRUCTURED
    return runs


def cost(run: pandas.Series) -> str:
    """Updates and batch size of a run's compression and of its fine-tuning, as text."""
    compression, tuning = run["compression"], f"{run['updates']:,} x {run['batch_size']}"
    if not isinstance(compression, dict):
        return tuning
    own = f"{compression['updates']:,} x {compression['batch_size']} + " if compression["updates"] else ""
    return own + tuning


def note(runs: pandas.DataFrame) -> str:
    """Sentences on what the baselines' runs shortened, and on how they differ from their recipes."""
    factors = sorted({item["update_divisor"] for item in runs["compression"] if isinstance(item, dict)})
    shortened = " and ".join(f"{factor:g}" for factor in factors)
    rates = sorted({item["lr_multiplier"] for item in runs["compression"] if isinstance(item, dict)})
    quickened = " and ".join(f"{factor:g}" for factor in rates)
    different = "; ".join(f"{name}: {row.differs}" for name, row in registered().items())
    return (
        f"Published numbers of updates were divided by {shortened}, and learning rates multiplied by {quickened}, for "
        "all methods alike; batch sizes and other settings are the published ones (conf/method). What differs from the "
        f"original recipes: {different}."
    )
