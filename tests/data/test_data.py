"""Utterances, their audio and their batches."""

import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
import torch
from transformers import PreTrainedModel

from sparsewav.data import demo
from sparsewav.data.batches import SpeechBatches, check_transcripts, collate, plan_batches
from sparsewav.data.demo import TEST_VOICES, TRAINING_VOICES
from sparsewav.data.librispeech import read_librispeech_folder
from sparsewav.data.sentences import draw_sentence, vocabulary
from sparsewav.data.sets import calibration_set, evaluation_set
from sparsewav.data.utterances import Utterance, audio_seconds, read_audio, sample_utterances
from sparsewav.errors import UserError
from sparsewav.inference.wer import transcribe
from sparsewav.models.load import load_processor, load_speech_model
from sparsewav.pruning.encoder import takes_padding
from sparsewav.settings.run import LibriSpeechHub

REAL_SPEECH = Path(os.environ.get("SPARSEWAV_REAL_SPEECH", "/nowhere"))
"""A folder with real recordings in LibriSpeech's layout, for whoever has one: ``<corpus>/<subset>/``."""


def test_reads_librispeech_layout_in_order_of_ids(corpus: Path) -> None:
    utterances = read_librispeech_folder(corpus, "train")
    assert [u.id for u in utterances] == sorted(u.id for u in utterances)
    assert len(utterances) == 12
    line = (corpus / "train/100/7/100-7.trans.txt").read_text().splitlines()[0]
    assert f"{utterances[0].id} {utterances[0].text}" == line
    assert audio_seconds(utterances[0]) * 16_000 == len(read_audio(utterances[0]))


def test_other_rates_and_channels_become_16_khz_mono(tmp_path: Path) -> None:
    """A tone keeps its frequency, and the two channels their mean."""
    time = np.arange(44_100) / 44_100
    tone = np.sin(2 * np.pi * 440 * time)
    soundfile.write(tmp_path / "a.wav", np.stack([0.6 * tone, 0.2 * tone], axis=1), 44_100)
    samples = read_audio(Utterance("a", "TEN", tmp_path / "a.wav"))
    assert len(samples) == 16_000
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(16_000)))
    assert spectrum.argmax() == 440
    assert np.abs(samples[2000:-2000]).max() == pytest.approx(0.4, abs=0.01)


def test_contents_of_a_file_are_read_as_the_file(corpus: Path) -> None:
    utterance = read_librispeech_folder(corpus, "test")[0]
    assert isinstance(utterance.audio, Path)
    np.testing.assert_array_equal(
        read_audio(utterance), read_audio(Utterance(utterance.id, utterance.text, utterance.audio.read_bytes()))
    )


def test_calibration_sample_is_seeded_and_without_replacement(corpus: Path) -> None:
    utterances = read_librispeech_folder(corpus, "train")
    drawn = sample_utterances(utterances, 8, seed=3)
    assert drawn == sample_utterances(utterances, 8, seed=3)
    assert len({u.id for u in drawn}) == 8
    assert drawn != sample_utterances(utterances, 8, seed=4)
    with pytest.raises(UserError, match="12 utterances"):
        sample_utterances(utterances, 13, seed=0)


@pytest.mark.parametrize("padding", [True, False])
def test_batches_hold_every_utterance_once_and_stay_within_their_length(corpus: Path, padding: bool) -> None:
    utterances = read_librispeech_folder(corpus, "train")
    groups = plan_batches(utterances, 2.0, padding=padding)
    assert sorted(position for group in groups for position in group) == list(range(len(utterances)))
    for group in groups:
        lengths = [audio_seconds(utterances[position]) for position in group]
        assert len(group) * max(lengths) <= 2.0
        assert padding or len(set(lengths)) == 1
    assert len(groups) < len(utterances)


def test_a_batch_is_normalised_padded_and_labelled(corpus: Path, model_folder: Path) -> None:
    processor = load_processor(str(model_folder))
    utterances = read_librispeech_folder(corpus, "test")[:3]
    batch = collate(utterances, processor)
    for row, utterance in enumerate(utterances):
        samples = read_audio(utterance)
        assert batch["attention_mask"][row].sum() == len(samples)
        expected = (samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)
        torch.testing.assert_close(
            batch["input_values"][row, : len(samples)], torch.from_numpy(expected), atol=1e-4, rtol=1e-4
        )
        assert not batch["input_values"][row, len(samples) :].any()
        labels = batch["labels"][row]
        assert processor.tokenizer.decode(labels[labels >= 0], group_tokens=False) == utterance.text


@pytest.mark.parametrize(
    ("family", "norm"),
    [
        ("wav2vec2", "layer"),
        ("wav2vec2", "group"),
        ("hubert", "group"),
        ("wavlm", "layer"),
        ("wavlm", "group"),
        ("data2vec-audio", "layer"),
        ("wav2vec2-conformer", "layer"),
    ],
)
def test_batched_transcripts_equal_single_ones(
    tiny_model: Callable[..., PreTrainedModel], corpus: Path, model_folder: Path, family: str, norm: str
) -> None:
    """Whatever shares a batch with an utterance must not change what is heard in it."""
    model = tiny_model(family, norm, vocab_size=32, conv_kernel=(20, 8), conv_stride=(20, 8))
    processor = load_processor(str(model_folder))
    utterances = read_librispeech_folder(corpus, "train")
    batches = SpeechBatches(utterances, processor, 60, padding=takes_padding(model))
    assert len(batches) < len(utterances)
    hypotheses = transcribe(model, processor, utterances, seconds_per_batch=60)
    assert len(set(hypotheses)) > 3, "the model has to say different things for this test to see a leak"
    assert hypotheses == transcribe(model, processor, utterances, seconds_per_batch=0.1)


def test_the_hub_is_streamed_and_sampled(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the columns of openslr/librispeech_asr, from a local file in the hub's place; nothing decodes the audio."""
    rows = [
        {"id": u.id, "text": u.text, "audio": {"bytes": Path(str(u.audio)).read_bytes(), "path": None}}
        for u in read_librispeech_folder(corpus, "train")
    ]
    table = datasets.Dataset.from_list(rows).cast_column("audio", datasets.Audio(sampling_rate=16_000, decode=False))
    table.to_parquet(tmp_path / "train.parquet")
    load = datasets.load_dataset

    def load_local(name: str, configuration: str, *, split: str, streaming: bool) -> datasets.IterableDataset:
        assert (name, configuration, split, streaming) == ("openslr/librispeech_asr", "clean", "train.100", True)
        return load("parquet", data_files={split: str(tmp_path / "train.parquet")}, split=split, streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", load_local)
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)  # after every sample
    hub = LibriSpeechHub(calibration_subset="clean/train.100", evaluation_subset="clean/train.100")
    sample = calibration_set(hub, 5, seed=1)
    assert len({u.id for u in sample}) == 5
    assert sample == calibration_set(hub, 5, seed=1)
    assert [u.id for u in sample] != [u.id for u in calibration_set(hub, 5, seed=2)]
    assert [u.id for u in evaluation_set(hub)] == [row["id"] for row in rows]
    assert len(read_audio(sample[0])) == audio_seconds(sample[0]) * 16_000


SPEAK_SMALL_SHARD = """
import sys
from pathlib import Path
from sparsewav.data import demo
demo.UTTERANCES_PER_SHARD = 20
name, folder, seed, shard = sys.argv[1:]
demo._speak_shard(demo.SUBSETS[name], Path(folder), int(seed), int(shard))
"""


def test_demo_speech_is_the_same_bytes_for_the_same_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with another number of processes: eSpeak's own state must not carry over between shards."""
    start = subprocess.run

    def start_small(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:3] == ["-m", "sparsewav.data.demo"]
        return start([command[0], "-c", SPEAK_SMALL_SHARD, *command[3:]], **options)

    monkeypatch.setattr(demo, "UTTERANCES_PER_SHARD", 20)
    monkeypatch.setattr(demo.subprocess, "run", start_small)

    def speak(name: str, seed: int, processes: int) -> dict[str, bytes]:
        folder = tmp_path / name
        folder.mkdir()
        demo._speak_subset(replace(demo.SUBSETS["test"], utterances=40), folder, seed, processes)
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    first = speak("first", 0, 1)
    assert len([name for name in first if name.endswith(".flac")]) == 40
    assert first == speak("second", 0, 2)
    assert first != speak("other", 1, 2)


def test_demo_sentences_are_split_and_varied() -> None:
    generator = np.random.default_rng(0)
    training = {draw_sentence(generator, for_evaluation=False) for _ in range(3000)}
    evaluation = {draw_sentence(generator, for_evaluation=True) for _ in range(300)}
    assert not training & evaluation
    assert len(training) > 2900
    words = {word for sentence in training for word in sentence.split()}
    assert words <= vocabulary()
    assert len(vocabulary()) > 500
    assert not set(TRAINING_VOICES) & set(TEST_VOICES)


def test_transcripts_that_cannot_be_written_are_refused(model_folder: Path) -> None:
    processor = load_processor(str(model_folder))
    check_transcripts([Utterance("a", "IT'S FINE", b"")], processor)
    with pytest.raises(UserError, match=r"utterance b .*: 1 É"):
        check_transcripts([Utterance("b", "CAFÉ 1", b"")], processor)
    with pytest.raises(UserError, match="utterance c has an empty transcript"):
        check_transcripts([Utterance("c", " ", b"")], processor)


def _break(corpus: Path, fault: str) -> None:
    audio = next((corpus / "test/100/7").glob("*.flac"))
    transcript = corpus / "test/100/7/100-7.trans.txt"
    if fault == "truncated":
        audio.write_bytes(audio.read_bytes()[:2000])
    elif fault == "not audio":
        audio.write_text("hello")
    elif fault == "nan":
        audio.unlink()
        soundfile.write(audio.with_suffix(".wav"), np.full(8000, np.nan), 16_000, subtype="FLOAT")
    elif fault == "empty transcript":
        transcript.write_text(f"{audio.stem} \n")
    elif fault == "no audio":
        audio.unlink()
    elif fault == "no transcripts":
        for path in corpus.rglob("*.trans.txt"):
            path.unlink()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("truncated", r"\.flac is (truncated|damaged)"),
        ("not audio", r"\.flac is not readable audio"),
        ("nan", r"\.wav holds samples that are NaN"),
        ("empty transcript", r"100-7\.trans\.txt, line 1: .* empty transcript"),
        ("no audio", r"there is no audio file .*\.flac"),
        ("no transcripts", r"has no transcripts"),
    ],
)
def test_broken_data_is_refused_by_name(own_corpus: Path, fault: str, message: str) -> None:
    _break(own_corpus, fault)

    def read_all() -> None:
        for utterance in read_librispeech_folder(own_corpus, "test"):
            read_audio(utterance)

    with pytest.raises(UserError, match=message):
        read_all()


@pytest.mark.skipif(not REAL_SPEECH.is_dir(), reason="SPARSEWAV_REAL_SPEECH names no folder of real recordings")
@pytest.mark.filterwarnings("error")
def test_real_recordings_are_read_without_a_warning(model_folder: Path) -> None:
    processor = load_processor(str(model_folder))
    subsets = {path.parents[2] for path in REAL_SPEECH.rglob("*.trans.txt")}
    assert subsets
    for subset in subsets:
        utterances = read_librispeech_folder(subset.parent, subset.name)
        assert len(utterances) == len(list(subset.rglob("*.flac")))
        check_transcripts(utterances, processor)
        for utterance in utterances:
            assert len(read_audio(utterance)) == round(audio_seconds(utterance) * 16_000)


def test_demo_model_is_within_its_limits() -> None:
    """Shipped small, and of the architecture it says."""
    speech = load_speech_model("demo")
    folder = Path(speech.model.config.name_or_path)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 10e6
    assert speech.model.config.model_type == "wav2vec2"
    assert speech.model.config.feat_extract_norm == "layer"
    assert {"README.md", "training.json", "training_log.csv"} <= {path.name for path in folder.iterdir()}
