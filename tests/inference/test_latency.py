"""Latencies of a model and its parts: what is timed, what is made of it, and what is read again."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sparsewav
from sparsewav import Structured
from sparsewav.errors import UserError
from sparsewav.files import write_checksums
from sparsewav.inference import latency, speedup
from sparsewav.inference.latency import RECORD, Measurement, grid, grids, isotonic, read_measurement, table_of
from sparsewav.inference.shapes import probe_of, with_parts
from sparsewav.inference.speedup import measure_speedup
from sparsewav.pruning.allocation.latency import TOLERANCE
from sparsewav.pruning.allocation.parts import part_budget
from sparsewav.pruning.encoder import base_of
from sparsewav.pruning.macs import counted_modules
from sparsewav.pruning.structure import front_end, structures

SHAPE = {"num_attention_heads": 4, "intermediate_size": 480, "conv_kernel": (8, 20), "conv_stride": (8, 20)}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Seconds are multiply-accumulates, and a list gets all models that are timed; the cache is empty."""
    timed: list[Any] = []

    def rounds_in_turns(rounds: int, contestants: Sequence[Any], *_: Any, **__: Any) -> list[list[float]]:
        seconds = []
        for contestant in contestants:
            model, audio = contestant.args
            timed.append(model)
            with torch.inference_mode(False):  # in which nothing is counted
                seconds.append([1e-9 * (counted_modules(model, audio.clone())[""] + 1000)] * rounds)
        return seconds

    for module in (latency, speedup):
        monkeypatch.setattr(module, "rounds_in_turns", rounds_in_turns)
        monkeypatch.setattr(module, "rounds_within", lambda *_: 7)
    monkeypatch.setenv("SPARSEWAV_CACHE", str(tmp_path / "cache"))
    return timed


def test_a_sequence_that_falls_is_pooled() -> None:
    """The nearest in squares, by the minimax formula of isotonic regression: max over i, min over j of mean(i..j)."""
    generator = np.random.default_rng(0)
    for size in (1, 2, 5, 9):
        values = generator.standard_normal(size).cumsum()
        best = [max(min(values[i : j + 1].mean() for j in range(k, size)) for i in range(k + 1)) for k in range(size)]
        np.testing.assert_allclose(isotonic(values), best, atol=1e-12)


def test_the_numbers_that_are_timed_begin_at_none_and_end_at_all() -> None:
    assert grid(4, 8) == (0, 1, 2, 3, 4)
    assert grid(3072, 10) == (0, 192, 384, 768, 1152, 1536, 1920, 2304, 2688, 3072)
    for most in (1, 7, 8, 12, 16, 24, 100):
        own = grid(most, 8)
        assert (own[0], own[-1]) == (0, most)
        assert len(own) <= 9
        assert list(own) == sorted(set(own))


ALL_PARTS = ["heads", "units", "channels"]


def made_up(model: Any, generator: np.random.Generator, asked: Structured | None = None) -> Measurement:
    counts = grids(model, asked or Structured(speedup=1.5))
    probes: Any = {
        kind: tuple((0.1 + 0.01 * index + 0.02 * generator.random(), 0.3 + 0.05 * index) for index in range(len(own)))
        for kind, own in counts.items()
    }
    thin = (0.125, 0.25) if "channels" in counts else ()
    return Measurement((1.0, 3.0), (0.25, 0.5), thin, counts, probes, 2, (5, 5))


def test_the_amounts_add_up_to_the_dense_model(tiny_model: Any) -> None:
    model = tiny_model("wavlm", **SHAPE)
    for seed in range(5):
        table = table_of(made_up(model, np.random.default_rng(seed)), structures(model), "made up")
        assert table.total == 4_000_000_000
        assert table.rest == pytest.approx(750_000_000, abs=10)  # whole nanoseconds
        assert table.rest + sum(int(table.parts[one.kind][one.count]) for one in structures(model)) == table.total
        budget = part_budget(model, Structured(speedup=1.5), table)
        assert budget.share({name: one.count for name, one in budget.structures.items()}) == 1
        one_kind = part_budget(model, Structured(speedup=1.5, parts=["units"]), table)
        assert one_kind.rest == table.rest + 2 * int(table.parts["heads"][-1])
    asked = Structured(speedup=4, parts=ALL_PARTS)
    parts = [*structures(model), front_end(model)]
    table = table_of(made_up(model, np.random.default_rng(0), asked), parts, "made up")
    assert table.rest == pytest.approx(375_000_000, abs=10)
    assert table.rest + sum(int(table.parts[one.kind][one.count]) for one in parts) == table.total
    assert table.parts["channels"][:2].tolist() == [0, 0], "one channel stays"
    with_front = part_budget(model, asked, table)
    assert with_front.share({name: one.count for name, one in with_front.structures.items()}) == 1
    nothing = Measurement((1.0, 1.0), (1.0, 1.5), *list(vars(made_up(model, np.random.default_rng(0))).values())[2:])
    with pytest.raises(UserError, match=r"take no time that can be told from noise.*sparsity\.audio_seconds"):
        table_of(nothing, structures(model), "made up")


@pytest.mark.parametrize(("family", "norm"), [("wav2vec2", "group"), ("hubert", "layer"), ("wavlm", "layer")])
def test_a_probe_has_the_layers_that_are_asked_for_and_sees_as_many_frames(
    tiny_model: Any, family: str, norm: str
) -> None:
    model = tiny_model(family, norm, **SHAPE)
    audio = torch.randn(1, 4000)
    before = torch.random.get_rng_state()
    for heads, units in ((0, 0), (3, 0), (0, 100), (4, 480)):
        probe = probe_of(model, 3, heads, units)
        with torch.no_grad():
            assert probe(audio).logits.shape[1] == model(audio).logits.shape[1]
        layers = base_of(probe).encoder.layers
        assert len(layers) == 3
        for layer in layers:
            assert layer.attention.shape.heads == list(range(heads)) if heads else not layer.attention.has_heads
            module = layer.feed_forward
            assert module.intermediate_dense.out_features == units if units else not hasattr(module, "output_dense")
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("head", [True, False])
def test_models_of_other_sizes_have_the_parts_that_are_asked_for(tiny_model: Any, head: bool) -> None:
    model = tiny_model("wav2vec2", **SHAPE)
    model = model if head else base_of(model)
    front, (first, *_) = front_end(model), structures(model)
    smaller = with_parts(model, {front.name: 3, first.name: 2})
    assert type(smaller).__name__ == ("StructuredWav2Vec2ForCTC" if head else "StructuredWav2Vec2Model")
    assert [one.count for one in front_end(smaller).sets] == front.kept(3)
    assert next(one.count for one in structures(smaller) if one.name == first.name) == 2
    assert [one.count for one in front_end(model).sets] == list(front.counts), "the model stays"


@pytest.mark.parametrize(("speedup", "parts"), [(1.6, ["heads", "units"]), (2.5, ALL_PARTS)])
def test_python_measures_for_itself_chooses_and_reads_again(
    tiny_model: Any, noise_batch: Callable[..., Any], clock: list[Any], speedup: float, parts: list[str]
) -> None:
    """With multiply-accumulates for seconds the cut model has just so many fewer."""
    model, batches = tiny_model("wav2vec2", **SHAPE), [noise_batch([4000, 3000])]
    dense = tiny_model("wav2vec2", **SHAPE)
    asked = Structured(speedup=speedup, audio_seconds=[1.0, 2.0], parts=parts)
    table, _ = latency.latency_table(model, asked)
    measured = len(clock)
    assert measured > 10
    report = sparsewav.prune(model, batches, asked)
    assert len(clock) < measured + 20  # the table was read; whole models alone were timed
    assert table.conditions == f"pytorch, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}, " + (
        "1 and 2 s of audio"
    )
    smaller = sparsewav.cut(model, report)
    found = measure_speedup(dense, smaller, asked)
    assert report.speedup == pytest.approx(found.ratio, rel=1e-6)
    assert found.ratio == pytest.approx(speedup, rel=TOLERANCE)
    assert found.low == found.high == pytest.approx(found.ratio)
    with pytest.raises(UserError, match="out of reach"):
        sparsewav.prune(tiny_model("wav2vec2", **SHAPE), batches, Structured(speedup=90, audio_seconds=[1.0, 2.0]))
    with pytest.raises(UserError, match="heads and units cannot be removed"):
        sparsewav.prune(tiny_model("sew"), batches, Structured(speedup=2))


def test_a_record_that_is_damaged_or_of_another_model_is_refused(tiny_model: Any, tmp_path: Path) -> None:
    model = tiny_model("wav2vec2", **SHAPE)
    good, expected = made_up(model, np.random.default_rng(0)), grids(model, Structured(speedup=1.5))
    path = tmp_path / RECORD

    def read(record: Any) -> Measurement:
        path.write_text(record if isinstance(record, str) else json.dumps(record))
        return read_measurement(path, 2, expected)

    record = json.loads(json.dumps(asdict(good)))
    assert read(record) == good
    wrong: list[Any] = ["", "{", "[]", "3", "[" * 5000]
    for key in record:
        wrong += [{other: value for other, value in record.items() if other != key}, record | {key: None}]
    wrong += [record | {"dense": values} for values in ([1.0], [1.0, -1.0], [1.0, float("nan")], [1, 2], ["1", "2"])]
    wrong += [record | {"counts": record["counts"] | {"heads": [0, 1, 2]}}, record | {"layers": 0}]
    wrong += [record | {"probes": record["probes"] | {"units": record["probes"]["units"][1:]}}]
    wrong += [record | {"probes": {"heads": record["probes"]["heads"]}}, record | {"rounds": [5]}]
    for one in wrong:
        with pytest.raises(ValueError):  # noqa: PT011 (the messages are of many kinds)
            read(one)


def test_a_foreign_record_in_the_cache_is_measured_again(
    tiny_model: Any, clock: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, asked = tiny_model("wav2vec2", **SHAPE), Structured(speedup=1.5, audio_seconds=[1.0])
    first, source = latency.latency_table(model, asked)
    assert source is None
    second, source = latency.latency_table(model, asked)
    assert source is not None
    assert second.record() == first.record()
    folder = source.parent
    (folder / RECORD).write_text("{}")
    again, source = latency.latency_table(model, asked)  # the hash of the file tells
    assert source is None
    assert "is damaged" in capsys.readouterr().out
    (folder / RECORD).write_text("{}")
    (folder / "checksums.json").unlink()
    write_checksums(folder)
    again, source = latency.latency_table(model, asked)
    assert source is None
    assert "holds no latencies of this model" in capsys.readouterr().out
    assert again.record() == first.record()
    other = latency.latency_table(model, Structured(speedup=1.5, audio_seconds=[2.0]))[0]
    assert other.total != first.total
    assert latency.latency_table(tiny_model("wav2vec2", **SHAPE | {"intermediate_size": 240}), asked)[1] is None
