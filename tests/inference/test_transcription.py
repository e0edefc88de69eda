"""Transcripts of whole recordings: chunks joined without a seam, the times of words, and the command."""

import itertools
import json
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import sparsewav
from sparsewav.cli.transcribe import _recording
from sparsewav.data.sets import Sets
from sparsewav.data.utterances import Utterance, read_audio
from sparsewav.errors import UserError
from sparsewav.inference import transcription
from sparsewav.inference.transcription import (
    Transcript,
    Word,
    as_srt,
    captions,
    join_chunks,
    plan_chunks,
    transcribe_recording,
)
from sparsewav.inference.wer import transcribe
from sparsewav.models.load import SpeechModel, load_speech_model
from sparsewav.settings.data import DemoData

QUIET = torch.tensor([0, 1])


@pytest.fixture(scope="module")
def demo() -> SpeechModel:
    return load_speech_model("demo")


@pytest.fixture(scope="module")
def utterances() -> list[Utterance]:
    """The first sentences of the demo's test set."""
    return Sets(DemoData()).evaluation()["test"][:8]


@pytest.fixture(scope="module")
def talk(utterances: list[Utterance], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same sentences as one recording, in stereo and at 44.1 kHz."""
    import soxr

    path = tmp_path_factory.mktemp("talk") / "talk.flac"
    pause = np.zeros(8000, np.float32)
    audio = np.concatenate([part for item in utterances for part in (read_audio(item), pause)])
    audio = soxr.resample(audio, 16_000, 44_100)
    soundfile.write(path, np.stack([audio, audio], 1), 44_100)
    return path


@pytest.mark.parametrize("frames", [1, 9, 10, 11, 17, 100])
@pytest.mark.parametrize("overlap", [0, 3, 4])
def test_chunks_cover_every_frame(frames: int, overlap: int) -> None:
    """No frame is left out, none is heard twice but in the overlaps, and the joined tokens are those of one pass."""
    chunks = plan_chunks(frames, 10, overlap)
    assert chunks[0].first == 0
    assert chunks[-1].stop == frames
    assert all(after.first == before.stop - overlap for before, after in itertools.pairwise(chunks))
    tokens = torch.randint(0, 5, (frames,), generator=torch.Generator().manual_seed(0))
    joined = join_chunks(chunks, [tokens[chunk.first : chunk.stop] for chunk in chunks], QUIET)
    assert torch.equal(joined, tokens)


def test_a_letter_at_the_seam_is_written_once() -> None:
    """Two chunks that hear a letter a frame apart hand over in a pause, where neither has half of it."""
    before = torch.tensor([2, 2, 0, 0, 0, 0, 3, 0, 4, 0])
    after = torch.tensor([0, 0, 0, 3, 0, 4, 0, 0, 5, 5])  # the same 3 and 4, one frame later than before's
    chunks = plan_chunks(16, 10, 4)
    # In the overlap (frames 6 to 9) the two read 3 0 4 0 and 0 0 0 3: no three frames in a row agree.
    assert len(join_chunks(chunks, [before, after], QUIET)) == 16
    chunks = plan_chunks(14, 10, 6)
    after = torch.tensor([0, 0, 0, 3, 0, 4, 0, 0, 5, 5])
    joined = join_chunks(chunks, [before, after], QUIET)
    letters = [
        token for token, last in zip(joined.tolist(), [0, *joined.tolist()], strict=False) if token not in (0, last)
    ]
    assert letters == [2, 3, 4, 5]


def test_chunks_read_what_the_whole_recording_reads(demo: SpeechModel, utterances: list[Utterance], talk: Path) -> None:
    """In chunks of 6 seconds a talk reads nearly as in one pass, and no word is doubled at a seam."""
    import jiwer

    whole = transcribe_recording(demo, Utterance("talk", "", talk), chunk_seconds=600)
    chunked = transcribe_recording(demo, Utterance("talk", "", talk), chunk_seconds=6, overlap_seconds=2)
    assert jiwer.cer(whole.text, chunked.text) < 0.08
    reference = " ".join(item.text for item in utterances)
    assert jiwer.wer(reference, chunked.text) < jiwer.wer(reference, whole.text) + 0.1
    doubled = re.findall(r"\b(\w{3,}) \1\b", chunked.text)
    assert doubled == re.findall(r"\b(\w{3,}) \1\b", whole.text)
    assert whole.seconds == pytest.approx(sum(len(read_audio(u)) for u in utterances) / 16_000 + 4, abs=0.1)
    times = [second for word in chunked.words for second in (word.start, word.end)]
    assert times == sorted(times)
    assert times[-1] <= whole.seconds


def test_one_chunk_is_the_evaluation(demo: SpeechModel, utterances: list[Utterance]) -> None:
    """A short recording reads as the evaluation reads it."""
    expected = transcribe(demo.model, demo.processor, utterances[:3])
    assert [transcribe_recording(demo, utterance).text for utterance in utterances[:3]] == expected


def test_python_transcribes_files_and_arrays_as_the_command_does(
    demo: SpeechModel, utterances: list[Utterance], talk: Path
) -> None:
    expected = transcribe_recording(demo, Utterance("talk", "", talk), chunk_seconds=10)
    samples, rate = soundfile.read(talk, dtype="float32")
    for given in (talk, str(talk), [talk], {"array": samples.mean(1), "sampling_rate": rate}):
        assert sparsewav.transcribe(demo, given, chunk_seconds=10) == [expected]
    texts = [transcript.text for transcript in sparsewav.transcribe(demo, utterances[:2])]
    assert texts == transcribe(demo.model, demo.processor, utterances[:2])


def test_words_are_where_they_are_said(demo: SpeechModel, utterances: list[Utterance], tmp_path: Path) -> None:
    """Two seconds of silence before a sentence move all its words by two seconds."""
    audio = read_audio(utterances[0])
    path = tmp_path / "late.wav"
    soundfile.write(path, np.concatenate([np.zeros(32_000, np.float32), audio]), 16_000)
    plain = transcribe_recording(demo, utterances[0])
    late = transcribe_recording(demo, Utterance("late", "", path))
    for moved, word in zip(late.words[-6:], plain.words[-6:], strict=True):  # before them the model hears the silence
        assert moved.text == word.text
        assert moved.start - word.start == pytest.approx(2, abs=0.15)
        assert moved.end - word.end == pytest.approx(2, abs=0.15)


def test_captions_end_at_pauses_and_lengths() -> None:
    words = [Word(f"W{i}", i * 0.5, i * 0.5 + 0.4) for i in range(10)] + [Word("LATE", 3661.0, 3661.5)]
    lines = captions(words, max_words=8)
    assert [line.text for line in lines] == ["W0 W1 W2 W3 W4 W5 W6 W7", "W8 W9", "LATE"]
    srt = as_srt(Transcript("", words, 3662.0))
    assert "3\n01:01:01,000 --> 01:01:01,500\nLATE\n" in srt


def test_refusals(demo: SpeechModel, utterances: list[Utterance], tmp_path: Path) -> None:
    soundfile.write(tmp_path / "click.wav", np.ones(100, np.float32), 16_000)
    with pytest.raises(UserError, match=r"click\.wav has 100 samples, too few"):
        transcribe_recording(demo, Utterance("click", "", tmp_path / "click.wav"))
    with pytest.raises(UserError, match="below half a chunk"):
        transcribe_recording(demo, utterances[0], chunk_seconds=4, overlap_seconds=2)
    whole = transcribe_recording(demo, utterances[0])
    assert transcribe_recording(demo, utterances[0], chunk_seconds=1e308, overlap_seconds=1e307) == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chunk", "inf"], "a chunk of inf seconds has no meaning"),
        (["--chunk", "nan"], "a chunk of nan seconds has no meaning"),
        (["--chunk", "0"], "a chunk of 0 seconds has no meaning"),
        (["--chunk", "-1"], "a chunk of -1 seconds has no meaning"),
        (["--overlap", "nan"], "an overlap of nan seconds must be"),
        (["--device", "gpu"], "--device=gpu is not known; choose auto, cpu, cuda or cuda:1"),
        (["./talk.wav", "--output", "t"], r"talk.wav and ./talk.wav would be written to one file"),
        (["TALK.WAV", "--output", "t"], r"talk.wav and TALK.WAV would be written to one file"),
    ],
)
def test_mistakes_are_refused_before_any_work(
    run_sparsewav: Callable[..., Any], arguments: list[str], message: str
) -> None:
    """In one sentence, although the audio does not exist."""
    done = run_sparsewav("talk.wav", *arguments, command="sparsewav-transcribe")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


def test_every_file_gets_its_own_transcript(
    run_sparsewav: Callable[..., Any], utterances: list[Utterance], tmp_path: Path
) -> None:
    """Whatever the folders and suffixes are; and what is wrong with one file does not stop the others."""
    for name, utterance in zip(("a/talk.wav", "b/talk.wav", "b/talk.flac", "pause.wav"), utterances, strict=False):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        soundfile.write(tmp_path / name, read_audio(utterance), 16_000)
    (tmp_path / "folder.wav").mkdir()
    names = ["folder.wav", "a/talk.wav", "b/talk.wav", "missing.wav", "b/talk.flac", "/dev/zero", "pause.wav"]
    done = run_sparsewav(*names, "--output", "t", command="sparsewav-transcribe")
    assert done.returncode == 1
    assert "error: folder.wav is neither a file nor a pipe" in done.stderr
    assert "error: missing.wav does not exist" in done.stderr
    assert "error: /dev/zero is neither a file nor a pipe" in done.stderr
    assert "Traceback" not in done.stderr
    written = {str(path.relative_to(tmp_path / "t")): path.read_text() for path in (tmp_path / "t").rglob("*.txt")}
    assert set(written) == {"a/talk.txt", "b/talk.txt", "talk.flac.txt", "pause.txt"}
    assert len(set(written.values())) == 4
    assert written["b/talk.txt"].startswith("b/talk.wav: ")


def test_an_error_that_nobody_expected_does_not_stop_the_other_files(
    run_sparsewav: Callable[..., Any], utterances: list[Utterance], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = transcription.read_audio

    def read_or_fail(utterance: Utterance, rate: int) -> Any:
        if utterance.id == str(utterances[0].audio):
            raise MemoryError("cannot allocate")
        return read(utterance, rate)

    monkeypatch.setattr(transcription, "read_audio", read_or_fail)
    done = run_sparsewav(*(str(item.audio) for item in utterances[:2]), command="sparsewav-transcribe")
    assert done.returncode == 1
    assert f"error: {utterances[0].audio}: MemoryError: cannot allocate\n" in done.stderr
    assert done.stdout.startswith(f"{utterances[1].audio}: ")


def test_what_the_terminal_says_is_short_and_true(
    utterances: list[Utterance], run_sparsewav: Callable[..., Any], tmp_path: Path
) -> None:
    """Brackets in a name are no markup, a report is a few lines, and an empty pipe is called one."""
    (tmp_path / "talk [first].flac").write_bytes(utterances[0].contents())
    reading, writing = os.pipe()
    os.close(writing)
    ours = os.dup(0)
    try:
        os.dup2(reading, 0)
        done = run_sparsewav("talk [first].flac", "-", "--accelerate", command="sparsewav-transcribe")
    finally:
        os.dup2(ours, 0)
        os.close(ours)
        os.close(reading)
    report, _, rest = done.stderr.partition("✓")
    beside = r"times as fast as dense at 250 and 1000 frames: this model 1\.00 and 1\.00; .*PyTorch bfloat16 .*\n"
    assert re.fullmatch(rf"\d+ of 41 matrices multiply sparse .*\n\d+ left dense: .*\n{beside}", report)
    assert re.fullmatch(r" talk \[first\]\.flac .* s\nerror: - has brought nothing; .*\n", rest)


def test_it_ends_quietly_when_nobody_reads_on(
    utterances: list[Utterance], run_sparsewav: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("sparsewav.cli.transcribe._transcribe", broken)
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    done = run_sparsewav(*(str(item.audio) for item in utterances[:2]), command="sparsewav-transcribe")
    assert (done.returncode, done.stderr) == (1, "")


def _write(output: Path | int, content: bytes) -> None:
    with open(output, "wb") as file:
        file.write(content)


def test_audio_from_a_pipe(
    demo: SpeechModel, utterances: list[Utterance], run_sparsewav: Callable[..., Any], tmp_path: Path
) -> None:
    """A FLAC without a length through the standard input, and a named pipe, which can be read once."""
    expected = transcribe_recording(demo, utterances[0]).text
    content = bytearray(utterances[0].contents())
    content[21:26] = bytes([content[21] & 0xF0, 0, 0, 0, 0])
    os.mkfifo(tmp_path / "pipe")
    reading, writing = os.pipe()
    for output in (tmp_path / "pipe", writing):
        threading.Thread(target=_write, args=(output, bytes(content)), daemon=True).start()
    ours = os.dup(0)
    try:
        os.dup2(reading, 0)
        done = run_sparsewav("-", "pipe", command="sparsewav-transcribe")
    finally:
        os.dup2(ours, 0)
        os.close(ours)
        os.close(reading)
    assert done.stdout == f"-: {expected}\npipe: {expected}\n", done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("piped", "message"),
    [(b"", "pipe has brought nothing"), (b"no audio", r"pipe is not readable audio \(Format not recognised\.\)")],
)
def test_a_pipe_without_audio(piped: bytes, message: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    threading.Thread(target=_write, args=(tmp_path / "pipe", piped), daemon=True).start()
    with pytest.raises(UserError, match=message):
        read_audio(_recording(str(tmp_path / "pipe")))


def test_command(run_sparsewav: Callable[..., Any], talk: Path, tmp_path: Path) -> None:
    """Every format, several files, one of which is broken: the others are done, and the exit code tells."""
    (tmp_path / "broken.mp3").write_bytes(b"not audio")
    (tmp_path / "short.wav").write_bytes(b"")
    done = run_sparsewav(str(talk), "broken.mp3", "--format", "json", command="sparsewav-transcribe")
    assert done.returncode == 1
    assert "broken.mp3 is not readable audio" in done.stderr
    assert "Traceback" not in done.stderr
    record = json.loads(done.stdout)
    assert record["file"] == str(talk)
    assert record["text"] == " ".join(word["text"] for word in record["words"])
    assert all(round(word["end"], 3) == word["end"] for word in record["words"]), "times in whole milliseconds"
    text = run_sparsewav(str(talk), command="sparsewav-transcribe")
    assert text.stdout.strip() == record["text"]
    files = run_sparsewav(str(talk), "--format", "srt", "--output", "subtitles", command="sparsewav-transcribe")
    assert files.returncode == 0
    assert "-->" in (tmp_path / "subtitles" / "talk.srt").read_text()
    several = run_sparsewav(str(talk), str(talk), "--format", "srt", command="sparsewav-transcribe")
    assert several.returncode == 1
    assert "--output FOLDER" in several.stderr
    missing = run_sparsewav(str(talk), "--model", "./nowhere", command="sparsewav-transcribe")
    assert missing.returncode == 1
    assert "error: ./nowhere is not a folder" in missing.stderr  # and no setting, which the command does not have
