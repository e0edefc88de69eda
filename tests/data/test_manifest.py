"""Manifests: CSV, TSV, JSON lines, Common Voice, NeMo and Kaldi, each read as its own tools write it."""

import csv
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from sparsewav.data import espeak
from sparsewav.data.manifest import read_manifest
from sparsewav.data.sentences import draw_sentence
from sparsewav.data.utterances import Listing, audio_seconds, read_audio, with_shared_audio
from sparsewav.errors import UserError
from sparsewav.settings.data import Manifest

RATE = 16_000


def _noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-9999, 9999, round(seconds * RATE), dtype=np.int16)


def _wavs(folder: Path, *names: str) -> None:
    """Write a second of audio, another one in every file."""
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name, _noise(1, seed), RATE)


def _read(path: Path, **settings: Any) -> Listing:
    return read_manifest(Manifest(**settings), str(path), "data.test")


def _rows(listing: Listing) -> list[tuple[str, str]]:
    return [(item.id, item.text) for item in listing.utterances]


def test_common_voice_is_recognised_and_its_quotes_are_characters(tmp_path: Path) -> None:
    _wavs(tmp_path, "clips/cv_2.mp3", "clips/cv_1.mp3")
    lines = [
        "client_id\tpath\tsentence\tup_votes",
        'anna\tcv_2.mp3\t"Straße", sagte  er.\t2',
        'bert\tcv_1.mp3\tEin "Wort\t2',
    ]
    (tmp_path / "test.tsv").write_text("\ufeff" + "\r\n".join(lines) + "\r\n", encoding="utf-8")
    listing = _read(tmp_path / "test.tsv")
    assert _rows(listing) == [("cv_1", 'Ein "Wort'), ("cv_2", '"Straße", sagte er.')]
    assert [item.speaker for item in listing.utterances] == ["bert", "anna"]
    assert listing.utterances[1].source == f"{tmp_path / 'test.tsv'} line 2 ({tmp_path / 'clips/cv_2.mp3'})"
    assert listing.recognised == (
        f"{tmp_path / 'test.tsv'} is read as Common Voice: audio in path, text in sentence, with client_id, paths from "
        f"{tmp_path / 'clips'}"
    )
    assert len(read_audio(listing.utterances[0])) == pytest.approx(RATE, rel=0.1)


def test_csv_has_quotes_and_lines_within_them_and_any_column_can_be_named(tmp_path: Path) -> None:
    _wavs(tmp_path / "wav", "a.wav", "deep/b.wav")
    text = 'file;words;id\na.wav;"eins; ""zwei"",\ndrei";second\ndeep/b.wav;vier;first\n'
    (tmp_path / "list.csv").write_text(text)
    settings = {"audio_column": "file", "text_column": "words", "audio_root": str(tmp_path / "wav")}
    listing = _read(tmp_path / "list.csv", **settings)
    assert _rows(listing) == [("first", "vier"), ("second", 'eins; "zwei", drei')]
    assert [str(item.place).rpartition(" ")[2] for item in listing.utterances] == ["4", "2"]
    assert not listing.recognised, "all of it was said"


def test_values_that_are_none_are_no_words_and_words_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON's NaN, as pandas writes it, is no transcript, speaker or duration; ``nan`` in a table is a word."""
    _wavs(tmp_path, "a.wav", "b.wav", "c.wav")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m.csv").write_text("audio\ttext\n~/a.wav\tnan\nb.wav\tnull\n")
    assert _rows(_read(tmp_path / "m.csv")) == [("a", "nan"), ("b", "null")]
    lines = [
        '{"audio_filepath": "a.wav", "text": NaN, "speaker": NaN, "duration": NaN}',
        '{"audio_filepath": "b.wav", "text": 42, "speaker": 0}',
        '{"audio_filepath": "c.wav", "text": ["x"]}',
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    listing = _read(tmp_path / "m.jsonl")
    assert _rows(listing) == [("a", ""), ("b", "42")]
    assert [(item.speaker, item.end) for item in listing.utterances] == [(None, None), ("0", None)]
    assert listing.broken[0].reason.endswith("m.jsonl line 3 has no text in text, but ['x']; correct the line")


def test_a_nemo_manifest_may_have_parts_of_recordings(tmp_path: Path) -> None:
    """Each part is those very samples; a duration that was rounded is that of the whole recording."""
    samples = _noise(3.00003)
    for name in ("long.wav", "long.flac", "long.mp3"):
        soundfile.write(tmp_path / name, samples, RATE)
    rows = [
        {"audio_filepath": "long.wav", "duration": 3.0, "text": "all of it"},
        {"audio_filepath": "long.wav", "offset": 0.5, "duration": 1.25, "text": "some"},
        {"audio_filepath": "long.flac", "offset": 2.5, "duration": None, "text": "the end"},
        {"audio_filepath": "long.mp3", "offset": 1, "duration": 0.5, "text": "compressed"},
        {"audio_filepath": "long.flac", "offset": 0, "duration": 0.5, "text": "the beginning", "speaker": 7},
    ]
    (tmp_path / "train.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {item.text: item for item in _read(tmp_path / "train.json").utterances}
    for text, first, last in (
        ("all of it", 0, len(samples)),
        ("some", 8_000, 28_000),
        ("the end", 40_000, len(samples)),
        ("the beginning", 0, 8_000),
    ):
        np.testing.assert_array_equal(read_audio(found[text]), samples[first:last].astype(np.float32) / 2**15)
        assert audio_seconds(found[text]) == (last - first) / RATE
    compressed = replace(found["compressed"], start=0.0, end=None)
    np.testing.assert_array_equal(read_audio(found["compressed"]), read_audio(compressed)[16_000:24_000])
    assert found["the beginning"].speaker == "7"
    assert found["some"].id == "long.wav-0000500-0001750"
    assert found["compressed"].id == "long.mp3"


def test_parts_of_one_recording_are_shared_where_their_times_meet(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", _noise(9), RATE)
    (tmp_path / "copy.wav").write_bytes((tmp_path / "a.wav").read_bytes())

    def parts(name: str, *times: tuple[float, float]) -> list[Any]:
        rows = [
            {"audio_filepath": name, "offset": start, "duration": end - start, "text": str(start)}
            for start, end in times
        ]
        (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return _read(tmp_path / "m.jsonl").utterances

    measured = parts("a.wav", (0, 1), (1, 2.5), (4, 5), (7, 8))
    learned = parts("copy.wav", (2, 3), (5, 6), (6.5, 7.25))
    assert [item.text for item in with_shared_audio(measured, learned)] == ["1", "7"]


def _kaldi(folder: Path) -> Path:
    soundfile.write(folder / "long.wav", _noise(4), RATE)
    soundfile.write(folder / "short.wav", _noise(1, 1), RATE)
    (folder / "wav.scp").write_text("rec1 long.wav\nrec2 short.wav\n")
    (folder / "segments").write_text("anna-2 rec1 2.5 -1\nanna-1 rec1 0.25 1.5\nbert-1 rec2 0 1\ncarl-1 rec2 0 1\n")
    (folder / "text").write_text("anna-2 второе\nanna-1 первое  слово\nbert-1 ja\n", encoding="utf-8")
    (folder / "utt2spk").write_text("anna-1 anna\nanna-2 anna\nbert-1 bert\n")
    return folder


def test_a_folder_of_kaldi_is_read_with_its_segments_and_speakers(tmp_path: Path) -> None:
    listing = _read(_kaldi(tmp_path))
    assert _rows(listing) == [("anna-1", "первое слово"), ("anna-2", "второе"), ("bert-1", "ja")]
    assert [item.speaker for item in listing.utterances] == ["anna", "anna", "bert"]
    expected = _noise(4).astype(np.float32) / 2**15
    np.testing.assert_array_equal(read_audio(listing.utterances[0]), expected[4_000:24_000])
    np.testing.assert_array_equal(read_audio(listing.utterances[1]), expected[40_000:])
    assert "folder of Kaldi (wav.scp, text, segments, utt2spk)" in listing.recognised
    assert listing.unused.endswith("is left out: 1, e.g. carl-1")
    (tmp_path / "segments").unlink()
    (tmp_path / "text").write_text("rec2 whole\n")
    assert [audio_seconds(item) for item in _read(tmp_path / "wav.scp").utterances] == [1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.csv", "path,words\na.wav,x\n", r"m\.csv has no column audio and no column text; it has path, words; name"),
        ("m.csv", "audio,text\n", r"data\.test=.*m\.csv has no utterances"),
        ("m.csv", "", r"has no utterances"),
        ("m.tsv", "audio\ttext\na.wav\tx\t\n", r"no line that can be read, e\.g\. line 2 has 3 fields, and the header"),
        ("m.csv", "audio,text\na.wav,x\na.wav,y\n", r"line 3 \(.*a\.wav\) is there a second time, after .*line 2"),
        ("m.csv", "id,audio,text\n1,a.wav,x\n1,b.wav,y\n", r"line 3 \(.*b\.wav\) has the id 1 a second time, after"),
        ("m.csv", "id,audio,text\n1,a.wav,x\n,b.wav,y\n", r"line 3 \(.*b\.wav\) has no id, which other lines have"),
        ("m.csv", "audio,text,text\na.wav,x,y\n", r"m\.csv line 1 names the column text twice"),
        ("m.csv", 'audio,text\na.wav,x\nb.wav,"y\n', r"m\.csv line 3: .*; correct the quotes"),
        ("m.json", '[{"audio": "a.wav"}]', r"m\.json is a list in JSON; write one object a line"),
        (
            "m.json",
            '{"audio_filepath": "a.wav", "text": "x", "duration": "1:30"}',
            r"line 1: duration is '1:30', which",
        ),
    ],
)
def test_a_wrong_manifest_is_refused_in_one_sentence(tmp_path: Path, name: str, content: str, message: str) -> None:
    _wavs(tmp_path, "a.wav", "b.wav")
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        _read(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "wav.scp",
            "rec1 sph2pipe -f wav a.sph |\n",
            r"wav\.scp line 1 is a pipe \(sph2pipe .*\|\), and no command is",
        ),
        ("segments", "anna-1 rec1 2 1\n", r"segments line 1 goes from 2 to 1 s"),
        ("segments", "anna-1 rec1\n", r"segments line 1 does not name a recording, its start and its end"),
        ("text", "a x\nb y\na z\n", r"text line 3: a is there already, on line 1"),
        ("text", None, r"is a folder without text; name a manifest in it"),
    ],
)
def test_a_wrong_folder_of_kaldi_is_refused(tmp_path: Path, file: str, content: str | None, message: str) -> None:
    _kaldi(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=message):
        _read(tmp_path)


def test_times_behind_the_end_of_a_recording_are_refused_by_line(tmp_path: Path) -> None:
    """Up to half a second is rounding of whoever cut it, as for Kaldi."""
    _kaldi(tmp_path)
    (tmp_path / "segments").write_text("anna-1 rec2 0.5 1.4\nanna-2 rec2 0.5 1.6\nbert-1 rec2 1.1 1.3\n")
    late, *wrong = _read(tmp_path).utterances
    assert len(read_audio(late)) == audio_seconds(late) * RATE == 8_000
    for item in wrong:
        with pytest.raises(
            UserError, match=r"text line \d \(.*short\.wav\) is said to be at .* s of a recording of 1 s"
        ):
            audio_seconds(item)


@pytest.fixture
def spoken(tmp_path: Path) -> Path:
    """Two files of Common Voice's with sentences that the demo model knows, of which one clip is damaged."""
    generator = np.random.default_rng(0)
    (tmp_path / "cv" / "clips").mkdir(parents=True)
    for split, count, voice in (("train", 8, "en-us+m3"), ("test", 8, "en-us+f2")):
        lines = ["client_id\tpath\tsentence"]
        for number in range(count):
            sentence = draw_sentence(generator, for_evaluation=split == "test")
            samples = espeak.speak(sentence.lower(), voice, words_per_minute=150, pitch=50, pitch_range=50)
            samples = samples / np.abs(samples).max() / 2 + generator.standard_normal(len(samples)) * 1e-3
            soundfile.write(tmp_path / "cv/clips" / f"{split}_{number}.mp3", samples, espeak.SAMPLE_RATE)
            lines.append(f"{voice}\t{split}_{number}.mp3\t{sentence.lower()}")
        (tmp_path / "cv" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    (tmp_path / "cv/clips/train_3.mp3").write_bytes(b"damaged")
    return tmp_path / "cv"


@pytest.mark.slow
def test_a_whole_run_reads_common_voice_and_lists_what_it_left_out(
    spoken: Path, run_sparsewav: Callable[..., Any], tmp_path: Path
) -> None:
    command = [
        *("data=manifest", f"data.train={spoken / 'train.tsv'}", f"data.test={spoken / 'test.tsv'}"),
        *("calibration.utterances=5", "allocation=uniform", "sparsity.target=0.3", "device=cpu", "hydra.run.dir=run"),
        *("data.max_seconds=60", "save_model=false"),
    ]
    refused = run_sparsewav(*command)
    assert refused.returncode == 1
    sentence = (
        r"train\.tsv line 5 \(.*train_3\.mp3\) is not readable audio .*; data\.skip_broken=true goes on without\n"
    )
    assert re.search(sentence, refused.stdout)
    command.append("data.skip_broken=true")
    done = run_sparsewav(*command)
    assert done.returncode == 0, done.stdout
    assert f"{spoken / 'test.tsv'} is read as Common Voice: audio in path, text in sentence" in done.stdout
    assert f"1 of 8 utterances of {spoken / 'train.tsv'} are left out: 1 by data.skip_broken=true" in done.stdout
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["wer_dense"] < 0.3, "audio and transcripts belong together"
    assert metrics["n_utterances"] == 8
    assert metrics["left_out"][str(spoken / "train.tsv")] == {"listed": 8, "max_seconds": 0, "skip_broken": 1}
    (row,) = csv.DictReader((tmp_path / "run/left_out.csv").read_text().splitlines())
    assert row["id"] == "train_3"
    assert row["reason"].startswith(f"{spoken / 'train.tsv'} line 5 ({spoken / 'clips/train_3.mp3'}) is not readable")
    assert "Done already" in run_sparsewav(*command).stdout
    lines = (spoken / "test.tsv").read_text().splitlines()
    (spoken / "test.tsv").write_text("\n".join([lines[0], *reversed(lines[1:])]))
    assert "Done already" in run_sparsewav(*command).stdout, "the order of lines changes nothing"
