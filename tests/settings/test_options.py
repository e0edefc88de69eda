"""Every option of every configuration group: explained, composing and valid; and the names of runs' folders."""

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from sparsewav.cli import app, reference
from sparsewav.files import conf_folder
from sparsewav.pipeline.naming import identifying_settings, run_name
from sparsewav.settings.options import MISSING
from sparsewav.settings.run import SCHEMAS, Config
from tests.terminal import Run

assert app, "its import registers the dataclasses with Hydra"


def composed(*overrides: str) -> DictConfig:
    """Compose a configuration as the command does."""
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return compose("config", list(overrides))


def _groups() -> list[Path]:
    return [
        path
        for path in conf_folder().iterdir()
        if path.is_dir() and path.name not in ("hydra", "architecture", "recipe")
    ]


def _names(group: Path) -> list[str]:
    return sorted(path.relative_to(group).with_suffix("").as_posix() for path in group.rglob("*.yaml"))


def test_help_names_every_option_of_every_group(run_sparsewav: Run) -> None:
    output = run_sparsewav("--help").stdout
    groups = _groups()
    assert {group.name for group in groups} == {*SCHEMAS, "scale", "experiment"}
    assert len(groups) == 16
    for group in groups:
        for option in _names(group):
            assert re.search(rf"(?<![\w/]){re.escape(option)}\b", output), f"{group.name}={option}"
    assert "Worth copying" in output
    assert "Worth copying" in run_sparsewav("--help", command="sparsewav-train").stdout


def _options() -> list[str]:
    return sorted(f"{group.name}={option}" for group in _groups() for option in _names(group))


@pytest.mark.parametrize("option", _options())
def test_every_option_composes_into_a_valid_configuration(option: str) -> None:
    extra = {
        "data=librispeech_dir": ["data.root=/data"],
        "data=manifest": ["data.train=a.tsv", "data.test=b.tsv"],
        "data=hf": ["data.path=a/b"],
        "sparsity=n_m": ["allocation=uniform"],
        "quantization=mixed": ["sparsity=megabytes", "sparsity.megabytes=20"],
        "sparsity=megabytes": ["sparsity.megabytes=20"],
        "sparsity=structured": ["sparsity.parameters=0.5"],
        "experiment=smallest": ["sparsity.megabytes=1"],
        "objective=asymmetric": ["calibration.propagation=true_sequential"],
        "recovery=reconstruction": ["calibration.propagation=sequential"],
        "recovery=affine": ["calibration.propagation=sequential"],
    }.get(option, [])
    config = OmegaConf.to_object(composed(option, *extra))
    assert isinstance(config, Config)
    config.check()


def test_generated_files_are_current() -> None:
    """``conf/README.md``, the groups of ``--help`` and the options' YAML files repeat what the dataclasses say."""
    stale = [str(path) for path, text in reference.texts().items() if path.read_text(encoding="utf-8") != text]
    assert not stale, f"run `python -m sparsewav.cli.reference`, which rewrites {', '.join(stale)}"


def test_no_override_gives_the_defaults_of_python() -> None:
    assert OmegaConf.to_object(composed()) == Config()


@pytest.mark.parametrize(
    ("group", "schema"), [(group, schema) for group, schemas in SCHEMAS.items() for schema in schemas]
)
def test_the_default_file_of_a_dataclass_has_its_defaults_and_explains_every_key(group: str, schema: type) -> None:
    """Composed by Hydra; a value that is taken from another key is left out."""
    path = reference.default_file(group, schema)
    chosen = composed(f"{group}={path.stem}")[group]
    assert OmegaConf.get_type(chosen) is schema
    found: Any = OmegaConf.to_container(chosen, resolve=False)
    expected: Any = OmegaConf.to_container(OmegaConf.structured(schema()))
    taken = [key for key, value in found.items() if isinstance(value, str) and value.startswith("${")]
    assert {key: found[key] for key in found if key not in taken} == {
        key: expected[key] for key in expected if key not in taken
    }
    text = path.read_text(encoding="utf-8")
    for item in fields(schema):
        if item.init:
            line = re.search(rf"^(#.*\n)?{item.name}:.*$", text, re.MULTILINE)
            assert line, f"{path} has no key {item.name}"
            assert "# " in line[0], f"{path} does not explain {item.name}"


def _leaves(settings: Any, prefix: str = "") -> Iterator[str]:
    """The keys of all values, as they are typed on the command line."""
    for key in settings:
        node = settings._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_interpolation():
            yield from _leaves(node, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _changed_names(*overrides: str) -> tuple[set[str], set[str]]:
    """The keys whose value changes the name of the run's folder when it changes, and those whose does not."""
    root = composed(*overrides)
    before = run_name(_root_=root)
    changing: set[str] = set()
    staying: set[str] = set()
    for key in _leaves(root):
        other = root.copy()
        OmegaConf.update(other, key, _another(OmegaConf.select(root, key)))
        (changing if run_name(_root_=other) != before else staying).add(key)
    return changing, staying


def _another(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if value is None:
        return 7
    return f"{value}x" if isinstance(value, str) else []


@pytest.mark.parametrize(
    ("overrides", "unused", "within"),
    [
        (["allocation=search"], ["training", "update_divisor", "lr_multiplier"], {"allocation.level_cache_gib"}),
        (["finetune_strategy=progressive"], ["update_divisor", "lr_multiplier"], {"training.checkpoint_updates"}),
        # The moment that is kept is one of those at which there is a checkpoint.
        (["recovery=global"], ["training", "update_divisor", "lr_multiplier"], set()),
        (
            ["solver=alps", "allocation=uniform"],
            ["saliency", "training", "update_divisor", "lr_multiplier"],
            set(),
        ),
        (
            ["method=distilhubert", "finetune_strategy=one_pass"],
            ["saliency", "solver", "objective", "recovery", "quantization", "allocation", "calibration"],
            {"training.checkpoint_updates", "method.checkpoint_updates"},
        ),
    ],
    ids=["one-shot", "tuned", "recovered", "alps", "baseline"],
)
def test_the_name_of_a_runs_folder_tells_apart_what_changes_its_results(
    overrides: list[str], unused: list[str], within: set[str]
) -> None:
    """Every key by itself: it changes the name, unless its field says no or the run does not read it."""
    changing, staying = _changed_names(*overrides)
    indifferent = {item.name for item in fields(Config) if not item.metadata["identifies"]} | set(unused)
    indifferent_within = within | {"data.development_subset"}
    assert indifferent_within <= staying
    assert {key.partition(".")[0] for key in staying - indifferent_within} == indifferent
    assert not {key.partition(".")[0] for key in changing} & indifferent
    assert {"device", "output_root", "tracker"} <= indifferent
    assert {"seed", "sparsity.target", "data.evaluation_subset", "model.name_or_path"} <= changing
    if "solver" not in unused:
        assert {"solver.damping", "calibration.frames_per_column"} <= changing
    assert not set(unused) & set(identifying_settings(composed(*overrides)))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "demo-obs_first_order-hutchinson-0.75"),
        (["solver=alps", "sparsity=n_m", "allocation=uniform"], "demo-alps-uniform-2of4"),
        (["solver=alps", "saliency=wanda"], "demo-wanda-hutchinson-0.75-alps"),  # refused, beside no run's results
        (
            ["model.fairseq_checkpoint=/models/my w2v.pt", "sparsity.target=0.5"],
            "my_w2v-obs_first_order-hutchinson-0.5",
        ),
        (["method=parp", "finetune_strategy=one_pass"], "demo-parp-0.75-one_pass"),
        (["sparsity=megabytes", "sparsity.megabytes=1.2"], "demo-obs_first_order-error_curves-1.2MB"),
        (["sparsity=megabytes", "sparsity.megabytes=20", "allocation=search"], "demo-obs_first_order-search-20MB"),
        (["sparsity=structured", "sparsity.macs=0.5"], "demo-obs-error_curves-0.5macs"),
    ],
    ids=["default", "pattern", "refused", "fairseq", "baseline", "size", "size, searched", "structured"],
)
def test_the_name_of_a_runs_folder_can_be_read(overrides: list[str], expected: str) -> None:
    name, _, digest = run_name(_root_=composed(*overrides)).rpartition("-")
    assert name == expected
    assert re.fullmatch(r"[0-9a-f]{8}", digest)


def test_a_value_that_the_user_has_to_give_is_missing() -> None:
    assert OmegaConf.to_container(composed("data=librispeech_dir"))["data"]["root"] == MISSING  # type: ignore[index,call-overload]
