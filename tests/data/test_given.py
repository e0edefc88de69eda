"""Speech that a caller of Python gives: the same batches in whatever form, and the results of the command."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
import soundfile
import torch
from safetensors.torch import load_file

import sparsewav
from sparsewav.data.given import as_utterances
from sparsewav.data.utterances import read_audio
from sparsewav.errors import UserError
from sparsewav.models.load import SpeechModel, load_speech_model
from tests.terminal import Run


@pytest.fixture(scope="module")
def speech(model_folder: Path) -> SpeechModel:
    return load_speech_model(str(model_folder))


@pytest.fixture(scope="module")
def files(corpus: Path) -> list[Path]:
    return sorted((corpus / "train").rglob("*.flac"), key=lambda path: path.stem)


def _samples(files: list[Path]) -> list[np.ndarray]:
    return [soundfile.read(path, dtype="int16")[0] for path in files]


FORMS: dict[str, Callable[[list[Path]], tuple[Any, dict[str, Any]]]] = {
    "names": lambda files: (list(map(str, files)), {}),
    "arrays": lambda files: (_samples(files), {"sampling_rate": 16_000}),
    "floats": lambda files: ([torch.from_numpy(x / 2**15)[None] for x in _samples(files)], {"sampling_rate": 16_000}),
    "rates": lambda files: ([{"array": x, "sampling_rate": 16_000} for x in _samples(files)], {}),
    "bytes": lambda files: ([path.read_bytes() for path in files], {}),
    "pairs": lambda files: ([(path, "sun  tea") for path in files], {}),
    "table": lambda files: (_table(files), {}),
    "stream": lambda files: (_table(files).to_iterable_dataset(), {}),
    "column": lambda files: (_table(files).rename_columns({"audio": "clip", "sentence": "said"}), COLUMNS),
    "rows": lambda files: (_rows(files), {}),
    "frame": lambda files: (pandas.DataFrame(_rows(files)), {}),
    "table of names": lambda files: (datasets.Dataset.from_list(_rows(files)), {}),
}
COLUMNS = {"text_column": "said"}  # there is one of audio


def _rows(files: list[Path]) -> list[dict[str, str]]:
    return [{"audio": str(path), "sentence": "sun  tea"} for path in files]


def _table(files: list[Path]) -> datasets.Dataset:
    return datasets.Dataset.from_list(_rows(files)).cast_column("audio", datasets.Audio())


@pytest.mark.parametrize("form", FORMS)
def test_the_same_speech_in_any_form_makes_the_same_batches(form: str, files: list[Path], speech: SpeechModel) -> None:
    given, options = FORMS[form](files)
    found = sparsewav.calibration_batches(given, speech, seconds_per_batch=3, **options)
    expected = sparsewav.calibration_batches(files, speech, seconds_per_batch=3)
    assert len(found) == len(expected) > 1
    assert re.fullmatch(rf"<SpeechBatches: {len(files)} utterances, [\d.]+ s, in {len(found)} batches>", repr(found))
    labeled = form in ("pairs", "table", "stream", "column", "rows", "frame", "table of names")
    for batch, other in zip(found, expected, strict=True):
        assert set(other) == {"input_values", "attention_mask"}
        assert set(batch) - set(other) == ({"labels"} if labeled else set())
        for key in other:
            assert torch.equal(batch[key], other[key]), key
    if labeled:  # in the case of the vocabulary
        assert speech.processor.tokenizer.decode(found[0]["labels"][0], group_tokens=False) == "SUN TEA"


def test_arrays_of_other_rates_are_resampled_as_files_are(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 22_050).astype(np.float32)
    soundfile.write(tmp_path / "one.wav", samples, 22_050, subtype="FLOAT")
    array, file = as_utterances({"array": samples, "sampling_rate": 22_050}), as_utterances(tmp_path)
    assert np.array_equal(read_audio(array[0]), read_audio(file[0]))
    assert len(read_audio(file[0])) == 16_000


def test_a_manifest_is_read_as_the_command_reads_it(
    files: list[Path], speech: SpeechModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what the settings say about it, and what was assumed in a line."""
    lines = ["path\tsentence", *(f"{path}\tSun, tea" for path in files)]
    (tmp_path / "dev.tsv").write_text("\n".join(lines))
    rates = sparsewav.evaluate(speech, tmp_path / "dev.tsv", remove_characters=",")
    assert "dev.tsv is read as Common Voice: audio in path, text in sentence" in capsys.readouterr().out
    assert rates == sparsewav.evaluate(
        speech, sparsewav.Manifest(test=str(tmp_path / "dev.tsv"), remove_characters=",")
    )
    assert rates == sparsewav.evaluate(speech, [(path, "sun tea") for path in files])
    with pytest.raises(UserError, match="characters outside the model's vocabulary: ,"):
        sparsewav.calibration_batches(tmp_path / "dev.tsv", speech)


def test_python_gives_the_bytes_and_error_rates_of_the_command(
    model_folder: Path, corpus: Path, small: list[str], run_sparsewav: Run, tmp_path: Path
) -> None:
    result = run_sparsewav(*small, "calibration.utterances=8", "sparsity.target=0.6", "seed=3")
    assert result.returncode == 0, result.stdout + result.stderr
    (metrics,) = tmp_path.glob("outputs/*/metrics.json")
    said = json.loads(metrics.read_text())
    data = sparsewav.LibriSpeechFolder(root=str(corpus), calibration_subset="train", evaluation_subset="test")
    speech = sparsewav.load_model(model_folder, device="cpu")
    assert sparsewav.evaluate(speech, data).wer == said["wer_dense"]
    batches = sparsewav.calibration_batches(data, speech, utterances=8, seed=3)
    report = sparsewav.prune(speech, batches, 0.6, seed=3)
    assert report.sparsity == said["achieved_sparsity"]
    rates = sparsewav.evaluate(speech, corpus / "test")
    assert (rates.wer, rates.cer) == (said["wer"], said["cer"])
    saved = sparsewav.save(speech, tmp_path / "saved")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (saved, metrics.parent / "model"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    # A run is taken wherever the command takes one.
    run = sparsewav.load_model(metrics.parent, device="cpu")
    assert sparsewav.evaluate(run, corpus / "test") == rates
    assert torch.equal(sparsewav.load(metrics.parent).lm_head.weight, run.model.lm_head.weight)


MISTAKES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "number": (lambda file: 3, "of type int holds no speech; give audio files, arrays or a data set"),
    "numbers": (lambda file: [3.5], "audio of item 0 is of type float; give a file, an array of samples"),
    "missing file": (lambda file: ["nowhere.wav"], "nowhere.wav is not a file; check the path"),
    "rate": (lambda file: [np.zeros(999)], "item 0 is an array; say how many samples .* sampling_rate=16000"),
    "channels": (lambda file: [np.zeros((2, 999))], r"item 0 have shape \(2, 999\); give one channel"),
    "integers": (lambda file: [np.zeros(999, np.int64)], "item 0 are int64; give floating-point numbers .* or int16"),
    "text": (lambda file: [(file, 3)], "transcript of item 0 is of type int; give a text$"),
    "pair": (lambda file: [(np.zeros(999), 16_000)], "type int; .*write an array and its rate {'array': ..., 'samp"),
    "no utterances": (lambda file: [file], "utterances=0 must be at least 1"),
    "splits": (lambda file: datasets.DatasetDict(train=_table([file])), "several data sets: train; give one of them"),
    "nothing": (lambda file: [], "there are no utterances"),
    "empty folder": (lambda file: file.parents[3] / "train" / "none", "none is not a file"),
    "some": (lambda file: [(file, "SUN"), file], "flac has no transcript, and others have; give every utterance one"),
    "column": (lambda file: datasets.Dataset.from_dict({"clip": [str(file)]}), "audio_column=audio is not in the data"),
    "frame": (lambda file: pandas.DataFrame({"clip": [str(file)]}), "item 0 has no audio, but clip; .* audio_column="),
    "rate of nothing": (
        lambda file: {"array": np.zeros(9), "sampling_rate": 0},
        "sampling_rate=0 of item 0 is no whole",
    ),
    "letters": (lambda file: [(file, "süß")], "characters outside the model's vocabulary"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_no_speech_is_refused(mistake: str, files: list[Path], speech: SpeechModel) -> None:
    make, message = MISTAKES[mistake]
    count = 0 if mistake == "no utterances" else None
    with pytest.raises(UserError, match=message):
        sparsewav.calibration_batches(make(files[0]), speech, utterances=count)


def test_what_is_no_model_is_refused(files: list[Path], speech: SpeechModel, tmp_path: Path) -> None:
    for model in ("demo", speech.model):
        for use in (sparsewav.evaluate, sparsewav.transcribe, sparsewav.save):
            with pytest.raises(UserError, match=f"of type {type(model).__name__}; give what sparsewav.load_model ret"):
                use(model, tmp_path / "new")
    with pytest.raises(UserError, match="name_or_path is of type NoneType; give a name or a folder"):
        sparsewav.load_model(None)  # type: ignore[arg-type]


def test_transcripts_are_asked_for_where_they_are_needed(files: list[Path], speech: SpeechModel) -> None:
    with pytest.raises(UserError, match="sensitivities need transcripts: give the calibration batches labels"):
        sparsewav.prune(speech, sparsewav.calibration_batches(files, speech), 0.6)
    with pytest.raises(UserError, match="has an empty transcript"):
        sparsewav.evaluate(speech, files)
    with pytest.raises(UserError, match="text_column=sad is not in item 0; it has audio, sentence"):
        sparsewav.evaluate(speech, _rows(files), text_column="sad")
    with pytest.raises(UserError, match="case=loewr is not known; choose auto, keep, lower or upper"):
        sparsewav.evaluate(speech, _rows(files), case="loewr")
