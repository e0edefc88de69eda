"""Pruning from disk: the same bytes as in memory, one layer at a time, and nothing half done."""

import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCTC, PreTrainedModel

import sparsewav
from sparsewav import OBS, Calibration, Pruning, Unstructured
from sparsewav.errors import UserError
from sparsewav.pipeline import prune_folder as streaming
from sparsewav.pruning import estimate_traces, layerwise, prune_model
from sparsewav.pruning.encoder import encoder_layers
from sparsewav.pruning.hidden_states import scratch_folder
from sparsewav.pruning.solvers.solve import MatrixGroup

Batch = dict[str, Tensor]
Factory = Callable[..., Any]
MakeBatch = Callable[..., Batch]

LAYERS = 3


@pytest.fixture
def batches(noise_batch: MakeBatch) -> list[Batch]:
    """Two batches of padded noise with transcripts."""
    return [noise_batch([400, 304]), noise_batch([352], seed=1)]


@pytest.fixture
def source(tiny_model: Factory, tmp_path: Path) -> Path:
    """A checkpoint of a tiny WavLM, whose layers share a position embedding."""
    tiny_model("wavlm", num_hidden_layers=LAYERS).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize(
    ("family", "norm", "dtype", "shard_size"),
    [
        ("wav2vec2", "layer", torch.float32, "4KB"),
        ("wav2vec2", "group", torch.bfloat16, "50GB"),
        ("hubert", "layer", torch.float16, "50GB"),
        ("wavlm", "layer", torch.float32, "50GB"),
        ("wavlm", "group", torch.float16, "4KB"),
        ("data2vec-audio", "layer", torch.float32, "50GB"),
        ("wav2vec2-conformer", "layer", torch.float32, "50GB"),
        ("sew", "layer", torch.float32, "50GB"),
        ("sew-d", "layer", torch.float32, "50GB"),
        ("wav2vec2-bert", "", torch.float16, "50GB"),
        ("parakeet_ctc", "", torch.float32, "4KB"),
        ("lasr_ctc", "", torch.bfloat16, "50GB"),
        ("granite_speech5_ctc", "", torch.float32, "50GB"),
    ],
)
def test_the_bytes_are_those_of_pruning_in_memory(
    family: str,
    norm: str,
    dtype: torch.dtype,
    shard_size: str,
    tiny_model: Factory,
    batches: list[Batch],
    model_input: Callable[[PreTrainedModel, Batch], Batch],
    tmp_path: Path,
) -> None:
    """From one file or shards, in any dtype: what is on disk is what pruning layer by layer in memory gives."""
    source, destination = tmp_path / "source", tmp_path / "pruned"
    model = tiny_model(family, norm, num_hidden_layers=LAYERS)
    model.to(dtype).save_pretrained(source, max_shard_size=shard_size)
    assert (source / "model.safetensors").exists() == (shard_size == "50GB")
    calibration = Calibration(propagation="sequential", frames_per_column=1.0)
    options: dict[str, Any] = {"sparsity": 0.6, "solver": OBS(damping=0.02), "calibration": calibration, "seed": 2}
    model = AutoModelForCTC.from_pretrained(source, dtype=torch.float32).eval()
    batches = [model_input(model, batch) for batch in batches]
    expected = sparsewav.prune(model, batches, allocation="uniform", **options)
    report = sparsewav.prune_folder(source, destination, batches, **options)
    assert report.matrices == expected.matrices
    assert report.sparsity == expected.sparsity
    assert report.masks == {}

    pruned = AutoModelForCTC.from_pretrained(destination)
    assert pruned.dtype == dtype
    states = pruned.state_dict(), model.to(dtype).state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    files = sorted(path.name for path in destination.glob("*.safetensors"))
    assert files == [f"model-{number:05}-of-00004.safetensors" for number in range(1, 5)]
    # What is not pruned is there under the names and with the bytes that it had.
    before, after = (
        {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
        for folder in (source, destination)
    )
    assert before.keys() == after.keys()
    matrices = {f"{row.name}.weight" for row in report.matrices}
    assert all(torch.equal(before[name], after[name]) != (name in matrices) for name in before)


def test_a_run_is_taken_and_tensors_named_as_in_a_bare_encoder(
    source: Path, batches: list[Batch], tmp_path: Path
) -> None:
    """As everywhere else where a model is named."""
    sparsewav.prune_folder(source, tmp_path / "expected", batches, 0.6)
    tensors = load_file(source / "model.safetensors")
    save_file(
        {name.removeprefix("wavlm."): tensor for name, tensor in tensors.items()},
        source / "model.safetensors",
        {"format": "pt"},
    )
    source.rename(tmp_path / "model")  # of the run in the folder around it
    sparsewav.prune_folder(tmp_path, tmp_path / "pruned", batches, 0.6)
    states = [sparsewav.load(tmp_path / name).state_dict() for name in ("expected", "pruned")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_killed_pruning_goes_on_to_the_same_bytes(
    dtype: torch.dtype, tiny_model: Factory, batches: list[Batch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers that were done are run and not pruned again; other settings begin anew."""
    source = tmp_path / "source"
    tiny_model("wavlm", num_hidden_layers=LAYERS).to(dtype).save_pretrained(source)
    whole = sparsewav.prune_folder(source, tmp_path / "whole", batches, 0.6)
    solved: list[str] = []
    prune_groups = layerwise.prune_groups

    def until_killed(groups: list[MatrixGroup], settings: Pruning) -> Any:
        solved.extend(name for group in groups for name in group.names)
        if any(".layers.2." in name for name in solved):
            raise KeyboardInterrupt
        return prune_groups(groups, settings)

    def count(groups: list[MatrixGroup], settings: Pruning) -> Any:
        solved.extend(name for group in groups for name in group.names)
        return prune_groups(groups, settings)

    def kill() -> None:
        monkeypatch.setattr(layerwise, "prune_groups", until_killed)
        with pytest.raises(KeyboardInterrupt):
            sparsewav.prune_folder(source, tmp_path / "pruned", batches, 0.6)
        monkeypatch.setattr(layerwise, "prune_groups", count)
        solved.clear()

    kill()
    assert not (tmp_path / "pruned").exists()
    report = sparsewav.prune_folder(source, tmp_path / "pruned", batches, 0.6)
    assert solved
    assert all(".layers.2." in name for name in solved)
    assert (report.matrices, report.sparsity) == (whole.matrices, whole.sparsity)
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "pruned").iterdir()}
    shutil.rmtree(tmp_path / "pruned")
    kill()
    sparsewav.prune_folder(source, tmp_path / "pruned", batches, 0.7)
    assert any(".layers.0." in name for name in solved)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "whole", "pruned"}


def test_one_layer_is_in_memory_at_a_time(
    source: Path, batches: list[Batch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever anything runs, one layer alone has storage, and the position embedding that all of them read."""
    found: list[set[str]] = []
    loader = streaming._model_without_layers

    def real_parameters(model: PreTrainedModel) -> set[str]:
        named = encoder_layers(model).named_parameters()
        return {name for name, parameter in named if parameter.device.type != "meta"}

    def watched(*arguments: Any) -> PreTrainedModel:
        model = loader(*arguments)
        found.append(real_parameters(model))
        for module in encoder_layers(model).modules():
            module.register_forward_pre_hook(lambda *_: found.append(real_parameters(model)))
        return model

    monkeypatch.setattr(streaming, "_model_without_layers", watched)
    sparsewav.prune_folder(source, tmp_path / "pruned", batches, 0.6)
    embedding = "0.attention.rel_attn_embed.weight"
    assert found[0] == {embedding}
    held = [{name.partition(".")[0] for name in names - {embedding}} for names in found[1:]]
    assert all(len(layers) <= 1 for layers in held)  # none while the front end runs
    assert set.union(*held) == {"0", "1", "2"}
    assert all(embedding in names for names in found)


def test_traces_found_before_allocate(source: Path, batches: list[Batch], tmp_path: Path) -> None:
    """Given traces of the whole model the sparsities follow them; without, the allocation is refused."""
    model = AutoModelForCTC.from_pretrained(source).eval()
    traces = estimate_traces(model, batches)
    settings = Pruning(sparsity=Unstructured(0.6), calibration=Calibration(propagation="sequential"))
    expected = prune_model(model, batches, settings, traces=traces)
    report = sparsewav.prune_folder(source, tmp_path / "pruned", batches, 0.6, allocation="hutchinson", traces=traces)
    assert report.matrices == expected.matrices
    with pytest.raises(UserError, match=r"gradients of the whole model.*uniform.*traces"):
        sparsewav.prune_folder(source, tmp_path / "other", batches, 0.6, allocation="hutchinson")
    weighted = sparsewav.ALPS(output_weighting="fisher")
    with pytest.raises(UserError, match=r"output_weighting=fisher takes gradients of the whole model"):
        sparsewav.prune_folder(source, tmp_path / "other", batches, 0.6, allocation="uniform", solver=weighted)


def _truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _shard(folder: Path) -> Path:
    model = AutoModelForCTC.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="4KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"]["wavlm.encoder.layers.1.attention.q_proj.weight"]


def _drop_a_shard(folder: Path) -> None:
    shard = _shard(folder)
    shard.rename(shard.with_name("lost.safetensors"))


def _truncate_a_shard(folder: Path) -> None:
    shard = _shard(folder)
    shard.write_bytes(shard.read_bytes()[:-100])


def _lose_a_layer(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": LAYERS + 1}))


def _change_a_width(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 32}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), r"source has no model\.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), r"source cannot be loaded"),
        (_truncate, r"source.model\.safetensors is missing or broken"),
        (_drop_a_shard, r"source.model-\d+-of-\d+\.safetensors is missing or broken"),
        (_truncate_a_shard, r"source.model-\d+-of-\d+\.safetensors is missing or broken"),
        (_lose_a_layer, r"source has no tensor wavlm\.encoder\.layers\.3\."),
        (_change_a_width, r"another shape .* wavlm\.encoder\.layers\.0\.\S+ \(\(24,\) instead of \(32,\)\)"),
        (lambda folder: shutil.rmtree(folder), r"source is not a folder"),
    ],
)
def test_a_broken_checkpoint_is_refused_by_name(
    spoil: Callable[[Path], object], message: str, source: Path, batches: list[Batch], tmp_path: Path
) -> None:
    """One sentence names the file or tensor, and no folder is left behind."""
    spoil(source)
    with pytest.raises(UserError, match=message):
        sparsewav.prune_folder(source, tmp_path / "pruned", batches, 0.6)
    assert {path.name for path in tmp_path.iterdir()} <= {"source"}


def test_the_modes_of_the_caller_do_not_matter(source: Path, batches: list[Batch], tmp_path: Path) -> None:
    sparsewav.prune_folder(source, tmp_path / "expected", batches, 0.6)
    for number, mode in enumerate((torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16))):
        with mode:
            sparsewav.prune_folder(source, tmp_path / str(number), batches, 0.6)
        for file in (tmp_path / "expected").glob("*.safetensors"):
            assert (tmp_path / str(number) / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"device": "gpu"}, "device=gpu is not known"), ({"calibration": "sequential"}, "=sequential is no Calibration")],
)
def test_an_option_that_does_not_exist_is_refused(
    options: dict[str, Any], message: str, source: Path, batches: list[Batch], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        sparsewav.prune_folder(source, tmp_path / "pruned", batches, 0.6, **options)


def test_a_folder_with_files_is_not_replaced(source: Path, batches: list[Batch]) -> None:
    """Neither the source nor anything else that is there already."""
    with pytest.raises(UserError, match="is there already"):
        sparsewav.prune_folder(source, source, batches, 0.6)
    assert (source / "model.safetensors").is_file()


def _prune_until_killed(monkeypatch: pytest.MonkeyPatch, source: Path, destination: Path, batches: list[Batch]) -> None:
    """Prune a checkpoint until all layers are done and nothing else is."""

    def kill(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(streaming._Layers, "write_rest", kill)
        with pytest.raises(KeyboardInterrupt):
            sparsewav.prune_folder(source, destination, batches, 0.6)


def _flip_an_exponent(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[-1] ^= 0x40  # of the last weight, which stays finite
    path.write_bytes(contents)


@pytest.mark.parametrize("damage", [_flip_an_exponent, lambda path: path.write_bytes(path.read_bytes()[:-8])])
def test_a_damaged_layer_is_pruned_again(
    damage: Callable[[Path], object],
    source: Path,
    batches: list[Batch],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What a killed pruning left is checked; half a file that it was writing goes; the bytes are the same."""
    sparsewav.prune_folder(source, tmp_path / "whole", batches, 0.6)

    _prune_until_killed(monkeypatch, source, tmp_path / "pruned", batches)
    unfinished = tmp_path / ".pruned.unfinished"
    damage(unfinished / "layer-1.resume.safetensors")
    (unfinished / ".layer-2.resume.safetensors.1.part").write_bytes(b"half")
    report = sparsewav.prune_folder(source, tmp_path / "pruned", batches, 0.6)
    sentence = "layer-1.resume.safetensors, which an interrupted pruning left, was damaged; its layer is pruned again"
    assert report.warnings == [sentence]
    assert sentence in caplog.text
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "pruned").iterdir()}


def test_one_process_at_a_time_makes_a_destination(source: Path, batches: list[Batch], tmp_path: Path) -> None:
    """The others wait, and find it there; none leaves a lock behind."""
    outcomes: list[str] = []

    def prune() -> None:
        try:
            sparsewav.prune_folder(source, tmp_path / "pruned", batches, 0.6)
            outcomes.append("made")
        except UserError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=prune) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("made") == 1
    assert sum("pruned is there already; remove it" in outcome for outcome in outcomes) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"source", "pruned"}
    assert AutoModelForCTC.from_pretrained(tmp_path / "pruned").dtype == torch.float32


def test_hidden_states_of_killed_processes_are_deleted(
    source: Path, batches: list[Batch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a process that lives, and folders of which nothing says whose they are, stay."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    for name in ("sparsewav-dead", "sparsewav-other"):
        (scratch / name).mkdir()
        (scratch / name / "0-hidden_states.pt").write_bytes(b"large")
    (scratch / "sparsewav-dead" / "lock").touch()
    with scratch_folder() as living:
        sparsewav.prune_folder(source, tmp_path / "pruned", batches, 0.6)
        assert {path.name for path in scratch.iterdir()} == {"sparsewav-other", living.name}


def test_other_weights_in_the_same_file_begin_anew(
    source: Path, batches: list[Batch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a killed pruning left belongs to the content of the source, whatever its size and times are."""

    _prune_until_killed(monkeypatch, source, tmp_path / "pruned", batches)
    weights = source / "model.safetensors"
    times = weights.stat()
    tensors = load_file(weights)
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, weights, {"format": "pt"})
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    sparsewav.prune_folder(source, tmp_path / "pruned", batches, 0.6)
    sparsewav.prune_folder(source, tmp_path / "expected", batches, 0.6)
    files = {path.name: path.read_bytes() for path in (tmp_path / "expected").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "pruned").iterdir()}
