"""Every option of every configuration group: explained, composing and valid."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from sparsewav.cli.app import _identifying
from sparsewav.files import conf_folder
from sparsewav.settings.run import Config
from sparsewav.settings.validation import validate

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_the_folders_of_the_papers_runs_keep_their_names() -> None:
    """The hash of a configuration without the later groups is the one from before there were any."""
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        settings = compose("config")
        chosen = _identifying(settings)
        assert not {"solver", "objective", "recovery"} & set(chosen)
        assert _identifying(compose("config", ["solver=alps"]))["solver"]["name"] == "alps"


def _groups() -> list[Path]:
    return [
        path
        for path in conf_folder().iterdir()
        if path.is_dir() and path.name not in ("hydra", "architecture", "recipe")
    ]


def test_help_names_every_option_of_every_group(run_sparsewav: Run) -> None:
    output = run_sparsewav("--help").stdout
    groups = _groups()
    assert len(groups) == 15
    for group in groups:
        for option in group.glob("*.yaml"):
            assert re.search(rf"\b{re.escape(option.stem)}\b", output), f"{group.name}={option.stem}"
    assert "Worth copying" in output
    assert "Worth copying" in run_sparsewav("--help", command="sparsewav-train").stdout


def _options() -> list[str]:
    return sorted(f"{group.name}={option.stem}" for group in _groups() for option in group.glob("*.yaml"))


@pytest.mark.parametrize("option", _options())
def test_every_option_composes_into_a_valid_configuration(option: str) -> None:
    extra = {
        "data=librispeech_dir": ["data.root=/data"],
        "sparsity=n_m": ["allocation=uniform"],
        "objective=asymmetric": ["calibration.propagation=true_sequential"],
        "recovery=reconstruction": ["calibration.propagation=sequential"],
        "recovery=affine": ["calibration.propagation=sequential"],
    }.get(option, [])
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = OmegaConf.to_object(compose("config", [option, *extra]))
    assert isinstance(config, Config)
    validate(config)
