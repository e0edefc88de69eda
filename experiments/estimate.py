"""How long a sweep is going to take: rough, for ``--dry-run``."""

from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiments.sweeps import CAST, Scale, Sweep, jobs
from sparsewav.config import Config, key_names
from sparsewav.finetune.strategies import plan_stages
from sparsewav.models import trained_model_folder

DEMO_SECONDS = {
    # role: (one-shot run, update, training of the model); measured on 2 cores of an AMD EPYC with AVX-512 bfloat16
    "base": (4.0, 0.36, 0.0),
    "large": (6.0, 0.55, 1210.0),
    "large_little": (6.0, 0.55, 330.0),
    "large_more": (6.0, 0.55, 770.0),
    "large_most": (6.0, 0.55, 1210.0),
    "wavlm": (5.0, 0.36, 100.0),
}
PAPER_SECONDS = {
    # Pruning as the paper gives it for one RTX 4090, with a minute for the evaluation; updates are a guess.
    "base": (140.0, 0.3, 0.0),
    "large": (330.0, 0.8, 0.0),
    "large_little": (330.0, 0.8, 0.0),
    "large_more": (330.0, 0.8, 0.0),
    "large_most": (330.0, 0.8, 0.0),
    "wavlm": (140.0, 0.35, 0.0),
}
TRAINING_UTTERANCES = {"demo": 20_000, "paper": 28_539}
"""Of the demo's train set, and of LibriSpeech's train-clean-100."""


@dataclass(frozen=True)
class Estimate:
    """Attributes: seconds: of the runs still to do. updates: of a run, least to most."""

    seconds: float
    updates: str


def estimate(sweep: Sweep, scale: Scale) -> Estimate:
    """Estimate the seconds that are left of a sweep, the training of its model included."""
    run, update, training = (DEMO_SECONDS if scale.name == "demo" else PAPER_SECONDS)[sweep.role]
    updates, seconds = [], 0.0
    for job in jobs(sweep, scale):
        config = typed(job.config)
        utterances = config.data.training_utterances or TRAINING_UTTERANCES[scale.name]
        updates.append(sum(stage.updates for stage in plan_stages(config, utterances)))
        if not job.done:
            seconds += run + update * updates[-1]
    model = CAST[scale.name][sweep.role]
    if seconds and training and not (trained_model_folder(model) / "training.json").is_file():
        seconds += training
    low, high = min(updates), max(updates)
    return Estimate(seconds, f"{low:,}" if low == high else f"{low:,} to {high:,}")


def typed(settings: DictConfig) -> Config:
    """The configuration of a job as the run gets it."""
    values: dict[str, Any] = {}
    for key in key_names():
        value = settings[key]
        values[key] = OmegaConf.to_object(value) if isinstance(value, DictConfig) else value
    return Config(**values)
