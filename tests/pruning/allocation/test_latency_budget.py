"""A budget of seconds: what is chosen by a table of latencies, and how it is corrected by what the choice takes."""

import itertools
from typing import Any

import numpy as np
import pytest

from sparsewav import Structured
from sparsewav.errors import UserError
from sparsewav.pruning.allocation.latency import TOLERANCE, TRIES, LatencyTable
from sparsewav.pruning.allocation.parts import PartBudget, part_budget
from sparsewav.pruning.structure import structures

SHAPE = {"num_attention_heads": 4, "intermediate_size": 48}


def made_up_table(generator: np.random.Generator, model: Any, rest: int = 60_000) -> LatencyTable:
    """Latencies with jumps and plateaus: half of the parts take no time, the others any."""
    parts: dict[Any, np.ndarray] = {}
    for kind, count in (("heads", 4), ("units", 48)):
        steps = generator.integers(1, 200_000 // count, count) * (generator.random(count) < 0.5)
        parts[kind] = np.concatenate([[0], np.cumsum(steps)])
    total = rest + sum(int(parts[one.kind][one.count]) for one in structures(model))
    return LatencyTable(total, parts, rest, "made up")


@pytest.mark.parametrize("uniform", [False, True])
def test_the_choice_is_the_cheapest_that_is_fast_enough(tiny_model: Any, uniform: bool) -> None:
    """By brute force over all choices of levels, with latencies that are anything but linear."""
    model = tiny_model("wav2vec2", **SHAPE)
    for seed in range(20):
        generator = np.random.default_rng(seed)
        table = made_up_table(generator, model)
        budget = part_budget(model, Structured(speedup=1.4, uniform=uniform), table)
        assert budget.rest == table.rest
        names = list(budget.structures)
        kept = {
            name: np.array([0, one.count // 4, one.count // 2, one.count]) for name, one in budget.structures.items()
        }
        sizes = {name: budget.amounts[name][kept[name]] for name in names}
        costs = {name: np.sort(generator.random(4))[::-1].copy() for name in names}

        def seconds(choice: dict[str, int], sizes: dict[str, np.ndarray] = sizes) -> int:
            return sum(int(sizes[name][index]) for name, index in choice.items())

        def cost(choice: dict[str, int], costs: dict[str, np.ndarray] = costs) -> float:
            return sum(costs[name][index] for name, index in choice.items())

        every = [dict(zip(names, levels, strict=True)) for levels in itertools.product(range(4), repeat=len(names))]
        if uniform:
            kinds = {name: one.kind for name, one in budget.structures.items()}
            every = [one for one in every if len({(kinds[name], index) for name, index in one.items()}) == 2]
        limit = table.total / 1.4 - table.rest
        chosen = budget.choose(costs, sizes)
        assert chosen in every
        assert seconds(chosen) <= limit
        # Amounts are rounded up to grains, of which the budget has 400 for every structure.
        assert cost(chosen) <= min(cost(one) for one in every if seconds(one) <= 0.99 * limit)
        final = budget.filled({name: int(kept[name][index]) for name, index in chosen.items()})
        taken = table.rest + sum(int(budget.amounts[name][count]) for name, count in final.items())
        assert taken <= table.total / 1.4
        assert budget.share(final) == taken / table.total
        evenly = budget.kept_evenly()
        assert table.rest + sum(int(budget.amounts[name][count]) for name, count in evenly.items()) <= table.total / 1.4


def test_a_choice_that_misses_is_made_again(tiny_model: Any) -> None:
    """The real time is another function of the parts than the table's sum, which the choice then meets."""
    model = tiny_model("wav2vec2", **SHAPE)
    linear: dict[Any, np.ndarray] = {"heads": 20_000 * np.arange(5), "units": 4_000 * np.arange(49)}
    table = LatencyTable(200_000 + 2 * (80_000 + 192_000), linear, 200_000, "made up")
    for factor, offset in ((1.0, 0.0), (1.3, 0.0), (0.9, 0.0), (1.0, 0.1), (1.2, -0.05)):
        calls: list[dict[str, int]] = []

        def time_shape(kept: Any, factor: float = factor, offset: float = offset, calls: Any = calls) -> float:
            calls.append(dict(kept))
            taken = sum(
                int(linear["heads" if name.endswith("attention") else "units"][own]) for name, own in kept.items()
            )
            return (table.rest + factor * taken) / table.total + offset

        budget = part_budget(model, Structured(speedup=1.5), table).measured_with(PartBudget.kept_evenly, time_shape)
        final = time_shape(budget.by_structure(budget.kept_evenly()))
        assert final * 1.5 == pytest.approx(1, abs=TOLERANCE)
        assert len(calls) - 1 <= TRIES
        assert (factor, offset) != (1.0, 0.0) or (budget.correction == 0 and len(calls) == 2)


def test_what_no_choice_reaches_and_tables_of_others_are_refused(tiny_model: Any) -> None:
    model = tiny_model("wav2vec2", **SHAPE)
    table = made_up_table(np.random.default_rng(0), model)
    most = int(100 * table.total / table.rest) / 100
    with pytest.raises(UserError, match=rf"speedup=9 is out of reach: .* is {most:.2f} times as fast .*\(made up\)"):
        part_budget(model, Structured(speedup=9), table)
    part_budget(model, Structured(speedup=most), table)
    with pytest.raises(UserError, match=r"or more of sparsity\.parts"):
        part_budget(model, Structured(speedup=9, parts=["heads"]), table)
    with pytest.raises(UserError, match=r"call sparsewav\.prune, which measures them"):
        part_budget(model, Structured(speedup=1.5))
    with pytest.raises(UserError, match="has 64 units, and the latencies are of a model with 48"):
        part_budget(tiny_model("wav2vec2", **SHAPE | {"intermediate_size": 64}), Structured(speedup=1.5), table)
    for wrong in ([1, 2], [0, 2, 1], []):
        with pytest.raises(ValueError, match="begin at 0 and never become fewer"):
            LatencyTable(10, {"units": np.array(wrong, dtype=np.int64)}, 5, "")
    again = LatencyTable.of_record(table.record())
    assert again.record() == table.record()
