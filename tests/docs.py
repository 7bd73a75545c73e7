"""The documentation, as tests read it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")))

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Snippet:
    """A fenced block of a page."""

    page: Path
    language: str
    text: str


def snippets(page: Path) -> Iterator[Snippet]:
    """Yield the fenced blocks of a page, in order."""
    for language, text in _FENCE.findall(page.read_text()):
        yield Snippet(page, language, text)


def write_project(page: Path, folder: Path) -> list[str]:
    """Write the blocks of a page that begin with ``# NAME`` as files; return the names."""
    names = []
    for snippet in snippets(page):
        first, _, rest = snippet.text.partition("\n")
        if re.fullmatch(r"# [\w.]+\.(py|toml)", first):
            names.append(first.removeprefix("# "))
            (folder / names[-1]).write_text(rest)
    return names
