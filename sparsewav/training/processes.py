"""Training in one or several new processes on this machine, e.g. one for each GPU."""

import json
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing
from transformers import PreTrainedModel

from sparsewav.data.utterances import Utterance
from sparsewav.errors import UserError
from sparsewav.models.load import load_speech_model
from sparsewav.models.processor import Processor
from sparsewav.pruning.hessian import Progress
from sparsewav.settings.pruning import ENCODER
from sparsewav.settings.recovery import Global
from sparsewav.settings.training import Training
from sparsewav.training.masks import masks_of
from sparsewav.training.trainer import Log, train_ctc

Learn = Callable[..., Log]
"""Trains a pruned model in place, as :func:`~sparsewav.training.trainer.train_ctc` does."""


def train_masked_in_processes(
    model: PreTrainedModel,
    processor: Processor,
    training_set: Sequence[Utterance],
    settings: Training | Global,
    updates: int,
    folder: Path,
    *,
    learn: Learn = train_ctc,
    progress: Progress | None = None,
    write_log: Callable[[Log], None] | None = None,
) -> tuple[PreTrainedModel, Log]:
    """Train a pruned model in ``settings.processes`` processes that share every batch, while its zeros are kept.

    The arguments are those of :func:`~sparsewav.training.trainer.train_ctc`; ``learn`` is called in their place in
    every process, and ``write_log`` in the first of them, and both must be functions that pickle finds by their names.
    ``settings`` has the number of processes. For a model on a GPU, the processes take the first so many GPUs.

    Returns:
        The trained model, on the CPU, and the log.

    Raises:
        UserError: There are fewer GPUs than processes, a process failed, or what ``train_ctc`` raises.
    """
    on_gpu = model.device.type == "cuda"
    if on_gpu and settings.processes > torch.cuda.device_count():
        asked = f"{settings.group}.processes={settings.processes}"
        raise UserError(f"{asked} wants a GPU each, and there are {torch.cuda.device_count()}")
    model.save_pretrained(folder / "pruned")
    processor.save_pretrained(folder / "pruned")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = multiprocessing.get_context("spawn").Value("q", 0)
    arguments = (list(training_set), settings, updates, folder, learn, on_gpu, port, done, write_log)
    try:
        processes = multiprocessing.spawn(_train, arguments, nprocs=settings.processes, join=False)
        while not processes.join(timeout=1):
            if progress and done.value:
                progress(done.value, updates)
    except multiprocessing.ProcessRaisedException as error:
        kind, _, sentence = error.msg.strip().splitlines()[-1].partition(": ")
        known = kind == f"{UserError.__module__}.{UserError.__name__}"
        raise UserError(sentence if known else f"a training process failed: {kind}: {sentence}") from error
    except multiprocessing.ProcessExitedException as error:
        raise UserError(f"a training process ended with code {error.exit_code}; was memory short?") from error
    log = json.loads((folder / "log.json").read_text())
    return load_speech_model(str(folder / "trained")).model, log


def _train(
    rank: int,
    training_set: list[Utterance],
    settings: Training | Global,
    updates: int,
    folder: Path,
    learn: Learn,
    on_gpu: bool,
    port: int,
    done: Any,
    write_log: Callable[[Log], None] | None,
) -> None:
    """Train in one of the processes, of which the first says how many updates are done and writes the result."""
    if settings.processes > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(settings.processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    speech = load_speech_model(str(folder / "pruned"), device=f"cuda:{rank}" if on_gpu else "cpu")
    model: Any = speech.model

    def count(update: int, _: int) -> None:
        done.value = update

    log = learn(
        model,
        speech.processor,
        training_set,
        settings,
        updates,
        folder,
        masks=masks_of(model, ENCODER),
        progress=count if rank == 0 else None,
        write_log=write_log,
    )
    if rank == 0:
        model.to("cpu").save_pretrained(folder / "trained")
        speech.processor.save_pretrained(folder / "trained")
        (folder / "log.json").write_text(json.dumps(log))
    if settings.processes > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
