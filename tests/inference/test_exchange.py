"""Models for other runtimes: the same numbers at any length and batch size, scored, and refused where they differ."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import PreTrainedModel, Wav2Vec2FeatureExtractor

import sparsewav
from sparsewav.data.batches import SpeechBatches
from sparsewav.data.sets import Sets
from sparsewav.errors import UserError
from sparsewav.inference import exchange
from sparsewav.inference.agreement import TRACED, zeros_kept
from sparsewav.inference.exchange import write_exchange
from sparsewav.inference.runtime import exported_model, load_exported, of_extra
from sparsewav.inference.transcription import transcribe_recording
from sparsewav.inference.wer import transcribe
from sparsewav.models.load import SpeechModel, load_speech_model
from sparsewav.models.processor import Parts
from sparsewav.pruning.encoder import input_key, output_counts, prunable_matrices, takes_padding
from sparsewav.settings.data import DemoData
from tests.conftest import CONFIGS

Factory = Callable[..., PreTrainedModel]
Batch = dict[str, torch.Tensor]
Run = Callable[..., Any]

UNSUPPORTED = "granite_speech5_ctc"
openvino = of_extra("openvino", "openvino")


def _speech(model: PreTrainedModel) -> SpeechModel:
    return SpeechModel("tiny", model, Parts(Wav2Vec2FeatureExtractor()))


def _prune(model: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for matrix in prunable_matrices(model):
            matrix.parameter.mul_(torch.rand(matrix.parameter.shape, generator=generator) > 0.6)


def _outputs(path: Path, feed: dict[str, np.ndarray]) -> np.ndarray:
    """Run a file with the runtime alone."""
    if path.suffix == ".onnx":
        return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feed)[0]
    return openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(feed)[0]


@pytest.mark.parametrize(
    ("family", "norm", "format"),
    [
        *((family, "layer", "onnx") for family in CONFIGS if family != UNSUPPORTED),
        *((family, "group", "onnx") for family in ("wav2vec2", "wavlm")),
        *((family, "group", "openvino") for family in ("wav2vec2", "sew-d")),
        *((family, "layer", "openvino") for family in ("wav2vec2", "wavlm", "parakeet_ctc")),
    ],
)
def test_a_file_gives_the_numbers_of_the_model_at_any_length(
    family: str,
    norm: str,
    format: str,
    tiny_model: Factory,
    noise_batch: Callable[..., Batch],
    model_input: Callable[..., Batch],
    tmp_path: Path,
) -> None:
    model = tiny_model(family, norm, intermediate_size=20)
    _prune(model)
    exported = write_exchange(_speech(model), tmp_path, format)
    key = input_key(model)
    for samples in ([700], [320], [2999], [5003], *([[2400, 1300, 900]] if takes_padding(model) else [[1650, 1650]])):
        batch = model_input(model, noise_batch(samples, seed=7))
        inputs, mask = batch[key], batch["attention_mask"]
        feed = {key: inputs.numpy()} | ({"attention_mask": mask.numpy()} if takes_padding(model) else {})
        with torch.no_grad():
            expected = model(**{name: torch.from_numpy(value) for name, value in feed.items()}).logits.numpy()
        found = _outputs(exported.path, feed)
        assert found.shape == expected.shape
        for row, frames in enumerate(output_counts(model, mask.sum(-1)).tolist()):  # behind them is padding
            own, other = expected[row, :frames], found[row, :frames]
            np.testing.assert_allclose(other, own, atol=2e-5 * float(np.abs(expected).max()))
    assert zeros_kept(model, exported) == (1.0, 1.0)
    assert sys.modules.get("openvino_telemetry") is None, "nothing is reported to anybody"


def test_a_family_that_the_exporter_cannot_follow_is_refused(
    tiny_model: Factory, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"of the family 'granite_speech5_ctc', cannot be exported.*Unfold"):
        write_exchange(_speech(tiny_model(UNSUPPORTED)), tmp_path, "onnx")
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr().out == ""


def test_zeros_that_an_exporter_loses_are_noticed(tiny_model: Factory, tmp_path: Path) -> None:
    exported = write_exchange(_speech(tiny_model("wav2vec2", intermediate_size=20)), tmp_path, "onnx")
    pruned = tiny_model("wav2vec2", intermediate_size=20)
    _prune(pruned)
    assert zeros_kept(pruned, exported)[0] < 0.05


def test_a_large_model_has_its_weights_in_a_file_of_their_own(
    tiny_model: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "WHOLE_FILE", 0)
    model = tiny_model("hubert", hidden_size=64, intermediate_size=128)
    exported = write_exchange(_speech(model), tmp_path, "onnx")
    assert [path.name for path in exported.files] == ["model.onnx", "model.onnx.data"]
    assert (tmp_path / "model.onnx").stat().st_size < (tmp_path / "model.onnx.data").stat().st_size
    onnx.checker.check_model(str(tmp_path / "model.onnx"))
    int8 = tmp_path / "int8"
    int8.mkdir()
    quantised = write_exchange(_speech(model), int8, "onnx", [])
    assert sum(path.stat().st_size for path in quantised.files) < sum(path.stat().st_size for path in exported.files)
    (tmp_path / "model.onnx.data").unlink()
    with pytest.raises(UserError, match=r"model\.onnx cannot be loaded"):
        exported_model(tmp_path / "model.onnx", type(model), model.config)


class _Scaled(exchange._Logits):
    def forward(self, inputs: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return 1.01 * super().forward(inputs, attention_mask)


class _Cut(exchange._Logits):
    """Has the length that was traced, as where an exporter makes a constant of it."""

    def forward(self, inputs: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(inputs, attention_mask)[:, :TRACED]


@pytest.mark.parametrize(
    ("broken", "reason"), [(_Scaled, r"differs from the model by 1\.0e-02"), (_Cut, r"logits of shape \(1, 51, 32\)")]
)
def test_a_broken_export_leaves_no_file(
    broken: type,
    reason: str,
    model_folder: Path,
    run_sparsewav: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exchange, "_Logits", broken)
    result = run_sparsewav(str(model_folder), "out", "--format", "onnx", "--no-score", command="sparsewav-export")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert re.search(reason, result.stderr)
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("onnx", ["--format", "onnx"]),
        ("onnxruntime", ["--format", "onnx"]),
        ("openvino", ["--format", "openvino"]),
        ("nncf", ["--format", "openvino", "--int8"]),
    ],
)
def test_a_missing_library_is_named(
    module: str, arguments: list[str], run_sparsewav: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    result = run_sparsewav("demo", "out", *arguments, command="sparsewav-export")
    assert result.returncode == 1
    assert result.stderr == (f"error: {module} is not installed; install it: pip install 'sparsewav[{arguments[1]}]'\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "onnx", "--dtype", "float16"], "--dtype float16 is for dense and bitmask"),
        (["--int8"], "--int8 is for --format onnx and openvino"),
        (["--format", "onnx"], "name the speech: --data data=..., or leave the file unscored: --no-score"),
        (["--format", "onnx", "--no-score", "--data", "data=demo"], "leave out --data"),
    ],
)
def test_what_cannot_be_asked_for(arguments: list[str], message: str, run_sparsewav: Run, model_folder: Path) -> None:
    result = run_sparsewav(str(model_folder), "out", *arguments, command="sparsewav-export")
    assert result.returncode == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_missing_model_is_found_before_any_speech_is_looked_for(run_sparsewav: Run) -> None:
    result = run_sparsewav("./nowhere", "out", "--format", "onnx", command="sparsewav-export")
    assert result.returncode == 1
    assert result.stdout + result.stderr == "error: ./nowhere is not a folder; check the path\n"


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ("data: [", r"config.yaml is missing or broken; delete .*\.hydra, and name the speech with --data"),
        ("model: {}", r"config.yaml is missing or broken"),
        ("data: {root: here}", r"hydra.yaml is missing or broken"),
    ],
)
def test_broken_settings_beside_a_model_are_named(
    settings: str, complaint: str, run_sparsewav: Run, model_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "mine")
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "config.yaml").write_text(settings)
    result = run_sparsewav("mine", "out", "--format", "onnx", command="sparsewav-export")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert re.search(complaint, result.stderr)


def test_a_model_of_a_training_is_exported_and_has_no_dense_one_beside_it(
    run_sparsewav: Run, corpus: Path, model_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "mine")
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "config.yaml").write_text("data: {}\ninitial_model: demo\n")
    data = ["--data", "data=librispeech_dir", f"data.root={corpus}", "data.evaluation_subset=test"]
    result = run_sparsewav("mine", "out", "--format", "onnx", *data, command="sparsewav-export")
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "out" / "sparsewav_export.json").read_text())
    assert [row["model"] for row in record["rates"]] == ["mine (PyTorch)", "onnx"]


@pytest.mark.slow
def test_int8_is_calibrated_on_a_corpus_that_is_smaller_than_the_usual_sample(
    run_sparsewav: Run, corpus: Path, model_folder: Path, tmp_path: Path
) -> None:
    data = [
        "data=librispeech_dir",
        f"data.root={corpus}",
        "data.calibration_subset=train",
        "data.evaluation_subset=test",
    ]
    arguments = [str(model_folder), "out", "--format", "openvino", "--int8", "--no-score", "--data", *data]
    result = run_sparsewav(*arguments, command="sparsewav-export")
    assert result.returncode == 0, result.stderr
    assert "int8 is calibrated on 12 utterances" in result.stdout
    assert (tmp_path / "out" / "openvino_model.bin").is_file()


@pytest.fixture(scope="module")
def demo() -> SpeechModel:
    return load_speech_model("demo")


@pytest.mark.parametrize("format", ["onnx", pytest.param("openvino", marks=pytest.mark.slow)])
def test_int8_writes_nearly_the_same_and_keeps_zeros(format: str, demo: SpeechModel, tmp_path: Path) -> None:
    """The layers' products are quantised, and the convolutions are not."""
    speech = load_speech_model("demo")
    with torch.no_grad():
        for pruned, whole in zip(prunable_matrices(speech.model), prunable_matrices(demo.model), strict=True):
            small = whole.weight.abs() < whole.weight.abs().quantile(0.3)
            pruned.weight.copy_(whole.weight.masked_fill(small, 0))
    sets = Sets(DemoData())
    calibration = SpeechBatches(sets.calibration(4, 0), speech.processor, 1e-3, padding=False)
    exported = write_exchange(speech, tmp_path, format, calibration)
    assert zeros_kept(speech.model, exported) == (1.0, 1.0)
    assert sum(path.stat().st_size for path in exported.files) < 0.45 * 12e6
    own = load_exported(tmp_path)
    utterances = sets.evaluation()["test"][:12]
    texts, quantised = (transcribe(item.model, item.processor, utterances) for item in (speech, own))
    pairs = list(zip(" ".join(texts).split(), " ".join(quantised).split(), strict=False))
    assert sum(first != second for first, second in pairs) <= 0.1 * len(pairs)
    for name, value in speech.model.state_dict().items():
        if "feature_extractor.conv_layers" in name and name.endswith("conv.weight"):
            assert any(np.array_equal(value.numpy(), other) for other in _constants(exported.path)), name


def _constants(path: Path) -> list[np.ndarray]:
    if path.suffix == ".onnx":
        return [onnx.numpy_helper.to_array(item) for item in onnx.load(path).graph.initializer]
    nodes = openvino.Core().read_model(path).get_ops()
    return [node.data.reshape(node.shape) for node in nodes if node.get_type_name() == "Constant"]


def test_a_run_is_exported_scored_and_used(
    run_sparsewav: Run, corpus: Path, model_folder: Path, tmp_path: Path
) -> None:
    done = run_sparsewav(
        f"model.name_or_path={model_folder}",
        "data=librispeech_dir",
        f"data.root={corpus}",
        "data.calibration_subset=train",
        "data.evaluation_subset=test",
        "calibration.utterances=4",
        "allocation=uniform",
        "sparsity.target=0.5",
        "hydra.run.dir=mine",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = run_sparsewav("mine/model", "out", "--format", "onnx", command="sparsewav-export")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Of the pruned weights 100.00% are zero in the file" in result.stdout
    record = json.loads((tmp_path / "out" / "sparsewav_export.json").read_text())
    rates = {row["model"]: row for row in record["rates"]}
    assert list(rates) == ["dense (tiny-wav2vec2)", "mine (PyTorch)", "onnx"]
    metrics = json.loads((tmp_path / "mine" / "metrics.json").read_text())
    assert rates["dense (tiny-wav2vec2)"]["wer"] == pytest.approx(metrics["wer_dense"])
    assert rates["onnx"]["wer"] == pytest.approx(metrics["wer"])
    assert record["agreement"]["difference"] < 1e-4
    assert record["agreement"]["same"] == record["agreement"]["zeros_kept"] == 1
    assert (record["family"], record["sampling_rate"], record["int8"]) == ("wav2vec2", 16_000, False)
    assert "ONNX Runtime" in (tmp_path / "out" / "README.md").read_text()

    compared = run_sparsewav("mine", "out", command="sparsewav-evaluate")
    assert compared.returncode == 0, compared.stdout + compared.stderr
    assert "+0.00 to +0.00" in compared.stdout
    audio = str(next((corpus / "test").rglob("*.flac")))
    texts = [
        run_sparsewav(audio, "--model", name, "--format", "json", "--chunk", "0.3", "--overlap", "0.1", command=command)
        for command in ["sparsewav-transcribe"]
        for name in ("mine", "out", "out/model.onnx")
    ]
    assert [text.returncode for text in texts] == [0, 0, 0], texts[1].stderr
    assert texts[0].stdout == texts[1].stdout == texts[2].stdout
    assert json.loads(texts[0].stdout)["words"]

    for arguments, command, message in [
        (["model.name_or_path=out", "data=demo"], "sparsewav", "give the model that it was made from"),
        (["out", "small"], "sparsewav-export", "out was exported (model.onnx)"),
        ([audio, "--model", "out", "--device", "cuda"], "sparsewav-transcribe", "runs on the CPU"),
        ([audio, "--model", "there/is/no.onnx"], "sparsewav-transcribe", "there/is/no.onnx does not exist"),
        ([audio, "--model", "out", "--accelerate"], "sparsewav-transcribe", "--accelerate is for models that PyTorch"),
    ]:
        refused = run_sparsewav(*arguments, command=command)
        assert refused.returncode == 1
        assert message in refused.stdout + refused.stderr
        assert "Traceback" not in refused.stdout + refused.stderr
    broken = shutil.copytree(tmp_path / "out", tmp_path / "broken")
    (broken / "model.onnx").write_bytes((broken / "model.onnx").read_bytes()[:20_000])
    refused = run_sparsewav(audio, "--model", "broken", command="sparsewav-transcribe")
    assert refused.returncode == 1
    assert "broken/model.onnx cannot be loaded" in refused.stderr


def test_exported_files_that_are_worse_are_told(
    run_sparsewav: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that quantisation has broken is written and scored, and its error rate is printed as a warning."""

    def lose(path: Path) -> None:
        graph = onnx.load(path)
        for item in graph.graph.initializer:
            if item.name.endswith("_scale"):
                item.CopyFrom(onnx.numpy_helper.from_array(3 * onnx.numpy_helper.to_array(item), item.name))
        onnx.save(graph, path)

    convert = exchange._convert_onnx

    def broken(traced: Path, path: Path, **options: Any) -> None:
        convert(traced, path, **options)
        lose(path)

    monkeypatch.setattr(exchange, "_convert_onnx", broken)
    data = ["--data", "data=demo", "data.evaluation_utterances=12"]
    result = run_sparsewav("demo", "out", "--format", "onnx", "--int8", *data, command="sparsewav-export")
    assert result.returncode == 0, result.stderr
    assert "! on test the exported model has a WER of" in result.stdout
    assert sparsewav.transcribe(load_exported(tmp_path / "out"), np.zeros(16_000, np.float32), sampling_rate=16_000)


def test_what_sparsewav_load_model_says_of_it_is_short(demo: SpeechModel, tmp_path: Path) -> None:
    write_exchange(demo, tmp_path, "onnx")
    speech = load_exported(tmp_path / "model.onnx")
    assert "run by onnxruntime" in repr(speech)
    utterance = Sets(DemoData()).evaluation()["test"][0]
    assert transcribe_recording(speech, utterance) == transcribe_recording(demo, utterance)
