"""A budget of structured pruning: what heads, units and channels take of the model, and how many of each fit.

What counts are the encoder's parameters, its multiply-accumulates for an utterance of ten seconds, or the seconds of
the whole model (:mod:`~sparsewav.pruning.allocation.latency`). What every number of parts takes is known before
anything is removed: parameters and multiply-accumulates grow linearly with the heads or units of a structure, and with
the square of the one share of channels that the convolutions of the front end keep; seconds never become fewer with
more parts. A level of a structure is a number of parts; its matrix is really solved there, and its cost in the model's
output measured (:mod:`~sparsewav.pruning.allocation.search`). The levels are few; units fill up what they leave.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsewav.errors import UserError
from sparsewav.pruning.allocation.latency import TOLERANCE, TRIES, LatencyTable, TimeShape, latency_amounts
from sparsewav.pruning.allocation.levels import Level, LevelStore, choose_within
from sparsewav.pruning.encoder import PrunableMatrix, base_of, encoder_layers
from sparsewav.pruning.macs import counted_modules
from sparsewav.pruning.solvers.solve import PrunedMatrix
from sparsewav.pruning.structure import FrontEnd, Structure, front_end, structures
from sparsewav.settings.sparsity import COUNTED, Structured

logger = logging.getLogger(__name__)

SAMPLES = 160_000
"""The utterance whose multiply-accumulates are counted: ten seconds at 16 kHz."""


@dataclass(frozen=True)
class PartBudget:
    """How much of the encoder stays, and what turns numbers of parts into levels.

    Attributes:
        asked: What was asked for.
        total: What the share is of: the parameters or multiply-accumulates that the encoder has, or the nanoseconds
            that the dense model takes.
        structures: What may lose parts, by the name of the matrix that reads them; the front end by its own name.
        amounts: What each takes with 0, 1, ... of its parts, by that name, shape (parts + 1,). The front end takes as
            much with 0 of the channels of its widest convolution as with 1, as every convolution keeps one.
        rest: What there is besides these structures.
        correction: Nanoseconds that a choice was found to take beyond the sum of its amounts; negative for fewer.
        conditions: How seconds were measured; empty for the other amounts.
    """

    asked: Structured
    total: int
    structures: dict[str, Structure | FrontEnd]
    amounts: dict[str, np.ndarray]
    rest: int
    correction: int = 0
    conditions: str = ""

    @property
    def front(self) -> FrontEnd | None:
        """The front end, if it may lose channels."""
        return next((own for own in self.structures.values() if isinstance(own, FrontEnd)), None)

    @property
    def in_layers(self) -> dict[str, Structure]:
        """What may lose parts in the layers, by the name of the matrix that reads them."""
        return {name: own for name, own in self.structures.items() if isinstance(own, Structure)}

    @property
    def readers(self) -> list[str]:
        """The names of all matrices that read what may be removed."""
        return [*(self.front.readers if self.front else ()), *self.in_layers]

    @property
    def room(self) -> int:
        """What the structures may take together."""
        assert self.asked.share is not None
        return math.floor(self.asked.share * self.total + 1e-6) - self.rest - self.correction

    def share(self, kept: Mapping[str, int]) -> float:
        """Give the share of the encoder that stays with so many parts of every structure."""
        return (self.rest + self._taken(kept)) / self.total

    def _taken(self, kept: Mapping[str, int]) -> int:
        return sum(int(self.amounts[name][count]) for name, count in kept.items())

    def sparsities(self, step: float) -> list[float]:
        """Give the shares of parts that are removed at the levels, from none to all."""
        return [*(round(index * step, 9) for index in range(math.ceil(1 / step - 1e-6))), 1.0]

    def check(self, least: int) -> None:
        """Refuse a budget below what all structures take at their smallest level (``least``).

        Raises:
            UserError: It says which budget is possible.
        """
        if least <= self.room:
            return
        possible = (self.rest + least) / self.total
        kinds = " and ".join(kind for kind in self.asked.parts if kind != "channels")
        fewest = "with one channel a convolution" if "channels" in self.asked.parts else ""
        without = " and ".join(filter(None, [f"without any {kinds}" if kinds else "", fewest]))
        more = "" if len(self.asked.parts) > 1 else ", or more of sparsity.parts"
        if self.asked.speedup is not None:
            most = math.floor(100 / possible) / 100
            raise UserError(
                f"{self.asked.asked} is out of reach: {without} the model is {most:.2f} times as fast as the "
                f"dense one by what was measured ({self.conditions}); choose sparsity.speedup={most:g} at most{more}"
            )
        raise UserError(
            f"{self.asked.asked} is out of reach: {without} the encoder still "
            f"has {possible:.4f} of its {COUNTED[self.asked.counts]}; choose "
            f"at least {math.ceil(possible * 1000) / 1000:g}{more}"
        )

    def front_numbers(self, step: float) -> list[int]:
        """Give how many channels the widest convolution keeps at the levels of the front end, ascending."""
        assert self.front is not None
        return sorted({max(parts_kept(sparsity, self.front.count), 1) for sparsity in self.sparsities(step)})

    def more_than_needed(self, most: int) -> str | None:
        """Give a sentence if nothing has to be removed, where all structures take ``most``."""
        return f"{self.asked.asked} removes nothing" if most <= self.room else None

    def levels(
        self,
        matrix: PrunableMatrix,
        plain: Sequence[Level],
        pruned: Sequence[PrunedMatrix],
        hessian: Float[Tensor, "cols cols"],
    ) -> tuple[list[Level], list[PrunedMatrix], np.ndarray]:
        """Give the levels of a structure that differ in the number of parts, and what they take in ascending order."""
        count = self.structures[matrix.name].count
        by_kept = {parts_kept(level.sparsity, count): one for level, one in zip(plain, pruned, strict=True)}
        kept = sorted(by_kept)
        levels = [Level(1 - number / count) for number in kept]
        return levels, [by_kept[number] for number in kept], self.amounts[matrix.name][kept]

    def reference(self, store: LevelStore, weights: Mapping[str, int]) -> dict[str, int]:
        """Give the level of every structure that is nearest to an even choice within the budget, and not above it."""
        even = self.kept_evenly()
        return {
            name: max(int(np.searchsorted(sizes, self.amounts[name][even[name]], side="right")) - 1, 0)
            for name, sizes in store.sizes.items()
        }

    def choose(self, costs: Mapping[str, np.ndarray], sizes: Mapping[str, np.ndarray]) -> dict[str, int]:
        """Give the index of every structure's level, so that they fit and cost least together.

        With ``sparsity.uniform`` the structures of a kind have one level, whose costs are summed. The convolutions of
        the front end always do, as they are one structure.
        """
        sets = [[name] for name in costs]
        if self.asked.uniform:
            kinds = dict.fromkeys(structure.kind for structure in self.structures.values())
            sets = [[name for name in costs if self.structures[name].kind == kind] for kind in kinds]
        chosen = choose_within(
            {names[0]: np.sum([costs[name] for name in names], axis=0) for names in sets},
            {names[0]: np.sum([sizes[name] for name in names], axis=0) for names in sets},
            self.room,
        )
        if chosen is None:  # the budget was checked, and only rounding it up can have left nothing
            return dict.fromkeys(costs, 0)
        return {name: chosen[names[0]] for names in sets for name in names}

    def kept_evenly(self) -> dict[str, int]:
        """Give how many parts every structure keeps if all keep the same share of theirs, as large as fits."""

        def kept(share: float) -> dict[str, int]:
            return {name: parts_kept(1 - share, structure.count) for name, structure in self.structures.items()}

        counts = [structure.count for structure in self.structures.values()]
        shares = sorted({(2 * number + 1) / (2 * count) + 1e-9 for count in counts for number in range(count)} | {0.0})
        return self.filled(kept(shares[_last(lambda index: self._fits(kept(shares[index])), len(shares))]))

    def filled(self, kept: Mapping[str, int]) -> dict[str, int]:
        """Give every structure that has units as many more as fit, the same number to each."""

        def more(number: int) -> dict[str, int]:
            return {
                name: min(count + number, self.structures[name].count)
                if count and self.structures[name].kind == "units"
                else count
                for name, count in kept.items()
            }

        most = max(structure.count for structure in self.structures.values())
        return more(_last(lambda number: self._fits(more(number)), most + 1))

    def targets(self, kept: Mapping[str, int]) -> dict[str, float]:
        """Give the share of the parts that every structure loses."""
        return {name: 1 - count / self.structures[name].count for name, count in kept.items()}

    def filled_targets(self, sparsities: Mapping[str, float]) -> dict[str, float]:
        """Give these shares with as many more units as fit (:meth:`filled`)."""
        return self.targets(self.filled(self.parts_left(sparsities)))

    def parts_left(self, sparsities: Mapping[str, float]) -> dict[str, int]:
        """Give how many parts every structure keeps that loses such a share of them."""
        return {name: parts_kept(own, self.structures[name].count) for name, own in sparsities.items()}

    def measured_with(self, choose: Callable[["PartBudget"], Mapping[str, int]], time_shape: TimeShape) -> "PartBudget":
        """Correct a budget of seconds so that what is chosen within it really takes what was asked for.

        Every choice is timed. Where it misses what was asked for by more than
        :data:`~sparsewav.pruning.allocation.latency.TOLERANCE`, the difference between its time and that of the table
        becomes the correction, and the choice is made again.

        Args:
            choose: Gives how many parts every structure keeps within a budget.
            time_shape: Times a model with these numbers.

        Returns:
            The budget whose choice came nearest of those that were tried, and was fast enough if any was.
        """
        assert self.asked.share is not None
        tried: list[tuple[bool, float, PartBudget]] = []
        budget = self
        least = sum(int(own[0]) for own in self.amounts.values())
        while len(tried) < TRIES:
            kept = choose(budget)
            measured = time_shape(self.by_structure(kept))
            miss = measured / self.asked.share - 1
            logger.info("chosen by the table: %.4f of the time; timed: %.4f", self.share(kept), measured)
            tried.append((miss > TOLERANCE, abs(miss), budget))
            budget = replace(self, correction=round((measured - self.share(kept)) * self.total))
            if abs(miss) <= TOLERANCE or budget.room < least:
                break
        return min(tried, key=lambda one: one[:2])[2]

    def by_structure(self, kept: Mapping[str, int]) -> dict[str, int]:
        """Give numbers of parts by the names of the structures."""
        return {self.structures[name].name: count for name, count in kept.items()}

    def _fits(self, kept: Mapping[str, int]) -> bool:
        return self._taken(kept) <= self.room


def parts_kept(sparsity: float, count: int) -> int:
    """Give how many of some parts stay if a share of them is removed."""
    return round((1 - sparsity) * count)


def _last(holds: Callable[[int], bool], count: int) -> int:
    """Give the last of the numbers below ``count`` for which something holds that holds from 0 on and then no more."""
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def part_budget(model: PreTrainedModel, asked: Structured, latency: LatencyTable | None = None) -> PartBudget:
    """Count what a model has, and what its heads, units and channels have of it.

    Args:
        model: A model; for a budget of seconds the one whose latencies were measured, or what was cut out of it.
        asked: The budget.
        latency: How long that model and its parts take, for a budget of seconds.

    Raises:
        UserError: The model's family has none that can be removed, its layers differ and are to be uniform, the budget
            is out of reach, or it is one of seconds and no latencies are given.
    """
    found = structures(model)
    chosen: dict[str, Structure | FrontEnd] = {}
    if "channels" in asked.parts:
        front = front_end(model)
        chosen[front.name] = front
    chosen |= {own.reader.name: own for own in found if own.kind in asked.parts}
    if not chosen:
        raise UserError(f"the model has no {' and '.join(asked.parts)} left to remove; choose others in sparsity.parts")
    if asked.uniform:
        kinds = [kind for kind in asked.parts if kind != "channels"]
        _check_alike(model, kinds, [own for own in chosen.values() if isinstance(own, Structure)])
    if asked.speedup is not None:
        if latency is None:
            raise UserError(
                f"{asked.asked} takes latencies that were measured, and none are given; call sparsewav.prune, which "
                "measures them"
            )
        every = latency_amounts([*chosen.values(), *(own for own in found if own.reader.name not in chosen)], latency)
        amounts = {name: every[name] for name in chosen}
        # Of a model that was cut before, the share is still of the dense one.
        rest = latency.rest + sum(int(own[-1]) for name, own in every.items() if name not in chosen)
        budget = PartBudget(asked, latency.total, chosen, amounts, rest, conditions=latency.conditions)
    else:
        total, amounts = _counted(model, asked, chosen)
        budget = PartBudget(asked, total, chosen, amounts, total - sum(int(own[-1]) for own in amounts.values()))
    budget.check(sum(int(own[0]) for own in amounts.values()))
    return budget


def _counted(
    model: PreTrainedModel, asked: Structured, chosen: Mapping[str, Structure | FrontEnd]
) -> tuple[int, dict[str, np.ndarray]]:
    """Give the parameters or multiply-accumulates of the encoder, and those of every structure by its parts."""
    base = base_of(model)
    if asked.macs is None:
        return sum(parameter.numel() for parameter in base.parameters()), {
            name: _front_parameters(model, own) if isinstance(own, FrontEnd) else _parameters(model, own)
            for name, own in chosen.items()
        }
    counts, prefix = counted_modules(base, torch.zeros(1, SAMPLES)), _prefix(model, base)
    return counts[""], {
        name: _front_macs(own, {prefix + place: count for place, count in counts.items()})
        if isinstance(own, FrontEnd)
        else np.arange(own.count + 1) * (counts[own.name.removeprefix(prefix)] // own.count)
        for name, own in chosen.items()
    }


def _prefix(model: PreTrainedModel, base: nn.Module) -> str:
    return next((f"{name}." for name, module in model.named_modules() if module is base and name), "")


def _check_alike(model: PreTrainedModel, kinds: Sequence[str], chosen: Sequence[Structure]) -> None:
    """Refuse a model whose layers have different numbers of parts.

    Raises:
        UserError: They have.
    """
    for kind in kinds:
        counts = [structure.count for structure in chosen if structure.kind == kind]
        if len(set(counts)) != 1 or len(counts) < len(encoder_layers(model)):
            raise UserError(
                f"the model's layers have {', '.join(map(str, counts))} {kind}, and sparsity.uniform=true gives all "
                "the same; choose sparsity.uniform=false"
            )


def _parameters(model: PreTrainedModel, structure: Structure) -> np.ndarray:
    """Give the parameters of a structure with 0, 1, ... parts, but for the bias that stays without any."""
    module = model.get_submodule(structure.name)
    linear = [part for part in module.modules() if isinstance(part, nn.Linear) and part is not structure.reader.module]
    shared = getattr(module, "gru_rel_pos_linear", None)  # WavLM's: a matrix for all heads, and a number for each
    makers = [part for part in linear if part is not shared]
    one = structure.size * len(structure.reader.weight)
    one += sum(structure.size * (part.in_features + (part.bias is not None)) for part in makers)
    kept = np.arange(structure.count + 1, dtype=np.int64)
    if shared is None:
        return kept * one
    return kept * (one + 1) + (kept > 0) * sum(parameter.numel() for parameter in shared.parameters())


def _front_parameters(model: PreTrainedModel, front: FrontEnd) -> np.ndarray:
    """Give the parameters of a front end, the projection's bias left out, by the channels of its widest convolution."""
    rows = len(front.sets[-1].reader.weight)

    def count(number: int) -> int:
        total, before = 0, 1
        for channels, kept in zip(front.sets, front.kept(number), strict=True):
            total += kept * (before * channels.maker.kernel_size[0] + len(channels.vectors))
            before = kept
        return total + before * rows

    return np.array([count(number) for number in range(front.count + 1)], dtype=np.int64)


def _front_macs(front: FrontEnd, counts: Mapping[str, int]) -> np.ndarray:
    """Give the multiply-accumulates of a front end by the channels of its widest convolution.

    Args:
        front: The front end.
        counts: Those of the modules of the model as it is, by name.
    """
    # For each channel that a convolution reads and each that it makes, and for each that the projection reads.
    before = [1, *front.counts[:-1]]
    pairs = [
        counts[channels.name] // (read * made)
        for channels, read, made in zip(front.sets, before, front.counts, strict=True)
    ]
    last = counts[front.sets[-1].reader.name] // front.counts[-1]

    def count(number: int) -> int:
        kept = front.kept(number)
        return sum(one * read * made for one, read, made in zip(pairs, [1, *kept[:-1]], kept, strict=True)) + (
            last * kept[-1]
        )

    return np.array([count(number) for number in range(front.count + 1)], dtype=np.int64)
