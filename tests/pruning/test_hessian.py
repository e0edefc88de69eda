"""Calibration against Hessians summed frame by frame from inputs that are caught in another way."""

import copy
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsewav.errors import UserError
from sparsewav.pruning import layerwise
from sparsewav.pruning.encoder import PrunableMatrix, projections_as_modules, prunable_matrices
from sparsewav.pruning.hessian import BLOCK, WAITING_FRAMES, Hessians, _Sum, collect_hessians
from sparsewav.pruning.plan import Outcome, Plan
from sparsewav.settings import Calibration, Pruning, Uniform

Batch = dict[str, Tensor]
Factory = Callable[..., Any]  # tiny models, whose submodules mypy does not know

ModelInput = Callable[[PreTrainedModel, Batch], Batch]
MODELS = [
    ("wav2vec2", "layer"),
    ("wav2vec2", "group"),
    ("hubert", "layer"),
    ("hubert", "group"),
    ("wavlm", "layer"),
    ("wavlm", "group"),
    ("data2vec-audio", "layer"),
    ("wav2vec2-conformer", "layer"),
    ("wav2vec2-conformer", "group"),
    *((family, "layer") for family in ("unispeech", "unispeech-sat", "sew", "sew-d")),
    *((family, "") for family in ("wav2vec2-bert", "parakeet_ctc", "lasr_ctc", "granite_speech5_ctc")),
]


def module_inputs(model: PreTrainedModel, names: list[str], utterance: Batch) -> dict[str, Tensor]:
    """Inputs (frames, width) of named modules in a plain forward pass of one utterance, without a mask.

    Those of a module that is called several times follow one another.
    """
    caught: dict[str, list[Tensor]] = {name: [] for name in names}

    def catch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            states = (args[0] if args else kwargs["hidden_states"])[0].detach().double()
            caught[name].append(states.T if isinstance(module, nn.Conv1d) else states)

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(catch(name), with_kwargs=True) for name in names]
    with torch.no_grad():
        model(utterance[model.main_input_name])
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(states) for name, states in caught.items()}


def frames_of(model: PreTrainedModel, utterances: list[Batch]) -> int:
    """Count the frames that reach the first layer, in utterances run one by one."""
    layer = prunable_matrices(model)[0].name.partition(".0.")[0] + ".0"
    return sum(len(module_inputs(model, [layer], utterance)[layer]) for utterance in utterances)


def wavlm_out_proj_input(model: Any, name: str, utterance: Batch) -> Tensor:
    """What WavLM's out_proj reads: the output of the attention when out_proj is the identity."""
    model = copy.deepcopy(model)
    projection = model.get_submodule(name)
    with torch.no_grad():
        projection.weight.copy_(torch.eye(len(projection.weight)))
        projection.bias.zero_()
    caught: list[Tensor] = []
    attention = model.get_submodule(name.rpartition(".")[0])
    attention.register_forward_hook(lambda module, args, output: caught.append(output[0][0].double()))
    with torch.no_grad():
        model(utterance["input_values"])
    return caught[0]


def brute_force_hessians(model: PreTrainedModel, utterances: list[Batch]) -> dict[str, Tensor]:
    """XXᵀ of every matrix, one unpadded utterance after the other, in float64."""
    names = [matrix.name for matrix in prunable_matrices(model)]
    wavlm = model.config.model_type == "wavlm"
    hessians: dict[str, Tensor] = {}
    for utterance in utterances:
        # WavLM never calls the projections themselves: query, key and value read what the attention is given.
        sources = {name: name.rpartition(".")[0] if wavlm and name.endswith("_proj") else name for name in names}
        inputs = module_inputs(model, list(set(sources.values())), utterance)
        for name in names:
            if wavlm and name.endswith("out_proj"):
                columns = wavlm_out_proj_input(model, name, utterance)
            else:
                columns = inputs[sources[name]]
            if name.endswith("pointwise_lin2"):  # where a layer halves the frames, it drops a last odd one after this
                columns = columns[: len(inputs[f"{name.rpartition('.conv.')[0]}.feed_forward2.linear1"])]
            hessians[name] = hessians.get(name, 0) + columns.T @ columns
    return hessians


def collect_layer_by_layer(
    model: PreTrainedModel,
    batches: list[Batch],
    visit: Callable[[list[PrunableMatrix], Hessians], None] = lambda matrices, hessians: None,
) -> None:
    """Go through the loop over the layers, on all frames, and visit what would be pruned in place of pruning it."""
    calibration = Calibration(propagation="sequential", frames_per_column=None)
    plan = Plan(Pruning(allocation=Uniform(), calibration=calibration), targets={})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layerwise, "solve", lambda matrices, hessians, plan, outcome: visit(matrices, hessians))
        layerwise.prune_layer_by_layer(model, batches, plan, Outcome())


def assert_same_hessians(hessians: Hessians, expected: dict[str, Tensor]) -> None:
    assert sorted(hessians.reads) == sorted(expected)
    for name, hessian in expected.items():
        scale = float(hessian.diagonal().max())
        torch.testing.assert_close(hessians.of(name).double(), hessian, rtol=0, atol=2e-5 * scale, msg=name)


@pytest.mark.parametrize(("family", "norm"), MODELS)
def test_hessians_equal_brute_force(
    family: str,
    norm: str,
    tiny_model: Factory,
    noise_batch: Callable[..., Batch],
    utterances: Callable[..., list[Batch]],
    model_input: ModelInput,
) -> None:
    """H of every matrix is XXᵀ over the frames of all batches, of full-length utterances here."""
    model = tiny_model(family, norm)
    batches = [noise_batch([400, 400]), noise_batch([272], seed=1)]
    single = [model_input(model, utterance) for utterance in utterances(batches)]
    hessians = collect_hessians(model, [model_input(model, batch) for batch in batches])
    assert hessians.frames == frames_of(model, single)
    assert_same_hessians(hessians, brute_force_hessians(model, single))


@pytest.mark.parametrize(("family", "norm"), MODELS)
def test_padding_never_counts(
    family: str,
    norm: str,
    tiny_model: Factory,
    noise_batch: Callable[..., Batch],
    utterances: Callable[..., list[Batch]],
    model_input: ModelInput,
) -> None:
    """A padded batch gives the Hessians of its utterances run one by one, whatever the padding holds."""
    model = tiny_model(family, norm)
    batch = noise_batch([400, 203, 320])
    single = [model_input(model, utterance) for utterance in utterances([batch])]
    hessians = collect_hessians(model, [model_input(model, batch)])
    assert hessians.frames == frames_of(model, single)
    assert_same_hessians(hessians, brute_force_hessians(model, single))


def test_adapter_after_the_encoder_does_not_disturb(
    tiny_model: Factory, noise_batch: Callable[..., Batch], utterances: Callable[..., list[Batch]]
) -> None:
    """A model whose adapter has fewer frames than its encoder is calibrated on the encoder's frames."""
    model = tiny_model("wav2vec2", add_adapter=True, output_hidden_size=16)
    batch = noise_batch([800, 608])
    assert_same_hessians(collect_hessians(model, [batch]), brute_force_hessians(model, utterances([batch])))


@pytest.mark.parametrize(("family", "norm"), MODELS)
def test_sequential_without_pruning_equals_parallel(
    family: str, norm: str, tiny_model: Factory, noise_batch: Callable[..., Batch], model_input: ModelInput
) -> None:
    """Going layer by layer over a model that stays as it is finds the Hessians of one pass."""
    model = tiny_model(family, norm, num_hidden_layers=3)
    batches = [model_input(model, batch) for batch in (noise_batch([400, 203]), noise_batch([320], seed=1))]
    together = collect_hessians(model, batches)
    found: dict[str, Tensor] = {}
    layers: list[set[int]] = []

    def keep(matrices: list[PrunableMatrix], hessians: Hessians) -> None:
        layers.append({matrix.layer for matrix in matrices})
        found.update({matrix.name: hessians.of(matrix.name) for matrix in matrices})
        assert hessians.frames == together.frames or layers[-1] != {0}  # a layer may halve the frames

    collect_layer_by_layer(model, batches, keep)
    assert layers == [{0}, {1}, {2}]
    assert_same_hessians(together, {name: hessian.double() for name, hessian in found.items()})


@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.parametrize("padded", [True, False])
def test_wavlm_spelled_out_attention_is_the_original(
    norm: str, padded: bool, tiny_model: Factory, noise_batch: Callable[..., Batch]
) -> None:
    """With its projections called as modules WavLM gives the same logits, and is itself again afterwards."""
    model = tiny_model("wavlm", norm)
    batch = noise_batch([400, 203] if padded else [400, 400])
    arguments = {"input_values": batch["input_values"], "attention_mask": batch["attention_mask"]}
    called: list[str] = []
    for matrix in prunable_matrices(model):
        matrix.module.register_forward_hook(lambda module, args, output, name=matrix.name: called.append(name))
    with torch.no_grad():
        original = model(**arguments).logits
        assert not any(name.endswith("_proj") for name in called)
        called.clear()
        with projections_as_modules(model):
            spelled_out = model(**arguments).logits
        assert sorted(called) == sorted(matrix.name for matrix in prunable_matrices(model))
        with pytest.raises(ZeroDivisionError), projections_as_modules(model):
            raise ZeroDivisionError
        called.clear()
        assert torch.equal(model(**arguments).logits, original)
        assert not any(name.endswith("_proj") for name in called)
    torch.testing.assert_close(spelled_out, original, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "overrides", "groups"),
    [
        ("wav2vec2", {}, [{"q_proj", "k_proj", "v_proj"}, {"out_proj"}]),
        ("wavlm", {}, [{"q_proj", "k_proj", "v_proj"}, {"out_proj"}]),
        (
            "wav2vec2-conformer",
            {"position_embeddings_type": "relative"},
            [{"linear_q", "linear_k", "linear_v"}, {"linear_pos"}, {"linear_out"}],
        ),
        (
            "wav2vec2-conformer",
            {"position_embeddings_type": "rotary"},
            [{"linear_q", "linear_k"}, {"linear_v"}, {"linear_out"}],
        ),
        # The query and key also project the table of relative positions.
        ("sew-d", {}, [{"query_proj", "key_proj"}, {"value_proj"}]),
    ],
)
def test_matrices_share_a_hessian_where_they_read_the_same(
    family: str,
    overrides: dict[str, str],
    groups: list[set[str]],
    tiny_model: Factory,
    noise_batch: Callable[..., Batch],
    utterances: Callable[..., list[Batch]],
) -> None:
    """Query, key and value share one H; with rotary positions the value reads something else and has its own."""
    model = tiny_model(family, **overrides)
    batches = [noise_batch([400, 400])]
    hessians = collect_hessians(model, batches)
    assert_same_hessians(hessians, brute_force_hessians(model, utterances(batches)))
    attention = [
        {name.rpartition(".")[2] for name in names}
        for names in hessians.groups().values()
        if re.search(r"\.layers?\.1\.", names[0]) and not re.search("dense|conv", names[0].partition(".1.")[2])
    ]
    assert sorted(attention, key=sorted) == sorted(groups, key=sorted)


def test_inputs_are_let_go_layer_by_layer(tiny_model: Factory, noise_batch: Callable[..., Batch]) -> None:
    """While a layer is observed, none of the inputs of the layers before it is in memory any more."""
    model = tiny_model("wav2vec2", num_hidden_layers=3)
    inputs: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def watch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        alive.append(sum(reference() is not None for reference in inputs))
        inputs.append(weakref.ref(args[0]))

    for layer in model.wav2vec2.encoder.layers:
        layer.feed_forward.output_dense.register_forward_pre_hook(watch)
    collect_hessians(model, [noise_batch([400]), noise_batch([320])])
    assert alive == [0] * 6


@pytest.mark.parametrize("collect", [collect_hessians, collect_layer_by_layer])
def test_broken_or_missing_audio_is_refused(
    collect: Callable[[PreTrainedModel, list[Batch]], object],
    tiny_model: Factory,
    noise_batch: Callable[..., Batch],
) -> None:
    """A NaN sample, a model that gives NaN and an empty set are reported, and leave no hook behind."""
    model = tiny_model("wav2vec2")
    batch = noise_batch([400, 320])
    batch["input_values"][1, 7] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        collect(model, [noise_batch([400]), batch])
    with pytest.raises(UserError, match="empty"):
        collect(model, [])
    with torch.no_grad():
        model.wav2vec2.encoder.layers[1].layer_norm.weight[0] = float("inf")
    with pytest.raises(UserError, match=r"layers\.1\."):
        collect(model, [noise_batch([400])])
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_batch_without_a_mask_is_all_speech(tiny_model: Factory, noise_batch: Callable[..., Batch]) -> None:
    """``attention_mask`` may be left out, and batches may come from a generator."""
    model = tiny_model("wav2vec2", "group")
    batch = noise_batch([400, 400])
    unmasked = {"input_values": batch["input_values"]}
    masked = collect_hessians(model, [batch])
    expected = {name: masked.of(name).double() for name in masked.reads}
    assert_same_hessians(collect_hessians(model, (item for item in [unmasked])), expected)


def test_sampled_frames_stand_for_all(tiny_model: Factory, noise_batch: Callable[..., Batch]) -> None:
    """A sample has the size asked for, depends on the seed alone, and sums to H in the mean over seeds."""
    model = tiny_model("wav2vec2", "layer")
    batches = [noise_batch([400, 203]), noise_batch([320], seed=1)]
    everything = collect_hessians(model, batches)
    assert_same_hessians(collect_hessians(model, batches, frames_per_column=1e6), doubled(everything))
    name = next(iter(everything.by_input))
    cols = len(everything.by_input[name])
    share = 10 / cols
    sampled = collect_hessians(model, batches, frames_per_column=share, seed=3)
    assert sampled.frames == everything.frames == 24 + 12 + 19
    assert sampled.sampled[name] == 2 * 5  # ten frames, half of them from either batch
    assert torch.equal(collect_hessians(model, batches, frames_per_column=share, seed=3).of(name), sampled.of(name))
    assert not torch.equal(sampled.of(name), everything.of(name))
    seeds = 300
    mean = sum(collect_hessians(model, batches, frames_per_column=share, seed=seed).of(name) for seed in range(seeds))
    assert isinstance(mean, Tensor)
    scale = float(everything.of(name).diagonal().max())
    torch.testing.assert_close(mean / seeds, everything.of(name), rtol=0, atol=0.1 * scale)


def doubled(hessians: Hessians) -> dict[str, Tensor]:
    return {name: hessians.of(name).double() for name in hessians.reads}


def test_wide_hessians_are_whole_and_symmetric() -> None:
    """Blocks above the diagonal, frames that wait and the mirrored rest give XXᵀ where nothing divides evenly."""
    generator = torch.Generator().manual_seed(0)
    total = _Sum(BLOCK * 2 + 7, torch.device("cpu"))
    pieces = [torch.randn(frames, BLOCK * 2 + 7, generator=generator) for frames in (3, WAITING_FRAMES, 100, 1)]
    for piece in pieces:
        total.add(piece)
    hessian, frames = total.finish(), torch.cat(pieces).double()
    assert total.frames == len(frames)
    assert torch.equal(hessian, hessian.T)
    torch.testing.assert_close(hessian.double(), frames.T @ frames, rtol=1e-4, atol=1e-3)
