"""Data sets of Hugging Face's library, saved or as folders, with torchcodec absent and nothing decoded by it."""

import gc
import pickle
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from sparsewav import cache
from sparsewav.data.librispeech import read_librispeech_folder
from sparsewav.data.sets import Sets
from sparsewav.data.utterances import Utterance, audio_seconds, read_audio, with_shared_audio
from sparsewav.errors import UserError
from sparsewav.settings.data import HuggingFace


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)  # after every stream


@pytest.fixture
def saved(corpus: Path, tmp_path: Path) -> Path:
    """A ``DatasetDict`` on the disk, with the columns of several data sets on the hub; its audio lies within it."""
    splits = {}
    for name in ("train", "test"):
        rows: dict[str, list[Any]] = {"audio": [], "transcription": [], "speaker_id": [], "gender": []}
        for item in read_librispeech_folder(corpus, name):
            rows["audio"].append({"bytes": item.contents(), "path": f"{item.id}.flac"})
            rows["transcription"].append(item.text.lower())
            rows["speaker_id"].append(int(item.speaker or 0))
            rows["gender"].append("x")
        table = datasets.Dataset.from_dict(rows)
        table = table.cast_column("audio", datasets.Audio(sampling_rate=16_000))
        splits[name] = table.with_format("numpy", columns=["gender"])  # a view of who saved it
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


def _same(got: list[Utterance], corpus: Path, subset: str) -> None:
    expected = {item.id: item for item in read_librispeech_folder(corpus, subset)}
    assert [item.id for item in got] == list(expected)
    for item in got:
        assert item.text == expected[item.id].text.lower()
        assert item.content_hash() == expected[item.id].content_hash()
        assert audio_seconds(item) == audio_seconds(expected[item.id])
    np.testing.assert_array_equal(read_audio(got[-1]), read_audio(expected[got[-1].id]))


def test_a_saved_data_set_is_read_with_its_columns_found(saved: Path, corpus: Path) -> None:
    sets = Sets(HuggingFace(path=str(saved)))
    test, train = sets.evaluation()["test"], sets.training(0)
    _same(test, corpus, "test")
    _same(train, corpus, "train")
    assert {item.speaker for item in train} == {"100", "101"}
    assert test[1].source == f"row 1 of test ({test[1].id})"
    assert sets.recognised()[0] == f"test of {saved} is read from its columns audio and transcription"
    assert with_shared_audio(test, [*train, test[3]]) == [test[3]]
    assert len(sets.calibration(5, 1)) == 5
    sent = pickle.dumps(train)  # to the other processes of a run
    assert len(sent) < 100_000, "the audio stays where it is"
    np.testing.assert_array_equal(read_audio(pickle.loads(sent)[3]), read_audio(train[3]))
    again = Sets(HuggingFace(path=str(saved))).evaluation()["test"]
    assert cache.utterances_fingerprint(again) == cache.utterances_fingerprint(test)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # of datasets
@pytest.mark.parametrize("streaming", [False, True])
def test_an_audiofolder_is_read_by_its_metadata(corpus: Path, tmp_path: Path, streaming: bool) -> None:
    for subset in ("train", "test"):
        folder = tmp_path / "folder" / subset
        folder.mkdir(parents=True)
        lines = ["file_name,sentence"]
        for item in read_librispeech_folder(corpus, subset):
            shutil.copy(str(item.audio), folder)
            lines.append(f"{item.id}.flac,{item.text.lower()}")
        (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    sets = Sets(HuggingFace(path=str(tmp_path / "folder"), streaming=streaming))
    _same(sorted(sets.evaluation()["test"], key=lambda item: item.id), corpus, "test")
    assert len({item.id for item in sets.calibration(7, 0)}) == 7
    gc.collect()  # files that the library left open, of which Python warns


def test_the_calibration_sample_of_a_stream_is_shuffled_filtered_and_seeded(saved: Path) -> None:
    data = HuggingFace(path=str(saved), streaming=True, max_seconds=0.7)
    sets = Sets(data)
    sample = sets.calibration(6, 1)
    assert len({item.id for item in sample}) == 6
    assert all(audio_seconds(item) <= 0.7 for item in sample)
    assert sample == Sets(data).calibration(6, 1)
    assert [item.id for item in sample] != [item.id for item in Sets(data).calibration(6, 2)]
    (said,) = sets.recognised()
    assert said.startswith("calibration on the first 6 utterances of the stream of train of ")
    assert said.endswith("a buffer of 24 rows are shuffled with seed 1: no uniform sample of all its rows")
    (left,) = sets.left_out()
    assert " utterances of train (calibration) are left out: " in left
    with pytest.raises(UserError, match=r"calibration\.utterances=9 asks for more than the 8 utterances"):
        sets.calibration(9, 1)


def test_rows_without_audio_or_text_are_named_or_left_out(saved: Path, tmp_path: Path) -> None:
    table = datasets.load_from_disk(str(saved / "test")).cast_column("audio", datasets.Audio(decode=False))
    rows = table.to_list()
    rows[1]["transcription"] = None
    rows[2]["audio"] = None
    rows[4]["audio"] = {"bytes": b"nothing", "path": "x.wav"}
    broken = datasets.Dataset.from_list(rows).cast_column("audio", datasets.Audio())
    datasets.DatasetDict({"test": broken}).save_to_disk(str(tmp_path / "broken"))
    for streaming in (False, True):
        data = HuggingFace(path=str(tmp_path / "broken"), streaming=streaming)
        with pytest.raises(UserError, match=r"^row [12] of test \(.*\) has no (transcript|audio); .*1 other "):
            Sets(data).evaluation()
        sets = Sets(data.changed(skip_broken=True))
        assert len(sets.evaluation()["test"]) == 3
        rows_out = sorted(row["source"].partition(" (")[0] for row in sets.broken())
        assert rows_out == [f"row {n} of test" for n in (1, 2, 4)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split_test": "tset"}, r"has no split tset; it has test, train"),
        (
            {"text_column": "words"},
            r"data\.text_column=words is not in data\.path=.*; it has audio, transcription, sp",
        ),
        (
            {"text_column": "speaker_id"},
            r"the column speaker_id of data\.path=.*saved has no text, but int64; name ano",
        ),
        ({"audio_column": "speaker_id"}, r"data\.split_test=test cannot be read from .*saved: "),
        ({"path": "{}/test"}, r"is a single data set; name the folder that it is in, .*saved, and test as the split"),
        ({"path": "{}/nowhere"}, r"data\.split_test=test cannot be read from .*nowhere: "),
    ],
)
def test_what_is_not_there_is_refused_in_one_sentence(saved: Path, settings: dict[str, str], message: str) -> None:
    settings = {"path": "{}"} | settings
    data = HuggingFace(**{key: value.format(saved) for key, value in settings.items()})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message) as error:
        Sets(data).evaluation()
    assert "\n" not in str(error.value)


def test_a_data_set_needs_no_column_of_text_where_nobody_reads_it(saved: Path, tmp_path: Path) -> None:
    table = datasets.load_from_disk(str(saved / "test")).remove_columns("transcription")
    datasets.DatasetDict({"test": table, "train": table}).save_to_disk(str(tmp_path / "heard"))
    for streaming in (False, True):
        sets = Sets(HuggingFace(path=str(tmp_path / "heard"), streaming=streaming))
        sets.needs_text = False
        assert {item.text for item in [*sets.evaluation()["test"], *sets.calibration(3, 0)]} == {""}
        assert sets.recognised()[0].endswith(" is read from its column audio, without transcripts")


def test_columns_that_may_be_meant_are_all_named(saved: Path, tmp_path: Path) -> None:
    table = datasets.load_from_disk(str(saved / "test"))
    table = table.add_column("sentence", ["x"] * len(table))
    datasets.DatasetDict({"test": table}).save_to_disk(str(tmp_path / "two"))
    data = HuggingFace(path=str(tmp_path / "two"))
    message = r"two sentence and transcription may have the text; name it with data\.text_column=, of audio, transcr"
    with pytest.raises(UserError, match=message):
        Sets(data).evaluation()
    assert Sets(data.changed(text_column="sentence")).evaluation()["test"][0].text == "x"
