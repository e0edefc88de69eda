"""Utterances, their audio and their batches."""

import json
import os
import re
import shutil
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
from sparsewav.data.batches import SpeechBatches, check_labels, check_lengths, collate, plan_batches
from sparsewav.data.demo import TEST_VOICES, TRAINING_VOICES
from sparsewav.data.librispeech import read_librispeech_folder
from sparsewav.data.sentences import draw_sentence, vocabulary
from sparsewav.data.sets import Sets, find_overlap
from sparsewav.data.text import choose_normalization, normalized
from sparsewav.data.utterances import Utterance, audio_seconds, read_audio, sample_utterances
from sparsewav.errors import UserError
from sparsewav.inference.wer import transcribe
from sparsewav.models.load import load_processor, load_speech_model
from sparsewav.pruning.encoder import takes_padding
from sparsewav.settings.data import Data, DemoData, LibriSpeechFolder, LibriSpeechHub

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


@pytest.mark.parametrize("suffix", [".flac", ".WAV"])
@pytest.mark.parametrize(
    "write",
    [
        lambda text: b"\xef\xbb\xbf" + text.encode(),
        lambda text: text.replace(" ", "\t").encode(),
        lambda text: text.replace(" ", "\xa0 \t").encode(),
        lambda text: text.replace(" ", "\u2028").encode(),
        lambda text: text.replace(" ", " \x0b\x0c\x85 ").encode(),
        lambda text: text.replace("\n", "  \r\n\r\n").encode(),
    ],
    ids=["byte-order mark", "tabs", "no-break spaces", "line separators", "control characters", "CRLF"],
)
def test_any_white_space_is_a_space_and_any_utf_8_is_read(
    own_corpus: Path, write: Callable[[str], bytes], suffix: str
) -> None:
    expected = [(u.id, u.text) for u in read_librispeech_folder(own_corpus, "test")]
    for path in (own_corpus / "test").rglob("*.trans.txt"):
        path.write_bytes(write(path.read_text()))
    for path in (own_corpus / "test").rglob("*.flac"):
        path.rename(path.with_suffix(suffix))
    assert [(u.id, u.text) for u in read_librispeech_folder(own_corpus, "test")] == expected


def test_names_that_occur_twice_are_told_apart(own_corpus: Path) -> None:
    """The same names under two speakers: every utterance keeps its own audio and text, and gets an id of its own."""
    before = {(u.contents(), u.text) for u in read_librispeech_folder(own_corpus, "test")}
    for speaker in ("100", "101"):
        folder = own_corpus / "test" / speaker / "7"
        transcript = folder / f"{speaker}-7.trans.txt"
        for number, path in enumerate(sorted(folder.glob("*.flac"))):
            transcript.write_text(transcript.read_text().replace(path.stem, f"{number:04}"))
            path.rename(folder / f"{number:04}.flac")
    utterances = read_librispeech_folder(own_corpus, "test")
    assert [u.id for u in utterances] == [f"{speaker}/7/{number:04}" for speaker in (100, 101) for number in range(3)]
    assert {(u.contents(), u.text) for u in utterances} == before


def _without_length(path: Path, kind: str) -> Path:
    """Write a second of a file as a pipe writes it, which cannot go back and correct the header."""
    samples = np.random.default_rng(0).integers(-9999, 9999, 16_000, dtype=np.int16)
    soundfile.write(path, samples, 16_000)
    content = bytearray(path.read_bytes())
    if kind == "flac":
        content[21:26] = bytes([content[21] & 0xF0, 0, 0, 0, 0])
    elif kind != "whole":
        size = {"wav-0": 0, "wav-max": 0xFFFFFFFF}[kind].to_bytes(4, "little")
        data = content.index(b"data")
        content[4:8] = content[data + 4 : data + 8] = size
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("kind", ["flac", "wav-0", "wav-max"])
def test_audio_without_a_length_is_read_to_its_end(tmp_path: Path, kind: str) -> None:
    utterance = Utterance("a", "TEN", _without_length(tmp_path / f"a.{kind[:4].rstrip('-')}", kind))
    whole = Utterance("b", "TEN", _without_length(tmp_path / "whole.wav", "whole"))
    assert audio_seconds(utterance) == 1
    np.testing.assert_array_equal(read_audio(utterance), read_audio(whole))
    np.testing.assert_array_equal(read_audio(replace(utterance, audio=utterance.contents())), read_audio(whole))
    assert plan_batches([utterance, whole], 2, padding=True) == [[0, 1]]


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
def test_an_mp3_without_a_count_of_its_frames_is_read_to_its_end(tmp_path: Path, mode: str) -> None:
    """libsndfile takes the length from the size of the file: too long behind a tag, far too short at variable rate."""
    path = tmp_path / "a.mp3"
    samples = np.random.default_rng(0).standard_normal(80_000) * np.linspace(1e-4, 0.1, 80_000)
    soundfile.write(path, samples, 16_000, bitrate_mode=mode, compression_level=0.5)
    content = path.read_bytes()
    counted = read_audio(Utterance("a", "TEN", content))
    first = content.index(content[:2], 4)  # behind the frame that holds the count
    uncounted = Utterance("a", "TEN", b"ID3\3\0\0\0\0\x4e\x10" + bytes(10_000) + content[first:])
    whole = read_audio(uncounted)
    assert audio_seconds(uncounted) == len(whole) / 16_000
    delay = 1105  # of encoder and decoder, which the count says, too
    np.testing.assert_allclose(whole[delay:][: len(counted)], counted, atol=1e-4)


def test_the_evaluation_sample_is_of_the_whole_subset_and_always_the_same(corpus: Path) -> None:
    data = LibriSpeechFolder(root=str(corpus), evaluation_subset="train", evaluation_utterances=6)
    drawn, everyone = Sets(data).evaluation()["train"], read_librispeech_folder(corpus, "train")
    assert drawn == Sets(data).evaluation()["train"]
    assert [u for u in everyone if u in drawn] == drawn, "in the order of the subset"
    assert {u.id[:3] for u in drawn} == {"100", "101"}, "the first 6 are of one speaker"
    with pytest.raises(UserError, match=r"data\.evaluation_utterances=13 asks for more than the 12"):
        Sets(replace(data, evaluation_utterances=13)).evaluation()


def test_a_missing_subset_is_named_with_its_key(corpus: Path) -> None:
    data = LibriSpeechFolder(root=str(corpus), training_subset="trian", development_subset="dve")
    with pytest.raises(UserError, match=r"data\.training_subset=trian is not in .*; it holds test, train"):
        Sets(data).training(0)
    with pytest.raises(UserError, match=r"data\.development_subset=dve is not in"):
        Sets(data).development()
    with pytest.raises(UserError, match=r"data\.evaluation_subset=tset is not in the demo corpus; it has train"):
        Sets(DemoData(evaluation_subset="tset")).evaluation()
    with pytest.raises(UserError, match=r"data\.evaluation_subset=clean of data=librispeech must be"):
        Sets(LibriSpeechHub(evaluation_subset="clean")).evaluation()


def test_a_role_may_have_several_subsets_and_text_stays_as_it_is_written(own_corpus: Path) -> None:
    for transcript in (own_corpus / "test").rglob("*.trans.txt"):
        transcript.write_text(transcript.read_text().lower())
    data = LibriSpeechFolder(root=str(own_corpus), training_subset=["test", "train"], evaluation_subset=["train"])
    test, train = (read_librispeech_folder(own_corpus, name) for name in ("test", "train"))
    assert Sets(data).training(0) == [*test, *train]
    assert Sets(data).evaluation() == {"train": train}
    assert data.subset("training") == ("data.training_subset", ["test", "train"])
    assert all(item.text.islower() for item in test)
    assert {item.speaker for item in train} == {"100", "101"}


def _read(data: Data, *roles: str) -> Sets:
    sets = Sets(data)
    for role in roles or ("calibration", "evaluation"):
        sets.read(role)
    return sets


def test_audio_without_a_transcript_is_mentioned(own_corpus: Path) -> None:
    data = LibriSpeechFolder(root=str(own_corpus), evaluation_subset="test", calibration_subset="train")
    assert not _read(data).left_out()
    next((own_corpus / "test").rglob("101*.trans.txt")).unlink()
    (note,) = _read(data).left_out()
    assert re.match(r"audio without a transcript in test is left out: 3 files, e\.g\. .*101-7-0001\.flac", note)


def test_evaluation_utterances_in_another_set_are_found_by_their_content(own_corpus: Path) -> None:
    """Also under another name, and as the contents of a file; not where the length alone is equal."""
    test, train = (read_librispeech_folder(own_corpus, name) for name in ("test", "train"))
    data = LibriSpeechFolder(root=str(own_corpus), evaluation_subset="test", training_subset="train")
    assert find_overlap(data, test, {"training": train}) == (0, [])
    copy = shutil.copy(str(test[4].audio), own_corpus / "other.flac")
    copies = [*train, Utterance("x", "SEA", Path(copy)), Utterance("y", "SEA", test[1].contents())]
    with pytest.raises(
        UserError,
        match=rf"2 of 6 evaluation utterances are in the training set, e\.g\. .*{test[1].id}\.flac: .*"
        r"data\.training_subset=train, or allow it with data\.allow_overlap=true",
    ):
        find_overlap(data, test, {"training": copies})
    data.allow_overlap = True
    count, notes = find_overlap(data, test, {"training": copies, "calibration": test[4:]})
    assert count == 3
    assert [note[:34] for note in notes] == ["2 of 6 evaluation utterances are i"] * 2


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
    nameless = [replace(utterance, id="x") for utterance in utterances]
    assert hypotheses == transcribe(model, processor, nameless, seconds_per_batch=1)


def test_the_hub_is_streamed_and_sampled(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the columns of openslr/librispeech_asr, from a local file in the hub's place; nothing decodes the audio."""
    rows = [
        {"id": u.id, "text": u.text, "audio": {"bytes": Path(str(u.audio)).read_bytes(), "path": None}}
        for u in read_librispeech_folder(corpus, "train")
    ]
    table = datasets.Dataset.from_list(rows).cast_column("audio", datasets.Audio(sampling_rate=16_000, decode=False))
    table.to_parquet(tmp_path / "train.parquet")
    load = datasets.load_dataset

    def load_local(name: str, configuration: str, *, split: str, streaming: bool, **_: Any) -> datasets.IterableDataset:
        assert (name, configuration, split, streaming) == ("openslr/librispeech_asr", "clean", "train.100", True)
        return load("parquet", data_files={split: str(tmp_path / "train.parquet")}, split=split, streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", load_local)
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)  # after every sample
    hub = LibriSpeechHub(calibration_subset="clean/train.100", evaluation_subset="clean/train.100")
    sample = Sets(hub).calibration(5, seed=1)
    assert len({u.id for u in sample}) == 5
    assert sample == Sets(hub).calibration(5, seed=1)
    assert [u.id for u in sample] != [u.id for u in Sets(hub).calibration(5, seed=2)]
    assert [u.id for u in Sets(hub).evaluation()["clean/train.100"]] == [row["id"] for row in rows]
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
    check_labels([Utterance("a", "IT'S  FINE", b"")], processor)
    with pytest.raises(UserError, match=r"1 of 2 transcripts .*: É \(2×\), 1 \(1×\); e\.g\. utterance b \(b\): "):
        check_labels([Utterance("a", "FINE", b""), Utterance("b", "FINE 1ÉÉ", b"")], processor)
    with pytest.raises(UserError, match=r"vocabulary: U\+200B \(1×\); e\.g\. utterance b "):
        check_labels([Utterance("b", "A\u200bB", b"")], processor)
    with pytest.raises(UserError, match=r"utterance c \(c\.wav\) has an empty transcript"):
        check_labels([Utterance("c", " ", Path("c.wav"))], processor)


def test_labels_that_are_not_the_transcript_are_refused(model_folder: Path, tmp_path: Path) -> None:
    """Although every character is in the vocabulary: ``do_lower_case`` makes capitals of letters, whatever it holds."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    tokens = json.loads((folder / "vocab.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"do_lower_case": True}))
    speaking = load_processor(str(folder))  # its vocabulary has capitals, of which it writes small letters
    how, _ = choose_normalization(["SEA TEN"], speaking.tokenizer)
    check_labels(normalized([Utterance("a", "SEA TEN", b"")], how), speaking)
    with pytest.raises(UserError, match=r"the labels of 'SEA' .* read 'sea'"):
        check_labels([Utterance("a", "SEA TEN", b"")], speaking)
    (folder / "vocab.json").write_text(json.dumps({token.lower(): index for token, index in tokens.items()}))
    with pytest.raises(
        UserError, match=r"turns 'sea' in the transcript of utterance a .*do_lower_case in tokenizer_config"
    ):
        check_labels([Utterance("a", "sea ten", b"")], load_processor(str(folder)))
    # A letter as the blank: the loss takes it for silence.
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "s"}))
    with pytest.raises(UserError, match=r"labels of 'sea' .* read 'ea'"):
        check_labels([Utterance("a", "sea ten", b"")], load_processor(str(folder)))


def test_utterances_too_short_for_their_transcript_are_refused(
    tiny_model: Callable[..., PreTrainedModel], model_folder: Path, tmp_path: Path
) -> None:
    """TEN and TEEN take 3 and 5 frames: CTC needs a blank between equal letters (160 samples are a frame)."""
    model = tiny_model("wav2vec2", vocab_size=32, conv_kernel=(20, 8), conv_stride=(20, 8))
    processor = load_processor(str(model_folder))

    def utterance(text: str, frames: int) -> Utterance:
        path = tmp_path / f"{text}-{frames}.wav"
        soundfile.write(path, np.zeros(160 * frames), 16_000)
        return Utterance(text, text, path)

    fitting = [utterance("TEN", 3), utterance("TEEN", 5)]
    check_lengths(fitting, model, processor, labels=True)
    short = utterance("TEEN", 4)
    with pytest.raises(
        UserError, match=r"utterance TEEN \(.*TEEN-4\.wav\) .* 4 frames, and its transcript needs 5.*\(1 m"
    ):
        check_lengths([*fitting, short, utterance("A B", 2)], model, processor, labels=True)
    check_lengths([short], model, processor, labels=False)
    soundfile.write(tmp_path / "click.wav", np.zeros(159), 16_000)
    with pytest.raises(UserError, match="0 frames, and the model needs 1"):
        check_lengths([Utterance("click", "A", tmp_path / "click.wav")], model, processor, labels=False)


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
    elif fault == "empty":
        audio.unlink()
        soundfile.write(audio.with_suffix(".wav"), np.zeros(0), 16_000)
    elif fault == "truncated WAV":  # libsndfile reads what there is and says nothing
        audio.unlink()
        soundfile.write(audio.with_suffix(".WAV"), np.zeros(8000), 16_000)
        audio.with_suffix(".WAV").write_bytes(audio.with_suffix(".WAV").read_bytes()[:9000])
    elif fault == "truncated Ogg":  # so it does here
        audio.unlink()
        soundfile.write(audio.with_suffix(".wav"), np.random.default_rng(0).random(80_000), 16_000, format="OGG")
        audio.with_suffix(".wav").write_bytes(audio.with_suffix(".wav").read_bytes()[:-2000])
    elif fault == "two recordings":  # libsndfile ends with the first
        audio.write_bytes(2 * audio.read_bytes())
    elif fault == "two files":
        shutil.copy(audio, audio.with_suffix(".FLAC"))
    elif fault == "same line twice":
        transcript.write_text(transcript.read_text() + transcript.read_text().splitlines()[1])
    elif fault == "two transcripts":
        shutil.copy(transcript, transcript.with_name("other.trans.txt"))
    elif fault == "UTF-16":
        transcript.write_text(transcript.read_text(), encoding="utf-16")
    elif fault == "Latin-1":
        transcript.write_text(transcript.read_text() + f"{audio.stem} É\n", encoding="latin-1")
    elif fault == "carriage returns":
        transcript.write_bytes(transcript.read_bytes().replace(b"\n", b"\r"))
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
        ("empty", r"\.wav holds no samples"),
        ("truncated WAV", r"\.WAV is truncated: 8956 of 16000 bytes"),
        ("truncated Ogg", r"\.wav is truncated: its last page is cut"),
        ("two recordings", r"\.flac is 2 recordings one after the other"),
        ("two files", r"100-7\.trans\.txt, line 1: there are .*\.FLAC and .*\.flac; keep one"),
        ("same line twice", r"line 4: .*\.flac has a transcript already, in .*100-7\.trans\.txt, line 2"),
        ("two transcripts", r"other\.trans\.txt, line 1: .*\.flac has a transcript already, in .*100-7\.trans"),
        ("UTF-16", r"100-7\.trans\.txt, line 1: the file is UTF-16"),
        ("Latin-1", r"100-7\.trans\.txt, line 4: byte 0xc9 is not UTF-8"),
        ("carriage returns", r"100-7\.trans\.txt, line 1: there is a carriage return within"),
        ("empty transcript", r"100-7\.trans\.txt, line 1 .* has an empty transcript"),
        ("no audio", r"there is no audio file .*\.flac"),
        ("no transcripts", r"has no transcripts"),
    ],
)
def test_broken_data_is_refused_by_name(own_corpus: Path, model_folder: Path, fault: str, message: str) -> None:
    _break(own_corpus, fault)

    def read_all() -> None:
        utterances = read_librispeech_folder(own_corpus, "test")
        for utterance in utterances:
            read_audio(utterance)
        check_labels(utterances, load_processor(str(model_folder)))

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
        check_labels(utterances, processor)
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
