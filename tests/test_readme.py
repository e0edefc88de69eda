"""The documents say what is true: links, commands, options, the map of the modules and the Python example."""

import importlib.util
import re
import shlex
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

import sparsewav.cli.app  # noqa: F401  (registers the schemas)
from experiments.__main__ import ITEMS
from sparsewav.cli.explain import choices_of_keys
from sparsewav.files import conf_folder

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sparsewav"
README = ROOT / "README.md"
DOCUMENTS = sorted(
    [
        README,
        *(path for folder in ("conf", "experiments", "sparsewav", "tests") for path in (ROOT / folder).rglob("*.md")),
    ]
)
CURRENT = [path for path in DOCUMENTS if path.name != "CHANGELOG.md"]
"""Documents that name nothing but what there is today; the changelog also has the names of before."""


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def _anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", _without_code(path.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_has_at_most_150_lines() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("document", DOCUMENTS, ids=_name)
def test_every_relative_link_resolves(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", _without_code(document.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


def test_the_python_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCTC

    (example,) = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(example.splitlines()) < 20
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARSEWAV_CACHE", str(tmp_path / "cache"))
    exec(compile(example, str(README), "exec"), {"__name__": "example"})
    assert "80.00% of the weights of the transformer's 36 matrices are zero" in capsys.readouterr().out
    weight = AutoModelForCTC.from_pretrained("pruned").wav2vec2.encoder.layers[0].attention.q_proj.weight
    assert float((weight == 0).float().mean()) == pytest.approx(0.8, abs=1e-4)


@pytest.mark.slow
def test_the_notebook_runs_and_prints_what_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (said,) = re.findall(r"^It prints.*\n\n((?:    .*\n)+)", text, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "experiments/README.md", "exec"), {"__name__": "example"})
    printed = re.sub("; calibrate.*", "; ...", capsys.readouterr().out)
    printed = re.sub(r"✓ Speaking .*\n", "", printed)  # where no test before this one has spoken the demo's sets
    number = r"\d+\.\d+"
    assert re.sub(number, "0", printed).split() == re.sub(number, "0", said).split()
    # Rounding of another processor may move a decision of the solver, and the WER of 100 utterances by 2.7 points.
    before, after = ([float(value) for value in re.findall(number, text)] for text in said.rsplit("ErrorRates", 1))
    found = [float(value) for value in re.findall(number, printed)]
    assert found[: len(before)] == pytest.approx(before, rel=0.15)
    assert found[len(before) :] == [
        pytest.approx(value, rel=0.15, abs=0.04 if place < 2 else 0.0) for place, value in enumerate(after)
    ]


def _command_lines(text: str) -> Iterator[list[str]]:
    """The words of every command in the indented lines of a document."""
    lines = re.findall(r"^ {4}(?! )(.*(?:\\\n.*)*)$", _without_code(text), flags=re.MULTILINE)
    for line in lines:
        try:
            yield shlex.split(line.replace("\\\n", " "), comments=True)
        except ValueError:  # prose, e.g. with an apostrophe
            continue


def _runs(words: list[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The configuration and the overrides of a command, once for every option of a group that it sweeps over."""
    configurations = {"sparsewav": "config", "sparsewav-train": "train"}
    for place, word in enumerate(words):
        before = words[place - 1] if place else ""
        if word in configurations and (not place or before in ("-m", ".ci/venv") or re.match(r"[A-Z_]+=", before)):
            overrides = [argument for argument in words[place + 1 :] if not argument.startswith("-")]
            if importlib.util.find_spec("hydra_plugins.hydra_ray_launcher") is None:  # it does not go with all others
                overrides = [argument for argument in overrides if not re.match(r"hydra.launcher[=.]ray", argument)]
            values = []
            for item in OverridesParser.create().parse_overrides(overrides):
                choices = [str(item.input_line)]
                if item.is_sweep_override():
                    choices = [f"{item.get_key_element()}={value}" for value in item.sweep_string_iterator()]
                values.append(choices if (conf_folder() / item.key_or_group).is_dir() else choices[:1])
            for run in range(max(map(len, values), default=1)):
                yield configurations[word], tuple(choices[min(run, len(choices) - 1)] for choices in values)
            return


@cache
def _compose(name: str, overrides: tuple[str, ...]) -> DictConfig:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return compose(name, [*overrides, *(choices_of_keys(overrides) if name == "config" else [])])


@pytest.mark.parametrize("document", CURRENT, ids=_name)
def test_every_command_of_the_package_composes(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    inline = [shlex.split(command) for command in re.findall(r"`(sparsewav(?:-train)? [^`]*=[^`]*)`", text)]
    for words in [*_command_lines(text), *inline]:
        for name, overrides in _runs(words):
            OmegaConf.to_container(_compose(name, overrides), resolve=True, throw_on_missing=True)


def test_the_readme_has_commands() -> None:
    runs = [run for words in _command_lines(README.read_text(encoding="utf-8")) for run in _runs(words)]
    assert len(runs) >= 4


@pytest.mark.parametrize("document", CURRENT, ids=_name)
def test_every_item_and_benchmark_of_the_commands_exists(document: Path) -> None:
    for words in _command_lines(document.read_text(encoding="utf-8")):
        if words[:1] == ["./reproduce.sh"]:
            own = words[1 : words.index("--")] if "--" in words else words[1:]
            if "--output" in own:
                del own[own.index("--output") + 1]
            for word in own:
                assert word.startswith("-") or word in {*ITEMS, "demo", "paper", "all", "full"}, word
        for before, module in pairwise(words):
            if before == "-m" and module.startswith("experiments"):
                assert importlib.util.find_spec(module), module


@pytest.mark.parametrize("document", CURRENT, ids=_name)
def test_every_option_in_the_text_exists(document: Path) -> None:
    """Spans such as ``solver=alps`` and ``allocation.alpha`` name a file of a group, or a word in its files."""
    for span in re.findall(r"`([^`]+)`", _without_code(document.read_text(encoding="utf-8"))):
        for word in span.split():
            option = re.fullmatch(r"([a-z_]+)(?:\.([a-z_]+))?(?:=([\w./-]+))?", word)
            if option is None or not (conf_folder() / option[1]).is_dir() or option[2] in ("csv", "json", "png"):
                continue
            group, key, value = option.groups()
            files = {path.relative_to(conf_folder() / group): path for path in (conf_folder() / group).rglob("*.yaml")}
            if key:
                assert any(re.search(rf"\b{key}\b", path.read_text(encoding="utf-8")) for path in files.values()), span
            elif value:
                assert Path(f"{value}.yaml") in files, span


def test_the_map_names_every_module_and_no_other() -> None:
    text = (PACKAGE / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `([\w/]+\.py)` \|", text, flags=re.MULTILINE))
    modules = {path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}
    modules |= {PACKAGE / "__init__.py", PACKAGE / "baselines" / "__init__.py"}
    assert named == {path.relative_to(PACKAGE).as_posix() for path in modules}


def test_every_function_beside_an_equation_exists() -> None:
    text = (PACKAGE / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"\| `([\w/]+\.py)` \| `(\w+)` \|$", text, flags=re.MULTILINE)
    assert len(rows) >= 20
    for module, function in rows:
        code = (PACKAGE / module).read_text(encoding="utf-8")
        assert re.search(rf"^(def|class) {function}\b", code, flags=re.MULTILINE), f"{module}: {function}"
