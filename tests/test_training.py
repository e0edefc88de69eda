"""Training a dense model from the terminal."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pandas
import torch
from safetensors.torch import load_file

from sparsewav.models import load_speech_model

ARCHITECTURE = (
    "architecture.hidden_size=16",
    "architecture.num_hidden_layers=2",
    "architecture.num_attention_heads=2",
    "architecture.intermediate_size=24",
    "architecture.conv_dim=[8,8,8,8,8]",
    "architecture.num_conv_pos_embeddings=4",
    "architecture.num_conv_pos_embedding_groups=2",
)


def test_training_learns_resumes_and_leaves_a_model_that_can_be_pruned(
    run_sparsewav: Callable[..., subprocess.CompletedProcess[str]], corpus: Path, tmp_path: Path
) -> None:
    data = ["data=librispeech_dir", f"data.root={corpus}", "data.training_subset=train"]
    subsets = ["data.development_subset=test", "data.evaluation_subset=test", "data.calibration_subset=train"]
    training = ["training.epochs=12", "training.batch_size=4", "training.warmup_steps=2", "training.bf16=false"]
    arguments = [*data, *subsets, *training, *ARCHITECTURE, "device=cpu"]
    result = run_sparsewav(*arguments, "output=model", command="sparsewav-train")
    assert result.returncode == 0, result.stdout + result.stderr
    folder = tmp_path / "model"
    log = pandas.read_csv(folder / "training_log.csv")
    assert log["eval_wer"].notna().sum() == 12
    record = json.loads((folder / "training.json").read_text())
    assert record["settings"]["epochs"] == 12
    assert record["n_utterances"] == {"training": 12, "development": 6, "evaluation": 6}
    assert not (folder / "checkpoints").exists()
    assert all(tensor.dtype == torch.float16 for tensor in load_file(folder / "model.safetensors").values())
    assert load_speech_model(str(folder)).model.dtype == torch.float32

    again = run_sparsewav(*arguments, "output=model", command="sparsewav-train")
    assert "Done already" in again.stdout

    same = run_sparsewav(*arguments, "output=same", command="sparsewav-train")
    assert same.returncode == 0
    assert (tmp_path / "same" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()

    pruned = run_sparsewav(*data[:2], *subsets, "model.name_or_path=./model", "calibration.utterances=12", "device=cpu")
    assert pruned.returncode == 0, pruned.stdout + pruned.stderr
