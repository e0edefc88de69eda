"""A rough estimate of how long a sweep takes, for ``--dry-run``."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiments.sweeps import MODELS, Scale, Sweep, jobs
from sparsewav.settings.baselines import TrainedMethod
from sparsewav.settings.run import Config
from sparsewav.training.recipes import lineage, trained_model_folder
from sparsewav.training.schedule import plan_stages

SECONDS = {
    # (one-shot run, update); measured on 2 cores of an AMD EPYC, in float32
    ("demo", "base"): (4.0, 0.36),
    ("demo", "large"): (6.0, 0.55),
    ("demo", "wavlm"): (5.0, 0.36),
    ("demo", "hubert"): (4.0, 0.36),
    # Pruning as the paper gives it for one RTX 4090, with a minute for the evaluation; updates are a guess.
    ("paper", "base"): (140.0, 0.3),
    ("paper", "large"): (330.0, 0.8),
    ("paper", "wavlm"): (140.0, 0.35),
    ("paper", "hubert"): (140.0, 0.3),
}
TRAINING_SECONDS = {
    "demo-large-10m": 330.0,
    "demo-large-100h": 440.0,
    "demo-large-960h": 440.0,
    "demo-wavlm": 100.0,
    "demo-hubert": 50.0,
}
"""Seconds to train each of the demo's models that are trained on first use, on the same 2 cores."""
TRAINING_UTTERANCES = {"demo": 20_000, "paper": 28_539}
"""Size of the demo's train set and of LibriSpeech's train-clean-100."""


@dataclass(frozen=True)
class Estimate:
    """What a sweep costs.

    Attributes:
        seconds: Duration of the runs that are still to do.
        updates: The fewest and the most updates of a run.
    """

    seconds: float
    updates: str


def estimate(sweep: Sweep, scale: Scale) -> Estimate:
    """Estimate the seconds that are left of a sweep."""
    run, update = SECONDS[scale.name, sweep.role.partition("_")[0]]
    # Beyond the paper's method, the evaluation is a small part of a run.
    run *= (sweep.seconds or SECONDS["demo", "base"][0]) / SECONDS["demo", "base"][0]
    updates, seconds = [], 0.0
    for job in jobs(sweep, scale):
        config = typed(job.config)
        utterances = config.data.training_utterances or TRAINING_UTTERANCES[scale.name]
        updates.append(sum(stage.updates for stage in plan_stages(config, utterances)))
        method = config.method.scaled(config.update_divisor, 1)
        compressing = method.updates * method.batch_size / 16 if isinstance(method, TrainedMethod) else 0.0
        if not job.done:
            seconds += run + update * (updates[-1] + compressing)
    low, high = min(updates), max(updates)
    return Estimate(seconds, f"{low:,}" if low == high else f"{low:,} to {high:,}")


def training_seconds(sweeps: Iterable[Sweep], scale: Scale) -> float:
    """Estimate the seconds that it takes to train the models which sweeps want and which are not in the cache yet."""
    wanted = {MODELS[scale.name][sweep.role] for sweep in sweeps if not all(job.done for job in jobs(sweep, scale))}
    models = {name for model in wanted & TRAINING_SECONDS.keys() for name in lineage(model)}
    missing = [model for model in models if not (trained_model_folder(model) / "training.json").is_file()]
    return sum(TRAINING_SECONDS[model] for model in missing)


def typed(settings: DictConfig) -> Config:
    """The configuration of a job as the run gets it."""
    values: dict[str, Any] = {}
    for key in (item.name for item in fields(Config)):
        value = settings[key]
        values[key] = OmegaConf.to_object(value) if isinstance(value, DictConfig) else value
    return Config(**values)
