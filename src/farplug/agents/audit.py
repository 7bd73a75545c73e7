"""A record of all that an agent did: a file with a JSON object a line."""

from __future__ import annotations

import json
import os
import stat
import sys
import time
from collections.abc import Mapping
from typing import Any, Final, Self

from farplug.descriptors import write_all
from farplug.errors import SetupError, from_oserror

MAX_TEXT: Final = 8192
"""Characters of a text in a record."""


class Audit:
    """Writes records. Each is complete in the file before the act that it announces begins.

    Args:
        path: of the file, which is made with mode 0600, or appended to; None: nothing is written.

    Raises:
        SetupError: the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self._path = path
        self._file = -1
        self._last = 0
        if path is not None:
            try:
                self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                if sys.platform != "win32" and stat.S_ISREG(os.fstat(self._file).st_mode):
                    os.fchmod(self._file, 0o600)  # what an agent types is in it
            except (OSError, ValueError) as error:
                raise from_oserror(path, error, as_=SetupError) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. A second call has no effect."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def begin(self, tool: str, arguments: Mapping[str, Any]) -> int:
        """Record that a tool was called; return the number of the call.

        Raises:
            SetupError: the record cannot be written: the tool must not be carried out.
        """
        self._last += 1
        self._write({"call": self._last, "event": "begin", "tool": tool, "arguments": _bounded(arguments)})
        return self._last

    def end(self, call: int, outcome: str, message: str = "") -> None:
        """Record how a call ended.

        Args:
            call: its number.
            outcome: ``done``, ``refused``, ``asked`` (the person is being asked) or ``interrupted``.
            message: of the error.

        Raises:
            SetupError: the record cannot be written.
        """
        self._write({"call": call, "event": "end", "outcome": outcome, "message": message[:MAX_TEXT]})

    def _write(self, record: dict[str, Any]) -> None:
        if self._file < 0:
            return
        line = json.dumps({"time": round(time.time(), 3), **record}, allow_nan=False).encode() + b"\n"
        try:
            write_all(self._file, line)
        except OSError as error:
            assert self._path is not None
            raise from_oserror(
                self._path,
                error,
                as_=SetupError,
                problem="cannot be written",
                remedy="nothing is done without a record: free some space, or start the server again",
            ) from error


def _bounded(value: Any, depth: int = 4) -> Any:
    """Return a value of JSON's types with bounded size."""
    if isinstance(value, str):
        return value[:MAX_TEXT]
    if value is None or isinstance(value, bool | int):
        return value if not isinstance(value, int) or abs(value) < 1 << 63 else str(value)[:80]
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else str(value)
    if depth and isinstance(value, Mapping):
        return {str(name)[:80]: _bounded(one, depth - 1) for name, one in list(value.items())[:32]}
    if depth and isinstance(value, list | tuple):
        return [_bounded(one, depth - 1) for one in value[:32]]
    return "…"
