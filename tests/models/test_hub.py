"""Models on the hub: what is fetched of them and loaded, and what is said where one cannot be had."""

from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from transformers import PreTrainedModel

from sparsewav.errors import UserError
from sparsewav.models.hub import commit_of
from sparsewav.models.load import load_speech_model
from tests.hub import TOKEN, Hub
from tests.published import Blank, model_files, vocabulary

BASE = "facebook/wav2vec2-base-100h"


@pytest.fixture
def base(tiny_model: Callable[..., PreTrainedModel]) -> Callable[..., PreTrainedModel]:
    """Make a tiny model of the base architecture, with an output for every token: (blank, seed=0)."""

    def make(blank: Blank = "<pad>", seed: int = 0) -> PreTrainedModel:
        size = len(vocabulary(blank)) + (2 if blank == "[PAD]" else 0)
        return tiny_model("wav2vec2", "group", seed=seed, vocab_size=size, pad_token_id=vocabulary(blank)[blank])

    return make


@pytest.mark.parametrize("blank", ["<pad>", "[PAD]"])
@pytest.mark.parametrize("weights", ["pickle", "shards", "safetensors"])
def test_published_repositories_load_and_nothing_else_is_fetched(
    hub: Hub, base: Callable[..., PreTrainedModel], blank: Blank, weights: str
) -> None:
    model = base(blank)
    files = model_files(model, blank, weights)  # type: ignore[arg-type]
    (commit,) = hub.publish(BASE, files).commits
    speech = load_speech_model(BASE)
    assert speech.name == "wav2vec2-base-100h"
    assert commit_of(speech.folder or Path()) == commit
    state = speech.model.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], torch.zeros_like(tensor) if "masked_spec_embed" in name else tensor), name
    tokenizer = speech.processor.tokenizer
    assert tokenizer.pad_token_id == speech.model.config.pad_token_id == vocabulary(blank)[blank]
    assert tokenizer.decode(tokenizer("SEA STONE").input_ids, group_tokens=False) == "SEA STONE"
    assert hub.fetched() == files.keys() - {".gitattributes", "tf_model.h5", "flax_model.msgpack"}


def test_a_wrong_checkpoint_is_refused_by_its_headers(hub: Hub, base: Callable[..., PreTrainedModel]) -> None:
    """As in a folder: before anything is allocated, and by the names of the tensors."""
    files = model_files(base(), weights="safetensors")
    hub.publish(
        BASE,
        files
        | {"config.json": files["config.json"].replace(b'"intermediate_size": 24', b'"intermediate_size": 9000000')},
    )
    with pytest.raises(UserError, match=r"intermediate_dense\.bias \(\(24,\) instead of \(9000000,\)\)"):
        load_speech_model(BASE)


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: Hub, base: Callable[..., PreTrainedModel]) -> None:
    repository = hub.publish(BASE, model_files(base(seed=1)))
    first = repository.branches["main"]
    repository.tags["v1"] = first
    second = repository.commit(model_files(base(seed=2)))
    other = repository.commit(model_files(base(seed=3)), branch="dev/new")
    for revision, commit in ((None, second), ("main", second), ("v1", first), (first, first), ("dev/new", other)):
        assert commit_of(load_speech_model(BASE, revision=revision).folder or Path()) == commit
    message = rf"model\.name_or_path={BASE} has no revision v2; give one of main, dev/new, v1, or a commit"
    with pytest.raises(UserError, match=message):
        load_speech_model(BASE, revision="v2")
    with pytest.raises(UserError, match="demo is no name on the hub, and only those have a revision; leave it out"):
        load_speech_model("demo", revision="main")


def test_what_may_not_be_read_says_what_to_do(
    hub: Hub, base: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = model_files(base())
    hub.publish("me/private", files, private=True)
    hub.publish("me/gated", files, gated=True)
    hub.publish("me/other", {"config.json": files["config.json"], "tf_model.h5": b"", "README.md": b""})

    def refused(name: str, message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            load_speech_model(name)
        assert "\n" not in str(caught.value)

    private = r"me/private is no folder, and no model on http://\S+; check it, or try with a token .* in HF_TOKEN"
    gated = r"me/gated is given after its terms are accepted only; accept them at http://\S+/me/gated, and try again"
    refused("me/private", private)
    refused("me/gated", gated)
    refused("me/nothing", "me/nothing is no folder, and no model on")
    refused("nothing", "nothing is no folder, and no model on")
    refused("no such name", "no such name is no folder, and no name on the hub, which is <owner>/<name>")
    refused("me/other", r"me/other has neither model\.safetensors nor pytorch_model\.bin on the hub \(tf_model\.h5 is")
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    refused("me/private", "does not know the token in HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    refused("me/gated", gated)
    assert load_speech_model("me/private").name == "private"


@pytest.mark.parametrize("fault", ["offline", "unreachable", "broken"])
def test_without_the_hub_what_was_fetched_before_is_taken(
    hub: Hub,
    base: Callable[..., PreTrainedModel],
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In a line, where the user did not ask for it; what was not fetched, or not completely, is refused."""
    commit = hub.publish(BASE, model_files(base(), weights="shards")).branches["main"]
    before = load_speech_model(BASE)
    capsys.readouterr()
    if fault == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        reason = "HF_HUB_OFFLINE is set"
    elif fault == "unreachable":
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
        reason = r"http://127\.0\.0\.1:9 cannot be reached \(.*refused\)"
    else:
        hub.broken = True
        reason = r"http://\S+ cannot be reached \(Server error '503 .*\)"
    remedy = "unset HF_HUB_OFFLINE" if fault == "offline" else "connect to the network"
    again = load_speech_model(BASE)
    said = capsys.readouterr().out
    assert again.folder == before.folder
    assert (f"cannot be reached; model.name_or_path={BASE} is the copy fetched before, commit {commit}" in said) == (
        fault != "offline"
    )
    for name, revision in (("facebook/other", None), (BASE, "v1")):
        message = rf"{name}.* is no folder, it is not complete in the hub's cache \S+, and {reason}; .*, or {remedy}"
        with pytest.raises(UserError, match=message):
            load_speech_model(name, revision=revision)
    assert before.folder
    (before.folder / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match="it is not complete in the hub's cache"):
        load_speech_model(BASE)
