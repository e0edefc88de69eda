"""Publishing the model of a run on the Hugging Face hub."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from sparsewav.errors import UserError
from sparsewav.files import damage
from sparsewav.models.bitmask import export
from sparsewav.models.checkpoint import WEIGHT_FILES, first_line
from sparsewav.pipeline import run_folder
from sparsewav.pipeline.model_card import CARD, make_card
from sparsewav.progress import print_warning


@contextmanager
def prepare(run: Path, format: str, dtype: str, stated: Mapping[str, str | None]) -> Iterator[dict[str, Path]]:
    """Give the files of a run that are published, by their names in the repository.

    Args:
        run: Folder of a finished run.
        format: ``dense`` or ``bitmask``.
        dtype: ``model`` or ``float16``.
        stated: What the user says of the model (``license``, ``language``), which goes into the card; None keeps what
            the card has.

    Raises:
        UserError: The run is not finished, keeps no model, or the model is not as the run wrote it, or the card is
            broken.
    """
    run = run.expanduser()
    if not (run / run_folder.METRICS).is_file():
        raise UserError(f"{run} has no {run_folder.METRICS}; give the folder of a finished run")
    metrics, model = run_folder.read_metrics(run), run / run_folder.MODEL
    if not any(model.glob("*.safetensors")):
        raise UserError(f"{run} has no {run_folder.MODEL}/ with weights; do the run again with save_model=true")
    if damaged := damage(model, metrics.get("model_files", {}), remember=True):
        raise UserError(
            f"{model / damaged} is not as the run wrote it, and the card has the run's figures; do the run again with "
            "force=true"
        )
    with tempfile.TemporaryDirectory() as temporary:
        source = run_folder.export_folder(Path(temporary), format, dtype)
        source = export(model, source, format, dtype) if source else model
        files = {path.name: path for path in sorted(source.iterdir()) if path.is_file()}
        written = files[CARD].read_text(encoding="utf-8") if CARD in files else make_card(metrics)
        try:
            card = ModelCard(written)
        except ValueError as error:
            raise UserError(f"{model / CARD} has metadata that the hub does not read: {first_line(error)}") from error
        for key, value in stated.items():
            if value is not None:
                setattr(card.data, key, value)
            elif card.data.get(key) is None:
                print_warning(f"the card states no {key}, because the dense model's states none; --{key} adds one")
        files[CARD] = Path(temporary) / CARD
        card.save(files[CARD])
        if (run / run_folder.LAYERS).is_file():
            files[run_folder.LAYERS] = run / run_folder.LAYERS
        yield files


def publish(files: Mapping[str, Path], name: str, *, private: bool, branch: str | None = None) -> str:
    """Commit files to a repository on the hub, which is made if it is not there, and give its address.

    Weights of an earlier commit that are not replaced are deleted by the same commit.

    Raises:
        UserError: The hub refuses it, or cannot be reached, or the repository is public and ``private`` is true.
    """
    if constants.is_offline_mode():
        raise UserError(f"{name} cannot be published, because HF_HUB_OFFLINE is set; unset it")
    if get_token() is None:
        raise UserError(
            f"{name} cannot be published without a token; put one that may write into HF_TOKEN, or call hf auth login"
        )
    api = HfApi()
    try:
        url = api.create_repo(name, private=private or None, exist_ok=True)
        if private and not api.model_info(url.repo_id).private:
            raise UserError(
                f"{url} is there already, and everybody sees it; leave out --private, or choose another name"
            )
        if branch:
            api.create_branch(url.repo_id, branch=branch, exist_ok=True)
        there = api.list_repo_files(url.repo_id, revision=branch)
        # Weights of an earlier commit would be loaded in the place of, or beside, the new ones.
        stale = [path for path in there if path not in files and any(fnmatch(path, item) for item in WEIGHT_FILES)]
        operations: list[Any] = [CommitOperationAdd(path, str(file)) for path, file in files.items()]
        operations += [CommitOperationDelete(path) for path in stale]
        api.create_commit(url.repo_id, operations, commit_message="Upload a model pruned by SparseWAV", revision=branch)
    except UserError:
        raise
    except Exception as error:  # of the client, and of the client's client
        raise UserError(f"{name} was not published: {_reason(error)}") from error
    return f"{url}/tree/{branch}" if branch else str(url)


def _reason(error: Exception) -> str:
    if isinstance(error, HFValidationError):
        return "a name is <owner>/<name> of letters, digits, -, _ and .; choose another"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403) or isinstance(error, RepositoryNotFoundError | RevisionNotFoundError):
            return (
                f"{constants.ENDPOINT} does not let your token do that ({error.server_message or status}); give one "
                "that may write there, in HF_TOKEN or by hf auth login"
            )
        return f"{constants.ENDPOINT} says {error.server_message or first_line(error)}"
    kind = type(error).__name__
    return f"{kind}, {first_line(error)}; look whether {constants.ENDPOINT} can be reached, and try again"
