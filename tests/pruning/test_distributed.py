"""Several processes that prune together: they end with the same masks and weights as one alone."""

import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, multiprocessing
from transformers import PreTrainedModel

from sparsewav import prune
from sparsewav.errors import UserError
from sparsewav.pruning import Hessians, PruneReport, Trace, collect_hessians, distributed, estimate_traces
from sparsewav.pruning.allocation.sensitivity import LEAST_BATCHES
from sparsewav.settings import ALPS, Calibration, Hutchinson, Int3, OBSRefit, Structured

Batch = dict[str, Tensor]
Factory = Callable[..., Any]
MakeBatch = Callable[..., Batch]


def in_processes(
    count: int, folder: Path, function: Callable[..., Any], models: list[Any], *arguments: Any
) -> list[Any]:
    """Call a function of this file in a process group; give what each process returned."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # PyTorch cannot pickle the weight norm of a model's positional convolution.
    states = [(type(model), model.config, model.state_dict()) for model in models]
    torch.save((states, arguments), folder / "arguments.pt")
    multiprocessing.spawn(_enter, (count, port, folder, function), nprocs=count)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _enter(rank: int, count: int, port: int, folder: Path, function: Callable[..., Any]) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", address, timedelta(seconds=60), world_size=count, rank=rank)
    states, arguments = torch.load(folder / "arguments.pt", weights_only=False)
    models = []
    for make, config, state in states:
        models.append(make(config).eval())
        models[-1].load_state_dict(state)
    torch.save(function(models, *arguments), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


class Result(NamedTuple):
    hessians: Hessians
    report: PruneReport
    state: dict[str, Tensor]


def pruned(models: list[PreTrainedModel], batches: list[Batch], options: list[dict[str, Any]]) -> list[Result]:
    results = []
    for model, settings in zip(models, options, strict=True):
        hessians = collect_hessians(model, batches, frames_per_column=settings["calibration"].frames_per_column)
        results.append(Result(hessians, prune(model, batches, **({"sparsity": 0.6} | settings)), model.state_dict()))
    return results


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_prune_as_one_does(count: int, tiny_model: Factory, noise_batch: MakeBatch, tmp_path: Path) -> None:
    """Hessians up to rounding, masks to the weight; three processes have two batches, and one of them none."""
    batches = [noise_batch([400, 304]), noise_batch([352], seed=1)]
    families = ("wav2vec2", "wavlm", "hubert", "wav2vec2", "wav2vec2", "hubert", "wav2vec2")
    options: list[dict[str, Any]] = [
        {"allocation": Hutchinson(rank_tolerance=0.0), "calibration": Calibration(frames_per_column=None)},
        {"allocation": "uniform", "calibration": Calibration(propagation="sequential", frames_per_column=2.0)},
        {"allocation": "uniform", "calibration": Calibration(frames_per_column=2.0), "saliency": "wanda"},
        {
            "allocation": "uniform",
            "calibration": Calibration(propagation="true_sequential", frames_per_column=None),
            "objective": "asymmetric",
            "solver": OBSRefit(damping=0.1, tolerance=1e-6),
        },
        {
            "sparsity": Structured(parameters=0.85),
            "allocation": "error_curves",
            "calibration": Calibration(propagation="sequential", frames_per_column=None),
        },
        {
            "sparsity": Structured(parameters=0.9, parts=["channels", "units"]),
            "allocation": "uniform",
            "calibration": Calibration(propagation="sequential", frames_per_column=None),
        },
        {
            "allocation": "uniform",
            "calibration": Calibration(frames_per_column=None),
            "solver": ALPS(output_weighting="fisher", damping=0.1, tolerance=1e-6),
        },
    ]
    models = [tiny_model(family) for family in families]
    of_processes = in_processes(count, tmp_path, pruned, models, batches, options)
    for index, alone in enumerate(pruned(models, batches, options)):
        for result in (results[index] for results in of_processes):
            assert result.hessians.groups() == alone.hessians.groups()
            assert result.hessians.frames == alone.hessians.frames
            assert result.hessians.sampled == alone.hessians.sampled
            for name, hessian in alone.hessians.by_input.items():
                rounding = 1e-6 * float(hessian.abs().max())
                torch.testing.assert_close(result.hessians.by_input[name], hessian, rtol=1e-6, atol=rounding)
            assert list(result.report.masks) == list(alone.report.masks)
            for name, mask in alone.report.masks.items():
                assert torch.equal(result.report.masks[name], mask), name
            for ours, theirs in zip(result.report.matrices, alone.report.matrices, strict=True):
                assert (ours.name, ours.rank, ours.target_sparsity) == (
                    theirs.name,
                    theirs.rank,
                    theirs.target_sparsity,
                )
                assert ours.relative_error == pytest.approx(theirs.relative_error, rel=1e-3)
            for name, kept in alone.report.kept.items():
                assert torch.equal(result.report.kept[name], kept), name
            for name, tensor in alone.state.items():
                torch.testing.assert_close(result.state[name], tensor, rtol=1e-3, atol=1e-4)
                assert torch.equal(result.state[name], of_processes[0][index].state[name])


@pytest.mark.slow
@pytest.mark.parametrize("recovery", ["none", "affine"])
def test_processes_round_as_one_does(
    recovery: str, tiny_model: Factory, noise_batch: MakeBatch, tmp_path: Path
) -> None:
    """All end with the same bytes, and with the errors of one process; a sum in another order may round another way."""
    batches = [noise_batch([400, 304]), noise_batch([352], seed=1)]
    options: dict[str, Any] = {
        "allocation": "uniform",
        "calibration": Calibration(propagation="sequential", frames_per_column=None),
        "quantization": Int3(group_size=8),
        "recovery": recovery,
    }
    models = [tiny_model("wav2vec2")]
    first, second = (results[0] for results in in_processes(2, tmp_path, pruned, models, batches, [options]))
    (alone,) = pruned(models, batches, [options])
    for name, tensor in first.state.items():
        assert torch.equal(tensor, second.state[name]), name
    for ours, theirs in zip(first.report.matrices, alone.report.matrices, strict=True):
        assert ours.bits == theirs.bits == 3
        assert ours.relative_error == pytest.approx(theirs.relative_error, rel=0.1)


def traced(models: list[PreTrainedModel], batches: list[Batch], tolerances: list[float]) -> list[dict[str, Trace]]:
    return [estimate_traces(models[0], batches, probes=2, rank_tolerance=tolerance, seed=3) for tolerance in tolerances]


@pytest.mark.slow
def test_processes_share_the_sensitivities(tiny_model: Factory, noise_batch: MakeBatch, tmp_path: Path) -> None:
    """The traces of one process, stopped at the same batch even where the others have gone past it."""
    model = tiny_model("wav2vec2")
    batches = [noise_batch([400], seed=seed) for seed in range(13)]
    alone = traced([model], batches, [0.0, 0.6])
    assert {trace.samples for trace in alone[0].values()} == {2 * 13}
    assert {trace.samples for trace in alone[1].values()} == {2 * LEAST_BATCHES}, "of the third round of three, two"
    for results in in_processes(3, tmp_path, traced, [model], batches, [0.0, 0.6]):
        for ours, theirs in zip(results, alone, strict=True):
            for name, trace in theirs.items():
                assert ours[name].samples == trace.samples
                assert ours[name].value == pytest.approx(trace.value, rel=1e-9)


def fail_in_the_second() -> None:
    with distributed.together():
        if distributed.rank() == 1:
            raise ValueError("only here")


def exchange(models: list[PreTrainedModel], batches: list[Batch]) -> tuple[list[str], Any]:
    messages = []
    for wrong in (batches, [], batches[:1]):
        with pytest.raises(UserError) as error:
            collect_hessians(models[0], wrong)
        messages.append(str(error.value))
    with pytest.raises(distributed.ProcessFailure, match=r"in process 1 of 2: ValueError: only here"):
        fail_in_the_second()
    tensors = {"mask": torch.tensor([[True, False], [False, True]]).T, "half": torch.arange(3).bfloat16()}
    value = {"text": "x", "empty": torch.empty(0, 4), "scalar": torch.tensor(2.5), **tensors}
    return messages, distributed.broadcast(value if distributed.rank() == 1 else None, 1)


def test_errors_and_objects_reach_all_processes(tiny_model: Factory, noise_batch: MakeBatch, tmp_path: Path) -> None:
    """Nobody waits for a process whose share of the calibration set, alone, is broken."""
    broken, fine = noise_batch([400]), noise_batch([400])
    broken["input_values"][0, 7] = torch.nan
    results = in_processes(2, tmp_path, exchange, [tiny_model("wav2vec2")], [broken, fine])
    for messages, _ in results:
        assert "holds samples that are NaN or infinite" in messages[0]
        assert "is empty" in messages[1]
        assert "holds samples that are NaN or infinite" in messages[2]
    first, second = (value for _, value in results)
    assert first["text"] == second["text"] == "x"
    for name in ("mask", "half", "empty", "scalar"):
        assert first[name].dtype == second[name].dtype
        assert torch.equal(first[name], second[name])


def test_one_process_is_left_alone() -> None:
    assert (distributed.world(), distributed.rank()) == (1, 0)
    assert list(distributed.share("abc")) == [(0, "a"), (1, "b"), (2, "c")]
    assert distributed.deal([1.0, 3.0]) == [0, 0]
    with pytest.raises(KeyError, match="as it was"), distributed.together():
        raise KeyError("as it was")
