"""What a run leaves in its folder."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparsewav
from sparsewav.errors import UserError
from sparsewav.models.load import load_speech_model
from sparsewav.pipeline import run_folder


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_model_with_a_number_that_is_not_finite_is_not_written(
    model_folder: Path, tmp_path: Path, value: float
) -> None:
    speech = load_speech_model(str(model_folder))
    with torch.no_grad():
        speech.model.lm_head.bias[2] = value
    with (
        pytest.raises(UserError, match=r"model was not written: lm_head\.bias has numbers that are not finite"),
        run_folder.write_model(tmp_path / "model", speech.model, speech.processor),
    ):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["model", "float16"])
@pytest.mark.parametrize("format", ["dense", "bitmask"])
def test_what_python_saves_is_what_the_commands_read(
    format: str, dtype: str, model_folder: Path, tmp_path: Path
) -> None:
    speech = sparsewav.load_model(model_folder, device="cpu")
    with torch.no_grad():
        matrix = speech.model.wav2vec2.encoder.layers[0].attention.q_proj.weight
        matrix[matrix.abs() < matrix.abs().median()] = 0
    folder = sparsewav.save(speech, tmp_path / "new" / "saved", format=format, dtype=dtype)
    assert [path.suffixes for path in folder.glob("*.safetensors")] == [
        [".safetensors"] if format == "dense" else [".bitmask", ".safetensors"]
    ]
    loaded = sparsewav.load_model(folder, device="cpu")
    assert loaded.processor.tokenizer.get_vocab() == speech.processor.tokenizer.get_vocab()
    for name, tensor in speech.model.state_dict().items():
        expected = tensor if dtype == "model" else tensor.half().float()
        assert torch.equal(loaded.model.state_dict()[name], expected), name
    assert sparsewav.load(folder).dtype == (torch.float32 if dtype == "model" else torch.float16)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["saved"]
    shown = repr(speech)
    assert len(shown.splitlines()) == 1 + len(speech.warnings)
    assert "Wav2Vec2ForCTC" in shown


def test_saving_replaces_nothing_and_knows_its_formats(model_folder: Path, tmp_path: Path) -> None:
    speech = sparsewav.load_model(model_folder, device="cpu")
    with pytest.raises(UserError, match="is there already; delete it or choose another folder"):
        sparsewav.save(speech, tmp_path)
    with pytest.raises(UserError, match="format=onnx, dtype=model: give dense or bitmask"):
        sparsewav.save(speech, tmp_path / "saved", format="onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="elsewhere the system's own figure is taken")
def test_peak_memory_is_that_of_the_process_alone() -> None:
    """A process that a larger one started does not count that one's memory, as getrusage does."""
    peak = "import torch; from sparsewav.pipeline import run_folder; print(run_folder.peak_memory(torch.device('cpu')))"
    code = f"import subprocess, sys; held = b'x' * 1_500_000_000; subprocess.run([sys.executable, '-c', {peak!r}])"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    assert 5e7 < int(done.stdout) < 1.4e9
