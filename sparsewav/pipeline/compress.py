"""A baseline's part of a run: compress, and say what was done."""

import time
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from sparsewav.baselines import METHODS
from sparsewav.data.utterances import Utterance
from sparsewav.errors import UserError
from sparsewav.files import writing
from sparsewav.models.load import SpeechModel
from sparsewav.pipeline import run_folder
from sparsewav.pipeline.resume import State
from sparsewav.progress import print_warning, stage
from sparsewav.pruning import distributed
from sparsewav.pruning.encoder import prunable_matrices
from sparsewav.settings.run import Config


def check(config: Config) -> None:
    """Refuse at once what a baseline cannot do.

    Raises:
        UserError: The method is not known, or several processes were started.
    """
    if config.method.name not in METHODS:
        raise UserError(f"method.name={config.method.name} does not exist; choose one of {', '.join(METHODS)}")
    if distributed.world() > 1:
        raise UserError(f"method={config.method.name} trains in one process; start it without torchrun")


def compress(
    config: Config,
    speech: SpeechModel,
    training: list[Utterance],
    state: State,
    checkpoints: Path,
    console: Console,
) -> None:
    """Put the smaller model in the place of the dense one, and note what was done."""
    settings = config.method.scaled(config.update_divisor, config.lr_multiplier)
    prunable = sum(matrix.size for matrix in prunable_matrices(speech.model))
    total, _ = run_folder.count_parameters(speech.model)
    with writing(checkpoints), stage(console, f"Compressing with {config.method.name}") as progress:
        started = time.perf_counter()
        speech.model, report = METHODS[config.method.name](
            speech.model, speech.processor, training, settings, checkpoints, seed=config.seed, progress=progress
        )
        seconds = time.perf_counter() - started
    for warning in report.warnings:
        print_warning(warning)
    speech.model.eval()
    left = sum(int(matrix.weight.count_nonzero()) for matrix in prunable_matrices(speech.model))
    nonzero = run_folder.count_parameters(speech.model)[1]
    state.seconds["compress"] = seconds
    state.warnings += report.warnings
    state.compression = asdict(report) | {"params_dense": total, "share_left": nonzero / total}
    state.stages.append({"sparsity": config.sparsity.fraction, "achieved_sparsity": 1 - left / prunable, "updates": 0})
