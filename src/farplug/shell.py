"""Quote words of commands that users copy from messages into a shell."""

from __future__ import annotations

import os
import shlex


def shell_word(path: str | os.PathLike[str]) -> str:
    """Return a path quoted as by :func:`shell_quote`.

    A relative path that could be read as an option or a URL gets the prefix ``./``.
    """
    text = os.fspath(path)
    if text.startswith("-") or ":" in text.partition("/")[0]:
        text = f"./{text}"
    return shell_quote(text)


def shell_quote(text: str) -> str:
    """Return text quoted for a shell, as one word on one line.

    Line ends, control characters and bytes that are not UTF-8 become escapes in ``$'...'`` (bash, zsh, ksh; in POSIX
    since 2024).
    """
    return shlex.quote(text) if text.isprintable() else f"$'{''.join(map(_escaped, text))}'"


def _escaped(character: str) -> str:
    if character in "'\\":
        return f"\\{character}"
    if character.isprintable():
        return character
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))
