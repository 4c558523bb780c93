"""A setting that was given and cannot act is an error that names it and what makes it idle."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

Values = Mapping[str, Any]  # of settings, by their names


class Acts(NamedTuple):
    """Where some settings act; elsewhere nothing would read them."""

    names: str  # with blanks between them; one that ends in a point means all whose names begin so
    on: str  # what they act on
    where: Callable[[Values], object]
    told: str  # the setting that decides it


def by(names: str, on: str, setting: str, holds: Callable[[Any], object] = bool) -> Acts:
    """Settings that act where something holds of another one's value."""
    return Acts(names, on, lambda values: holds(values.get(setting)), setting)


def among(names: str, setting: str, *choices: str) -> Acts:
    """Settings that act where another one is one of some choices."""
    return by(names, f"{setting} {' and '.join(choices)}", setting, lambda value: value in choices)


def refuse(table: Iterable[Acts], given: Iterable[str], runs: Sequence[Values]) -> None:
    """Raises where a given setting acts in none of the runs, of which the first is told."""
    for name in given:
        for row in table:
            meant = any(name == one or (one.endswith(".") and name.startswith(one)) for one in row.names.split())
            if meant and not any(row.where(values) for values in runs):
                value = runs[0][row.told]
                raise ValueError(f"{name} acts on {row.on} alone, got {row.told} {repr(value) if isinstance(value, str) else value}")
