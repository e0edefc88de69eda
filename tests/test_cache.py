"""Results are kept between runs for as long as nothing that they depend on has changed."""

import os
import time
from pathlib import Path

import pytest

import sparsewav
from sparsewav import cache
from sparsewav.files import content_hash


@pytest.mark.parametrize("place", ["new.py", "pruning/new.py", "a/folder/within/another/new.py", "kernel.cpp"])
def test_code_anywhere_in_the_package_changes_the_fingerprint(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "cache.py"))
    (tmp_path / "cache.py").touch()
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    fingerprints = set()
    for content in (None, "one = 1", "one = 2"):
        if content is not None:
            path.write_text(content)
        cache.code_fingerprint.cache_clear()
        fingerprints.add(cache.code_fingerprint())
    cache.code_fingerprint.cache_clear()
    assert len(fingerprints) == 3


def test_the_fingerprint_covers_every_source_file_of_the_package() -> None:
    package = Path(sparsewav.__file__).parent
    sources = {path for path in package.rglob("*") if path.suffix in (".py", ".cpp")}
    assert sources == set(cache.code_files())


def test_content_that_changed_is_noticed_whatever_the_time_of_change_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSEWAV_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    os.utime(path, ns=(10**18, 10**18))
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + 10**10)  # the file is old enough for its record
    first = content_hash(path)
    assert content_hash(path) == first
    records = (tmp_path / "cache" / "file_hashes.jsonl").read_text()
    assert first in records
    path.write_bytes(b"two")
    os.utime(path, ns=(10**18, 10**18))
    assert content_hash(path) != first
