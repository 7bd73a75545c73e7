"""The check of words (``scripts/words.py``)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "words.py"
_spec = importlib.util.spec_from_file_location("words", SCRIPT)
assert _spec is not None
assert _spec.loader is not None
words = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(words)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("OPEN_PATIENCE = 3", 1),
        ("x = 1\n# as it was told\n", 2),
        ("def test_what_is_told(): ...", 1),
        ("# the commit was broken\n#   off", 1),
        ("def f(under_way): ...", 1),
        ('raise E("X is no target")', 1),
        ("# takes it back", 1),
        ('def f():\n    """Whether it runs."""', 2),
        ('class A:\n    async def f(self):\n        """Tell why."""', 3),
    ],
)
def test_words_that_are_found(text: str, line: int) -> None:
    assert {number for number, _ in words.problems(text)} == {line}


@pytest.mark.parametrize(
    "text",
    [
        "# there is no port",
        "# a port that is no longer open",
        "# recommended",
        "# the amendment",
        '"""What a module does."""',
        'def f():\n    """Return whether it runs."""',
        "async def f(): ...",
    ],
)
def test_words_that_are_not_found(text: str) -> None:
    assert list(words.problems(text)) == []


def test_text_that_is_not_python() -> None:
    assert [line for line, _ in words.problems("X is no\ntarget {", python=False)] == [1]
