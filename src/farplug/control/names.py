"""Names of sessions: the folder with their sockets, how a session gets its name, and how a client finds sessions.

A session has a socket ``NAME.sock`` in the folder, and holds a lock of flock(2) on ``NAME.lock`` as long as it runs. So
the name is free again whatever ends the process. A socket is removed only under that lock, and only if no program
listens.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import re
import socket
import stat
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from farplug.control.client import Client
from farplug.control.messages import Hello
from farplug.errors import (
    FarplugError,
    Reason,
    Remedy,
    RemoteProtocolError,
    SetupError,
    TargetError,
    UsageError,
    from_oserror,
)
from farplug.text import shown, without_credentials

if sys.platform != "win32":
    import fcntl

log = logging.getLogger(__name__)

MAX_NAME: Final = 64
"""Characters of the name of a session."""
MAX_PATH: Final = 103 if sys.platform == "darwin" else 107
"""Bytes of the path of a UNIX socket: ``sun_path`` of unix(7), without the NUL."""
LIST_TIMEOUT: Final = 5.0
"""Seconds in which a session answers when sessions are listed."""
MAX_PARALLEL: Final = 32
"""Sessions that are asked at a time when sessions are listed."""
LOCK_ATTEMPTS: Final = 5
LOCK_INTERVAL: Final = 0.01
"""Attempts to get a name on which no program listens, and seconds between two of them.

A program that lists sessions holds the lock of such a name for a moment.
"""
MAX_NUMBER: Final = 1000
"""Suffix of a name that is taken, at most: ``web-1000``."""

_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}", re.ASCII)
_DEFAULT: Final = "session"


def check_name(name: str) -> str:
    """Return the name of a session.

    Raises:
        UsageError: ``bad-name``: it is not a valid name.
    """
    if _NAME.fullmatch(name):
        return name
    raise UsageError(
        f"{shown(name)} is not a valid name of a session",
        reason=Reason.BAD_NAME,
        remedy=f"use 1 to {MAX_NAME} of the characters A-Z a-z 0-9 . _ -, not a dot or a dash first",
    )


def default_name(vm: str, target: str) -> str:
    """Return the name of a session to which its user gave none: that of the VM, else ``host-port``.

    Args:
        vm: the name of the VM; empty: it is not known.
        target: where the VM is, as in :class:`~farplug.app.settings.TargetSettings`.
    """
    address = without_credentials(target).partition("?")[0]
    scheme, mark, rest = address.partition("://")
    if not mark:
        rest = scheme.removeprefix("unix:")
    if not mark or "unix" in scheme:
        rest = Path(rest).stem
    return _sanitised(vm) or _sanitised(rest) or _DEFAULT


def _sanitised(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text[: 4 * MAX_NAME]).lstrip(".-")[:MAX_NAME].rstrip("-.")


# The folder -------------------------------------------------------------------------------------------------------


def folder(environment: Mapping[str, str] | None = None, *, create: bool = False) -> Path:
    """Return the folder with the sockets of this user's sessions: ``$XDG_RUNTIME_DIR/farplug``.

    Without ``XDG_RUNTIME_DIR`` it is ``/run/farplug`` for root, else ``/tmp/farplug-UID`` (macOS: below ``TMPDIR``).

    Args:
        environment: the environment variables; None: those of this process.
        create: make the folder if it does not exist.

    Raises:
        SetupError: the folder belongs to another user, other users may write to it, or it cannot be made.
    """
    if sys.platform == "win32":
        raise SetupError(
            "sessions with a name need UNIX sockets, which Python does not have on Windows",
            reason=Reason.UNSUPPORTED_SYSTEM,
        )
    variables = os.environ if environment is None else environment
    runtime = variables.get("XDG_RUNTIME_DIR", "")
    if runtime:
        parent = Path(runtime)
        if not parent.is_absolute():
            raise SetupError(
                f"XDG_RUNTIME_DIR is {shown(runtime)}, which is not an absolute path",
                reason=Reason.NO_PERMISSION,
                remedy=_RUNTIME_REMEDY,
            )
        _check_folder(parent, "XDG_RUNTIME_DIR", _RUNTIME_REMEDY)
        path = parent / "farplug"
    elif os.geteuid() == 0:
        path = Path("/var/run/farplug" if sys.platform == "darwin" else "/run/farplug")
    else:
        temporary = variables.get("TMPDIR", "") if sys.platform == "darwin" else ""
        path = Path(temporary or "/tmp") / f"farplug-{os.geteuid()}"
    if create:
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            pass
        except OSError as error:
            raise from_oserror(path, error, as_=SetupError, problem="cannot be made") from error
    elif not os.path.lexists(path):
        return path
    _check_folder(path, str(path), f"remove {path}, or set XDG_RUNTIME_DIR to a folder of your own with mode 0700")
    return path


_RUNTIME_REMEDY: Final = "set XDG_RUNTIME_DIR to a folder of your own with mode 0700, or unset it"


def _check_folder(path: Path, what: str, remedy: str) -> None:
    """Raise an error unless a folder belongs to this user and no other user may write to it."""
    subject = str(path) if what == str(path) else f"{what}, {path},"
    try:
        found = os.lstat(path) if what == str(path) else os.stat(path)
    except OSError as error:
        raise from_oserror(path, error, as_=SetupError, problem="cannot be used", remedy=remedy) from error
    except ValueError as error:  # a NUL character
        raise from_oserror(path, error, as_=SetupError, remedy=remedy) from error
    if not stat.S_ISDIR(found.st_mode):
        raise SetupError(f"{subject} is not a folder", reason=Reason.NO_PERMISSION, remedy=remedy)
    if found.st_uid != os.geteuid():
        raise SetupError(
            f"{subject} belongs to the user {found.st_uid}, not to the user {os.geteuid()}",
            reason=Reason.NO_PERMISSION,
            remedy=remedy,
        )
    if found.st_mode & 0o022:
        raise SetupError(
            f"{subject} may be written to by other users (mode {stat.S_IMODE(found.st_mode):04o})",
            reason=Reason.NO_PERMISSION,
            remedy=Remedy(remedy, command=f"chmod go-w {path}") if what == str(path) else remedy,
        )


def socket_path(name: str, environment: Mapping[str, str] | None = None) -> Path:
    """Return the path of the socket of a session, which may not run.

    Raises:
        UsageError: the name is not valid.
        SetupError: the folder cannot be used, or its path is too long.
    """
    return _socket_path(folder(environment), check_name(name))


def _socket_path(where: Path, name: str) -> Path:
    path = where / f"{name}.sock"
    size = len(os.fsencode(path))
    if size > MAX_PATH:
        raise SetupError(
            f"the path of the socket {path} has {size} bytes, and a UNIX socket has at most {MAX_PATH}",
            reason=Reason.BAD_NAME,
            remedy="use a shorter name, or set XDG_RUNTIME_DIR to a folder with a shorter path",
        )
    return path


# The name of a session --------------------------------------------------------------------------------------------


class Reservation:
    """A name that this process has: no other session can get it until :meth:`release`, or until the process ends.

    Made by :func:`reserve`. It can be used with ``with``.

    Attributes:
        name: the name.
        path: of the socket, which does not exist yet.
    """

    def __init__(self, name: str, path: Path, lock: int) -> None:
        self.name = name
        self.path = path
        self._lock = lock

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Remove the socket, and let other sessions have the name. A second call has no effect."""
        if self._lock >= 0:
            lock, self._lock = self._lock, -1
            try:
                if _is_at(lock, _lock_path(self.path)):  # else they belong to another session
                    self.path.unlink(missing_ok=True)
                    _lock_path(self.path).unlink(missing_ok=True)
            except OSError as error:  # what remains is stale: the next session with this name removes it
                log.warning("%s cannot be removed: %s", self.path, error)
            finally:
                os.close(lock)


def reserve(name: str | None, default: str = _DEFAULT, environment: Mapping[str, str] | None = None) -> Reservation:
    """Return a name for a session of this process.

    Args:
        name: that a user chose; None: ``default``, or with a number (``web-2``) if it is taken.
        default: the name if a user chose none: :func:`default_name`.
        environment: the environment variables; None: those of this process.

    Raises:
        UsageError: ``bad-name``, or ``name-taken``: a session with this name runs.
        SetupError: the folder cannot be used, or its path is too long.
    """
    if name is not None:
        check_name(name)
        where = folder(environment, create=True)
        reservation = _try_reserve(where, name)
        if reservation is None:
            raise UsageError(
                f"the name {name} is taken: a session with it runs",
                reason=Reason.NAME_TAKEN,
                remedy="choose another name, or stop that session",
            )
        return reservation
    where = folder(environment, create=True)
    room = MAX_PATH - len(os.fsencode(where)) - len("/.sock")
    for number in range(1, MAX_NUMBER + 1):
        suffix = f"-{number}" if number > 1 else ""
        stem = check_name(default)[: max(1, min(MAX_NAME, room) - len(suffix))]
        reservation = _try_reserve(where, stem + suffix)
        if reservation is not None:
            return reservation
    raise UsageError(
        f"the names {default} to {default}-{MAX_NUMBER} are taken",
        reason=Reason.NAME_TAKEN,
        remedy="choose another name",
    )


def _try_reserve(where: Path, name: str, attempts: int = LOCK_ATTEMPTS) -> Reservation | None:
    """Return the reservation of a name; None: another session has the name."""
    path = _socket_path(where, name)
    try:
        while (lock := _lock(_lock_path(path))) is None:
            attempts -= 1
            if not attempts or _listens(path):
                return None
            time.sleep(LOCK_INTERVAL)
        try:
            free = _remove_stale(path)
        except BaseException:
            os.close(lock)
            raise
    except OSError as error:
        raise from_oserror(path, error, as_=SetupError, problem="cannot be used") from error
    if free:
        return Reservation(name, path, lock)
    os.close(lock)
    return None


def _lock_path(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".sock") + ".lock")


def _lock(path: Path) -> int | None:
    """Return the descriptor of a locked file, which is made if it is missing; None: another process has the lock."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its owner removed the file before it released the lock: there is a new one, or none


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether the file that a descriptor has open is the one at a path."""
    try:
        opened, found = os.fstat(descriptor), path.lstat()
    except FileNotFoundError:
        return False
    return (opened.st_dev, opened.st_ino) == (found.st_dev, found.st_ino)


def _remove_stale(path: Path) -> bool:
    """Remove a socket on which no program listens; return whether the path is free. The caller has the lock.

    Raises:
        OSError: the path is not that of a socket, or cannot be removed.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return True
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(errno.EEXIST, "it exists and is not a socket")
    if _listens(path):
        return False
    path.unlink(missing_ok=True)
    return True


def _listens(path: Path) -> bool:
    """Return whether a program listens on a socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except BlockingIOError:
            return True  # it has not accepted earlier clients yet
        return True


# Finding sessions -------------------------------------------------------------------------------------------------


class SessionState(StrEnum):
    """What a socket in the folder stands for."""

    RUNNING = "running"
    NOT_RESPONDING = "not responding"
    """A program has the name, and did not answer in time, or as a session does."""
    GONE = "gone"
    """The session ended without removing its socket, as with kill -9. The name is free."""


@dataclass(frozen=True, slots=True)
class SessionEntry:
    """A session, as :func:`list_sessions` found it.

    Attributes:
        name: of the session.
        path: of its socket.
        state: whether it runs.
        hello: what it is; None: it is not running.
        snapshot: the result of ``status``; None: it is not running.
        error: why there is no answer; None: the session is running.
    """

    name: str
    path: Path
    state: SessionState
    hello: Hello | None = None
    snapshot: Mapping[str, Any] | None = None
    error: FarplugError | None = None


async def list_sessions(environment: Mapping[str, str] | None = None) -> list[SessionEntry]:
    """Return all sessions of this user, sorted by name. What sessions left that are gone is removed.

    All are asked in parallel; each has :data:`LIST_TIMEOUT` to answer.

    Raises:
        SetupError: the folder cannot be used.
    """
    where = folder(environment)
    names = sorted(path.name.removesuffix(".sock") for path in where.glob("*.sock"))
    limit = asyncio.Semaphore(MAX_PARALLEL)

    async def ask(name: str) -> SessionEntry:
        async with limit:
            return await _ask(where, name)

    return await asyncio.gather(*(ask(name) for name in names if _NAME.fullmatch(name)))


async def _ask(where: Path, name: str) -> SessionEntry:
    path = where / f"{name}.sock"
    try:
        async with asyncio.timeout(LIST_TIMEOUT), Client.connect(path) as client:
            snapshot = await client.call("status")
            if not isinstance(snapshot, dict):
                raise RemoteProtocolError(f"{shown(snapshot)} is not a status")
            return SessionEntry(name, path, SessionState.RUNNING, client.hello, snapshot)
    except TimeoutError:
        silent = TargetError(f"the session {name} does not answer", reason=Reason.TIMED_OUT)
        return SessionEntry(name, path, SessionState.NOT_RESPONDING, error=silent)
    except FarplugError as error:
        if error.reason is Reason.NO_SESSION:
            with suppress(SetupError):
                stale = _try_reserve(where, name, attempts=1)
                if stale is not None:
                    stale.release()
                    return SessionEntry(name, path, SessionState.GONE, error=error)
        return SessionEntry(name, path, SessionState.NOT_RESPONDING, error=error)


@asynccontextmanager
async def open_session(name: str | None = None, environment: Mapping[str, str] | None = None) -> AsyncIterator[Client]:
    """Return a context manager that connects to a session by its name, or to the only one that runs.

    Raises:
        UsageError: ``no-session``: it does not run, or none does; ``ambiguous``: several run; ``bad-name``.
        SetupError: the folder cannot be used.
        FarplugError: see :meth:`~farplug.control.client.Client.connect`.
    """
    if name is None:
        name = await _only_session(environment)
    async with Client.connect(socket_path(name, environment)) as client:
        yield client


async def _only_session(environment: Mapping[str, str] | None) -> str:
    running = [entry.name for entry in await list_sessions(environment) if entry.state is not SessionState.GONE]
    if len(running) == 1:
        return running[0]
    if not running:
        raise UsageError("no session is running", reason=Reason.NO_SESSION, remedy="start one first")
    raise UsageError(
        f"{len(running)} sessions are running",
        reason=Reason.AMBIGUOUS,
        remedy=f"name one of them: {', '.join(running)}",
    )
