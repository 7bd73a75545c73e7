"""Text that somebody else chose: names of devices, messages of servers, paths."""

from __future__ import annotations


def printable(text: str, most: int | None = None) -> str:
    """Return text without control characters, which could steer a terminal: U+FFFD stands for each.

    Args:
        text: any text.
        most: characters to keep; None: all.
    """
    text = text[:most]
    return (
        text
        if text.isprintable()
        else "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
    )
