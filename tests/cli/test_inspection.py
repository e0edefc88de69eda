"""A run's export, and what ``sparsewav-inspect`` says of a model."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch

import sparsewav
from sparsewav.cli.inspection import draw_heat_map, heat_map, matrix_sparsities
from sparsewav.models.load import locate_model
from sparsewav.models.structured import StructuredWavLMConfig, StructuredWavLMForCTC
from sparsewav.pruning.encoder import prunable_matrices
from sparsewav.pruning.families import FAMILIES

Run = Callable[..., Any]


@pytest.fixture
def arguments(small: list[str]) -> list[str]:
    return [*small, "allocation=uniform"]


def _run_folder(root: Path) -> Path:
    (metrics,) = (root / "outputs").glob("*/metrics.json")
    return metrics.parent


def test_run_exports_and_inspect_checks(
    run_sparsewav: Run, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished run is exported when asked to; what it reports is what inspect counts, until it reports otherwise."""
    plain = run_sparsewav(*arguments)
    assert plain.returncode == 0, plain.stdout
    folder = _run_folder(tmp_path)
    assert not (folder / "model-bitmask").exists()
    again = run_sparsewav(*arguments, "export.format=bitmask")
    assert "Done already" in again.stdout
    model, exported = sparsewav.load(folder / "model"), sparsewav.load(folder / "model-bitmask")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, exported.state_dict()[name]), name
    assert "bitmask format" in (folder / "model-bitmask" / "README.md").read_text()
    assert not (folder / "model-bitmask" / "step.json").exists()

    shown = run_sparsewav(str(folder), command="sparsewav-inspect")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "zeros and sizes are those that the run reported" in shown.stdout
    assert (folder / "sparsity.png").stat().st_size > 1000
    nonzero = sum(int(parameter.count_nonzero()) for parameter in model.parameters())
    assert f"{nonzero:,}" in shown.stdout
    also = run_sparsewav(str(folder / "model-bitmask"), command="sparsewav-inspect")
    assert also.returncode == 0, also.stdout + also.stderr

    monkeypatch.chdir(tmp_path)
    relative = folder.relative_to(tmp_path)  # as a user types it: no dot in front, one slash in it
    assert locate_model(str(relative)) == str(relative / "model")

    layers = pandas.read_csv(folder / "layers.csv")
    layers.loc[3, "sparsity"] = 0.5
    layers.to_csv(folder / "layers.csv", index=False)
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps(metrics | {"params_nonzero": 1}))
    wrong = run_sparsewav(str(folder), command="sparsewav-inspect")
    assert wrong.returncode == 1
    assert f"weights of {layers.loc[3, 'name']} are zero" in wrong.stdout
    assert "says 1 parameters are not zero" in wrong.stdout


def test_heat_map_has_the_order_of_the_layer_and_the_range_of_the_data(
    tiny_model: Callable[..., Any],
) -> None:
    """Columns from q to the output, labels centred below them, colours over the sparsities that there are."""
    matrices = matrix_sparsities(tiny_model("wav2vec2", "group"))
    matrices["zeros"] = (matrices["rows"] * matrices["cols"] * (0.7 + 0.01 * (matrices.index % 7))).astype(int)
    shares = 100 * matrices["zeros"] / (matrices["rows"] * matrices["cols"])
    axes, bar = draw_heat_map(matrices).axes
    names = ["q", "k", "v", "out", "intermediate", "output"]
    assert [label.get_text() for label in axes.get_xticklabels()] == names
    assert [column.header for column in heat_map(matrices).columns] == ["layer", *names]
    assert axes.get_xticks().tolist() == list(range(6))
    assert {label.get_ha() for label in axes.get_xticklabels()} == {"center"}
    assert axes.images[0].get_clim() == pytest.approx((shares.min(), shares.max()))
    assert bar.get_ylabel() == f"Sparsity, % (here {shares.min():.1f} to {shares.max():.1f})"
    value = shares[(matrices["layer"] == 0) & (matrices["role"] == "attention.k_proj")].iloc[0]
    assert axes.images[0].get_array()[0, 1] == pytest.approx(value)


def test_heat_map_tells_the_two_feed_forward_modules_of_a_conformer_apart(tiny_model: Callable[..., Any]) -> None:
    matrices = matrix_sparsities(tiny_model("wav2vec2-conformer", "layer"))
    assert not matrices.duplicated(["layer", "role"]).any()
    labels = [label.get_text() for label in draw_heat_map(matrices).axes[0].get_xticklabels()]
    attention, convolution = ["q", "k", "v", "pos", "out"], ["pointwise_conv1", "pointwise_conv2"]
    feed_forward = [[f"{module}\nintermediate", f"{module}\noutput"] for module in ("ffn1", "ffn2")]
    assert labels == [*feed_forward[0], *attention, *convolution, *feed_forward[1]]


def test_bits_are_those_of_the_grid_and_of_the_file(
    tiny_model: Callable[..., Any], run_sparsewav: Run, tmp_path: Path
) -> None:
    """Of every matrix and of all; the model's file has the size that is named for the format it has."""
    model = tiny_model("wav2vec2", "group", hidden_size=48, intermediate_size=96)
    for number, matrix in enumerate(prunable_matrices(model)):
        if number % 2:
            top = torch.randint(-7, 8, matrix.weight.shape, generator=torch.Generator().manual_seed(number))
            matrix.weight.data = 2.0**-8 * top
    matrices = matrix_sparsities(model)
    assert matrices["bits"].tolist() == [32, 4] * (len(matrices) // 2)
    weights = matrices["rows"] * matrices["cols"]
    stored = 8 * matrices["bytes"] / weights
    assert (stored[::2] == 32).all()
    assert stored[1::2].between(3.9, 4.3).all()
    model.save_pretrained(tmp_path / "dense")
    assert run_sparsewav("dense", "small", command="sparsewav-export").returncode == 0
    shown = run_sparsewav("small", command="sparsewav-inspect", COLUMNS="80")
    assert shown.returncode == 0, shown.stderr
    assert f"4 {stored[1]:.2f}" in shown.stdout
    mean = (matrices["bits"] * weights).sum() / weights.sum()
    assert f"{mean:.2f} of a number, {(stored * weights).sum() / weights.sum():.2f} of the bitmask file" in shown.stdout
    size = (tmp_path / "small" / "model.bitmask.safetensors").stat().st_size
    assert shown.stdout.count(f"{size / 1e6:,.2f} MB") == 2, "on disk and as bitmask"
    assert max(map(len, shown.stdout.splitlines())) <= 80


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_of_a_layer_have_names_of_their_own(family: str, tiny_model: Callable[..., Any]) -> None:
    matrices = matrix_sparsities(tiny_model(family))
    names = [str(column.header) for column in heat_map(matrices).columns]
    assert len(set(names)) == len(names) == 1 + matrices["role"].nunique()


def test_export_without_the_plain_model(run_sparsewav: Run, arguments: list[str], tmp_path: Path) -> None:
    """With save_model=false the export alone is left, and the run prunes again from it."""
    words = (*arguments, "save_model=false", "export.format=bitmask", "export.dtype=float16")
    assert run_sparsewav(*words).returncode == 0
    folder = _run_folder(tmp_path)
    assert not (folder / "model").exists()
    assert sparsewav.load(folder / "model-bitmask-float16").dtype == torch.float16
    assert "Done already" in run_sparsewav(*words).stdout
    further = [f"model.name_or_path={folder / 'model-bitmask-float16'}", *arguments[1:], "sparsity.target=0.9"]
    assert run_sparsewav(*further).returncode == 0


def test_inspect_takes_a_model_whose_layers_were_cut_to_nothing(
    run_sparsewav: Run, tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    """As the methods with gates may leave it."""
    dense = tiny_model("wavlm", "group")
    nothing = [{"heads": [], "query_dims": [], "value_dims": [], "units": 0}] * 2
    config = StructuredWavLMConfig(**dense.config.to_dict() | {"layers": nothing})
    StructuredWavLMForCTC(config).save_pretrained(tmp_path / "model")
    result = run_sparsewav("model", command="sparsewav-inspect")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "no matrices of the transformer are left" in result.stdout


def test_inspect_refuses(run_sparsewav: Run, model_folder: Path, tmp_path: Path) -> None:
    """In a sentence that begins with what was typed."""
    (tmp_path / "empty").mkdir()
    exported = tmp_path / "exported"
    exported.mkdir()
    shutil.copyfile(model_folder / "config.json", exported / "config.json")
    (exported / "model.onnx").touch()
    for name, complaint in (
        ("empty", "cannot be loaded: .*empty is no model's folder"),
        ("missing/some/model", "is not a folder; check the path"),
        (f"{model_folder}/model.safetensors", "is a file; give the folder"),
        ("exported", r"was exported \(model.onnx\), and only sparsewav-transcribe"),
        ("exported/model.onnx", r"was exported \(model.onnx\), and only sparsewav-transcribe"),
    ):
        done = run_sparsewav(name, command="sparsewav-inspect")
        assert done.returncode == 1
        assert re.fullmatch(f"error: {re.escape(name)} {complaint}.*\n", done.stderr), done.stderr
