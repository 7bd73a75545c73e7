"""The short forms of tests: which combinations of parameters they have."""

from __future__ import annotations

import itertools

import pytest
from tests import long


def rows(mark: pytest.MarkDecorator) -> list[tuple[object, ...]]:
    found: list[tuple[object, ...]] = mark.args[1]
    return found


@pytest.mark.parametrize("sizes", [(2, 3), (2, 2, 2), (12, 2, 3), (2, 3, 4), (3, 3, 3)])
def test_every_value_and_every_pair(sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = {f"p{number}": range(size) for number, size in enumerate(sizes)}
    product = set(itertools.product(*parameters.values()))
    monkeypatch.setattr(long, "LONG", False)
    values = rows(long.every_value(**parameters))
    assert len(values) == max(sizes)
    assert [set(column) for column in zip(*values, strict=True)] == [set(range(size)) for size in sizes]
    pairs = rows(long.every_pair(**parameters))
    assert set(pairs) <= product
    for one, other in itertools.combinations(range(len(sizes)), 2):
        assert {(row[one], row[other]) for row in pairs} == {(row[one], row[other]) for row in product}
    monkeypatch.setattr(long, "LONG", True)
    assert set(rows(long.every_value(**parameters))) == product
    assert set(rows(long.every_pair(**parameters))) == product


def test_pairs_are_fewer_than_combinations() -> None:
    assert len(long.pairs(list(itertools.product(range(2), repeat=3)))) == 4
    assert len(long.pairs(list(itertools.product(range(12), range(2), range(3))))) == 36
    assert len(long.pairs(list(itertools.product(range(3), repeat=3)))) <= 10


def test_values_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    for whole, expected in ((False, ()), (True, (1, 2))):
        monkeypatch.setattr(long, "LONG", whole)
        assert long.in_full(1, 2) == expected


def test_names_are_the_same_in_each_process() -> None:
    name = long.every_value(value=[rows]).kwargs["ids"]
    assert [name(value) for value in (rows, int, 3, "text")] == [None, None, "3", "text"]
