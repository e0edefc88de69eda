"""Fisher traces against every transcript that a tiny model can give, each with its probability."""

import json
import math
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import sparsewav
from sparsewav.data.librispeech import read_librispeech_folder
from sparsewav.errors import UserError
from sparsewav.pruning.allocation.sensitivity import (
    LEAST_BATCHES,
    draw_transcripts,
    estimate_traces,
    rank_displacement,
)
from sparsewav.pruning.encoder import prunable_matrices
from tests.conftest import CONFIGS
from tests.terminal import Run, assert_one_sentence

Batch = dict[str, Tensor]
Factory = Callable[..., Any]  # tiny models, whose submodules mypy does not know


def transcripts(logits: Tensor, plain_ctc: Callable[..., Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Every transcript that fits into the frames of (frames, characters), and its log-probability."""
    frames, characters = logits.shape
    for length in range(frames + 1):
        for labels in product(range(1, characters), repeat=length):
            # What does not fit, because equal neighbours want a blank between them, has the probability exp(-1e30).
            yield torch.tensor(labels, dtype=torch.long), -plain_ctc(logits, torch.tensor(labels, dtype=torch.long))


def exact_moments(
    model: PreTrainedModel, utterance: Batch, plain_ctc: Callable[..., Tensor]
) -> tuple[dict[str, tuple[float, float]], float]:
    """Mean and variance of every matrix's squared gradient over all transcripts, and their probabilities' sum."""
    matrices = prunable_matrices(model)
    logits = model(utterance["input_values"].to(model.dtype)).logits[0]
    total, first, second = 0.0, torch.zeros(len(matrices)).double(), torch.zeros(len(matrices)).double()
    for _, log_probability in transcripts(logits, plain_ctc):
        probability = math.exp(log_probability.item())
        if probability > 0:
            gradients = torch.autograd.grad(
                log_probability, [matrix.parameter for matrix in matrices], retain_graph=True
            )
            squares = torch.stack([gradient.square().sum() for gradient in gradients])
            total += probability
            first += probability * squares
            second += probability * squares.square()
    moments = zip(first.tolist(), (second - first.square()).tolist(), strict=True)
    return {matrix.name: values for matrix, values in zip(matrices, moments, strict=True)}, total


@pytest.fixture
def small(tiny_model: Factory) -> PreTrainedModel:
    """A model whose posteriors are far from uniform over three characters."""
    model: PreTrainedModel = tiny_model("wav2vec2", vocab_size=3, initializer_range=0.6).double()
    return model


def test_fisher_traces_agree_with_all_transcripts(
    small: PreTrainedModel, noise_batch: Callable[..., Batch], plain_ctc: Callable[..., Tensor]
) -> None:
    """Estimates lie within four standard errors of the sum over all transcripts, and the errors are what theory says.

    Five frames and two characters besides the blank have 63 transcripts, some of which do not fit. The same utterance
    comes again and again, so that the transcripts alone are random.
    """
    batch = noise_batch([100], characters=1)
    exact, total = exact_moments(small, batch, plain_ctc)
    assert total == pytest.approx(1, abs=1e-9), "all transcripts that can be, each with its probability"
    count = 400
    traces = estimate_traces(small, [batch] * count, trace="fisher", seed=1)
    assert list(traces) == list(exact)
    for name, (mean, variance) in exact.items():
        trace = traces[name]
        assert trace.value >= 0
        assert abs(trace.value - mean) < 4 * trace.standard_error, name
        assert trace.standard_error == pytest.approx(math.sqrt(variance / count), rel=0.25), name
        assert (trace.samples, trace.gradients) == (count, count)
    several = estimate_traces(small, [batch] * 100, trace="fisher", probes=4, seed=2)
    for name, (mean, variance) in exact.items():
        assert abs(several[name].value - mean) < 4 * several[name].standard_error, name
        # Four transcripts an utterance are one sample, with half the error of one.
        assert several[name].standard_error == pytest.approx(math.sqrt(variance / 400), rel=0.35), name
        assert (several[name].samples, several[name].gradients) == (100, 400)


def test_transcripts_are_drawn_with_their_probability(plain_ctc: Callable[..., Tensor]) -> None:
    """How often a transcript is drawn is what the CTC loss says of it, within four standard errors."""
    logits = torch.tensor([[1.0, 0.5, -0.3], [-0.2, 0.8, 0.4], [0.3, 0.2, 1.1], [0.6, -1.0, 0.0]])
    count = 20_000
    drawn = draw_transcripts(logits.log_softmax(-1), 0, count, torch.Generator().manual_seed(0))
    counts: dict[tuple[int, ...], int] = {}
    for labels in drawn:
        assert 0 not in labels
        counts[tuple(labels.tolist())] = counts.get(tuple(labels.tolist()), 0) + 1
    for labels, log_probability in transcripts(logits, plain_ctc):
        probability = math.exp(log_probability.item())
        found = counts.pop(tuple(labels.tolist()), 0) / count
        assert found == pytest.approx(probability, abs=4 * math.sqrt(probability * (1 - probability) / count))
    assert not counts, "nothing was drawn that cannot be"
    assert () in {tuple(labels.tolist()) for labels in drawn}


@pytest.mark.parametrize("family", CONFIGS)
def test_every_utterance_counts_by_itself(
    family: str,
    tiny_model: Factory,
    noise_batch: Callable[..., Batch],
    model_input: Callable[..., Batch],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The trace of a padded batch is the mean of the squared gradients of its utterances, each alone.

    The loss is the model's own, for labels that are given in place of drawn ones.
    """
    model = tiny_model(family)
    given = [torch.tensor([2, 2, 5]), torch.tensor([4]), torch.tensor([], dtype=torch.long)]
    wanted = iter(given)
    monkeypatch.setattr("sparsewav.pruning.allocation.sensitivity.draw_transcripts", lambda *arguments: [next(wanted)])
    batch = model_input(model, noise_batch([800, 640, 512]))
    batch.pop("labels")
    traces = estimate_traces(model, [batch], trace="fisher", scope="transformer")
    matrices = prunable_matrices(model)
    expected = torch.zeros(len(matrices))
    key = model.main_input_name
    model.config.ctc_loss_reduction = "sum"
    for row, (length, labels) in enumerate(zip(batch["attention_mask"].sum(-1).tolist(), given, strict=True)):
        padded = torch.cat([labels, torch.tensor([-100])])[None]  # no model takes labels without a column
        alone = {name: batch[name][row : row + 1, :length] for name in (key, "attention_mask")}
        loss = model(**alone, labels=padded).loss
        gradients = torch.autograd.grad(loss, [matrix.parameter for matrix in matrices])
        expected += torch.stack([gradient.square().sum() for gradient in gradients]) / 3
    found = torch.tensor([traces[matrix.name].value for matrix in matrices])
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-6)


def test_convolutions_have_fisher_traces(tiny_model: Factory, noise_batch: Callable[..., Batch]) -> None:
    model = tiny_model("wav2vec2")
    traces = estimate_traces(model, [noise_batch([400, 304])], trace="fisher", scope="encoder")
    assert list(traces) == [matrix.name for matrix in prunable_matrices(model, "encoder")]
    assert all(trace.value > 0 for trace in traces.values())


def test_fisher_repeats_itself_and_reads_no_labels(tiny_model: Factory, noise_batch: Callable[..., Batch]) -> None:
    """A seed gives the same transcripts whatever the global generator's state; labels change nothing."""
    model = tiny_model("wavlm").train()
    batches = [noise_batch([800, 640]), noise_batch([720], seed=1)]
    unlabelled = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    first = estimate_traces(model, batches, trace="fisher", seed=7)
    torch.manual_seed(99)
    assert estimate_traces(model, unlabelled, trace="fisher", seed=7) == first
    assert estimate_traces(model, batches, trace="fisher", seed=8) != first
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_fisher_stops_when_the_ranks_are_settled(tiny_model: Factory, noise_batch: Callable[..., Batch]) -> None:
    """The tolerance is that of the Hessian's traces: standard errors of utterances, batches as the steps."""
    model = tiny_model("wav2vec2")
    batches = [noise_batch([800, 720], seed=seed) for seed in range(LEAST_BATCHES + 4)]
    everything = estimate_traces(model, batches, trace="fisher")
    assert {trace.samples for trace in everything.values()} == {2 * len(batches)}
    expected = rank_displacement(everything)
    assert 0 < expected < 0.5
    early = estimate_traces(model, batches, trace="fisher", rank_tolerance=0.6)
    assert {trace.samples for trace in early.values()} == {2 * LEAST_BATCHES}
    assert estimate_traces(model, batches, trace="fisher", rank_tolerance=1e-9) == everything


def test_what_has_no_fisher_traces_is_refused(tiny_model: Factory, noise_batch: Callable[..., Batch]) -> None:
    model = tiny_model("wav2vec2")
    with pytest.raises(UserError, match="trace=kfac does not exist; choose one of hutchinson, fisher"):
        estimate_traces(model, [noise_batch([800])], trace="kfac")
    model.lm_head.weight.data[0, 0] = math.nan
    with pytest.raises(UserError, match="posteriors are NaN or infinite on calibration batch 0"):
        estimate_traces(model, [noise_batch([800])], trace="fisher")


@pytest.mark.parametrize("allocation", [sparsewav.Hutchinson, sparsewav.HAWQ])
def test_fisher_traces_allocate_without_labels(
    allocation: Callable[..., Any], tiny_model: Factory, noise_batch: Callable[..., Batch]
) -> None:
    """Both allocations by traces prune unlabelled speech; the table has the sensitivities, their errors and ranks."""
    model = tiny_model("wav2vec2")
    batches = [noise_batch([800, 640], seed=seed) for seed in range(3)]
    unlabelled = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    with pytest.raises(UserError, match=r"sensitivities need transcripts: .*allocation\.trace=fisher"):
        sparsewav.prune(model, unlabelled, 0.6, allocation=allocation())
    report = sparsewav.prune(model, unlabelled, 0.6, allocation=allocation(trace="fisher"))
    traces = estimate_traces(tiny_model("wav2vec2"), unlabelled, trace="fisher", rank_tolerance=0.05)
    for row in report.matrices:
        assert row.sensitivity == traces[row.name].sensitivity
        assert row.sensitivity_error == traces[row.name].standard_error / traces[row.name].size
    ranked = sorted(report.matrices, key=lambda row: row.rank if row.rank is not None else -1)
    assert [row.rank for row in ranked] == list(range(len(ranked)))
    assert not any("below 0" in warning for warning in report.warnings)


def test_a_run_reads_no_transcripts_and_keeps_its_traces(
    run_sparsewav: Run, model_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    """Calibration speech without transcripts will do; the cache tells both kinds of traces and their probes apart."""
    spoken = read_librispeech_folder(corpus, "train")
    (tmp_path / "unlabelled.csv").write_text("audio\n" + "\n".join(str(item.source) for item in spoken))
    (tmp_path / "labelled.csv").write_text("audio,text\n" + "\n".join(f"{item.source},{item.text}" for item in spoken))
    tested = read_librispeech_folder(corpus, "test")
    (tmp_path / "test.csv").write_text("audio,text\n" + "\n".join(f"{item.source},{item.text}" for item in tested))
    arguments = [f"model.name_or_path={model_folder}", "device=cpu", "data=manifest", "data.test=test.csv"]
    arguments += ["calibration.utterances=12", "sparsity.target=0.6"]

    def run(place: str, *options: str) -> tuple[dict[str, Any], pandas.DataFrame]:
        result = run_sparsewav(*arguments, *options, f"output_root={place}")
        assert result.returncode == 0, result.stdout + result.stderr
        (folder,) = (tmp_path / place).glob("tiny*")
        return json.loads((folder / "metrics.json").read_text()), pandas.read_csv(folder / "layers.csv")

    refused = run_sparsewav(*arguments, "data.calibration=unlabelled.csv")
    assert_one_sentence(refused, "unlabelled.csv")
    fisher = ("data.calibration=unlabelled.csv", "allocation.trace=fisher")
    metrics, layers = run("first", *fisher)
    assert metrics["stages"][0]["sensitivity_gradients"] == 12
    assert (layers.sensitivity >= 0).all()
    assert layers.sensitivity_error.notna().all()
    assert sorted(layers["rank"]) == list(range(len(layers)))
    traces = sorted((tmp_path / "cache").rglob("traces.json"))
    assert len(traces) == 1
    _, again = run("again", *fisher, "allocation.alpha=0.05")
    assert again.sensitivity.tolist() == layers.sensitivity.tolist()
    assert sorted((tmp_path / "cache").rglob("traces.json")) == traces, "they were there"
    _, more = run("more", *fisher, "allocation.probes=2")
    of_hessian, hessian = run("hessian", "data.calibration=labelled.csv")
    (warning,) = [sentence for sentence in of_hessian["warnings"] if "sensitiv" in sentence]
    assert "choose allocation.trace=fisher" in warning
    assert len(list((tmp_path / "cache").rglob("traces.json"))) == 3
    assert len({tuple(found.sensitivity) for found in (layers, more, hessian)}) == 3
