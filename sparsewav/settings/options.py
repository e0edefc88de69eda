"""How an option is declared and checked.

An option is a field of one dataclass, with its default and one line of documentation. The same classes are what Hydra
registers, what Python takes and what the code reads; ``conf/README.md`` is generated from them.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from numbers import Integral, Real
from types import UnionType
from typing import Any, ClassVar, Self, get_args

MISSING: Any = "???"
"""A value that the user has to give."""


def option(
    default: Any,
    doc: str = "",
    *,
    identifies: bool = True,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    choices: Sequence[str] = (),
) -> Any:
    """Declare a field of a settings dataclass.

    Args:
        default: The default value; a list is copied for every instance, and a class is instantiated.
        doc: One line of documentation; empty where a subclass changes the default alone (:func:`metadata_of`).
        identifies: Whether the value can change a run's results, and so belongs to the name of the run's folder.
        least: The smallest value that is allowed.
        above: Every value has to be larger.
        most: The largest value that is allowed.
        below: Every value has to be smaller.
        choices: The names that are allowed.
    """
    bounds = {"least": least, "above": above, "most": most, "below": below, "choices": choices}
    metadata = {"doc": doc, "identifies": identifies, **bounds}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def metadata_of(schema: type, key: str) -> Mapping[str, Any]:
    """Give documentation and bounds of a field, from the nearest class that documents it."""
    for base in schema.__mro__:
        own = base.__dict__.get("__dataclass_fields__", {}).get(key)
        if own is not None and own.metadata.get("doc"):
            return own.metadata
    return {}


def doc_of(schema: type, key: str) -> str:
    """Give the documentation of a field."""
    return metadata_of(schema, key).get("doc", "")


def range_faults(settings: Any) -> Iterator[str]:
    """Give a sentence for every field of a dataclass that is out of its bounds; each begins with ``key=value``."""
    for item in fields(settings):
        value, bounds = getattr(settings, item.name), metadata_of(type(settings), item.name)
        if not bounds:
            continue
        if value == MISSING:  # of which group_faults tells
            continue
        fault = _type_fault(item.type, value)
        if fault:
            yield f"{item.name}={'null' if value is None else value} {fault}"
        if fault or value is None:
            continue
        if bounds["choices"] and value not in bounds["choices"]:
            yield f"{item.name}={value} does not exist; choose one of {', '.join(bounds['choices'])}"
        if bounds["above"] is not None and not value > bounds["above"]:
            yield f"{item.name}={value:g} must be above {bounds['above']:,.10g}"
        least, most = bounds["least"], bounds["most"]
        if least is not None and most is not None and not least <= value <= most:
            yield f"{item.name}={value:g} is not between {least:,.10g} and {most:,.10g}"
        elif least is not None and most is None and not value >= least:
            yield f"{item.name}={value:g} must be at least {least:,.10g}"
        if bounds["below"] is not None and not value < bounds["below"]:
            yield f"{item.name}={value:,.10g} must be below {bounds['below']:,.10g}"


def _type_fault(annotation: Any, value: Any) -> str | None:
    """Say what is wrong with a value of another type than its field has, or with a number that is not finite."""
    kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    if value is None:
        return None if annotation is Any or type(None) in kinds else "has no meaning; give a value"
    if float in kinds and (isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value)):
        return "is not a finite number"
    if int in kinds and float not in kinds and (isinstance(value, bool) or not isinstance(value, Integral)):
        return "is not a whole number"
    if str in kinds and not str(value).strip():
        return "is empty; give a value" + (", or null" if type(None) in kinds else "")
    return None


@dataclass
class Settings:
    """A group of options without a name."""

    def changed(self, **values: Any) -> Self:
        """Give a copy with other values; unlike :func:`dataclasses.replace` it keeps the name."""
        item = copy.copy(self)
        for key, value in values.items():
            setattr(item, key, value)
        return item

    def faults(self) -> Iterator[str]:
        """Give a sentence for every value that is out of range; each begins with ``key=value``."""
        yield from range_faults(self)


@dataclass
class Option(Settings):
    """What may be chosen in a group."""

    name: str = field(default=MISSING, init=False)
    presets: ClassVar[tuple[str, ...]] = ()
    """Names of options whose values differ from the class's defaults."""

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.name not in (type(self)().name, *self.presets):
            yield f"name={self.name} cannot be set; choose another option of the group instead"


def no_value(key: str) -> str:
    """Give the sentence on a key that the user has to give."""
    return f"{key} has no value; give it: {key}=..."


def group_faults(settings: Any) -> Iterator[str]:
    """Give the faults of a configuration and of all its groups, each beginning with ``key=`` or ``group.key=``."""
    yield from range_faults(settings)
    for item in fields(settings):
        value = getattr(settings, item.name)
        for inner in fields(value) if is_dataclass(value) else ():
            if getattr(value, inner.name) == MISSING:
                yield no_value(f"{item.name}.{inner.name}")
        if hasattr(value, "faults"):
            yield from (f"{item.name}.{fault}" for fault in value.faults())
