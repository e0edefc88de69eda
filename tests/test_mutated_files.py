"""Six hundred damaged or hostile files, over every reader of files: each is refused in one sentence, or read right."""

import json
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import sparsewav
from sparsewav import cache
from sparsewav.cache import cached_folder
from sparsewav.data.librispeech import read_librispeech_folder
from sparsewav.data.sets import Sets
from sparsewav.data.utterances import Utterance, read_audio
from sparsewav.errors import UserError
from sparsewav.inference import accelerate
from sparsewav.models.bitmask import export
from sparsewav.models.fairseq import converted_folder
from sparsewav.models.load import load_pretrained
from sparsewav.pruning import Hessians, prunable_matrices
from sparsewav.settings.data import Manifest
from tests.models.test_fairseq import _cfg

Make = Callable[..., PreTrainedModel]

MUTATIONS = 63
"""For each of the ten readers: 630 in all."""

HOSTILE = (None, True, -1, 0, 1e400, float("nan"), 10**12, 2.5, "x", "../x", "/dev/zero", "", [], {}, [[]], {"a": []})
"""Put in the place of values in files of JSON."""


@pytest.fixture(autouse=True)
def _limited_memory() -> Iterator[None]:
    """A reader that is led to allocate without bound fails here, instead of taking the machine's memory."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@dataclass
class Case:
    """What a reader reads.

    Attributes:
        folder: It is copied, and one of its files is mutated.
        files: Their names.
        read: Reads the copy of the folder.
        is_right: Tells whether what was read is what the mutated folder says.
    """

    folder: Path
    files: list[str]
    read: Callable[[Path], Any]
    is_right: Callable[[Any, Path], bool]


def _mutate_bytes(content: bytes, random: random.Random) -> bytes:
    if not content:
        return random.randbytes(4)
    start = random.randrange(len(content)) if random.random() < 0.5 else random.randrange(min(len(content), 400))
    end = min(len(content), start + random.choice((1, 4, 16)))
    return random.choice(
        (
            lambda: content[:start] + bytes([content[start] ^ 1 << random.randrange(8)]) + content[start + 1 :],
            lambda: content[:start] + bytes(end - start) + content[end:],
            lambda: content[:start] + b"\xff" * (end - start) + content[end:],
            lambda: content[:start],
            lambda: content[:start] + random.randbytes(7) + content[start:],
            lambda: content[:start] + content[end:],
            lambda: b"",
            lambda: content + content,
        )
    )()


def _mutate_json(content: bytes, random: random.Random) -> bytes:
    """Replace, delete or add one value anywhere in a document."""
    document = json.loads(content)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(document)
    node, key = random.choice(places)
    if random.random() < 0.2:
        del node[key]
    else:
        node[key] = random.choice(HOSTILE)
    return json.dumps(document).encode()


def _same_state(model: PreTrainedModel) -> Callable[[Any, Path], bool]:
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def is_right(got: PreTrainedModel, folder: Path) -> bool:
        state = got.state_dict()
        return state.keys() == expected.keys() and all(
            torch.equal(tensor.float(), expected[name].float()) for name, tensor in state.items()
        )

    return is_right


@torch.no_grad()
def _pruned(model: PreTrainedModel) -> PreTrainedModel:
    for matrix in prunable_matrices(model):
        matrix.weight[torch.rand(matrix.weight.shape, generator=torch.Generator().manual_seed(1)) < 0.8] = 0
    return model


def _bitmask(tmp_path: Path, tiny_model: Make) -> Case:
    model = _pruned(tiny_model("wav2vec2"))
    model.save_pretrained(tmp_path / "dense")
    export(tmp_path / "dense", tmp_path / "case")
    return Case(tmp_path / "case", ["model.bitmask.safetensors"], sparsewav.load, _same_state(model))


@torch.no_grad()
def _rounded(tmp_path: Path, tiny_model: Make) -> Case:
    """Of a model in few bits, with what deflates and what does not."""
    model = _pruned(tiny_model("wav2vec2", hidden_size=32, intermediate_size=64))
    for matrix in prunable_matrices(model):
        scales = matrix.weight.abs().amax(1, keepdim=True).half().float()
        matrix.weight.copy_((3 * matrix.weight / scales).round() * scales + 0.0)
    model.save_pretrained(tmp_path / "dense")
    export(tmp_path / "dense", tmp_path / "case")
    return Case(tmp_path / "case", ["model.bitmask.safetensors"], sparsewav.load, _same_state(model))


def _index(tmp_path: Path, tiny_model: Make) -> Case:
    model = tiny_model("wav2vec2")
    model.save_pretrained(tmp_path / "case", max_shard_size="8KB")
    return Case(tmp_path / "case", ["model.safetensors.index.json"], _load, _same_state(model))


def _config(tmp_path: Path, tiny_model: Make) -> Case:
    model = tiny_model("wav2vec2")
    model.save_pretrained(tmp_path / "case")
    return Case(tmp_path / "case", ["config.json"], _load, _same_state(model))


def _load(folder: Path) -> PreTrainedModel:
    return load_pretrained(str(folder), torch.float32, "model.name_or_path")


def _cache(tmp_path: Path, tiny_model: Make) -> Case:
    generator = torch.Generator().manual_seed(0)
    by_input = {name: torch.randn(6, 6, generator=generator) for name in ("a", "b")}
    hessians = Hessians(by_input, {"one": "a", "two": "b"}, 9, {})

    def read(folder: Path) -> Hessians:
        # The folder is put where the cache has it, as damage on the disk would be there.
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SPARSEWAV_CACHE", str(folder))
            found, _ = cached_folder(
                "hessians", {"model": 1}, lambda made: cache.save_hessians(hessians, made), enabled=True
            )
            return cache.load_hessians(found, torch.device("cpu"))

    read(tmp_path / "case")
    files = [str(path.relative_to(tmp_path / "case")) for path in (tmp_path / "case").rglob("*") if path.is_file()]

    def is_right(got: Hessians, folder: Path) -> bool:
        return got.reads == hessians.reads and all(torch.equal(got.by_input[name], by_input[name]) for name in by_input)

    return Case(tmp_path / "case", files, read, is_right)


def _acceleration(tmp_path: Path, tiny_model: Make) -> Case:
    model = _pruned(tiny_model("wav2vec2"))
    audio = torch.randn(1, 1600)
    with torch.inference_mode():
        expected = model(audio).logits
    model.save_pretrained(tmp_path / "case")

    def read(folder: Path) -> torch.Tensor:
        loaded = sparsewav.load(folder)
        accelerate(loaded, frames=2, folder=folder)
        with torch.inference_mode():
            return loaded(audio).logits

    read(tmp_path / "case")
    return Case(
        tmp_path / "case",
        ["acceleration.json"],
        read,
        lambda got, folder: torch.allclose(got, expected, rtol=1e-3, atol=1e-4),
    )


def _fairseq(tmp_path: Path, tiny_model: Make) -> Case:
    layout = {"conv_dim": (16, 16), "conv_kernel": (20, 8), "conv_stride": (20, 8)}
    model = tiny_model("wav2vec2", "group", vocab_size=32, conv_bias=False, **layout)
    (tmp_path / "case").mkdir()
    torch.save(_cfg(model), tmp_path / "case" / "best.pt")

    def read(folder: Path) -> PreTrainedModel:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SPARSEWAV_CACHE", str(folder / "cache"))
            return _load(converted_folder(str(folder / "best.pt")))

    return Case(tmp_path / "case", ["best.pt"], read, _same_state(model))


def _audio(tmp_path: Path, corpus: Path) -> Case:
    (tmp_path / "case").mkdir()
    source = sorted(corpus.rglob("*.flac"))[0]
    shutil.copyfile(source, tmp_path / "case" / "speech.flac")
    expected = read_audio(Utterance("speech", "", source))

    def read(folder: Path) -> np.ndarray:
        return read_audio(Utterance("speech", "", folder / "speech.flac"))

    def is_right(got: np.ndarray, folder: Path) -> bool:
        # A rate or a number of channels in the header is what the file says: nothing else knows better.
        return len(got) != len(expected) or bool(np.array_equal(got, expected))

    return Case(tmp_path / "case", ["speech.flac"], read, is_right)


def _transcripts(tmp_path: Path, corpus: Path) -> Case:
    shutil.copytree(corpus, tmp_path / "case")
    files = [str(path.relative_to(tmp_path / "case")) for path in sorted((tmp_path / "case/train").rglob("*.txt"))]

    def is_right(got: list[Utterance], folder: Path) -> bool:
        texts = {}
        for name in files:
            for line in (folder / name).read_bytes().decode("utf-8-sig").split("\n"):
                if line.split():
                    identifier, *words = line.split()
                    texts[identifier] = " ".join(words)
        return {utterance.id: utterance.text for utterance in got} == texts

    return Case(tmp_path / "case", files, lambda folder: read_librispeech_folder(folder, "train"), is_right)


def _manifest(tmp_path: Path, corpus: Path) -> Case:
    shutil.copytree(corpus / "test", tmp_path / "case" / "clips")
    rows = [
        f"{item.speaker}\t{Path(str(item.audio)).relative_to(corpus / 'test')}\t{item.text} „é“\t2"
        for item in read_librispeech_folder(corpus, "test")
    ]
    (tmp_path / "case" / "test.tsv").write_text("\n".join(["client_id\tpath\tsentence\tage", *rows]), encoding="utf-8")

    def read(folder: Path) -> list[Utterance]:
        return Sets(Manifest(test=str(folder / "test.tsv"))).evaluation()[str(folder / "test.tsv")]

    def is_right(got: list[Utterance], folder: Path) -> bool:
        header, *lines = (folder / "test.tsv").read_bytes().decode("utf-8-sig").split("\n")
        names = [name.strip() for name in header.split("\t")]
        rows = [dict(zip(names, line.split("\t"), strict=True)) for line in lines if line.strip()]
        texts = {Path(row["path"].strip()).stem: " ".join(row["sentence"].split()) for row in rows}
        return {utterance.id: utterance.text for utterance in got} == texts

    return Case(tmp_path / "case", ["test.tsv"], read, is_right)


MODELS = {
    "bitmask": _bitmask,
    "rounded": _rounded,
    "index": _index,
    "config": _config,
    "cache": _cache,
    "acceleration": _acceleration,
    "fairseq": _fairseq,
}
SPEECH = {"audio": _audio, "transcripts": _transcripts, "manifest": _manifest}


@pytest.mark.parametrize("reader", [*MODELS, *SPEECH])
def test_a_mutated_file_is_refused_in_one_sentence_or_read_right(
    reader: str, tmp_path: Path, tiny_model: Make, corpus: Path
) -> None:
    case = MODELS[reader](tmp_path, tiny_model) if reader in MODELS else SPEECH[reader](tmp_path, corpus)
    assert case.is_right(case.read(case.folder), case.folder), "the unchanged files are not read right"
    wrong, refused = [], 0
    for number in range(MUTATIONS):
        rng = random.Random(f"{reader} {number}")
        name = rng.choice(case.files)
        folder = tmp_path / "mutated"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(case.folder, folder)
        content = (folder / name).read_bytes()
        mutate = _mutate_json if name.endswith(".json") and rng.random() < 0.7 else _mutate_bytes
        (folder / name).write_bytes(mutate(content, rng))
        try:
            got = case.read(folder)
        except UserError as error:
            refused += 1
            if "\n" in str(error) or len(str(error)) > 600:
                wrong.append(f"{number} {name}: not one sentence: {error}")
        except Exception as error:
            wrong.append(f"{number} {name}: {type(error).__name__}: {str(error)[:200]}")
        else:
            if not case.is_right(got, folder):
                wrong.append(f"{number} {name}: read wrong ({mutate.__name__})")
    print(f"{reader}: {MUTATIONS} mutated files, {refused} refused, {MUTATIONS - refused - len(wrong)} read right")
    assert not wrong, "\n".join(wrong)
