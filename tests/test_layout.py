"""Where modules are, and which of them may import which."""

import ast
import inspect
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import sparsewav

PACKAGE = Path(sparsewav.__file__).parent

TOP = {"__init__", "__main__", "errors", "files", "progress", "cache"}
"""What every part of the package may need."""


def _name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def _is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).rpartition(".")[2] == "TYPE_CHECKING"


def _statements(body: list[ast.stmt], within_functions: bool) -> Iterator[ast.stmt]:
    """Statements that run when a module is imported, and on request those of its functions."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not within_functions:
            continue
        if _is_type_checking(node):
            assert isinstance(node, ast.If)
            yield from _statements(node.orelse, within_functions)
            continue
        yield node
        for _, value in ast.iter_fields(node):
            if isinstance(value, list):
                inner = [item for item in value if isinstance(item, ast.stmt)]
                inner += [
                    item for part in value if isinstance(part, ast.ExceptHandler | ast.match_case) for item in part.body
                ]
                yield from _statements(inner, within_functions)


def imports_of(module: str, *, within_functions: bool = False) -> set[str]:
    """The package's own modules that a module imports; where a package's name is imported, the package itself."""
    path = MODULES[module]
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in _statements(ast.parse(path.read_text(encoding="utf-8")).body, within_functions):
        if isinstance(node, ast.Import):
            found |= {item.name for item in node.names if item.name in MODULES}
        elif isinstance(node, ast.ImportFrom):
            parent = package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(part for part in (parent, node.module) if part)
            for item in node.names:
                name = f"{source}.{item.name}"
                found |= {name if name in MODULES else source} & set(MODULES)
    return found - {module}


def test_imports_are_seen() -> None:
    """Or the other tests of this file would hold of anything."""
    assert "sparsewav.settings.pruning" in imports_of("sparsewav.settings")
    assert "sparsewav.pruning.distributed" in imports_of("sparsewav.pruning.layerwise")
    assert "sparsewav.pipeline.run" not in imports_of("sparsewav.cli.app")
    assert "sparsewav.pipeline.run" in imports_of("sparsewav.cli.app", within_functions=True)
    assert "sparsewav.inference" not in imports_of("sparsewav", within_functions=True)


def test_no_module_imports_itself_through_others() -> None:
    try:
        TopologicalSorter({module: imports_of(module) for module in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other: {' -> '.join(reversed(error.args[1]))}")


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("sparsewav.pruning")])
def test_the_engine_knows_settings_and_errors_alone(module: str) -> None:
    """Not the data, the pipeline or the command line, in its functions neither."""
    parts = {name.split(".")[1] for name in imports_of(module, within_functions=True) - {"sparsewav"}}
    assert parts <= {"errors", "settings", "pruning"}
    assert "sparsewav" not in imports_of(module, within_functions=True)


def test_settings_import_nothing_heavy() -> None:
    """So that ``sparsewav --help`` does not wait for PyTorch."""
    for module in [name for name in MODULES if name.startswith("sparsewav.settings")]:
        assert {name.split(".")[1] for name in imports_of(module)} <= {"errors", "files", "settings"}, module


def test_the_public_names_are_listed_before_they_are_imported_and_known_to_editors() -> None:
    assert set(sparsewav._LATER) <= set(dir(sparsewav)) == set(sparsewav.__all__)
    for name in dir(sparsewav):
        assert name == "__version__" or inspect.getdoc(getattr(sparsewav, name)), name
    tree = ast.parse(MODULES["sparsewav"].read_text(encoding="utf-8"))
    (checked,) = (node for node in tree.body if _is_type_checking(node))
    imported = {
        alias.name: node.module
        for node in ast.walk(checked)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == sparsewav._LATER


def test_the_package_has_few_modules_at_its_top() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == TOP
