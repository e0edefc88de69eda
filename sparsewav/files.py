"""Locations of files, and writing files that appear whole or not at all.

What cannot be written (a full disk, a read-only folder) raises :class:`UserError`; see :func:`writing`.
"""

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout
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
    key = json.dumps([os.path.abspath(path), status.st_size, status.st_dev, status.st_ino, *times])
    known = _known_hashes(cache_folder())
    if key not in known:
        known[key] = _digest(path)
        # A file that was changed within the resolution of the clock may be changed again and look the same.
        if time.time_ns() - max(times) > 2_000_000_000:
            with suppress(OSError):  # without the record the file is read again
                cache_folder().mkdir(parents=True, exist_ok=True)
                with (cache_folder() / _HASHES).open("a", encoding="utf-8") as records:
                    records.write(json.dumps([key, known[key]]) + "\n")
        else:
            return known.pop(key)
    return known[key]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


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
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != CHECKSUMS]
    return {path.relative_to(folder).as_posix(): _digest(path) for path in files}


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


def temporary_name(stem: str) -> str:
    """Give the start of a name that says which process of which machine uses it: see :func:`remove_leftovers`."""
    return f"{stem}{_node()}-{os.getpid()}-"


def _node() -> str:
    return re.sub(r"\W", "_", platform.node())


def remove_leftovers(*folders: Path) -> None:
    """Delete what killed processes left in folders and in the cache.

    Temporary files and folders that name a process of this machine go when that process is gone. All others may be in
    use on another machine that shares the folder, and go when they have not been changed for a day; so do locks that
    are free.
    """
    cached = [cache_folder(), *cache_folder().glob("*/"), *cache_folder().glob("*/*/")]
    for path in [path for folder in (*folders, *cached) for path in folder.glob(".*.part")]:
        with suppress(OSError):
            if _is_abandoned(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in [path for folder in (*folders, *cached) for path in (*folder.glob("*.lock"), *folder.glob(".*.lock"))]:
        with suppress(OSError, Timeout):
            if time.time() - path.stat().st_mtime > _DAY:
                with FileLock(path, timeout=0):
                    path.unlink()


_DAY = 24 * 3600.0

_QUIETLY = 5.0
"""Seconds that waiting for another process may take without a word."""


def _is_abandoned(path: Path) -> bool:
    named = re.search(r"\.(?P<node>\w*)-(?P<pid>\d+)-\w*\.part$", path.name)
    if named is None or path.is_symlink() or path.stat().st_uid != os.getuid():
        return False
    if named["node"] != _node():
        return time.time() - max(item.stat().st_mtime for item in (path, *path.rglob("*"))) > _DAY
    try:
        os.kill(int(named["pid"]), 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's process
        pass
    return False


@contextmanager
def write_file(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to, which is renamed to ``path`` if the block ends without an error."""
    temporary = path.with_name(f"{temporary_name(f'.{path.name}.')}.part")
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
        prefix = temporary_name(f".{path.name}.")
        temporary = Path(tempfile.mkdtemp(prefix=prefix, suffix=".part", dir=path.parent))
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
    """Let one process at a time run the block, while the others wait, and say so if it takes longer than seconds."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=_QUIETLY)
        except Timeout:
            print(f"Waiting for another process that is making the same; it holds {path}", flush=True)
            lock.acquire(timeout=-1)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within the block, turn an error of the system that prevents writing ``path`` into one sentence.

    An error that names a file elsewhere, such as a recording that cannot be read, stays what it is.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        sentence = cannot_write(error, path)
        if sentence is None:
            raise
        raise UserError(sentence) from error


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def cannot_write(error: Exception, path: Path) -> str | None:
    """Say in one sentence that a file cannot be written, if that is what an error means; otherwise None.

    Args:
        error: An error of the system, of safetensors or of ``torch.save``.
        path: What was being written; an error that names a file on a full disk elsewhere is about that file.
    """
    text = str(error)
    if isinstance(error, OSError):
        named = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
        here = named is not None and (named.is_relative_to(path.parent) or path.is_relative_to(named))
        if error.errno not in _FULL and not here:
            return None
        path = path if here or named is None else named
        reason = error.strerror or text
    elif isinstance(error, SafetensorError) and "I/O error" in text:
        reason = text.rpartition(": ")[2]  # "Error while serializing: I/O error: No space left on device"
    elif isinstance(error, RuntimeError) and re.search(
        r"inline_container|PytorchStreamWriter|iostream error", text
    ):  # torch.save does not say why
        reason = "it could not be written in full, as on a full disk"
    else:
        return None
    blocked = isinstance(error, NotADirectoryError | IsADirectoryError | FileExistsError | PermissionError)
    remedy = "" if blocked else "free some space, or "
    return f"cannot write {path}: {reason}; {remedy}choose another folder (output_root, $SPARSEWAV_CACHE, $TMPDIR)"
