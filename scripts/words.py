#!/usr/bin/env python3
"""Check names, comments, docstrings, messages and documents for words that are not plain technical English.

python scripts/words.py [PATH ...]

Prints each occurrence with a better word, and fails if there is one.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = (".py", ".md", ".toml", "Makefile", "setup")

WORDS = {
    "patience": "timeout",
    "mend|mends|mended|mending": "fix",
    "tell|tells|told|telling": "report, return, show; distinguish",
    "hear|hears|heard|hearing": "receive",
    "hunger|hungry": "out of memory",
    "nobody|somebody|whoever": "name the user, the program or the peer",
    "so many|so much": "n",
    "broken off|breaks off|break off|broke off": "interrupted",
    "under way": "in flight, running, pending",
    "(?:give|gives|gave|given|giving) (?:it |them )?back": "release",
    "(?:take|takes|took|taken|taking) (?:it |them )?back": "cancel",
    "all the same": "nevertheless",
    "(?:say|says|said) nothing": "has no effect, sends nothing",
    "for ever": "forever",
    "for want of": "because ... is missing",
    r"(?<!there.)(?:is|are|was|were) no(?! longer| more| less| sense|-)": "is not a",
    "made anew|chosen anew|begins anew": "again",
}
"""Expressions, and what to write instead. A space stands for any white space, a comment sign, or an underscore."""

FIRST_WORDS = (
    *("How", "Likewise", "Nobody", "Of", "Say", "Says", "Somebody", "Tell", "Tells", "What", "Where", "Whether"),
    *("Who", "Whom", "Why"),
)
"""Words that no docstring of a function begins with: it begins with a verb, such as Return, Raise or Make."""

EXEMPT = ("scripts/words.py", "tests/test_words.py", "LICENSE")

_SPACE = r"(?:_|\s+(?:#\s*)?)"
_RULES = [
    (re.compile(rf"(?<![A-Za-z])(?:{words.replace(' ', _SPACE)})(?![A-Za-z])", re.IGNORECASE), hint)
    for words, hint in WORDS.items()
]


def problems(text: str, *, python: bool = True) -> Iterator[tuple[int, str]]:
    """Yield the line number of each occurrence in a file, and a message."""
    for pattern, hint in _RULES:
        for match in pattern.finditer(text):
            found = " ".join(match[0].split())
            yield text.count("\n", 0, match.start()) + 1, f"{found!r}: {hint}"
    if python:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node) or ""
                first = docstring.split(maxsplit=1)[0].rstrip(".,:;") if docstring else ""
                if first in FIRST_WORDS:
                    yield node.lineno + 1, f"the docstring of {node.name} begins with {first!r}: begin with a verb"


def files(paths: Iterable[str]) -> list[str]:
    """Return the files in the index of git, below these paths."""
    output = subprocess.run(
        ["git", "ls-files", "-z", *paths], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [name for name in output.split("\0") if name.endswith(SUFFIXES) and name not in EXEMPT]


def main() -> int:
    """Check the files of this repository, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", metavar="PATH")
    options = parser.parse_args()
    found = False
    for name in files(options.paths):
        for line, message in sorted(problems((ROOT / name).read_text(), python=name.endswith(".py"))):
            print(f"{name}:{line}: {message}")
            found = True
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
