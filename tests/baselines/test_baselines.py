"""The methods that the paper compares with: their characteristic parts, their sizes, and a run by the command line."""

import json
import pkgutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from transformers import AutoModelForCTC, HubertConfig, PreTrainedModel

import sparsewav.cli.app  # noqa: F401  (registers the schemas)
from sparsewav.baselines import METHODS, deep_vs_wide, distilhubert, fithubert
from sparsewav.baselines.distillation import Frozen, scaled_front_end_gradient
from sparsewav.baselines.magnitude import prune_by_magnitude
from sparsewav.data.librispeech import read_librispeech_folder
from sparsewav.errors import UserError
from sparsewav.files import conf_folder
from sparsewav.models.load import load_speech_model
from sparsewav.pruning.encoder import prunable_matrices
from sparsewav.pruning.families import FAMILIES
from sparsewav.pruning.macs import multiply_accumulates
from sparsewav.training import trainer
from sparsewav.training.masks import masks_of
from sparsewav.training.trainer import ParameterGroup, train

Settings = Callable[..., Any]


def settings_of(method: str, *overrides: str) -> Any:
    """A method's settings as its file has them."""
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = compose("config", overrides=[f"method={method}", *overrides])
    return OmegaConf.to_object(config.method)


def base_model() -> PreTrainedModel:
    """HuBERT-base with random weights."""
    return AutoModelForCTC.from_config(HubertConfig(vocab_size=32))


def millions(model: PreTrainedModel) -> float:
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "published"),
    [
        *(("distilhubert", 23.49), ("fithubert", 22.49), ("deep_vs_wide", 26.87)),
        *(("parp", None), ("parp_p", None), ("self_pinching", None)),
    ],
)
def test_full_size_takes_two_updates_and_has_the_published_size(
    method: str, published: float | None, corpus: Path, model_folder: Path, tmp_path: Path
) -> None:
    """HuBERT base with random weights, the published settings cut to two updates of one utterance each."""
    teacher = base_model()
    settings = replace(settings_of(method), updates=2, batch_size=1)
    if method in ("parp", "parp_p"):
        settings = replace(settings, reprunes=1)
    processor = load_speech_model(str(model_folder)).processor
    utterances = read_librispeech_folder(corpus, "train")[:2]
    smaller, _ = METHODS[method](teacher, processor, utterances, settings, tmp_path, seed=0)
    assert all(parameter.isfinite().all() for parameter in smaller.parameters())
    if published is None:
        matrices = prunable_matrices(smaller)
        zeros = sum(int((matrix.weight == 0).sum()) for matrix in matrices)
        assert zeros == round(settings.sparsity * sum(matrix.size for matrix in matrices))
    else:
        assert millions(smaller) == pytest.approx(published, rel=0.02)


def test_magnitude_takes_the_smallest_weights_of_all_matrices(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model("wav2vec2")
    before = torch.cat([matrix.weight.detach().flatten() for matrix in prunable_matrices(model)])
    prune_by_magnitude(model, 0.7)
    after = torch.cat([matrix.weight.detach().flatten() for matrix in prunable_matrices(model)])
    gone = after == 0
    assert gone.sum() == round(0.7 * len(before))
    assert before[gone].abs().max() <= before[~gone].abs().min()


@pytest.fixture
def compressed(corpus: Path, model_folder: Path, tmp_path: Path) -> Callable[..., Any]:
    """Compress the tiny model of a folder with a method: (name, *overrides); gives teacher, student and report."""

    def run(method: str, *overrides: str) -> Any:
        speech = load_speech_model(str(model_folder))
        settings = settings_of(method, "method.updates=8", "method.batch_size=4", *overrides)
        utterances = read_librispeech_folder(corpus, "train")
        teacher = load_speech_model(str(model_folder)).model
        student, report = METHODS[method](
            speech.model, speech.processor, utterances, settings, tmp_path / method, seed=0
        )
        return teacher, student, report

    return run


@pytest.mark.parametrize("method", ["distilhubert", "fithubert", "deep_vs_wide", "dphubert", "wang2023"])
def test_the_precision_has_to_suit_the_teacher_too(
    method: str, compressed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its convolutions may be computed wrongly in bfloat16 where the student's, which are narrower, are not."""
    tried: list[Any] = []

    def choose(name: str, model: Any, frozen: Any, **_: object) -> str:
        tried.append([module.config.hidden_size for module in frozen])
        return "float32"

    monkeypatch.setattr(trainer, "choose_precision", choose)
    gated = ["method.final_updates=4", "method.target=0.3"] if method in ("dphubert", "wang2023") else []
    teacher, _, _ = compressed(method, *gated)
    assert tried
    assert all(widths == [teacher.config.hidden_size] for widths in tried)


def test_parp_lets_weights_come_back_and_ends_on_a_prune(compressed: Callable[..., Any]) -> None:
    overrides = ("method.reprunes=2", "method.learning_rate=0.2", "sparsity.target=0.5", "allocation=uniform")
    teacher, student, report = compressed("parp", *overrides)
    prune_by_magnitude(teacher, 0.5)
    first, last = masks_of(teacher), masks_of(student)
    assert report.facts["regrown"] > 0
    assert not report.warnings
    assert report.facts["regrown"] == sum(int((last[name] & ~first[name]).sum()) for name in first)
    sizes = [(mask.numel(), int((~mask).sum())) for mask in last.values()]
    assert sum(zeros for _, zeros in sizes) == round(0.5 * sum(size for size, _ in sizes))
    assert report.masked


def test_parp_p_prunes_more_each_time() -> None:
    from sparsewav.baselines.parp import ramp

    settings = settings_of("parp_p", "method.updates=8", "method.reprunes=4", "sparsity.target=0.9")
    assert [ramp(settings, update) for update in range(1, 9)] == [
        *(None, pytest.approx(0.6), None, pytest.approx(0.7)),
        *(None, pytest.approx(0.8), None, pytest.approx(0.9)),
    ]


def test_distilhubert_starts_from_the_teachers_first_layers_and_drops_its_heads(compressed: Callable[..., Any]) -> None:
    overrides = ("method.layers=6", "method.predicted=[6,12]", "method.learning_rate=1e-9")
    teacher, student, report = compressed("distilhubert", *overrides)
    assert report.facts == {"layers": 1, "predicted_layers": [1, 2]}
    assert all(name in dict(teacher.named_parameters()) for name, _ in student.named_parameters())
    for name, parameter in student.wav2vec2.named_parameters():  # at no learning rate to speak of: still its start
        assert torch.allclose(parameter, teacher.wav2vec2.get_parameter(name), atol=1e-5), name


def test_distilhubert_learns_from_every_predicted_layer_and_little_in_the_front_end(
    tiny_model: Callable[..., PreTrainedModel], noise_batch: Callable[..., Any]
) -> None:
    teacher, batch = tiny_model("hubert"), noise_batch([400, 320])
    student = distilhubert.make_student(teacher, 1).eval()  # no dropout
    losses = []
    for predicted in ([1], [2], [1, 2]):
        torch.manual_seed(0)
        distiller = distilhubert.DistilHubert(student, Frozen(teacher), predicted, 1.0)
        losses.append(distiller(**batch)["loss"].item())
        distiller(**batch)["loss"].backward()
        assert all(parameter.grad is not None for parameter in distiller.heads.parameters())
    assert len(set(losses)) == 3
    assert all(parameter.grad is None for parameter in teacher.parameters())
    full = student.hubert.feature_extractor.conv_layers[0].conv.weight
    student.zero_grad()
    distiller(**batch)["loss"].backward()
    whole = full.grad.clone()
    student.zero_grad()
    with scaled_front_end_gradient(student, 0.1):
        distiller(**batch)["loss"].backward()
    assert torch.allclose(full.grad, 0.1 * whole, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("family", ["wav2vec2", "wavlm"])
def test_every_layer_of_the_half_learns_from_the_teachers(
    family: str, tiny_model: Callable[..., PreTrainedModel], noise_batch: Callable[..., Any]
) -> None:
    teacher, batch = tiny_model(family), noise_batch([400, 320])
    student = deep_vs_wide.make_student(teacher, settings_of("deep_vs_wide"))
    assert student.config.num_hidden_layers == teacher.config.num_hidden_layers
    assert 2 * student.config.hidden_size == teacher.config.hidden_size
    distiller = deep_vs_wide.LayerwiseDistiller(student, Frozen(teacher), 1.0)
    distiller(**batch)["loss"].backward()
    assert len(distiller.projections) == 2
    for projection in distiller.projections:
        assert projection.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_distillations_refuse_what_has_not_the_form_of_wav2vec2(
    family: str, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    """A student and its loss are made of the families that the sentence names, and the others are refused."""
    teacher = tiny_model(family, num_hidden_layers=3)
    plain = {"wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat"}
    for method, build, suits in (
        ("distilhubert", distilhubert.build, plain | {"data2vec-audio", "wav2vec2-conformer"}),
        ("deep_vs_wide", deep_vs_wide.build, plain | {"data2vec-audio", "wav2vec2-conformer"}),
        ("fithubert", fithubert.build, plain),
    ):
        if family in suits:
            assert prunable_matrices(build(teacher, settings_of(method))[0].student)
            continue
        with pytest.raises(UserError, match=rf"method={method} .*'{family}' .*choose a model of .*wavlm") as refusal:
            build(teacher, settings_of(method))
        listed = str(refusal.value).partition("choose a model of ")[2].partition(", or method=")[0]
        assert set(listed.split(", ")) == suits


def test_fithubert_hints_reach_the_lower_layers_with_their_weight(
    tiny_model: Callable[..., PreTrainedModel], noise_batch: Callable[..., Any]
) -> None:
    teacher = tiny_model("wav2vec2", conv_dim=(8, 8, 8), conv_kernel=(8, 4, 2), conv_stride=(4, 2, 2))
    batch = noise_batch([400, 320])
    student = fithubert.make_student(teacher, settings_of("fithubert")).eval()  # no dropout
    gradients = {}
    for weight in (0.0, 0.1, 0.2):
        torch.manual_seed(0)
        distiller = fithubert.FitHubert(student, Frozen(teacher), weight)
        for hint in distiller.hints:
            torch.nn.init.normal_(hint.projection.weight, std=0.1)
        distiller(**batch)["loss"].backward()
        gradients[weight] = [hint.projection.bias.grad.clone() for hint in distiller.hints]
        student.zero_grad()
    assert not gradients[0.0][0].any()
    assert gradients[0.1][0].abs().sum() > 0
    assert torch.allclose(gradients[0.2][0], 2 * gradients[0.1][0])


def test_fithubert_halves_the_frames_restores_them_and_loads_again(
    tiny_model: Callable[..., PreTrainedModel], noise_batch: Callable[..., Any], tmp_path: Path
) -> None:
    teacher, batch = tiny_model("wav2vec2"), noise_batch([400, 320])
    student = fithubert.make_student(teacher, settings_of("fithubert")).eval()
    frames = teacher(batch["input_values"]).logits.shape[1]
    seen: list[int] = []
    student.wav2vec2.encoder.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    output = student(**batch)
    assert seen == [frames // 2]
    assert output.logits.shape[1] == 2 * (frames // 2)
    assert torch.isfinite(output.loss)
    student.save_pretrained(tmp_path / "student")
    again = AutoModelForCTC.from_pretrained(tmp_path / "student")
    assert torch.equal(again(**batch).logits, output.logits)
    alone = student(batch["input_values"][1:, :320]).logits
    assert torch.allclose(output.logits[1:, : alone.shape[1]], alone, atol=1e-4)
    audio = torch.zeros(1, 16_000)
    assert multiply_accumulates(student, audio)[0] < multiply_accumulates(teacher, audio)[0]


class _Stopped(Exception):
    pass


@pytest.mark.parametrize("method", ["dphubert", "parp", "self_pinching"])
def test_a_stopped_method_goes_on_to_the_same_model(
    method: str, corpus: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gates, multipliers and optimizers, or what PARP has pruned so far, come back from the last checkpoint."""
    overrides = ("method.checkpoint_updates=2", "method.batch_size=4", "method.precision=float32")
    settings = settings_of(method, *overrides).scaled(4000, 1)
    utterances = read_librispeech_folder(corpus, "train")

    def compress(folder: str, stop_after: int | None = None) -> dict[str, torch.Tensor]:
        def progress(done: int, total: int) -> None:
            if done == stop_after:
                raise _Stopped

        speech = load_speech_model(str(model_folder))
        student, _ = METHODS[method](
            speech.model, speech.processor, utterances, settings, tmp_path / folder, seed=0, progress=progress
        )
        return student.state_dict()

    whole = compress("whole")
    with pytest.raises(_Stopped):
        compress("stopped", stop_after=3)
    assert list((tmp_path / "stopped").rglob("checkpoint-2"))
    resumed = compress("stopped")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    if method == "dphubert":  # the cut model that it would go on from is damaged: it is cut again
        path = tmp_path / "stopped" / "cut" / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-2] ^= 4
        path.write_bytes(data)
        again = compress("stopped")
        assert "model.safetensors is damaged; the model is cut again" in " ".join(capsys.readouterr().out.split())
        assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


@pytest.mark.parametrize(
    ("method", "spoiled", "named"),
    [
        ("dphubert", "sparsewav.baselines.gated.l1_and_cosine", "for each of them alone"),
        ("l0_finetune", "sparsewav.baselines.gated.Lagrangian.forward", "for each of them alone"),
        ("distilhubert", "sparsewav.baselines.distilhubert.l1_and_log_cosine", "for each of them alone"),
        ("self_pinching", "sparsewav.baselines.self_pinching.PinchedStudent.sparsity_of", "for each of them alone"),
        ("parp", "sparsewav.baselines.parp.collate", r"the loss is nan for utterance \S+ \(\S+\.flac\)"),
    ],
)
def test_a_method_whose_loss_is_not_finite_stops(
    method: str,
    spoiled: str,
    named: str,
    compressed: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """A distance between hidden states, the penalty of the gates, and one utterance's audio, which becomes NaN."""
    module, _, name = spoiled.rpartition(".")
    owner = pkgutil.resolve_name(module)
    function, calls = getattr(owner, name), []

    def spoil(*arguments: Any, **options: Any) -> Any:
        result = function(*arguments, **options)
        calls.append(None)
        if name == "collate":
            result["input_values"][[item.id == "100-7-0002" for item in arguments[0]]] = torch.nan
            return result
        if len(calls) <= 4:  # of the first updates; each calls it up to four times
            return result
        return tuple(item * torch.nan for item in result) if isinstance(result, tuple) else result * torch.nan

    monkeypatch.setattr(owner, name, spoil)
    with pytest.raises(UserError, match=rf"stopped at update \d of 8: .*{named}") as stopped:
        compressed(method)
    assert "training.learning_rate" not in str(stopped.value)
    assert not [path for path in (tmp_path / method).rglob("*.safetensors") if "checkpoint" not in str(path)]


@pytest.mark.parametrize("method", ["distilhubert", "fithubert"])
def test_a_method_runs_by_the_command_line_and_is_found_done(
    method: str, run_sparsewav: Callable[..., Any], corpus: Path, model_folder: Path, tmp_path: Path
) -> None:
    arguments = [
        f"method={method}",
        f"model.name_or_path={model_folder}",
        "data=librispeech_dir",
        f"data.root={corpus}",
        "data.training_subset=train",
        "data.evaluation_subset=test",
        "method.batch_size=4",
        "update_divisor=100000",
        "finetune_strategy=one_pass",
        "training.epochs=0.5",
        "training.batch_size=4",
    ]
    first = run_sparsewav(*arguments)
    assert first.returncode == 0, first.stdout + first.stderr
    (folder,) = (tmp_path / "outputs").glob(f"tiny-wav2vec2-{method}-0.75-one_pass-*")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["method"] == method
    assert metrics["compression"]["updates"] == (2 if method == "distilhubert" else 12)
    assert metrics["compression"]["batch_size"] == 4
    assert metrics["updates"] == 3
    assert metrics["seconds"]["compress"] > 0
    assert metrics["params_total"] < metrics["compression"]["params_dense"]
    assert metrics["macs_per_second"] > 0
    model = AutoModelForCTC.from_pretrained(folder / "model")
    assert sum(parameter.numel() for parameter in model.parameters()) == metrics["params_total"]
    assert ("import sparsewav" in (folder / "model" / "README.md").read_text()) == (method == "fithubert")
    second = run_sparsewav(*arguments)
    assert "Done already" in second.stdout


class _Seesaw(torch.nn.Module):
    """A loss whose slope is 1 in both of its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.multiplier = torch.nn.Parameter(torch.zeros(1))

    def forward(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.weight + self.multiplier).sum()}


def test_a_parameter_group_has_its_own_rate_and_may_climb(corpus: Path, tmp_path: Path) -> None:
    settings = settings_of("distilhubert", "method.learning_rate=0.1", "method.scheduler=constant")
    model = _Seesaw()
    log = train(
        model,
        lambda utterances: {"values": torch.ones(len(utterances))},
        read_librispeech_folder(corpus, "train"),
        settings,
        3,
        tmp_path,
        seed=0,
        parameter_groups=[ParameterGroup([model.multiplier], 0.5, ascend=True)],
    )
    assert model.weight.item() == pytest.approx(-0.3, rel=0.01)  # a step of Adam is as long as its rate
    assert model.multiplier.item() == pytest.approx(1.5, rel=0.01)
    assert [entry["update"] for entry in log] == [1, 2, 3]


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("method.layers=13", "method.layers=13 is not between 1 and 12"),
        ("method.updates=0", "method.updates=0 must be at least 1"),
        ("update_divisor=0.5", "update_divisor=0.5 must be at least 1"),
        ("finetune_strategy=progressive", "choose one_pass"),
    ],
)
def test_wrong_values_are_refused_in_one_sentence(argument: str, sentence: str) -> None:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = OmegaConf.to_object(compose("config", overrides=["method=distilhubert", argument]))
    with pytest.raises(UserError, match=sentence) as refused:
        config.check()
    assert "\n" not in str(refused.value)
