"""The commands with names on the hub."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import soundfile
from transformers import PreTrainedModel

from sparsewav.files import conf_folder
from tests.hub import Hub
from tests.published import Blank, model_files, vocabulary
from tests.terminal import Run

BASE = "facebook/wav2vec2-base-100h"


@pytest.fixture
def published(tiny_model: Callable[..., PreTrainedModel]) -> Callable[..., dict[str, bytes]]:
    """Give the files of a tiny model's repository: (seed, weights)."""

    def make(seed: int = 0, weights: str = "pickle") -> dict[str, bytes]:
        size = len(vocabulary("<pad>"))
        options = {"vocab_size": size, "conv_kernel": (20, 8), "conv_stride": (20, 8)}
        return model_files(tiny_model("wav2vec2", "group", seed=seed, **options), weights=weights)  # type: ignore[arg-type]

    return make


def test_a_run_knows_its_commit_and_is_done_again_where_main_has_other_weights(
    hub: Hub, published: Callable[..., dict[str, bytes]], small: list[str], run_sparsewav: Run, tmp_path: Path
) -> None:
    arguments = [*small, f"model.name_or_path={BASE}", "allocation=uniform"]

    def run(*more: str) -> str:
        result = run_sparsewav(*arguments, *more)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def commits() -> set[str]:
        records = (json.loads(path.read_text()) for path in (tmp_path / "outputs").glob("*/metrics.json"))
        return {record["provenance"]["commit"] for record in records}

    repository = hub.publish(BASE, published(seed=1))
    first = repository.branches["main"]
    run()
    assert commits() == {first}
    hub.requests.clear()
    assert "Done already" in run()
    assert hub.fetched() == set()
    # A commit that changes nothing that is loaded is the same model.
    repository.commit(published(seed=1) | {"README.md": b"---\nlicense: mit\n---\n"})
    assert "Done already" in run()
    second = repository.commit(published(seed=2))
    said = run()
    assert f"pytorch_model.bin of {BASE} changed since this run was made; doing it again" in said
    assert commits() == {second}
    # A revision is a model of its own, which does not move.
    run(f"model.revision={first}")
    assert commits() == {first, second}
    repository.commit(published(seed=3))
    hub.requests.clear()
    assert "Done already" in run(f"model.revision={first}")
    assert hub.requests == []
    hub.broken = True
    assert "Done already" in run(f"model.revision={first}")
    refused = run_sparsewav(*small, "model.revision=main")
    assert refused.returncode == 1
    assert "is no name on the hub, and only those have a revision" in refused.stdout


def test_inspect_and_transcribe_take_names_and_revisions(
    hub: Hub,
    published: Callable[..., dict[str, bytes]],
    run_sparsewav: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    repository = hub.publish(BASE, published(weights="safetensors"))
    repository.commit(published(), branch="pickle")
    soundfile.write(tmp_path / "talk.wav", np.random.default_rng(0).standard_normal(8000) * 0.1, 16_000)
    for revision in ("main", "pickle"):
        shown = run_sparsewav(BASE, "--revision", revision, command="sparsewav-inspect")
        assert shown.returncode == 0, shown.stdout + shown.stderr
        assert ("PyTorch, float32" if revision == "pickle" else "dense, float32") in shown.stdout
        assert re.search(r"sparsity\W+0\.0000", shown.stdout)
        assert (tmp_path / "wav2vec2-base-100h-sparsity.png").stat().st_size > 1000
        heard = run_sparsewav("talk.wav", "--model", BASE, "--revision", revision, command="sparsewav-transcribe")
        assert heard.returncode == 0, heard.stdout + heard.stderr
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert run_sparsewav("talk.wav", "--model", BASE, command="sparsewav-transcribe").stdout == heard.stdout
    refused = run_sparsewav("facebook/other", command="sparsewav-inspect")
    assert refused.returncode == 1
    assert re.fullmatch(r"error: facebook/other is no folder, .*HF_HUB_OFFLINE is set; .*\n", refused.stderr)


def test_a_training_starts_from_a_revision_on_the_hub(
    hub: Hub, published: Callable[..., dict[str, bytes]], corpus: Path, run_sparsewav: Run, tmp_path: Path
) -> None:
    repository = hub.publish(BASE, published(seed=1))
    first = repository.branches["main"]
    arguments = [
        *(f"initial_model={BASE}", "architecture=same", "data=librispeech_dir", f"data.root={corpus}", "output=mine"),
        *("data.training_subset=train", "data.development_subset=test", "data.evaluation_subset=test", "device=cpu"),
        *("data.allow_overlap=true", "training.epochs=1", "training.batch_size=6"),
    ]
    result = run_sparsewav(*arguments, command="sparsewav-train")
    assert result.returncode == 0, result.stdout + result.stderr
    record = json.loads((tmp_path / "mine/training.json").read_text())
    assert record["initial_commit"] == first
    assert "model/pytorch_model.bin" in record["inputs"]["content"]
    assert "Done already" in run_sparsewav(*arguments, command="sparsewav-train").stdout
    repository.commit(published(seed=2))
    moved = run_sparsewav(*arguments, command="sparsewav-train")
    assert moved.returncode == 1
    assert f"pytorch_model.bin of {BASE} changed since {tmp_path / 'mine'} was trained" in moved.stdout
    other = run_sparsewav(*arguments, "initial_revision=nope", "output=other", command="sparsewav-train")
    assert other.returncode == 1
    assert f"initial_model={BASE} has no revision nope; give one of main, or a commit" in other.stdout


@pytest.mark.parametrize(
    ("option", "family", "norm", "blank"),
    [
        ("wav2vec2-base-100h", "wav2vec2", "group", "<pad>"),
        ("wav2vec2-large-960h", "wav2vec2", "group", "<pad>"),
        ("hubert-large-ls960", "hubert", "layer", "<pad>"),
        ("wavlm-base-plus-100h", "wavlm", "group", "[PAD]"),
    ],
)
def test_the_options_for_published_models_name_them_on_the_hub(
    option: str,
    family: str,
    norm: str,
    blank: Blank,
    hub: Hub,
    tiny_model: Callable[..., PreTrainedModel],
    small: list[str],
    run_sparsewav: Run,
    tmp_path: Path,
) -> None:
    """By fairseq's tokens, or those of the widespread recipe of fine-tuning."""
    name = re.search(r"^name_or_path: (\S+)", (conf_folder() / f"model/{option}.yaml").read_text(), re.MULTILINE)
    assert name
    size = len(vocabulary(blank)) + (2 if blank == "[PAD]" else 0)
    model = tiny_model(family, norm, vocab_size=size, conv_kernel=(20, 8), conv_stride=(20, 8))
    hub.publish(name[1], model_files(model, blank))
    result = run_sparsewav(*small[1:], f"model={option}", "allocation=uniform")
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(list((tmp_path / "outputs").glob(f"{Path(name[1]).name}-*/metrics.json"))) == 1
