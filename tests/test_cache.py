"""Results are kept between runs for as long as nothing that they depend on has changed."""

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import sparsewav
from sparsewav import cache
from sparsewav.data.utterances import Utterance
from sparsewav.errors import UserError
from sparsewav.files import (
    CHECKSUMS,
    cannot_write,
    content_hash,
    locked,
    remove_leftovers,
    temporary_name,
    write_folder,
)
from sparsewav.pruning import Hessians


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


def _flip(path: Path) -> None:
    """Change one bit, and neither the size nor the time of change."""
    status, content = path.stat(), bytearray(path.read_bytes())
    content[-10] ^= 0x40
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("hessians.safetensors", _flip),
        ("hessians.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-100])),
        ("hessians.safetensors", Path.unlink),
        ("hessians.json", lambda path: path.write_text("{}")),
        (CHECKSUMS, Path.unlink),
        (CHECKSUMS, lambda path: path.write_text("[]")),
    ],
    ids=["flipped", "truncated", "missing", "edited", "no checksums", "other checksums"],
)
def test_what_is_damaged_in_the_cache_is_made_again(
    name: str,
    harm: Callable[[Path], object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("SPARSEWAV_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "500")
    hessians = Hessians({"q": torch.eye(40)}, {"q": "q", "k": "q"}, 7, {"q": 7})

    def cached() -> tuple[Path, bool]:
        return cache.cached_folder("hessians", {"of": 1}, lambda to: cache.save_hessians(hessians, to), enabled=True)

    folder, _ = cached()
    assert cached() == (folder, True)
    assert capsys.readouterr().out == ""
    harm(folder / name)
    assert cached() == (folder, False)
    assert capsys.readouterr().out == f"! {folder / name} is damaged; it is made again\n"
    assert "is damaged" in caplog.text
    assert cached() == (folder, True)
    found = cache.load_hessians(folder, torch.device("cpu"))
    assert torch.equal(found.by_input["q"], torch.eye(40))
    assert found.reads == hessians.reads


def test_statistics_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    broken = torch.eye(3)
    broken[1, 2] = float("nan")
    cache.save_hessians(Hessians({"layers.0.q": torch.eye(3), "layers.1.q": broken}, {"k": "layers.1.q"}), tmp_path)
    with pytest.raises(UserError, match=r"^the Hessian in .* of layers\.1\.q is not finite; .*cache=false$"):
        cache.load_hessians(tmp_path, torch.device("cpu"))
    with pytest.raises(UserError, match=r"^the Hessian's trace of k is not finite"):
        cache.check_finite({"q": -1.0, "k": float("inf")}, "the Hessian's trace")


def test_what_killed_processes_left_goes_and_what_others_use_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSEWAV_CACHE", str(tmp_path / "cache"))
    script = (
        "import os, signal, sys; from pathlib import Path; from sparsewav.files import *;"
        "a = write_folder(cache_folder() / 'hessians' / 'key'); a.__enter__().joinpath('h').touch();"
        "b = write_file(Path(sys.argv[1], 'metrics.json')); b.__enter__().touch();"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    (tmp_path / "out").mkdir()
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")], check=False)

    def found() -> list[str]:
        return sorted(path.name for path in tmp_path.rglob("*.part"))

    left = found()
    assert len(left) == 2
    kept = [temporary_name(".model.") + "abc.part", ".model.elsewhere-1-abc.part", "held.lock", "new.lock"]
    gone = [".model.elsewhere-2-abc.part", ".old.lock"]
    others = ["sparsewav-demo-2026-07-best", ".part", ".notes.part"]  # whose names are not ours
    for name in [*kept, *gone, *others]:
        (tmp_path / "out" / name).touch()
        if name not in (kept[1], "new.lock"):
            os.utime(tmp_path / "out" / name, (time.time() - 100_000,) * 2)
    with locked(tmp_path / "out" / "held.lock"):
        os.utime(tmp_path / "out" / "held.lock", (time.time() - 100_000,) * 2)
        remove_leftovers(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*kept, *others])
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_a_process_says_what_it_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sparsewav.files, "_QUIETLY", 0.05)

    def wait() -> None:
        with locked(tmp_path / "a.lock"):
            pass

    with ThreadPoolExecutor() as threads:
        with locked(tmp_path / "a.lock"):
            waiting = threads.submit(wait)
            time.sleep(0.5)
            assert not waiting.done()
        waiting.result(timeout=5)
    assert capsys.readouterr().out.splitlines() == [
        f"Waiting for another process that is making the same; it holds {tmp_path / 'a.lock'}"
    ]


def test_a_full_disk_is_told_from_other_errors(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    full = OSError(errno.ENOSPC, "No space left on device")
    assert str(cannot_write(full, path)).startswith(f"cannot write {path}: No space left on device; free some space")
    full.filename = "/other/tensor"
    assert str(cannot_write(full, path)).startswith("cannot write /other/tensor: No space left")
    assert cannot_write(FileNotFoundError(errno.ENOENT, "No such file", "/data/a.flac"), path) is None
    denied = PermissionError(errno.EACCES, "Permission denied", str(tmp_path))
    assert str(cannot_write(denied, path)).startswith(f"cannot write {path}: Permission denied; choose another folder")
    assert cannot_write(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), path) is None
    with pytest.raises(FileNotFoundError), write_folder(path):
        (tmp_path / "elsewhere" / "speech.flac").read_bytes()


@pytest.mark.parametrize("library", ["torch", "safetensors", "pandas", "json"])
def test_what_libraries_raise_on_a_full_disk_is_one_sentence(library: str, tmp_path: Path) -> None:
    """A limit on the size of a file stands for a full disk."""
    save = {
        "torch": "torch.save(torch.zeros(100_000), path)",
        "safetensors": "save_file({'a': torch.zeros(100_000)}, path)",
        "pandas": "pandas.DataFrame({'a': range(100_000)}).to_csv(path)",
        "json": "path.write_text(json.dumps([0] * 100_000))",
    }[library]
    script = f"""
import json, resource, sys, pandas, torch
from pathlib import Path
from safetensors.torch import save_file
from sparsewav.errors import UserError
from sparsewav.files import writing
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
path = Path(sys.argv[1])
try:
    with writing(path):
        {save}
except UserError as error:
    print(error)
"""
    path = tmp_path / "file"
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False)
    assert done.stdout.startswith(f"cannot write {path}: "), done.stderr
    assert done.stdout.endswith("choose another folder (output_root, $SPARSEWAV_CACHE, $TMPDIR)\n")


def test_a_corrected_speaker_is_another_set() -> None:
    """Intervals are drawn over speakers, whom a run's predictions name."""
    sets = [[Utterance("a", "x", b"audio", speaker)] for speaker in (None, "anna", "bert")]
    assert len(set(map(cache.utterances_fingerprint, sets))) == 3
