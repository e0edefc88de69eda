"""The loop over the layers: collect a layer's Hessians, solve its matrices, recover its output, round, and propagate.

Where nothing is recovered a matrix is rounded right after it is solved, so that what comes after it makes up for both.
What is in front of the layers (``scope=encoder``, or channels that are removed whole) is pruned before, matrix by
matrix. With propagation ``parallel`` there is no loop: all Hessians come from one pass of the dense model.
"""

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsewav.pruning import distributed
from sparsewav.pruning.allocation.parts import parts_kept
from sparsewav.pruning.channels import remove_channels
from sparsewav.pruning.encoder import FRONT, PrunableMatrix, encoder_layers, projections_as_modules, prunable_matrices
from sparsewav.pruning.gradient_covariance import layer_name
from sparsewav.pruning.hessian import Hessians, InputObserver, Progress, collect_hessian_in_front
from sparsewav.pruning.hidden_states import (
    LayerInputs,
    first_layer_inputs,
    run_layer,
    save_next_inputs,
    scratch_folder,
)
from sparsewav.pruning.output_error import output_energy, output_error
from sparsewav.pruning.plan import Outcome, Plan
from sparsewav.pruning.recovery import recover
from sparsewav.pruning.report import MatrixReport
from sparsewav.pruning.solvers.quantize import QuantizedMatrix
from sparsewav.pruning.solvers.solve import MatrixGroup, PrunedMatrix, check_finite, prune_groups
from sparsewav.pruning.structured import StructureReport, remove_parts
from sparsewav.settings.pruning import Asymmetric, Pruning

StageProgress = Callable[[str, int, int], None]
"""Called with (stage, steps done, steps in all); stages are ``calibrate``, ``allocate``, ``solve`` and ``recover``."""

LoadLayer = Callable[[int, Outcome], AbstractContextManager[bool]]
"""Called with a layer's index and the outcome so far. Within the context that it returns, the layer has its weights;
the context's value is True for a layer that is pruned already, whose reports are then in the outcome."""

BATCHED_BYTES = 2 * 2**30
"""Memory in bytes that matrices which are solved together may take."""


@torch.no_grad()
def prune_layer_by_layer(
    model: PreTrainedModel,
    batches: Any,
    plan: Plan,
    outcome: Outcome,
    *,
    load_layer: LoadLayer | None = None,
    progress: StageProgress | None = None,
) -> None:
    """Prune every layer in place, on the outputs of the pruned layers before it (``sequential``, ``true_sequential``).

    What is in front of the layers, where the scope has it, comes first, each matrix on the outputs of the pruned ones
    before it. It is pruned with the symmetric objective and without a recovery: the first layer is given the dense
    model's outputs beside, and makes up for it.

    The hidden states of the calibration set lie on disk, in the folder for temporary files; one batch of one layer is
    in memory at a time. In a process group each process takes its share of the batches, and all solve with the Hessians
    of the whole set.

    Args:
        model: A CTC model in evaluation mode.
        batches: Calibration batches, a sequence.
        plan: What is to be done to the matrices.
        outcome: The results are added to it.
        load_layer: Loads a layer's weights for a context and unloads them afterwards, for models that do not fit into
            memory. Outside of the context the layer's parameters may be on the meta device, except for the position
            embedding that WavLM's first layer has.
        progress: Called as the stages advance.

    Raises:
        UserError: The set is empty, or an activation is not finite.
    """
    settings, device = plan.settings, model.device
    how = settings.layer_recovery
    layers, matrices = encoder_layers(model), prunable_matrices(model, settings.scope)
    front = [matrix for matrix in matrices if matrix.layer == FRONT]
    with projections_as_modules(model), scratch_folder() as folder:
        front_changes = bool(front) or plan.front is not None
        if settings.two_models or not front_changes:
            with distributed.together():
                inputs = first_layer_inputs(model, batches, folder)
                for item in inputs if settings.two_models else []:
                    item.save("dense_states", item.load("hidden_states", device))
        for number, matrix in enumerate(front, start=1):
            sample = settings.calibration.frames_per_column
            found = collect_hessian_in_front(model, matrix, batches, frames_per_column=sample, seed=settings.seed)
            solve([matrix], found, plan, outcome)
            if progress:
                progress("calibrate", number, len(front) + len(layers))
        if plan.front is not None:
            remove_front_channels(model, batches, plan, outcome)
        if plan.structures == {} and how is None:  # channels alone
            return
        if front_changes:
            with distributed.together():
                inputs = first_layer_inputs(model, batches, folder)
        for index, layer in enumerate(layers):

            def run(
                item: LayerInputs, layer: nn.Module = layer, piece: str = "hidden_states"
            ) -> Float[Tensor, "batch frames width"]:
                return run_layer(layer, layers[0], item.load(piece, device), item.load("others", device)[0])

            with load_layer(index, outcome) if load_layer else nullcontext(False) as pruned_already:
                dense_layer = copy.deepcopy(layer) if settings.two_models else layer
                own = [matrix for matrix in matrices if matrix.layer == index]
                groups = [] if pruned_already else [plan.pruned(own)]
                if settings.calibration.propagation == "true_sequential" and any(groups):
                    groups = in_reading_order(groups[0], inputs, run)
                solved: list[tuple[list[PrunableMatrix], Hessians]] = []  # for the roundings and errors that follow
                dense_weights = {matrix.name: matrix.weight.detach().clone() for matrix in own if how}
                for group in filter(None, groups):  # a layer may have no parts that can be removed
                    hessians = collect_layer_hessians(group, inputs, run, settings, layer, dense_layer, device)
                    if how:
                        solved.append((group, hessians))
                    solve(group, hessians, plan, outcome)
                for item in inputs if settings.two_models else []:
                    item.save("dense_states", run(item, dense_layer, "dense_states"))
                if how:
                    covariance = plan.covariances.get(layer_name(model, index))
                    with outcome.timing("recover"):
                        shown = _of_layer(progress, index, len(layers))
                        recovery = recover(layer, own, run, inputs, how, settings.seed, shown, covariance=covariance)
                    if plan.bits and plan.rounds:
                        grids: dict[str, QuantizedMatrix] = {}
                        for group, hessians in solved:
                            grids |= quantize(group, hessians, plan, outcome)
                        with outcome.timing("recover"):
                            again = recover(
                                *(layer, own, run, inputs, how, settings.seed, shown),
                                grids=grids,
                                covariance=covariance,
                            )
                        recovery = replace(again, diverged=again.diverged or recovery.diverged)
                    outcome.recoveries.append(recovery)
                    with outcome.timing("recover"):
                        _measure_again(solved, dense_weights, outcome)
                for item in inputs if index + 1 < len(layers) else []:
                    outputs = {"hidden_states": run(item)}
                    if settings.two_models:
                        outputs["dense_states"] = item.load("dense_states", device)
                    save_next_inputs(model, index, item, outputs)
            if progress:
                progress("calibrate", len(front) + index + 1, len(front) + len(layers))


def collect_layer_hessians(
    matrices: list[PrunableMatrix],
    inputs: list[LayerInputs],
    run: Callable[..., Tensor],
    settings: Pruning,
    layer: nn.Module,
    dense_layer: nn.Module,
    device: torch.device,
) -> Hessians:
    """Run a layer on all batches, and sum the Hessians of some of its matrices.

    With the asymmetric objective the dense layer is run beside it on the dense model's hidden states, and the drift of
    the inputs is summed as well.
    """
    dense = None
    if isinstance(settings.objective, Asymmetric):
        places = {module: place for place, module in layer.named_modules()}
        dense = {matrix.name: dense_layer.get_submodule(places[matrix.module]) for matrix in matrices}
    observer = InputObserver(matrices, settings.calibration.frames_per_column, settings.seed, dense)
    with distributed.together(), observer.attached():
        for item in inputs:
            observer.start_batch({matrices[0].layer: item.load("others", device)[1]}, item.number, item.share)
            if dense is not None:
                run(item, dense_layer, "dense_states")
            run(item)
            observer.end_batch()
    return observer.finish()


def in_reading_order(
    matrices: list[PrunableMatrix], inputs: list[LayerInputs], run: Callable[[LayerInputs], Tensor]
) -> list[list[PrunableMatrix]]:
    """Group a layer's matrices by the tensor that they read, in the order of the forward pass."""
    seen: dict[tuple[int, bool], tuple[Tensor, list[str]]] = {}
    called: set[str] = set()

    def hook_of(matrix: PrunableMatrix) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, read: tuple[Tensor, ...]) -> None:
            if matrix.name not in called:  # one that reads two tensors is pruned with those that read the first
                called.add(matrix.name)
                seen.setdefault((id(read[0]), matrix.positions), (read[0], []))[1].append(matrix.name)

        return hook

    hooks = [matrix.module.register_forward_pre_hook(hook_of(matrix)) for matrix in matrices]
    try:
        for item in inputs[:1]:
            run(item)
    finally:
        for hook in hooks:
            hook.remove()
    by_name = {matrix.name: matrix for matrix in matrices}
    found = distributed.gather([names for _, names in seen.values()])
    order = next((groups for groups in found if groups), [list(by_name)])  # a process without a batch found none
    return [[by_name[name] for name in by_name if name in names] for names in order]


@torch.no_grad()
def solve(
    matrices: list[PrunableMatrix], hessians: Hessians, plan: Plan, outcome: Outcome, progress: Progress | None = None
) -> None:
    """Prune matrices in place, those with the same input together; the processes of a group share the work.

    They are rounded, too, unless a recovery is to come first, as it does in layers alone.

    Args:
        matrices: The matrices to prune.
        hessians: Their Hessians.
        plan: What is to be done to them.
        outcome: Reports, masks and seconds are added to it.
        progress: Called with the number of matrices done.
    """
    if plan.structures is not None:
        _remove_parts(matrices, hessians, plan, outcome, progress)
        return
    with outcome.timing("solve"):
        dealt, owners = _dealt_groups(matrices, hessians)
        recovered = plan.settings.layer_recovery is not None and matrices[0].layer != FRONT
        rounds = bool(plan.bits) and plan.rounds and not recovered
        done: dict[str, tuple[MatrixReport, Tensor]] = {}
        with distributed.together():
            own = {key: items for key, items in dealt.items() if owners[key] == distributed.rank()}
            for keys in _batches_of(own, plan.batched_devices):
                asked = [
                    plan.group(
                        own[key],
                        [plan.targets[matrix.name] for matrix in own[key]],
                        hessians.by_input[key],
                        hessians.drifts.get(key),
                    )
                    for key in keys
                ]
                for key, group, found in zip(keys, asked, prune_groups(asked, plan.settings), strict=True):
                    results = _rounded(group, found, plan, outcome) if rounds else found
                    for matrix, result in zip(own[key], results, strict=True):
                        check_finite(result.weight, matrix.name)
                        done[matrix.name] = (_report(matrix, result, hessians, plan), result.keep)
                        matrix.weight.data.copy_(result.weight)
                if progress:
                    progress(len(done), len(matrices))
        _exchange(dealt, owners, done)
        outcome.reports |= {name: report for name, (report, _) in done.items()}
        if plan.keep_masks:
            outcome.masks |= {name: mask for name, (_, mask) in done.items()}


def remove_front_channels(
    model: PreTrainedModel, batches: Any, plan: Plan, outcome: Outcome, hessians: Hessians | None = None
) -> None:
    """Remove channels of the front end in place, as planned; with Hessians of the dense model from those."""
    assert plan.front is not None
    settings = plan.settings
    with outcome.timing("solve"):
        done = remove_channels(
            model,
            plan.front,
            plan.channels_kept,
            batches,
            settings.solver.damping,
            settings.calibration,
            settings.seed,
            hessians,
            asymmetric=isinstance(settings.objective, Asymmetric),
        )
    for reader, (report, kept) in zip(plan.front.readers, done, strict=True):
        outcome.structures[reader], outcome.kept[report.name] = report, kept


def _remove_parts(
    matrices: list[PrunableMatrix], hessians: Hessians, plan: Plan, outcome: Outcome, progress: Progress | None
) -> None:
    """Remove parts of the structures that these matrices read: their columns become zero, the others make up for it."""
    done: dict[str, tuple[StructureReport, Tensor]] = {}
    with outcome.timing("solve"):
        dealt, owners = _dealt_groups(matrices, hessians)
        with distributed.together():
            for key, group in dealt.items():
                for matrix in group if owners[key] == distributed.rank() else []:
                    assert plan.structures is not None
                    structure, dense = plan.structures[matrix.name], matrix.weight.detach()
                    count = parts_kept(plan.targets[matrix.name], structure.count)
                    drift = plan.group([matrix], [0.0], hessians.by_input[key], hessians.drifts.get(key)).drift
                    damping = plan.settings.solver.damping
                    removal = remove_parts(structure, hessians.by_input[key], [count], damping, drift)[0]
                    check_finite(removal.weight, matrix.name)
                    error = output_error(dense, removal.weight, hessians, matrix.name)
                    report = StructureReport(
                        name=structure.name,
                        layer=structure.layer,
                        kind=structure.kind,
                        size=structure.size,
                        parts=structure.count,
                        kept=count,
                        relative_error=error / output_energy(dense, hessians, matrix.name),
                    )
                    done[matrix.name] = report, removal.kept.cpu()
                    matrix.weight.data.copy_(removal.weight)
                    if progress:
                        progress(len(done), len(matrices))
        _exchange(dealt, owners, done)
        for name, (report, kept) in done.items():
            outcome.structures[name], outcome.kept[report.name] = report, kept


def _exchange(groups: Mapping[str, list[PrunableMatrix]], owners: Mapping[str, int], done: dict[str, Any]) -> None:
    """Give every process the weights, and what is known of them, of the matrices that another one has worked on."""
    if distributed.world() == 1:
        return
    for key, group in groups.items():
        for matrix in group:
            received: Any = distributed.broadcast((matrix.weight.data, done.get(matrix.name)), owners[key])
            matrix.weight.data.copy_(received[0])
            done[matrix.name] = received[1]


@torch.no_grad()
def quantize(
    matrices: list[PrunableMatrix], hessians: Hessians, plan: Plan, outcome: Outcome
) -> dict[str, QuantizedMatrix]:
    """Round matrices in place that are solved and recovered; what is zero stays zero. Processes share the work.

    Returns:
        The whole numbers and the scales of every matrix, by name.
    """
    done: dict[str, QuantizedMatrix] = {}
    with outcome.timing("quantize"):
        groups, owners = _dealt_groups(matrices, hessians)
        with distributed.together():
            for key, group in groups.items():
                if owners[key] == distributed.rank():
                    weights = [matrix.weight.detach() for matrix in group]
                    keeps = [weight != 0 for weight in weights]
                    names = [matrix.name for matrix in group]
                    rounded = plan.quantize(names, weights, keeps, hessians.by_input[key])
                    done |= dict(zip(names, rounded, strict=True))
        for key, group in groups.items():
            for matrix in group:
                if distributed.world() > 1:
                    received: Any = distributed.broadcast(done.get(matrix.name), owners[key])
                    done[matrix.name] = received
                matrix.weight.data.copy_(done[matrix.name].weight)
    return done


def _rounded(group: MatrixGroup, found: list[PrunedMatrix], plan: Plan, outcome: Outcome) -> list[PrunedMatrix]:
    """Round matrices that were just solved, and read the same input."""
    with outcome.timing("quantize"):
        weights, keeps = [item.weight for item in found], [item.keep for item in found]
        rounded = plan.quantize(list(group.names), weights, keeps, group.hessian)
        return [
            replace(item, weight=new.weight.to(item.weight.dtype), increments=None)
            for item, new in zip(found, rounded, strict=True)
        ]


def _dealt_groups(
    matrices: list[PrunableMatrix], hessians: Hessians
) -> tuple[dict[str, list[PrunableMatrix]], dict[str, int]]:
    """Give the matrices by the input that they read, and the rank of the process that works on each group."""
    by_name = {matrix.name: matrix for matrix in matrices}
    groups = {key: [by_name[name] for name in names] for key, names in hessians.groups().items()}
    # The cost in operations is that of factoring a Hessian and of sweeping the matrices that share it.
    sizes = [sum(matrix.size for matrix in group) for group in groups.values()]
    widths = [len(hessians.by_input[key]) for key in groups]
    costs = [cols**3 / 3 + size * cols for size, cols in zip(sizes, widths, strict=True)]
    return groups, dict(zip(groups, distributed.deal(costs), strict=True))


def _batches_of(groups: Mapping[str, list[PrunableMatrix]], batched_devices: tuple[str, ...]) -> list[list[str]]:
    """Batch the groups of matrices (those that share an input) of the same width, as memory allows.

    The sweep of one group consists of hundreds of small steps that depend on one another, which leaves a GPU idle.
    """
    batches: list[list[str]] = []
    open_batches: dict[int, tuple[list[str], float]] = {}  # by width, with the bytes taken
    for key, matrices in groups.items():
        weight = matrices[0].weight
        cols, size = weight.shape[1], sum(matrix.size for matrix in matrices)
        needed = 4 * (2 * cols**2 + 6 * size)  # the factor and its blocks; weights, scores, results and masks
        batch, taken = open_batches.get(cols, ([], float("inf")))
        if weight.device.type not in batched_devices or taken + needed > BATCHED_BYTES:
            batch, taken = [], 0.0
            batches.append(batch)
        batch.append(key)
        open_batches[cols] = (batch, taken + needed)
    return batches


def _report(matrix: PrunableMatrix, pruned: PrunedMatrix, hessians: Hessians, plan: Plan) -> MatrixReport:
    dense = matrix.weight.detach()
    trace = plan.traces[matrix.name] if plan.traces else None
    return MatrixReport(
        name=matrix.name,
        rows=dense.shape[0],
        cols=dense.shape[1],
        sensitivity=trace.sensitivity if trace else None,
        sensitivity_error=trace.standard_error / trace.size if trace else None,
        rank=plan.ranks.get(matrix.name),
        target_sparsity=plan.targets[matrix.name],
        sparsity=int((~pruned.keep).sum()) / pruned.keep.numel(),
        bits=plan.bits.get(matrix.name),
        relative_error=_error_of(dense, pruned, hessians, matrix.name) / output_energy(dense, hessians, matrix.name),
    )


def _measure_again(
    solved: list[tuple[list[PrunableMatrix], Hessians]], dense_weights: Mapping[str, Tensor], outcome: Outcome
) -> None:
    """Update the errors in the matrices' reports after the recovery and the rounding."""
    for group, hessians in solved:
        for matrix in group:
            dense = dense_weights[matrix.name]
            error = output_error(dense, matrix.weight, hessians, matrix.name)
            relative = error / output_energy(dense, hessians, matrix.name)
            if matrix.name in outcome.structures:
                found = outcome.structures[matrix.name]
                outcome.structures[matrix.name] = replace(found, relative_error=relative)
            else:
                outcome.reports[matrix.name] = replace(outcome.reports[matrix.name], relative_error=relative)


def _error_of(dense: Float[Tensor, "rows cols"], pruned: PrunedMatrix, hessians: Hessians, name: str) -> float:
    """Give ||WX − ŴX̂||² on the calibration set."""
    if pruned.increments is not None and not hessians.drifts:
        # The sweep has summed it already, together with λ||W − Ŵ||² over the live inputs.
        change = dense - pruned.weight
        damped = float(pruned.increments.sum(dtype=torch.float64))
        live = hessians.of(name).diagonal() > 0
        from_damping = pruned.damping * float((change.square().sum(0, dtype=torch.float64) * live).sum())
        if from_damping < 0.9 * damped:  # otherwise the difference would be dominated by rounding
            return damped - from_damping
    return output_error(dense, pruned.weight, hessians, name)


def _of_layer(progress: StageProgress | None, index: int, layers: int) -> Progress | None:
    """Turn the steps of one layer's recovery into those of all layers."""
    if progress is None:
        return None
    return lambda step, steps: progress("recover", index * steps + step, layers * steps)
