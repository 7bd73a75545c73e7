"""Show text from untrusted sources: names of devices, messages of servers, paths."""

from __future__ import annotations

import re
import reprlib
from typing import Final

MAX_SHOWN: Final = 80
"""Characters of a value that a message quotes."""


def printable(text: str, most: int | None = None) -> str:
    """Return text with U+FFFD in place of each control character, which could control a terminal.

    Args:
        text: any text.
        most: maximum number of characters; None: no limit.
    """
    text = text[:most]
    return (
        text
        if text.isprintable()
        else "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
    )


class _Short(reprlib.Repr):
    """Makes short texts of values, however long or deep the values are."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = MAX_SHOWN

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() <= 1024 else f"an integer of {x.bit_length()} bits"


_SHORT: Final = _Short()


def shown(value: object) -> str:
    """Return a value of JSON's types as a message quotes it: escaped, and at most :data:`MAX_SHOWN` characters."""
    text = _SHORT.repr(value)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"


def without_credentials(url: str) -> str:
    """Return a URL without its user, its password and its ``password=`` parameter; any other text is not changed.

    An ``@`` is part of a name in the path of a socket (``spice+unix://``), and in a context (``kubevirt://``).
    """
    scheme, mark, rest = url.partition("://")
    if not mark or scheme in ("spice+unix", "kubevirt"):
        return url
    head, mark, query = rest.partition("?")
    query, found = re.subn("(^|[&;])password=[^&]*", "", query, flags=re.IGNORECASE)
    if found:
        query = query.lstrip("&")
        mark = "?" if query else ""
    return f"{scheme}://{head.rpartition('@')[2]}{mark}{query}"
