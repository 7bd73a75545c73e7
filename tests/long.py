"""What ``make test`` does in a short form, and ``make stress`` in full."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from typing import TypeVar

import pytest

T = TypeVar("T")

LONG = os.environ.get("FARPLUG_LONG") == "1"
"""Whether the tests run in full: all combinations of parameters, longer texts, files and pauses, more rounds.

``make stress`` runs every file that imports from this module.
"""
ATTACH_ROUNDS = 50 if LONG else 10
"""Rounds of attach and detach in which nothing leaks."""

Row = tuple[object, ...]
"""A value of each parameter."""


def every_value(**parameters: Iterable[object]) -> pytest.MarkDecorator:
    """Parametrize a test by the fewest combinations that have every value of each parameter; in full, by all of them.

    Args:
        parameters: the values of each parameter, by its name.
    """
    columns = [tuple(values) for values in parameters.values()]
    rows = [tuple(values[place % len(values)] for values in columns) for place in range(max(map(len, columns)))]
    return _parametrize(parameters, list(itertools.product(*columns)) if LONG else rows)


def every_pair(**parameters: Iterable[object]) -> pytest.MarkDecorator:
    """Parametrize a test by combinations that have every pair of values of two parameters; in full, by all of them.

    Args:
        parameters: the values of each of two or more parameters, by its name.
    """
    product = list(itertools.product(*parameters.values()))
    return _parametrize(parameters, product if LONG else pairs(product))


def in_full(*values: T) -> tuple[T, ...]:
    """Return these values in full, and none otherwise: those of a parameter whose work another test does, too."""
    return values if LONG else ()


def _parametrize(names: Iterable[str], rows: Sequence[Row]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(tuple(names), rows, ids=_name)


def _name(value: object) -> str | None:
    """Return the name of a value in that of a test, or None if pytest names it: as text, a function has its address."""
    return None if callable(value) else str(value)


def pairs(product: Sequence[Row]) -> list[Row]:
    """Return rows that have every pair of values of two columns, each time the one with the most new pairs."""
    pairs_of = {row: set(itertools.combinations(enumerate(row), 2)) for row in product}
    missing = set().union(*pairs_of.values())
    rows = []
    while missing:
        rows.append(max(product, key=lambda row: len(pairs_of[row] & missing)))
        missing -= pairs_of[rows[-1]]
    return rows
