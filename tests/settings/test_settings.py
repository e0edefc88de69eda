"""The settings' dataclasses: documented, checked as a whole, and the same in Python as on the command line."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from transformers import SchedulerType

import sparsewav
import sparsewav.cli.app
from sparsewav.errors import UserError
from sparsewav.files import conf_folder
from sparsewav.settings.baselines import PARP, DistilHuBERT, Gated
from sparsewav.settings.data import DemoData
from sparsewav.settings.options import doc_of
from sparsewav.settings.presets import preset_names, read_preset
from sparsewav.settings.pruning import (
    ALPS,
    NM,
    OBS,
    OPTIONS,
    Asymmetric,
    Calibration,
    Hutchinson,
    Megabytes,
    OBSRefit,
    Pruning,
    Search,
    Uniform,
    Unstructured,
    Wanda,
    resolve,
)
from sparsewav.settings.recovery import Global, Reconstruction
from sparsewav.settings.run import SCHEMAS, Config, Export, Model, TrainConfig
from sparsewav.settings.training import SCHEDULERS, Progressive, Training

SETTINGS = {schema.__name__: schema for schemas in SCHEMAS.values() for schema in schemas} | {
    schema.__name__: schema for schema in (Pruning, Config, TrainConfig, Export)
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_field_is_documented(name: str) -> None:
    schema = SETTINGS[name]
    documented = [item.name for item in fields(schema) if item.metadata]
    assert {item.name for item in fields(schema)} - set(documented) <= {"name"}
    assert [key for key in documented if not doc_of(schema, key)] == []
    assert inspect.getdoc(schema)


def test_prune_takes_the_settings_of_the_command_with_the_same_defaults() -> None:
    parameters = inspect.signature(sparsewav.prune).parameters
    assert len(parameters) <= 15
    defaults = read_preset(parameters["preset"].default)
    assert [item.name for item in fields(Pruning)] == [name for name in parameters if hasattr(defaults, name)]
    assert set(parameters) - {item.name for item in fields(Pruning)} == {
        *("model", "calibration_batches"),
        *("preset", "masks", "progress"),
    }
    assert defaults == Pruning()
    assert resolve("sparsity", parameters["sparsity"].default) == defaults.sparsity
    assert parameters["seed"].default == defaults.seed
    # The others are the preset's.
    assert {parameters[group].default for group in (*OPTIONS, "calibration") if group != "sparsity"} == {None}


def test_presets_are_what_the_command_reads_from_the_same_files() -> None:
    assert preset_names() == ["paper", "best", "best_oneshot", "smallest"]
    for name in preset_names():
        sparsity = Megabytes(1.0) if name == "smallest" else Unstructured(0.8)
        key = "megabytes=1" if name == "smallest" else "target=0.8"
        overrides = [f"sparsity.{key}", *([f"experiment={name}"] if name != "paper" else [])]
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            config: Any = OmegaConf.to_object(compose("config", overrides))
        assert replace(config.pruning(0.8), sparsity=sparsity) == replace(read_preset(name), sparsity=sparsity), name
    with pytest.raises(
        UserError, match="preset=smoke does not exist; choose one of paper, best, best_oneshot, smallest"
    ):
        read_preset("smoke")  # which is about the speech, too


@pytest.mark.parametrize(
    ("function", "own", "other_defaults"),
    [
        (sparsewav.prune_folder, {"source", "destination", "traces", "device"}, {"allocation"}),
        (sparsewav.prune_matrix, {"weight", "hessian", "keep", "drift", "covariance", "name"}, {"sparsity"}),
    ],
    ids=["prune_folder", "prune_matrix"],
)
def test_the_other_functions_take_the_names_of_prune(function: Any, own: set[str], other_defaults: set[str]) -> None:
    """With the same defaults; from disk there is no gradient for an allocation, and a matrix has no usual sparsity."""
    theirs, ours = inspect.signature(sparsewav.prune).parameters, inspect.signature(function).parameters
    assert set(ours) - set(theirs) == own
    for name in set(ours) & set(theirs) - other_defaults:
        expected, given = theirs[name].default, ours[name].default
        if name in OPTIONS and expected is None:
            expected, given = getattr(Pruning(), name), resolve(name, given)
        assert given == expected, name
        assert ours[name].kind == theirs[name].kind, name


@pytest.mark.parametrize("group", OPTIONS)
def test_an_option_goes_by_its_name_or_its_object(group: str) -> None:
    for choice in OPTIONS[group]:
        assert resolve(group, choice().name) == choice()
        assert resolve(group, item := choice()) is item
    names = ", ".join(choice().name for choice in OPTIONS[group])
    number = ", or give a number, e.g. 0.75" if group == "sparsity" else ""
    for wrong in ("obd", None, Calibration()):
        with pytest.raises(UserError, match=rf"^{group}=.* does not exist; choose one of {names}{number}$"):
            resolve(group, wrong)
    assert resolve("sparsity", 0.3) == Unstructured(0.3)


def _faults(settings: Any) -> list[str]:
    with pytest.raises(UserError) as error:
        settings.check()
    return str(error.value).splitlines()


def _keys(lines: list[str]) -> Iterator[str]:
    """The key that a line begins with."""
    for line in lines:
        found = re.match(r"([a-z_.]+)[= ]", line)
        assert found, line
        yield found[1]


WRONG: list[tuple[Any, set[str]]] = [
    (
        Config(
            sparsity=Unstructured(1.5),
            saliency=Wanda(),
            solver=OBS(damping=-1.0, block_size=0, comparison_group="row"),
            objective=Asymmetric(strength=2.0),
            recovery=Reconstruction(steps=0, learning_rate=0.0),
            allocation=Hutchinson(trace="kfac", probes=0, distribution="cauchy", utterances=0, rank_tolerance=-1.0),
            calibration=Calibration(utterances=0, frames_per_column=0.5),
            seed=-1,
            data=DemoData(evaluation_utterances=0, training_utterances=0, evaluation_subset=[1, "dev"]),
            training=Training(
                batch_size=0,
                gradient_accumulation_steps=0,
                learning_rate=0.0,
                betas=[0.9],
                epsilon=0.0,
                warmup_steps=-1,
                scheduler="exponential",
                weight_decay=-0.1,
                max_grad_norm=-1.0,
                precision="int8",
                checkpoint_updates=0,
                epochs=0.0,
                processes=0,
                seed=2**32,
            ),
            finetune_strategy=Progressive(stages=[0.8, 0.7]),
            method=DistilHuBERT(layers=13, predicted=[], cosine_weight=-1.0, front_end_gradient=2.0, updates=0),
            update_divisor=0.5,
            lr_multiplier=0.0,
            device="gpu",
            seconds_per_batch=0.0,
            export=Export("zip", "int8"),
        ),
        {
            *("sparsity.target", "solver.damping", "solver.block_size", "solver.comparison_group"),
            *("objective.strength", "recovery.steps", "recovery.learning_rate"),
            *("allocation.trace", "allocation.probes", "allocation.distribution", "allocation.utterances"),
            "allocation.rank_tolerance",
            *("calibration.utterances", "calibration.frames_per_column", "seed"),
            *("data.evaluation_utterances", "data.training_utterances", "data.evaluation_subset"),
            *(f"training.{item.name}" for item in fields(Training) if item.name != "freeze_feature_encoder"),
            *("finetune_strategy.stages", "finetune_strategy"),
            *("method.layers", "method.predicted", "method.cosine_weight", "method.front_end_gradient"),
            *("method.updates", "update_divisor", "lr_multiplier", "device", "seconds_per_batch"),
            *("export.format", "export.dtype"),
        },
    ),
    (
        Config(
            sparsity=NM(4, 4),
            saliency=Wanda(),
            solver=ALPS(damping=-1.0, tolerance=0.0, max_steps=0),
            allocation=Search(step=0.5, effect="loss", others="none", utterances=0, evaluations=0, level_cache_gib=-1),
            calibration=Calibration(propagation="sideways"),
            model=Model(offload=True),
            method=Gated(gated=["layers"], drop_rate=0.0, ramp_updates=-1, gate_learning_rate=0.0),
            training=Training(processes=3, batch_size=3),
            finetune_strategy=Progressive(),
        ),
        {
            *("sparsity.n", "sparsity", "solver.damping", "solver.tolerance", "solver.max_steps"),
            *("allocation.step", "allocation.effect", "allocation.others", "allocation.utterances"),
            *("allocation.evaluations", "allocation.level_cache_gib", "calibration.propagation", "model.offload"),
            *("method.gated", "method.drop_rate", "method.ramp_updates", "method.gate_learning_rate"),
            *("training.processes", "finetune_strategy"),
        },
    ),
    (
        Config(
            method=PARP(sparsity=1.5, first_sparsity=2.0, reprunes=0),
            allocation=Hutchinson(alpha=0.3),
            solver=OBSRefit(tolerance=2.0),
        ),
        {"method.sparsity", "method.first_sparsity", "method.reprunes", "solver.tolerance"},
    ),
    (  # choices that do not fit one another, which a baseline does not read
        Config(
            saliency=Wanda(),
            solver=ALPS(),
            objective=Asymmetric(),
            recovery=Reconstruction(),
            allocation=Hutchinson(alpha=0.3, trace="fisher", distribution="rademacher"),
        ),
        {"solver", "objective", "recovery", "allocation.alpha", "allocation.distribution"},
    ),
    (
        TrainConfig(training=Training(epochs=0.0), device="gpu"),
        {"training.epochs", "device", "architecture"},
    ),
]


@pytest.mark.parametrize(("settings", "wrong"), WRONG, ids=["values", "choices", "ramp", "unfit", "training"])
def test_all_faults_are_told_at_once_by_the_keys_that_are_typed(settings: Any, wrong: set[str]) -> None:
    lines = _faults(settings)
    assert set(_keys(lines)) == wrong
    assert len(lines) == len(set(lines))
    assert is_dataclass(settings)
    typed = OmegaConf.structured(settings)
    for key in wrong:
        assert OmegaConf.select(typed, key, throw_on_missing=False) is not None, f"{key} is no key of the command"


def test_the_defaults_are_valid() -> None:
    Config().check()
    Pruning().check()
    for name, schema in SETTINGS.items():
        # Structured has no size by default, and says so.
        if hasattr(schema, "faults") and name not in ("Config", "Pruning", "Structured"):
            assert list(schema().faults()) == [], name


def test_schedulers_are_those_of_transformers() -> None:
    assert set(SCHEDULERS) <= {item.value for item in SchedulerType}


@pytest.mark.parametrize(
    ("option", "fault"),
    [
        (OBS(damping=None), "damping=null has no meaning"),
        (OBS(comparison_group=" "), "comparison_group=  is empty; give a value"),
        (OBS(damping=float("inf")), "damping=inf is not a finite number"),
        (OBS(block_size=1.5), "block_size=1.5 is not a whole number"),
        (NM(2.5, 4), "n=2.5 is not a whole number"),
        (OBS().changed(name="alps"), "name=alps cannot be set"),
        (Global(betas=None), "betas=null has no meaning"),
        (Global(batch_size="x"), "batch_size=x is not a whole number"),
        (Global(processes=None), "processes=null has no meaning"),
        (Global(scheduler="polynomial", learning_rate=1e-8), "learning_rate=1e-08 must be above 1e-07, at which"),
    ],
)
def test_values_of_a_wrong_type_are_refused(option: Any, fault: str) -> None:
    (found,) = option.faults()
    assert found.startswith(fault)
    settings = Pruning(allocation=Uniform())
    setattr(settings, {NM: "sparsity", Global: "recovery"}.get(type(option), "solver"), option)
    with pytest.raises(UserError, match=fault):
        settings.check()
