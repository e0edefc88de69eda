"""Models on the Hugging Face hub: fetching the files of one that are needed, and telling which commit they are of."""

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from rich.console import Console

from sparsewav.errors import UserError
from sparsewav.files import writing
from sparsewav.models.bitmask import BITMASK_WEIGHTS
from sparsewav.models.checkpoint import INDEX, PICKLE, PICKLE_INDEX, WEIGHTS, first_line, named
from sparsewav.progress import print_warning

SETTINGS = ["*.json", "*.txt", "*.model", "README.md"]
"""Patterns of what lies beside the weights: configuration, processor and card."""

SHARDS = {INDEX: "model-*.safetensors", PICKLE_INDEX: "pytorch_model-*.bin"}

FORMATS = (WEIGHTS, INDEX, BITMASK_WEIGHTS, PICKLE, PICKLE_INDEX)
"""The files that weights are loaded from, the first that is there; nothing else that a repository holds is fetched."""

SECONDS = 10.0
"""That the hub has for an answer; then the copy in the cache is taken."""


def fetch(name: str, revision: str | None = None, key: str = "model.name_or_path") -> Path:
    """Give the folder in the hub's cache with a model's files, after fetching those that are missing.

    Where the hub cannot be reached, it is what was fetched before, and a line says so.

    Args:
        name: Name on the hub, ``owner/name``.
        revision: A branch, a tag or a commit; None for the main branch.
        key: The setting that names the model, for messages.

    Raises:
        UserError: There is no such model or revision, it may not be read, or it was not fetched before and the hub
            cannot be reached.
    """
    called = named(key, name)
    if constants.is_offline_mode():
        return _fetched_before(name, revision, called, "HF_HUB_OFFLINE is set")
    wanted: list[str] = []
    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=SECONDS)
        sizes = {item.rfilename: item.size or 0 for item in info.siblings or []}
        wanted = _wanted(list(sizes), called)
        folder = Path(_storage(name), "snapshots", str(info.sha))
        missing = sum(size for file, size in sizes.items() if file in wanted and not (folder / file).exists())
        if missing > 10e6:
            Console().print(f"Fetching {name} from {constants.ENDPOINT}: {missing / 1e6:,.0f} MB", highlight=False)
        with writing(Path(constants.HF_HUB_CACHE)):
            return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, etag_timeout=SECONDS))
    except UserError:
        raise
    except Exception as error:  # of the client, and of the client's client
        if sentence := _refusal(error, name, revision, called):
            raise UserError(sentence) from error
        reason = f"{constants.ENDPOINT} cannot be reached ({first_line(error)})"
        folder = _fetched_before(name, revision, called, reason, wanted)
        print_warning(
            f"{constants.ENDPOINT} cannot be reached; {called} is the copy fetched before, commit {folder.name}"
        )
        return folder


def newest_commit(name: str, revision: str | None = None) -> str | None:
    """Ask the hub which commit a branch or tag is at; None where it does not say."""
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    if constants.is_offline_mode():
        return None
    try:
        return HfApi().model_info(name, revision=revision, timeout=SECONDS).sha
    except Exception:  # whatever it is, fetching the model says it in a sentence
        return None


def present(name: str, revision: str | None = None) -> Path | None:
    """Give the folder of a model that was fetched before, without asking the hub; None if there is none."""
    try:
        config = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None


def commit_of(folder: Path) -> str | None:
    """Give the commit whose files a folder in the hub's cache has; None for any other folder."""
    is_snapshot = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    return folder.name if is_snapshot else None


def _storage(name: str) -> Path:
    return Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}")


def _wanted(files: list[str], called: str) -> list[str]:
    """Give patterns of the files that are needed.

    Raises:
        UserError: There are no weights that can be read.
    """
    weights = next((name for name in FORMATS if name in files), None)
    if weights is None:
        others = sorted(name for name in files if name.endswith((".h5", ".msgpack", ".onnx", ".pt", ".gguf", ".nemo")))
        found = f" ({', '.join(others)} is not read)" if others else ""
        raise UserError(
            f"{called} has neither {WEIGHTS} nor {PICKLE} on the hub{found}; choose a model that transformers saved "
            "with PyTorch"
        )
    settings = [name for name in files if "/" not in name and any(Path(name).match(pattern) for pattern in SETTINGS)]
    indices = set(SHARDS) - {weights}  # an index promises shards
    shards = [name for name in files if weights in SHARDS and Path(name).match(SHARDS[weights]) and "/" not in name]
    return [name for name in (*settings, weights, *shards) if name not in indices]


def _fetched_before(name: str, revision: str | None, called: str, reason: str, wanted: Sequence[str] = ()) -> Path:
    """Give the folder that holds what was fetched before.

    Raises:
        UserError: There is none, or it lacks wanted files, as after an interrupted fetch.
    """
    try:
        folder: Path | None = Path(
            snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=["config.json"])
        )
    except HFValidationError as error:
        raise UserError(_no_name(called)) from error
    except LocalEntryNotFoundError:
        folder = None
    present = [file for file in wanted or FORMATS if folder and (folder / file).is_file()]
    if folder is None or len(present) < (len(wanted) or 1):
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"{called}{at} is no folder, it is not complete in the hub's cache {constants.HF_HUB_CACHE}, and {reason}; "
            f"give a folder, or {'unset HF_HUB_OFFLINE' if constants.HF_HUB_OFFLINE else 'connect to the network'}"
        )
    return folder


def _refusal(error: Exception, name: str, revision: str | None, called: str) -> str | None:
    """Say in a sentence why the hub does not give a model; None if it could not be reached."""
    page = f"{constants.ENDPOINT}/{name}"
    token = "with a token that may read it in HF_TOKEN (hf auth login keeps one)"
    if isinstance(error, HFValidationError):
        return _no_name(called)
    if isinstance(error, RevisionNotFoundError):
        return f"{called} has no revision {revision}; give one of {_revisions(name)}, or a commit"
    if isinstance(error, GatedRepoError):
        return f"{called} is given after its terms are accepted only; accept them at {page}, and try again {token}"
    if isinstance(error, RepositoryNotFoundError):
        return f"{called} is no folder, and no model on {constants.ENDPOINT}; check it, or try {token} if it is private"
    if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
        refused = error.response.status_code == 401 and get_token()
        if refused:
            return f"{constants.ENDPOINT} does not know the token in HF_TOKEN, or of hf auth login; give another"
        return f"{called} cannot be fetched: {first_line(error)}; look at {page}"
    return None


def _no_name(called: str) -> str:
    return f"{called} is no folder, and no name on the hub, which is <owner>/<name>; check the path"


def _revisions(name: str) -> str:
    try:
        refs = HfApi().list_repo_refs(name)
    except Exception:  # the sentence that this goes into names the error
        return "its branches and tags"
    return ", ".join(ref.name for ref in (*refs.branches, *refs.tags)[:10])
