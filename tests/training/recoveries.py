"""What the tests of recoveries of the whole model share."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsewav.data.librispeech import read_librispeech_folder
from sparsewav.models.load import load_speech_model
from sparsewav.pruning.encoder import prunable_matrices
from sparsewav.settings import Global
from sparsewav.training.global_recovery import recover_on_utterances
from sparsewav.training.masks import masks_of
from sparsewav.training.trainer import Log

QUICK: dict[str, Any] = {
    "updates": 20,
    "batch_size": 4,
    "held_back": 0.25,
    "learning_rate": 3e-3,
    "precision": "float32",
}


class _Killed(BaseException):
    pass


def half_pruned(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model that lost half of its prunable weights by chance."""
    generator = torch.Generator().manual_seed(5)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for matrix in prunable_matrices(other):
            matrix.weight[torch.rand(matrix.weight.shape, generator=generator) < 0.5] = 0
    return other


def assert_a_killed_one_ends_the_same(
    settings: Global, stop_after: int, model_folder: Path, corpus: Path, folder: Path
) -> Log:
    """With the same bytes and log as one that was not killed, whose log is given."""
    utterances = read_librispeech_folder(corpus, "train")

    def recover(name: str, stop_after: int | None = None) -> tuple[dict[str, Tensor], Log]:
        def count(done: int, _: int) -> None:
            if done == stop_after:
                raise _Killed

        speech = load_speech_model(str(model_folder))
        pruned = half_pruned(speech.model)
        log = recover_on_utterances(
            *(copy.deepcopy(speech.model), False, 0, pruned, speech.processor, utterances, settings),
            *(settings.updates, folder / name),
            masks=masks_of(pruned),
            progress=count,
        )
        return pruned.state_dict(), log

    whole, log = recover("whole")
    with pytest.raises(_Killed):
        recover("killed", stop_after)
    resumed, again = recover("killed")
    keep = ("update", "loss", "eval_loss")
    assert [{key: entry.get(key) for key in keep} for entry in again] == [
        {key: entry.get(key) for key in keep} for entry in log
    ]
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    return log
