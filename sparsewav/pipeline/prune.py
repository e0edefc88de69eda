"""Pruning in Python: the engine, with the latencies and the recovery of the whole model that lie beyond it."""

import copy
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedModel

from sparsewav.errors import UserError
from sparsewav.inference.latency import latency_table
from sparsewav.inference.shapes import Shape
from sparsewav.inference.speedup import shape_timer
from sparsewav.pruning import PruneReport, prune_model
from sparsewav.pruning.batches import as_sequence, count_utterances, first_utterances
from sparsewav.pruning.layerwise import StageProgress
from sparsewav.pruning.prune import HasModel, checked, model_within, options_of, round_pruned, stage_progress
from sparsewav.pruning.rest import round_rest
from sparsewav.settings.pruning import (
    Allocation,
    Calibration,
    Objective,
    Pruning,
    Saliency,
    Solver,
    Sparsity,
    Structured,
)
from sparsewav.settings.quantization import Integers, NoQuantization, Quantization
from sparsewav.settings.recovery import Elsa, Global, Recovery
from sparsewav.training.global_recovery import check_learnable, check_one_process, recover
from sparsewav.training.masks import masks_of, sparsities_of


def prune(
    model: PreTrainedModel | HasModel,
    calibration_batches: Iterable[Mapping[str, Tensor]],
    sparsity: float | Sparsity = 0.75,
    *,
    preset: str = "paper",
    saliency: str | Saliency | None = None,
    solver: str | Solver | None = None,
    objective: str | Objective | None = None,
    recovery: str | Recovery | None = None,
    quantization: str | Quantization | None = None,
    allocation: str | Allocation | None = None,
    calibration: Calibration | None = None,
    scope: str | None = None,
    seed: int = 0,
    masks: Mapping[str, Bool[Tensor, "_rows _cols"]] | None = None,
    progress: StageProgress | None = None,
) -> PruneReport:
    """Prune a CTC model, or an encoder without a head, in place and in one shot.

    >>> speech = sparsewav.load_model("demo")  # doctest: +SKIP
    >>> batches = sparsewav.calibration_batches("demo", speech, utterances=128)  # doctest: +SKIP
    >>> report = sparsewav.prune(speech, batches, 0.8, preset="best_oneshot")  # doctest: +SKIP

    Every option is an object of :mod:`sparsewav.settings`, or its name for the defaults; None is what the preset says.
    In a process group (:mod:`torch.distributed`) all processes call it with the same arguments, share the work, and end
    with the same model.

    Args:
        model: A CTC model of transformers, or an encoder (``AutoModel``), which takes the allocations that need no
            labels; or what has one as ``model``, such as :func:`sparsewav.load_model` gives. Its prunable matrices are
            those of :mod:`~sparsewav.pruning.families`.
        calibration_batches: Dictionaries with ``input_values`` (batch, samples) or ``input_features`` (batch, feature
            frames, bins), whichever the model takes, ``attention_mask`` over their second axis and, for the allocations
            ``hutchinson`` and ``hawq`` by traces of the Hessian, ``labels`` (batch, characters; −100 where there is
            none); their other keys are not read. What is no sequence, as a ``DataLoader``, is read once, into a list.
        sparsity: The share of the prunable weights to remove, or ``NM(n, m)``, or ``Megabytes(20)``: as few as the size
            of the weights file allows, or ``Structured(parameters=0.5)``: whole heads and units, whose columns in the
            matrices that read them become zero, until :func:`sparsewav.cut` makes the smaller model, and channels of
            the convolutions where its ``parts`` name them, which are cut out of the model at once; with
            ``Structured(speedup=2)`` as many go as make it twice as fast on this machine's CPU, which is measured.
            For the last two ``allocation`` is ``error_curves`` unless one is given.
        preset: Where the options come from that are not given: ``paper``, ``best_oneshot`` (recommended), ``best``, or
            ``smallest`` for ``Megabytes``; the same as ``experiment=`` of the command.
        saliency: Which weights are removed first: ``obs_first_order`` (the paper's), ``obs``, ``wanda``, ``magnitude``.
        solver: How mask and kept weights are found: ``obs`` (the paper's), ``obs_refit``, ``alps``.
        objective: Which error is minimised: ``symmetric`` (the paper's), ``asymmetric``.
        recovery: What is left learns from the dense model afterwards: ``none`` (the paper's), ``reconstruction`` or
            ``affine``, layer by layer; ``global`` or ``elsa``, as a whole, which :func:`sparsewav.recover` does, too.
        quantization: To how few values the kept weights are rounded: ``none`` (the paper's), ``float16``, ``int8``,
            ``int4``, ``int3``, ``int2``, or ``mixed`` for ``Megabytes``; all but ``float16`` take a model in float32.
        allocation: How the sparsity is shared among the matrices: ``hutchinson`` (the paper's), ``uniform``, ``hawq``,
            ``error_curves``, ``search``; ``Hutchinson(trace="fisher")`` needs no labels.
        calibration: Which activations the Hessians are summed over, e.g. ``Calibration(propagation="sequential")``;
            all utterances of the batches are taken.
        scope: What is pruned: ``transformer`` (the paper's), the matrices of the layers, or ``encoder``, the
            convolutions and the projection in front of them, too. The sparsity is over what is pruned.
        seed: The seed of the probes of traces, the sample of frames, the search and the recovery's order of batches.
        masks: Masks already in force, by matrix name: what they removed stays removed and counts.
        progress: Called as the stages advance.

    Raises:
        UserError: An option, the model or the calibration data is wrong. After this and any other error the model is
            as it was, for which a copy of it is kept in the meantime.
    """
    settings = options_of(
        sparsity,
        preset,
        {
            "saliency": saliency,
            "solver": solver,
            "objective": objective,
            "recovery": recovery,
            "quantization": quantization,
            "allocation": allocation,
            "calibration": calibration,
            "scope": scope,
            "seed": seed,
        },
    )
    pruned = model_within(model)
    whole = settings.recovery if isinstance(settings.recovery, Global) else None
    if whole:
        check_one_process(whole)
    if masks and isinstance(whole, Elsa):
        raise UserError("recovery=elsa lets removed weights return, and masks hold them; choose recovery=global")
    with checked(pruned, settings):
        batches: Any = as_sequence(calibration_batches)
        if whole:
            check_learnable(pruned, whole, count_utterances(first_utterances(batches, 2)))
        dense = copy.deepcopy(pruned) if whole else None
        with _latencies(pruned, settings.sparsity) as timing:
            report = prune_model(pruned, batches, settings, masks=masks, rounds=not whole, progress=progress, **timing)
        if dense is not None:
            _recover(pruned, dense, batches, settings, report, progress)
    return report


@contextmanager
def _latencies(dense: PreTrainedModel, sparsity: Sparsity) -> Iterator[dict[str, Any]]:
    """Give what the engine takes for a speed-up: latencies of the dense model's parts, and what times a choice."""
    if not isinstance(sparsity, Structured) or sparsity.speedup is None:
        yield {}
        return
    table, _ = latency_table(dense, sparsity)
    shape = Shape.of(dense)
    with shape_timer(shape, shape, sparsity) as time_shape:
        yield {"latency": table, "time_shape": time_shape}


def _recover(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    batches: Any,
    settings: Pruning,
    report: PruneReport,
    progress: StageProgress | None,
) -> None:
    """Let the model learn the dense one's outputs, then round it where that is asked for; the report tells of both."""
    assert isinstance(settings.recovery, Global)
    started = time.perf_counter()
    found = recover(
        *(model, dense, batches, settings.recovery),
        scope=settings.reach,
        seed=settings.seed,
        progress=stage_progress(progress, "recover"),
    )
    report.recovery = found
    if isinstance(settings.recovery, Elsa):  # the mask has moved, and with it the sparsities of the matrices
        now = masks_of(model, settings.scope)
        report.masks = {name: now[name] for name in report.masks}
        sparsities = sparsities_of(now)
        report.matrices = [replace(matrix, sparsity=sparsities[matrix.name]) for matrix in report.matrices]
    report.warnings += found.warnings
    report.seconds["recover"] = report.seconds.get("recover", 0.0) + time.perf_counter() - started
    if isinstance(settings.quantization, NoQuantization):
        return
    started = time.perf_counter()
    if isinstance(settings.quantization, Integers):
        bits = {matrix.name: matrix.bits for matrix in report.matrices if matrix.bits is not None}
        round_pruned(model, batches, settings, masks_of(model, settings.scope), bits, progress)
    else:
        round_rest(model, settings.quantization, settings.scope)
    report.seconds["quantize"] = time.perf_counter() - started
