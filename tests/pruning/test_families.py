"""The table of families: what it says of every model that transformers has a CTC class for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCTC, AutoTokenizer, PreTrainedModel, Wav2Vec2FeatureExtractor
from transformers.models.auto.modeling_auto import MODEL_FOR_CTC_MAPPING_NAMES

import sparsewav
from sparsewav import Calibration, Reconstruction
from sparsewav.inference.wer import decode
from sparsewav.models.bitmask import export
from sparsewav.models.processor import Parts
from sparsewav.pruning.allocation.divergence import OutputDivergence
from sparsewav.pruning.encoder import (
    base_of,
    encoder_layers,
    frame_counts,
    freeze_front_end,
    output_counts,
    prunable_matrices,
    takes_padding,
)
from sparsewav.pruning.families import FAMILIES, encoder_config
from sparsewav.training.masks import masked_gradients, masks_of

Batch = dict[str, Tensor]
Factory = Callable[..., Any]  # tiny models, whose submodules mypy does not know
ModelInput = Callable[[PreTrainedModel, Batch], Batch]

ADAPTER = {"add_adapter": True, "output_hidden_size": 16, "num_adapter_layers": 1}
VARIANTS: list[tuple[str, str, dict[str, object]]] = [
    *((family, "layer", {}) for family in FAMILIES),
    ("wav2vec2", "group", {}),
    ("wav2vec2", "layer", ADAPTER),
    ("wav2vec2", "layer", {"adapter_attn_dim": 4}),
    ("sew-d", "layer", {"share_att_key": False}),
    ("wav2vec2-conformer", "layer", {"position_embeddings_type": "rotary"}),
    ("wav2vec2-bert", "", {"position_embeddings_type": "relative"}),
    ("wav2vec2-bert", "", ADAPTER),
    ("lasr_ctc", "", {"conv_kernel_size": 4}),
    ("granite_speech5_ctc", "", {"subsample_layers": [0, 1]}),
]
"""Families with their published settings and with those that change what the table says."""

MASKED = {"wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat", "wav2vec2-bert"} | {
    *("parakeet_ctc", "lasr_ctc", "granite_speech5_ctc"),
}
"""Families whose mask keeps padding from all valid frames, without a group norm and without an adapter."""


def test_every_ctc_class_of_transformers_is_in_the_table() -> None:
    """A family that transformers adds is missed here first."""
    assert set(FAMILIES) == set(MODEL_FOR_CTC_MAPPING_NAMES)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")  # as the published LASR has it
@pytest.mark.parametrize(("family", "norm", "options"), VARIANTS)
def test_padding(
    family: str,
    norm: str,
    options: dict[str, object],
    tiny_model: Factory,
    noise_batch: Callable[..., Batch],
    utterances: Callable[..., list[Batch]],
    model_input: ModelInput,
) -> None:
    """Where padding is allowed, an utterance gives in a padded batch what it gives alone; elsewhere it does not."""
    model = tiny_model(family, norm, **options)
    batch = noise_batch([560, 411, 288])
    padded = model_input(model, batch)
    assert takes_padding(model) == (family in MASKED and norm != "group" and "add_adapter" not in options)
    with torch.no_grad():
        together = model(**{key: value for key, value in padded.items() if key != "labels"}).logits
        worst = 0.0
        for row, utterance in enumerate(utterances([batch])):
            single = model_input(model, utterance)
            alone = model(single[model.main_input_name]).logits[0]
            assert len(alone) == int(output_counts(model, single["attention_mask"].sum(-1)))
            worst = max(worst, float((together[row, : len(alone)] - alone).abs().max() / alone.std()))
    assert (worst < 1e-4) == takes_padding(model)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize(("family", "norm", "options"), VARIANTS)
def test_frames(
    family: str,
    norm: str,
    options: dict[str, object],
    tiny_model: Factory,
    noise_batch: Callable[..., Batch],
    model_input: ModelInput,
) -> None:
    """The counts of frames are those that reach the first layer, and those of the logits, for every length."""
    model = tiny_model(family, norm, **options)
    caught: list[int] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append((args[0] if args else kwargs["hidden_states"]).shape[1])

    encoder_layers(model)[0].register_forward_pre_hook(hook, with_kwargs=True)
    for samples in [*range(257, 330, 9), 1000]:
        batch = model_input(model, noise_batch([samples]))
        with torch.no_grad():
            logits = model(batch[model.main_input_name]).logits
        assert frame_counts(model, batch["attention_mask"]).tolist() == caught[-1:], samples
        assert output_counts(model, batch["attention_mask"].sum(-1)).tolist() == [logits.shape[1]], samples


@pytest.mark.parametrize(("family", "norm", "options"), VARIANTS)
def test_no_matrix_is_left_out_silently(
    family: str, norm: str, options: dict[str, object], tiny_model: Factory
) -> None:
    """Every linear module of a layer, and every convolution of kernel 1, is prunable or listed with a reason."""
    model = tiny_model(family, norm, **options)
    prunable = {matrix.module for matrix in prunable_matrices(model)}
    for layer in encoder_layers(model):
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv1d) and module.weight.shape[2] == 1):
                assert (module in prunable) != (name in FAMILIES[family].dense), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_model_is_saved_and_loaded(
    family: str,
    tiny_model: Factory,
    noise_batch: Callable[..., Batch],
    model_input: ModelInput,
    model_folder: Path,
    tmp_path: Path,
) -> None:
    """Dense and as bitmasks, by transformers and by this package: the same logits and texts, the zeros in place."""
    model = tiny_model(family, vocab_size=32)
    processor = Parts(Wav2Vec2FeatureExtractor(), AutoTokenizer.from_pretrained(model_folder))
    batch = model_input(model, noise_batch([400, 304] if takes_padding(model) else [400, 400]))
    sparsewav.prune(model, [batch], 0.6, allocation="uniform")
    key = model.main_input_name
    single = [
        {key: batch[key][row : row + 1, :length], "attention_mask": batch["attention_mask"][row : row + 1, :length]}
        for row, length in enumerate(batch["attention_mask"].sum(-1).tolist())
    ]
    texts = [decode(model, processor, utterance)[0] for utterance in single]
    assert all(texts)
    model.save_pretrained(tmp_path / "dense")
    export(tmp_path / "dense", tmp_path / "bitmask")
    with torch.no_grad():
        expected = model(**batch)
        for loaded in (
            AutoModelForCTC.from_pretrained(tmp_path / "dense", attn_implementation="eager").eval(),
            sparsewav.load(tmp_path / "dense"),
            sparsewav.load(tmp_path / "bitmask"),
        ):
            assert type(loaded) is type(model)
            for mine, theirs in zip(prunable_matrices(loaded), prunable_matrices(model), strict=True):
                assert torch.equal(mine.weight, theirs.weight), mine.name
            torch.testing.assert_close(loaded(**batch).logits, expected.logits, rtol=1e-4, atol=1e-4)
            assert decode(loaded, processor, batch) == texts


def test_full_size_counts() -> None:
    """Of the default configurations, without memory: the prunable parameters, and that they are most of the model."""
    shares = {}
    for family in FAMILIES:
        config = AutoConfig.for_model(family)
        config.vocab_size = config.vocab_size or 32  # that of wav2vec2-conformer must be chosen
        with torch.device("meta"):
            model = AutoModelForCTC.from_config(config)
        assert len(encoder_layers(model)) == encoder_config(model.config).num_hidden_layers
        prunable = sum(matrix.size for matrix in prunable_matrices(model))
        shares[family] = prunable / sum(parameter.numel() for parameter in model.parameters())
    assert min(shares.values()) > 0.85, shares


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_by_layer_with_all_that_runs_beside(
    family: str, tiny_model: Factory, noise_batch: Callable[..., Batch], model_input: ModelInput
) -> None:
    """Pruned by input within a layer, on the drifted inputs, with a recovery: exact counts, and no layer is worse."""
    model = tiny_model(family, num_hidden_layers=3)
    batches = [model_input(model, batch) for batch in (noise_batch([400, 307]), noise_batch([352], seed=1))]
    report = sparsewav.prune(
        model,
        batches,
        0.5,
        allocation="uniform",
        objective="asymmetric",
        recovery=Reconstruction(steps=4),
        calibration=Calibration(propagation="true_sequential", frames_per_column=None),
    )
    matrices = prunable_matrices(model)
    assert [row.sparsity for row in report.matrices] == [0.5] * len(matrices)
    assert all(int((matrix.weight == 0).sum()) == matrix.size // 2 for matrix in matrices)
    assert len(report.recoveries) == 3
    assert all(recovery.error <= recovery.error_before < 1 for recovery in report.recoveries)


@pytest.mark.parametrize("family", ["sew-d", "wav2vec2-bert", "parakeet_ctc", "lasr_ctc", "granite_speech5_ctc"])
def test_divergence_resumed_at_a_layer(
    family: str, tiny_model: Factory, noise_batch: Callable[..., Batch], model_input: ModelInput
) -> None:
    """With the outputs of the layers below kept, the divergence is that of the whole model."""
    model = tiny_model(family, num_hidden_layers=4)
    divergence = OutputDivergence(model, [model_input(model, noise_batch([400, 307]))], prunable_matrices(model))
    with divergence.resuming_at(2):
        for matrix in prunable_matrices(model):
            if matrix.layer == 3:
                matrix.weight.data[:, ::2] = 0
        resumed = divergence.measure()
    assert resumed > 1e-3
    assert divergence.measure() == pytest.approx(resumed, rel=1e-5)


@pytest.mark.parametrize("family", ["wav2vec2-conformer", "sew-d", "parakeet_ctc", "granite_speech5_ctc"])
def test_masked_weights_learn_nothing(
    family: str, tiny_model: Factory, noise_batch: Callable[..., Batch], model_input: ModelInput
) -> None:
    """Pruned weights, those of pointwise convolutions among them, get no gradient; others do, but not the front end."""
    model = tiny_model(family)
    batch = model_input(model, noise_batch([400, 400]))
    sparsewav.prune(model, [batch], 0.5, allocation="uniform")
    freeze_front_end(model)
    masks = masks_of(model)
    with masked_gradients(model, masks):
        model(**batch).loss.backward()
    for matrix in prunable_matrices(model):
        gradient = matrix.parameter.grad.flatten(1)
        assert not gradient[~masks[matrix.name]].any()
        assert gradient[masks[matrix.name]].any(), matrix.name
    front = base_of(model).get_submodule(FAMILIES[family].front)
    assert all(parameter.grad is None for parameter in front.parameters())


@pytest.mark.parametrize("family", ["granite_speech5_ctc", "parakeet_ctc"])
def test_half_precision(
    family: str, tiny_model: Factory, noise_batch: Callable[..., Batch], model_input: ModelInput, tmp_path: Path
) -> None:
    """A model in bfloat16 is pruned, saved and loaded, also where transformers keeps norms in float32."""
    tiny_model(family).save_pretrained(tmp_path / "single")
    model = AutoModelForCTC.from_pretrained(tmp_path / "single", dtype=torch.bfloat16).eval()
    sparsewav.prune(model, [model_input(model, noise_batch([400, 304]))], 0.5, allocation="uniform")
    model.save_pretrained(tmp_path / "half")
    loaded = sparsewav.load(tmp_path / "half")
    assert {name: tensor.dtype for name, tensor in loaded.named_parameters()} == {
        name: tensor.dtype for name, tensor in model.named_parameters()
    }
    assert all(torch.equal(loaded.get_parameter(name), tensor) for name, tensor in model.named_parameters())
