"""Locations of files, and writing files that appear whole or not at all.

What cannot be written (a full disk, a read-only folder) raises :class:`UserError`; see :func:`writing`.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_path
from safetensors import SafetensorError

from sparsewav.errors import UserError


def cache_folder() -> Path:
    """Give the folder of everything that can be made again: ``$SPARSEWAV_CACHE``, or the user's cache directory."""
    folder = Path(os.environ.get("SPARSEWAV_CACHE") or user_cache_path("sparsewav", appauthor=False))
    return folder.expanduser().absolute()


def conf_folder() -> Path:
    """Give the folder of the YAML files, inside the installed package or beside it in a checkout.

    Raises:
        UserError: Neither exists.
    """
    package = Path(__file__).parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise UserError(f"{package / 'conf'} is missing; install sparsewav again")


def content_hash(path: Path) -> str:
    """Hash the bytes of a file, reading them again only if the file was changed since the last time.

    What tells an unchanged file is its path, size, inode and the times at which it was modified and its record was,
    the last of which no program can set. Hashes are kept in the cache folder.

    Raises:
        OSError: The file cannot be read.
    """
    status = path.stat()
    times = (status.st_mtime_ns, status.st_ctime_ns)
    key = json.dumps([str(path.resolve()), status.st_size, status.st_dev, status.st_ino, *times])
    known = _known_hashes(cache_folder())
    if key not in known:
        with path.open("rb") as file:
            known[key] = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        # A file that was changed within the resolution of the clock may be changed again and look the same.
        if time.time_ns() - max(times) > 2_000_000_000:
            with suppress(OSError):  # without the record the file is read again
                cache_folder().mkdir(parents=True, exist_ok=True)
                with (cache_folder() / _HASHES).open("a", encoding="utf-8") as records:
                    records.write(json.dumps([key, known[key]]) + "\n")
        else:
            return known.pop(key)
    return known[key]


_HASHES = "file_hashes.jsonl"


@cache
def _known_hashes(folder: Path) -> dict[str, str]:
    """Read the hashes that are kept in a cache folder; a line that is cut off or damaged is passed over."""
    known: dict[str, str] = {}
    with suppress(OSError), (folder / _HASHES).open(encoding="utf-8", errors="replace") as records:
        for line in records:
            with suppress(ValueError, TypeError):
                key, digest = json.loads(line)
                known[key] = digest
    return known


CHECKSUMS = "checksums.json"
"""Lies in a folder of the cache with a hash of every other file, by which damage is noticed."""


def checksums(folder: Path) -> dict[str, str]:
    """Hash the bytes of every file in a folder; what is named in :data:`CHECKSUMS` has to match when it is read."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != CHECKSUMS:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
            found[path.relative_to(folder).as_posix()] = digest.hexdigest()
    return found


def write_checksums(folder: Path) -> None:
    """Write the hashes of all files of a folder into it."""
    (folder / CHECKSUMS).write_text(json.dumps(checksums(folder), indent=1))


def damage(folder: Path, expected: dict[str, str] | None = None, *, remember: bool = False) -> str | None:
    """Say which file of a folder is missing or not as it was written; None if all are.

    Args:
        folder: A folder of the cache, or of a step of a run.
        expected: What :func:`checksums` gave; by default it is read from the folder.
        remember: Do not read a file again that was not changed since the last time; see :func:`content_hash`.
    """
    try:
        expected = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8")) if expected is None else expected
        if not isinstance(expected, dict):
            return CHECKSUMS
        if remember:
            present = {name: content_hash(folder / name) for name in expected if (folder / name).is_file()}
        else:
            present = checksums(folder)
    except (OSError, ValueError):
        return CHECKSUMS
    return next((name for name, digest in expected.items() if present.get(name) != digest), None)


@contextmanager
def write_file(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to, which is renamed to ``path`` if the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def write_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder to fill, which replaces the folder ``path`` if the block ends without an error."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
        try:
            yield temporary
            make_readable(temporary)
            if path.exists():
                shutil.rmtree(path)
            temporary.replace(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def make_readable(folder: Path) -> None:
    """Let everybody read a folder and its files, which mkdtemp and safetensors restrict to their owner."""
    folder.chmod(0o755)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time run the block, while the others wait."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within the block, turn an error of the system that prevents writing ``path`` into one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors wraps the message of the system: "Error while serializing: I/O error: No space left on device"
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).rpartition(": ")[2]
        raise UserError(
            f"cannot write {path}: {reason}; free some space, or choose another folder (output_root, $SPARSEWAV_CACHE)"
        ) from error
