"""Filters, broken files and samples, of any source of speech."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from sparsewav.data.sets import Sets, refuse_unreadable
from sparsewav.errors import UserError
from sparsewav.settings.data import LibriSpeechFolder, Manifest


@pytest.fixture
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twenty utterances of 0.1 to 2 seconds; every fifth has a digit in its text."""
    monkeypatch.setenv("SPARSEWAV_CACHE", str(tmp_path / "cache"))
    rows = ["audio,text"]
    for number in range(1, 21):
        samples = np.random.default_rng(number).standard_normal(1600 * number) * 0.1
        soundfile.write(tmp_path / f"{number:02}.wav", samples, 16_000)
        rows.append(f"{number:02}.wav,{'TEN 10' if number % 5 == 0 else 'SEA'}")
    (tmp_path / "all.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "all.csv"


def _sets(manifest: Path, **settings: Any) -> Sets:
    return Sets(Manifest(train=str(manifest), test=str(manifest), **settings))


def test_filters_come_before_the_sample_and_are_counted(manifest: Path) -> None:
    sets = _sets(manifest, min_seconds=0.45, max_seconds=1.55, text_filter="[A-Z ]+", training_utterances=4)
    expected = [f"{number:02}" for number in (6, 7, 8, 9, 11, 12, 13, 14)]
    assert [item.id for item in sets.evaluation()[str(manifest)]] == expected
    assert {item.id for item in sets.calibration(8, 0)} == set(expected)
    assert {item.id for item in sets.training(1)} < set(expected)
    counts = {"listed": 20, "text_filter": 4, "min_seconds": 4, "max_seconds": 4}
    assert sets.counts() == {str(manifest): counts}
    assert sets.left_out() == [
        f"12 of 20 utterances of {manifest} are left out: 4 by data.text_filter=[A-Z ]+, 4 by data.min_seconds=0.45, "
        "4 by data.max_seconds=1.55"
    ]
    with pytest.raises(UserError, match=r"=9 asks for more than the 8 utterances"):
        sets.calibration(9, 0)
    with pytest.raises(UserError, match=r"^data\.test=.*all\.csv: all of 20 utterances are left out, 20 by data\.min"):
        _sets(manifest, min_seconds=3).evaluation()


def _break_some(manifest: Path) -> None:
    folder = manifest.parent
    (folder / "03.wav").unlink()
    (folder / "04.wav").write_bytes(b"no audio")
    (folder / "07.wav").write_bytes(b"")
    content = (folder / "09.wav").read_bytes()
    (folder / "09.wav").write_bytes(content[:-1000])
    soundfile.write(folder / "11.wav", np.full(8000, np.nan), 16_000, subtype="FLOAT")  # its header is fine
    manifest.write_text(manifest.read_text().replace("02.wav,SEA", "02.wav,").replace("13.wav,SEA", "13.wav,SEA,TEN"))


def test_the_first_broken_line_is_named_and_the_others_are_counted(manifest: Path) -> None:
    _break_some(manifest)
    with pytest.raises(
        UserError,
        match=r"^.*all\.csv line 4: there is no audio file .*03\.wav; .* \(and 2 others cannot be read\); "
        r"data\.skip_broken=true goes on without$",
    ):
        _sets(manifest).evaluation()
    manifest.write_text("audio,text\n" + "".join(f"{number:02}.wav,SEA\n" for number in (1, 4, 5, 7, 9)))
    with pytest.raises(
        UserError, match=r"line 3 \(.*04\.wav\) is not readable audio .* \(and 2 others cannot be read\)"
    ):
        refuse_unreadable(_sets(manifest).evaluation()[str(manifest)])


def test_broken_files_are_left_out_counted_and_listed(manifest: Path) -> None:
    _break_some(manifest)
    sets = _sets(manifest, skip_broken=True)
    whole = [f"{number:02}" for number in range(1, 21) if number not in (2, 3, 4, 7, 9, 11, 13)]
    assert [item.id for item in sets.evaluation()[str(manifest)]] == whole
    assert sets.counts() == {str(manifest): {"listed": 20, "skip_broken": 7}}
    assert {Path(row["id"]).name for row in sets.broken()} == {"02", "03", "04", "07", "09", "11", "all.csv line 14"}
    assert all(row["reason"] and row["subset"] == str(manifest) for row in sets.broken())
    (sentence,) = sets.left_out()
    assert sentence.startswith(f"7 of 20 utterances of {manifest} are left out: 7 by data.skip_broken=true, e.g. ")


def test_a_sample_has_no_broken_file_and_is_always_the_same(manifest: Path) -> None:
    """Decoding finds what the header does not say; only what is drawn is decoded."""
    soundfile.write(manifest.parent / "11.wav", np.full(8000, np.nan), 16_000, subtype="FLOAT")
    for seed in range(5):
        drawn = [item.id for item in _sets(manifest, skip_broken=True).calibration(12, seed)]
        assert "11" not in drawn
        assert len(set(drawn)) == 12
        assert drawn == [item.id for item in _sets(manifest, skip_broken=True).calibration(12, seed)]


def test_a_librispeech_folder_skips_what_is_broken_too(own_corpus: Path, tmp_path: Path) -> None:
    data = LibriSpeechFolder(root=str(own_corpus), evaluation_subset="test", skip_broken=True)
    names = [item.id for item in Sets(data).evaluation()["test"]]
    paths = sorted((own_corpus / "test").rglob("*.flac"))
    paths[0].unlink()
    paths[1].write_bytes(paths[1].read_bytes()[:2000])
    assert [item.id for item in Sets(data).evaluation()["test"]] == names[2:]
    data.skip_broken = False
    with pytest.raises(UserError, match=r"there is no audio file .*; data\.skip_broken=true goes on without$"):
        Sets(data).evaluation()
