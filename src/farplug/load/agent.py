"""The load agent: a process that runs sessions for a Locust process, and measures them by its own clock.

It serves one client over a socket that it inherits, with the messages of the control protocol
(:mod:`farplug.control.messages`). It ends, with all sessions, when the client closes the socket or ends.

============ ==================================== =======================================================
method       parameters                           result
============ ==================================== =======================================================
``connect``  ``session``: a new number,           ``seconds``, and of these ``link`` and ``hello``
             ``target``, ``vv``: the contents of
             a ``.vv`` file, or null
``attach``   ``session``, ``size`` of the disk    ``seconds``
``read``     ``session``, ``size``                ``seconds`` that the VM needed
``write``    ``session``, ``size``                ``seconds`` that the VM needed
``detach``   ``session``                          ``seconds``
``close``    ``session``                          ``seconds``; interrupts a call for the session
``figures``                                       see :meth:`LoadAgent.figures`
============ ==================================== =======================================================

Calls that wait for the VM also have ``timeout``, in seconds.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from farplug.app.attachment import Attachment
from farplug.app.guest import Guest
from farplug.app.guest_port import PortState
from farplug.app.settings import GuestSettings, TargetSettings
from farplug.control.messages import (
    MAX_CLIENT_PAYLOAD,
    ErrorData,
    Failure,
    Receiver,
    Reply,
    Request,
    encode,
    parse_request,
)
from farplug.errors import (
    FarplugError,
    GuestGoneError,
    InternalError,
    Reason,
    Remedy,
    SetupError,
    StateError,
    TargetError,
    UsageError,
)
from farplug.load.disk import LoadStore, Meter
from farplug.virtual.device import VirtualDevice
from farplug.virtual.disk import disk_device

T = TypeVar("T")

log = logging.getLogger(__name__)

SPARE_FILES = 16
"""Open files that are left for other things than sessions: a session is refused before the limit of the process."""
TICK = 0.05
"""Seconds between two measurements of the delay of the event loop."""
END_TIMEOUT = 10.0
"""Seconds in which all sessions are closed when the client is gone."""


def raise_file_limit() -> int | None:
    """Allow this process as many open files as the system permits; return the number, or None if it is unknown."""
    if sys.platform == "win32":
        return None
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError):  # macOS permits fewer than the hard limit
        return soft
    return hard


def peak_memory() -> int:
    """Return the bytes that this process has occupied at most; 0 if it is unknown."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


class _Session:
    """A guest, and the disk that is plugged into it."""

    def __init__(self, settings: TargetSettings) -> None:
        self.calls: set[asyncio.Future[Any]] = set()
        self._guest = Guest(GuestSettings(settings))
        self._disk: tuple[LoadStore, VirtualDevice] | None = None
        self._attachment: Attachment | None = None

    async def connect(self) -> dict[str, float]:
        """Connect, and wait until all ports are ready. Return how long both took, in seconds."""
        begun = time.perf_counter()
        await self._guest.connect()
        linked = time.perf_counter()
        await self._unless_gone(self._all_ready())
        over = time.perf_counter()
        return {"seconds": over - begun, "link": linked - begun, "hello": over - linked}

    async def _all_ready(self) -> None:
        changed = asyncio.Event()
        unsubscribe = self._guest.stream.subscribe(lambda event: changed.set())
        try:
            while not all(port.state is PortState.READY for port in self._guest.ports):
                for port in self._guest.ports:
                    if port.error is not None:
                        raise port.error
                changed.clear()
                await changed.wait()
        finally:
            unsubscribe()
        if not self._guest.ports:
            self._guest.check_room(1)

    async def attach(self, size: int) -> None:
        """Plug a disk in, and wait until the VM has configured it."""
        if self._attachment is not None:
            raise StateError("the session has a disk already")
        try:
            store = LoadStore(size, time.perf_counter)
        except ValueError as error:
            raise UsageError(str(error), reason=Reason.BAD_SETTING) from error
        device = disk_device(store)
        self._disk = store, device
        try:
            self._attachment = await self._guest.plug(device)
            await self._attachment.configured()
        except BaseException:
            await self._take_out()
            raise

    async def moved(self, direction: str, size: int) -> float:
        """Wait until the VM has moved ``size`` bytes in a direction, ``read`` or ``write``; return the seconds."""
        if self._disk is None or self._attachment is None:
            raise StateError("the session has no disk: attach it first")
        store = self._disk[0]
        meter = store.reads if direction == "read" else store.writes
        return await self._unless_gone(_measured(meter, size), self._attachment)

    async def detach(self) -> None:
        """Take the disk out."""
        if self._attachment is None:
            raise StateError("the session has no disk: attach it first")
        await self._take_out()

    async def _take_out(self) -> None:
        attachment, self._attachment = self._attachment, None
        disk, self._disk = self._disk, None
        try:
            if attachment is not None:
                await self._guest.unplug(attachment)
        finally:
            if disk is not None:
                await disk[1].dispose()
                await disk[0].close()

    async def close(self) -> None:
        """End the session."""
        await self._guest.close()
        await self._take_out()

    async def _unless_gone(self, awaitable: Awaitable[T], attachment: Attachment | None = None) -> T:
        """Wait for something; raise why the VM, or an attachment, has gone meanwhile."""
        wanted = asyncio.ensure_future(awaitable)
        gone = asyncio.ensure_future(self._guest.closed() if attachment is None else attachment.ended())
        try:
            await asyncio.wait((wanted, gone), return_when=asyncio.FIRST_COMPLETED)
            if not wanted.done():
                raise gone.result() or GuestGoneError("the disk has left the VM")
            return wanted.result()
        finally:
            wanted.cancel()
            gone.cancel()


async def _measured(meter: Meter, size: int) -> float:
    changed = asyncio.Event()
    meter.changed = changed.set
    while (seconds := meter.take(size)) is None:
        changed.clear()
        await changed.wait()
    return seconds


class LoadAgent:
    """Runs the sessions of one client.

    Args:
        folder: a private folder, for ``.vv`` files.
        limit: open files of this process; None: unknown.
    """

    def __init__(self, folder: Path, limit: int | None) -> None:
        self._folder = folder
        self._limit = limit
        self._sessions: dict[int, _Session] = {}
        self._vv_names = (str(folder / f"{number}.vv") for number in itertools.count())
        self._total = self._most = 0
        self._memory = peak_memory()
        self._cpu = time.process_time()
        self._delay = 0.0
        self._due = 0.0

    def figures(self) -> dict[str, float | int]:
        """Return what the agent has done, and what it needs.

        Returns:
            ``sessions`` now, ``most`` at once, ``total``; ``cpu``: seconds of processor time, without the start;
            ``memory``: bytes at the start, ``peak_memory``: bytes at most; ``delay``: seconds by which the event loop
            was late at most, since the last call.
        """
        delay, self._delay = self._delay, 0.0
        return {
            "sessions": len(self._sessions),
            "most": self._most,
            "total": self._total,
            "cpu": time.process_time() - self._cpu,
            "memory": self._memory,
            "peak_memory": peak_memory(),
            "delay": delay,
        }

    def tick(self) -> None:
        """Measure the delay of the event loop, from now on."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        if self._due:
            self._delay = max(self._delay, now - self._due)
        self._due = now + TICK
        loop.call_at(self._due, self.tick)

    async def execute(self, method: str, params: Mapping[str, Any]) -> dict[str, Any]:
        """Execute a call; return its result.

        Raises:
            FarplugError: it failed.
        """
        if method == "figures":
            return self.figures()
        number = params.get("session")
        if type(number) is not int:
            raise UsageError("session is not a number", reason=Reason.BAD_SETTING)
        if method == "connect":
            return await self._connect(number, params)
        session = self._sessions.get(number)
        if session is None:
            raise UsageError(f"session {number} is not open", reason=Reason.NO_SESSION)
        begun = time.perf_counter()
        match method:
            case "attach":
                what = "the VM has not configured the disk"
                await _in_time(session, session.attach(_size(params)), params, what)
            case "read" | "write":
                what = f"the VM has not {'read' if method == 'read' else 'written'} {_size(params)} bytes"
                remedy = "a program in the VM must read and write the disk, in commands of 32 KiB or more"
                moved = session.moved(method, _size(params))
                return {"seconds": await _in_time(session, moved, params, what, remedy)}
            case "detach":
                await _in_time(session, session.detach(), params, "the disk was not detached")
            case "close":
                del self._sessions[number]
                for call in session.calls:
                    call.cancel()
                await session.close()
            case _:
                raise UsageError(f"{method} is not a method", reason=Reason.UNKNOWN_COMMAND)
        return {"seconds": time.perf_counter() - begun}

    async def _connect(self, number: int, params: Mapping[str, Any]) -> dict[str, Any]:
        if number in self._sessions:
            raise StateError(f"session {number} is open already")
        self._check_files()
        path = ""
        if (vv := params.get("vv")) is not None:
            path = next(self._vv_names)
            _write_private(path, str(vv))
        try:
            session = _Session(TargetSettings(path or str(params.get("target"))))
            self._sessions[number] = session
            self._total += 1
            self._most = max(self._most, len(self._sessions))
            what = "a port of the VM sent no hello"
            try:
                return await _in_time(session, session.connect(), params, what, "check that the VM is not paused")
            except BaseException:
                if self._sessions.pop(number, None) is not None:
                    await session.close()
                raise
        finally:
            if path:
                with suppress(FileNotFoundError):  # the file may have asked for its end
                    os.unlink(path)

    def _check_files(self) -> None:
        """Refuse a session for which too few files can be opened.

        Raises:
            SetupError: the limit is nearly reached.
        """
        try:
            free = os.open(os.devnull, os.O_RDONLY)  # the lowest number that is free
            os.close(free)
        except OSError:
            free = sys.maxsize
        if self._limit is not None and free > self._limit - SPARE_FILES:
            raise SetupError(
                f"the load agent has {len(self._sessions)} sessions, and may open {self._limit} files: no more "
                "sessions",
                reason=Reason.IO_ERROR,
                remedy=Remedy("start more Locust workers, or allow more open files", command="ulimit -n 65536"),
            )

    async def serve(self, sock: socket.socket) -> None:
        """Serve until the client closes the socket, then end all sessions."""
        reader, writer = await asyncio.open_connection(sock=sock)
        receiver = Receiver(parse_request, MAX_CLIENT_PAYLOAD)
        tasks: set[asyncio.Task[None]] = set()
        self.tick()
        try:
            while data := await reader.read(1 << 16):
                receiver.receive_data(data)
                while (request := receiver.next_message()) is not None:
                    task = asyncio.ensure_future(self._answer(request, writer.write))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
        except ConnectionError:
            pass
        finally:
            writer.close()
            for task in tasks:
                task.cancel()
            closing = [session.close() for session in self._sessions.values()]
            await asyncio.wait_for(asyncio.gather(*tasks, *closing, return_exceptions=True), END_TIMEOUT)

    async def _answer(self, request: Request, write: Callable[[bytes], None]) -> None:
        try:
            reply: Reply | Failure = Reply(request.id, await self.execute(request.method, request.params))
        except FarplugError as error:
            reply = Failure(request.id, ErrorData.of(error))
        except Exception as error:
            log.exception("%s failed", request.method)
            reply = Failure(request.id, ErrorData.of(InternalError(error)))
        write(encode(reply))


def _write_private(path: str, text: str) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def _size(params: Mapping[str, Any]) -> int:
    size = params.get("size")
    if type(size) is not int or size <= 0:
        raise UsageError("size is not a positive number of bytes", reason=Reason.BAD_SETTING)
    return size


async def _in_time(session: _Session, call: Awaitable[T], params: Mapping[str, Any], what: str, remedy: str = "") -> T:
    """Wait for a call of a session within the timeout of its parameters; it may be cancelled by ``close``."""
    seconds = params.get("timeout")
    if not isinstance(seconds, int | float):
        raise UsageError("timeout is not a number of seconds", reason=Reason.BAD_SETTING)
    running = asyncio.ensure_future(call)
    session.calls.add(running)
    try:
        async with asyncio.timeout(seconds):
            return await running
    except TimeoutError:
        raise TargetError(f"{what} within {seconds:g} s", reason=Reason.TIMED_OUT, remedy=remedy) from None
    except asyncio.CancelledError:
        caller = asyncio.current_task()
        if caller is not None and caller.cancelling():
            raise
        raise GuestGoneError("the session was closed") from None
    finally:
        session.calls.discard(running)


async def run(sock: socket.socket) -> None:
    """Run a load agent until its client is gone."""
    with tempfile.TemporaryDirectory(prefix="farplug-load-") as folder:
        await LoadAgent(Path(folder), raise_file_limit()).serve(sock)


def main() -> None:
    """Run the load agent whose client has the other end of the socket with the given descriptor."""
    logging.basicConfig(level=logging.WARNING, format="load agent: %(message)s")
    asyncio.run(run(socket.socket(fileno=int(sys.argv[1]))))


if __name__ == "__main__":
    main()
