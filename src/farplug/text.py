"""Show text from untrusted sources: names of devices, messages of servers, paths."""

from __future__ import annotations


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
