"""LibriSpeech from the hub: fetched once, whole or as a sample."""

from pathlib import Path

import datasets
import huggingface_hub.constants
import pytest

from sparsewav.data.sets import Sets
from sparsewav.data.utterances import Utterance
from sparsewav.errors import UserError
from sparsewav.settings.data import LibriSpeechHub
from tests.hub import Hub
from tests.published import librispeech

COUNTS = {"train.100": 24, "train.500": 4, "validation": 4, "test": 6}


@pytest.fixture(autouse=True)
def _librispeech(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEWAV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # 5 seconds, against a fault of pyarrow
    hub.publish("openslr/librispeech_asr", librispeech(["SEA", "SUN"], COUNTS), kind="datasets")


def _facts(utterances: list[Utterance]) -> list[tuple[str, str, str | None, str]]:
    return [(item.id, item.text, item.speaker, item.content_hash()) for item in utterances]


def test_a_split_and_a_sample_are_streamed_once(hub: Hub) -> None:
    """By all runs; another seed is another sample, and a sample is no beginning of the split."""
    whole = Sets(LibriSpeechHub()).read("training")["clean/train.100"]
    assert len({item.id for item in whole}) == 24
    assert {item.speaker for item in whole} == {"100", "101"}
    first = Sets(LibriSpeechHub()).calibration(8, seed=0)
    assert len(hub.requests) > 0
    hub.requests.clear()
    assert _facts(Sets(LibriSpeechHub()).calibration(8, seed=0)) == _facts(first)
    assert _facts(Sets(LibriSpeechHub()).read("training")["clean/train.100"]) == _facts(whole)
    assert hub.requests == []
    assert set(_facts(first)) < set(_facts(whole))
    assert _facts(first) != _facts(whole)[:8]
    assert _facts(Sets(LibriSpeechHub()).calibration(8, seed=1)) != _facts(first)


def test_a_split_or_a_hub_that_is_not_there_is_one_sentence(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^data\.evaluation_subset=clean/tset cannot be .*tset.*test") as wrong:
        Sets(LibriSpeechHub(evaluation_subset="clean/tset")).evaluation()
    assert "\n" not in str(wrong.value)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^data\.evaluation_subset=clean/test cannot be .*offline.*the network"):
        Sets(LibriSpeechHub()).evaluation()
