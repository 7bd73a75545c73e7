"""The log of a session in the background: a text stream on a file of bounded size."""

from __future__ import annotations

import io
import os
import threading
from pathlib import Path
from typing import Final

from farplug.descriptors import write_all
from farplug.errors import SetupError, from_oserror

LIMIT: Final = 4 << 20
"""Bytes of a log file; what comes then goes to a new one, and the one before is kept as ``NAME.log.1``."""
HELD: Final = 1 << 20
"""Bytes that are held until the file is opened; of more the oldest are dropped."""


def log_path(name: str) -> Path:
    """Return the path of the log of the session with this name.

    It is below ``$XDG_STATE_HOME``, or ``~/.local/state`` if that is not set to an absolute path.
    """
    state = os.environ.get("XDG_STATE_HOME", "")
    root = Path(state) if os.path.isabs(state) else Path.home() / ".local/state"
    return root / "farplug" / f"{name}.log"


class LogFile(io.TextIOBase):
    """Writes text to a file of at most :data:`LIMIT` bytes, and keeps the file before.

    What is written before :meth:`open` is held. Threads may write.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held = b""
        self._path: Path | None = None
        self._file = -1
        self._copies: list[int] = []
        """Other descriptors that are the file."""

    def open(self, path: Path) -> None:
        """Write to this file from now on, first what was held. Text is appended to a file that exists.

        Raises:
            SetupError: the file cannot be written.
        """
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._lock:
                self._open(path)
                held, self._held = self._held, b""
                self._append(held)
        except OSError as error:
            raise from_oserror(path, error, as_=SetupError, problem="cannot be written") from error

    def _open(self, path: Path) -> None:
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _NO_FOLLOW, 0o600)
        if self._file < 0:
            self._file = os.dup(file)
        for copy in (self._file, *self._copies):
            os.dup2(file, copy, inheritable=copy != self._file)
        os.close(file)
        self._path = path

    def _append(self, data: bytes) -> None:
        size = os.fstat(self._file).st_size
        if self._path is not None and size and size + len(data) > LIMIT:
            os.replace(self._path, f"{self._path}.1")
            self._open(self._path)
        write_all(self._file, data)

    def take_over(self, *descriptors: int) -> None:
        """Make descriptors of the process, such as that of standard error, the file that is open."""
        with self._lock:
            self._copies += descriptors
            for copy in descriptors:
                os.dup2(self._file, copy)

    def write(self, text: str) -> int:
        """Write text; raise ``OSError`` if the file cannot take it."""
        data = text.encode(errors="backslashreplace")
        with self._lock:
            if self._path is None:
                self._held = (self._held + data)[-HELD:]
            else:
                self._append(data)
        return len(text)

    def fileno(self) -> int:
        """Return the descriptor of the file; it stays the same when a new file is begun."""
        if self._file < 0:
            raise io.UnsupportedOperation("the log has no file yet")
        return self._file

    def writable(self) -> bool:
        return True


_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
