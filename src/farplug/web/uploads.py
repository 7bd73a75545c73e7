"""Files that browsers upload: pieces that become a file when all of them are there.

Nothing of an upload is visible under its name before it is complete. An abandoned upload is removed.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol

from farplug.errors import FarplugError, Reason, Remedy, SetupError, UsageError, from_oserror
from farplug.text import shown

if sys.platform != "win32":
    import fcntl

SCHEME: Final = "upload:"
"""Begins the path of an uploaded file."""
DEFAULT_QUOTA: Final = 16 << 30
"""Bytes of all uploads."""
MAX_NAME: Final = 200
"""Bytes of the name of an upload."""
MAX_UPLOADS: Final = 8
"""Uploads that are not complete."""
ABANDONED: Final = 600.0
"""Seconds without a new piece after which an upload is removed."""
IDLE_TIMEOUT: Final = 60.0
"""Seconds in which the next bytes of a piece come."""
WRITE_AT_ONCE: Final = 1 << 20
"""Bytes that are written at a time."""

_RANGE: Final = re.compile(r"bytes (?:(\d{1,18})-(\d{1,18})|\*)/(\d{1,18})", re.ASCII)


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of a file: the header ``Content-Range`` (RFC 9110, section 14.4).

    Attributes:
        total: bytes of the file.
        first: where the piece begins; None: the request only asks how much is there.
        size: bytes of the piece.
    """

    total: int
    first: int | None = None
    size: int = 0

    @classmethod
    def parse(cls, content_range: str | None, content_length: str | None) -> Piece:
        """Return the piece that headers describe. Without ``Content-Range`` it is the whole file.

        Raises:
            UsageError: a header is missing, is not valid, or contradicts the other.
        """
        if content_length is None or not re.fullmatch(r"\d{1,18}", content_length, re.ASCII):
            raise UsageError("Content-Length is missing", reason=Reason.BAD_OPTION)
        length = int(content_length)
        if content_range is None:
            return cls(length, 0, length)
        match = _RANGE.fullmatch(content_range)
        if match is None:
            raise UsageError(f"Content-Range: {shown(content_range)} is not valid", reason=Reason.BAD_OPTION)
        total = int(match[3])
        if match[1] is None:
            if length:
                raise UsageError("a request with Content-Range: bytes */TOTAL has a body", reason=Reason.BAD_OPTION)
            return cls(total)
        first, last = int(match[1]), int(match[2])
        if not first <= last < total or last - first + 1 != length:
            raise UsageError(
                f"Content-Range: {shown(content_range)} does not fit a body of {length} bytes",
                reason=Reason.BAD_OPTION,
            )
        return cls(total, first, length)


class WrongOffset(UsageError):
    """A piece does not begin where the upload ends.

    Attributes:
        status: how much is there, as an answer has it.
    """

    def __init__(self, status: dict[str, Any]) -> None:
        super().__init__(f"the next piece begins at {status['received']}", reason=Reason.BAD_OPTION)
        self.status = status


@dataclass(slots=True)
class _Upload:
    total: int
    path: Path
    """Of the incomplete file."""
    file: BinaryIO
    used: float
    received: int = 0
    busy: bool = False
    hash: _Hash = field(default_factory=hashlib.sha256)

    def discard(self) -> None:
        """Remove the incomplete file."""
        self.file.close()
        with suppress(OSError):
            self.path.unlink()


_INCOMPLETE: Final = ".part"
_INCOMPLETE_NAME: Final = re.compile(rf"\.[0-9a-f]{{16}}{re.escape(_INCOMPLETE)}")


class Uploads:
    """The uploads of a page.

    Incomplete files that a killed process left in the folder are removed.

    Args:
        folder: where the files are kept; it is made with the first upload.
        quota: bytes of all uploads.
    """

    def __init__(self, folder: Path, quota: int = DEFAULT_QUOTA, clock: Callable[[], float] = time.monotonic) -> None:
        self.folder = folder
        self.quota = quota
        self._clock = clock
        self._open: dict[str, _Upload] = {}
        self._complete: dict[str, dict[str, Any]] = {}
        _remove_abandoned(folder)

    @property
    def used(self) -> int:
        """Return the bytes of all uploads; those that are not complete count whole."""
        found = 0
        try:
            with os.scandir(self.folder) as entries:
                for entry in entries:
                    if entry.name[0] != ".":
                        with suppress(FileNotFoundError):  # it was removed meanwhile
                            found += entry.stat(follow_symlinks=False).st_size
        except FileNotFoundError:
            pass  # there is no upload yet
        except OSError as error:
            raise from_oserror(self.folder, error, as_=SetupError, problem="cannot be used for uploads") from error
        return found + sum(upload.total for upload in self._open.values())

    def to_json(self) -> dict[str, int]:
        """Return the quota, and how much of it is used."""
        return {"quota": self.quota, "used": self.used}

    def existing(self, path: str) -> str:
        """Return the absolute path of an upload that is complete.

        Raises:
            UsageError: there is none.
        """
        name = check_name(path.removeprefix(SCHEME))
        whole = self.folder / name
        if not whole.is_file() or whole.is_symlink():
            raise UsageError(f"there is no upload {shown(name)}", reason=Reason.NOT_FOUND, remedy="upload it again")
        return str(whole)

    def remove(self, path: str) -> None:
        """Remove an upload. A VM that uses it keeps it until the device is unplugged.

        Raises:
            UsageError: there is none, or it cannot be removed.
        """
        whole = self.existing(path)
        try:
            os.unlink(whole)
        except OSError as error:
            raise from_oserror(path, error, as_=UsageError, problem="cannot be removed") from error
        self._complete.pop(Path(whole).name, None)

    async def put(self, name: str, piece: Piece, body: AsyncIterator[bytes]) -> dict[str, Any]:
        """Take a piece of a file; return how much is there: ``received``, ``complete``, ``sha256`` and ``path``.

        If the body ends early, what came of it is kept, and the upload can be continued there.

        Raises:
            WrongOffset: the piece does not begin where the upload ends.
            UsageError: ``bad-name``, ``exists``, ``too-large`` (the quota), ``no-space``, ``empty``; ``in-use``:
                another request writes to it; or the file cannot be written.
            SetupError: ``busy``: too many uploads are not complete.
            TimeoutError: no bytes came for :data:`IDLE_TIMEOUT` seconds.
        """
        check_name(name)
        self.sweep()
        done = self._complete.get(name)
        if done is not None and piece.first is None and done["received"] == piece.total:
            return done
        if piece.first is None:
            upload = self._open.get(name)
            return self._status(name, upload if upload is not None and upload.total == piece.total else None)
        upload = self._begin(name, piece)
        if upload.busy:
            raise UsageError(f"{shown(name)} is being uploaded already", reason=Reason.IN_USE)
        if piece.first != upload.received:
            raise WrongOffset(self._status(name, upload))
        upload.busy = True
        try:
            with _discarding(lambda: self._discard(name)):
                await self._receive(upload, piece, body)
                if upload.received == upload.total:
                    await asyncio.to_thread(self._finish, name, upload)
                    del self._open[name]
                    self._complete[name] = self._status(name, upload, complete=True)
                    return self._complete[name]
        finally:
            upload.busy = False
            upload.used = self._clock()
        return self._status(name, upload)

    def sweep(self) -> None:
        """Remove abandoned uploads."""
        now = self._clock()
        for name, upload in list(self._open.items()):
            if not upload.busy and now - upload.used > ABANDONED:
                self._discard(name)

    def close(self) -> None:
        """Remove what is not complete."""
        for name in list(self._open):
            self._discard(name)

    def _discard(self, name: str) -> None:
        upload = self._open.pop(name, None)
        if upload is not None:
            upload.discard()

    def _begin(self, name: str, piece: Piece) -> _Upload:
        """Return the upload that a piece belongs to, or a new one."""
        upload = self._open.get(name)
        if upload is not None and upload.total == piece.total and (piece.first or upload.busy):
            return upload
        if upload is not None and upload.busy:
            raise UsageError(f"{shown(name)} is being uploaded already", reason=Reason.IN_USE)
        if piece.first:
            raise WrongOffset(self._status(name, None))
        self._discard(name)  # it begins again
        if not piece.total:
            raise UsageError(f"{shown(name)} is empty", reason=Reason.EMPTY)
        if len(self._open) >= MAX_UPLOADS:
            raise SetupError(
                f"{MAX_UPLOADS} uploads are not complete", reason=Reason.BUSY, remedy="wait until one of them is done"
            )
        if os.path.lexists(self.folder / name):
            raise UsageError(
                f"there is an upload {shown(name)} already",
                reason=Reason.EXISTS,
                remedy="plug in that one, remove it, or rename the file",
            )
        used = self.used
        if used + piece.total > self.quota:
            raise UsageError(
                f"{shown(name)} has {piece.total} bytes, and {max(0, self.quota - used)} of {self.quota} bytes for "
                "uploads are left",
                reason=Reason.TOO_LARGE,
                remedy=Remedy(
                    "plug it in from the browser without an upload, remove other uploads, or raise the limit",
                    setting="upload_quota",
                ),
            )
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if shutil.disk_usage(self.folder).free < piece.total:
                raise UsageError(f"there is no space for {piece.total} bytes", reason=Reason.NO_SPACE)
            path = self.folder / f".{secrets.token_hex(8)}{_INCOMPLETE}"
            file = open(path, "xb", buffering=0, opener=_private)  # noqa: SIM115  (open until the upload is complete)
            if sys.platform != "win32":
                fcntl.flock(file, fcntl.LOCK_EX)  # _remove_abandoned of another process leaves it alone
        except OSError as error:
            raise from_oserror(name, error, as_=UsageError, problem="cannot be written") from error
        upload = self._open[name] = _Upload(piece.total, path, file, self._clock())
        self._complete.pop(name, None)
        return upload

    async def _receive(self, upload: _Upload, piece: Piece, body: AsyncIterator[bytes]) -> None:
        """Write the body of a piece, also what came of it before an error."""
        left = piece.size
        buffer = bytearray()

        async def write() -> None:
            data = bytes(buffer)
            buffer.clear()
            await asyncio.to_thread(_write, upload, data)

        try:
            while left:
                async with asyncio.timeout(IDLE_TIMEOUT):
                    chunk = await anext(body, b"")
                if not chunk:
                    break
                chunk = chunk[:left]  # the server passes no more than Content-Length
                left -= len(chunk)
                buffer += chunk
                if len(buffer) >= WRITE_AT_ONCE:
                    await write()
        finally:
            if buffer:
                await asyncio.shield(write())

    def _finish(self, name: str, upload: _Upload) -> None:
        """Give a complete file its name, unless a file has it."""
        try:
            os.fsync(upload.file.fileno())
            upload.file.close()
            try:
                os.link(upload.path, self.folder / name)
            except FileExistsError:
                raise
            except OSError:  # the file system has no hard links
                if os.path.lexists(self.folder / name):
                    raise FileExistsError(f"{name} exists") from None
                upload.path.rename(self.folder / name)
            else:
                upload.path.unlink()
        except OSError as error:
            raise from_oserror(name, error, as_=UsageError, problem="cannot be written") from error

    def _status(self, name: str, upload: _Upload | None, *, complete: bool = False) -> dict[str, Any]:
        return {
            "received": 0 if upload is None else upload.received,
            "complete": complete,
            "sha256": upload.hash.hexdigest() if complete and upload is not None else None,
            "path": f"{SCHEME}{name}",
        }


def check_name(name: str) -> str:
    """Return the name of an upload.

    Raises:
        UsageError: ``bad-name``: it is not the name of one visible file.
    """
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        size = 0
    if not 0 < size <= MAX_NAME or name.startswith(".") or not name.isprintable() or set("/\\") & set(name):
        raise UsageError(
            f"{shown(name)} cannot be the name of an upload",
            reason=Reason.BAD_NAME,
            remedy=f"use a name of at most {MAX_NAME} bytes without slashes, not a dot first",
        )
    return name


def _remove_abandoned(folder: Path) -> None:
    """Remove the incomplete files of processes that have ended: those that no process has locked."""
    if sys.platform == "win32":
        return
    for path in folder.glob(f".*{_INCOMPLETE}"):
        if not _INCOMPLETE_NAME.fullmatch(path.name):
            continue
        with suppress(OSError):  # it is complete meanwhile, locked, or not ours
            file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(file)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _write(upload: _Upload, data: bytes) -> None:
    """Write data at the end of an upload."""
    view = memoryview(data)
    try:
        while view:
            view = view[upload.file.write(view) :]
    except OSError as error:
        raise from_oserror("the upload", error, as_=UsageError, problem="cannot be written") from error
    upload.hash.update(data)
    upload.received += len(data)


@contextmanager
def _discarding(discard: Callable[[], None]) -> Iterator[None]:
    """Remove an upload whose file cannot be written."""
    try:
        yield
    except FarplugError:
        discard()
        raise


# A folder of this process -----------------------------------------------------------------------------------------


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Return a context manager with a private folder, which it removes at the end.

    What processes left there that were killed is removed, too.

    Raises:
        SetupError: it cannot be made.
    """
    _remove_stale(parent)
    try:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise from_oserror(parent, error, as_=SetupError, problem="cannot be written to") from error
    try:
        if sys.platform != "win32":
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


_PREFIX: Final = "page-"
_LOCK: Final = ".lock"


def _remove_stale(parent: Path) -> None:
    """Remove the folders of processes that have ended: whose lock is free."""
    if sys.platform == "win32":
        return
    for path in parent.glob(f"{_PREFIX}*"):
        try:
            lock = os.open(path / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:
            continue  # its process is making it
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(lock)
