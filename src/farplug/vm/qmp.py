"""QEMU Machine Protocol: JSON, one message per line (QEMU, docs/interop/qmp-spec.rst)."""

from __future__ import annotations

import asyncio
import json
import socket
from collections import deque
from collections.abc import Mapping
from typing import Any

from farplug.errors import GuestGoneError, Reason, RefusedError, RemoteProtocolError
from farplug.vm.own_loop import OwnLoop, on_own_loop

MAX_LINE = 16 << 20
"""Maximum size of a message, in bytes."""

MAX_EVENTS = 1000
"""Events kept for :meth:`Qmp.event`; older events are dropped."""


class QmpError(RefusedError):
    """QEMU refused a command.

    Attributes:
        error_class: QEMU's error class, such as ``GenericError``.
    """

    def __init__(self, command: str, error_class: str, description: str) -> None:
        super().__init__(f"QEMU refused {command}: {description}", reason=Reason.REJECTED)
        self.error_class = error_class


class Qmp(OwnLoop):
    """A connection to QEMU's monitor. Several commands may be in flight; replies are matched by id.

    Its coroutines run on the event loop that connected it, whichever loop awaits them.
    """

    def __init__(self) -> None:
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._commands: dict[int, tuple[str, asyncio.Future[Any]]] = {}
        self._last_id = 0
        self._events: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)
        self._changed = asyncio.Condition()
        self._closed = False

    async def connect(self, sock: socket.socket) -> None:
        """Read the greeting from a connected socket, and leave capabilities negotiation mode.

        Raises:
            GuestGoneError: QEMU closed the connection.
            RemoteProtocolError: the peer is not a QMP server.
        """
        self._loop = asyncio.get_running_loop()
        reader, self._writer = await asyncio.open_connection(sock=sock, limit=MAX_LINE)
        greeting = await _read_message(reader)
        if greeting is None:
            raise GuestGoneError("QEMU closed its monitor before the greeting")
        if "QMP" not in greeting:
            raise RemoteProtocolError(f"not a QMP greeting: {str(greeting)[:200]}")
        self._reading = asyncio.create_task(self._read(reader))
        await self.execute("qmp_capabilities")

    @on_own_loop
    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Run a command, and return its ``return`` value.

        Raises:
            QmpError: QEMU refused the command.
            GuestGoneError: the connection is closed.
        """
        if self._writer is None or self._closed:
            raise GuestGoneError(f"QEMU's monitor is closed: {command} cannot run")
        self._last_id += 1
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._commands[self._last_id] = (command, answer)
        message: dict[str, Any] = {"execute": command, "id": self._last_id}
        if arguments:
            message["arguments"] = dict(arguments)
        self._writer.write(json.dumps(message).encode() + b"\n")
        return await answer

    async def human(self, command_line: str) -> str:
        """Run a command of the human monitor, such as ``info usb``, and return its output."""
        return str(await self.execute("human-monitor-command", {"command-line": command_line}))

    @on_own_loop
    async def event(self, name: str, timeout: float = 30) -> dict[str, Any]:
        """Return the oldest event of this name that was not returned yet; wait for one if there is none.

        Raises:
            TimeoutError: no event arrived within ``timeout`` seconds.
            GuestGoneError: the connection is closed.
        """
        async with asyncio.timeout(timeout), self._changed:
            while True:
                for event in self._events:
                    if event["event"] == name:
                        self._events.remove(event)
                        return event
                if self._closed:
                    raise GuestGoneError(f"QEMU's monitor is closed: the event {name} cannot arrive")
                await self._changed.wait()

    async def close(self) -> None:
        """Close the connection; commands in flight fail."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
        if self._writer is not None:
            self._writer.close()
            await asyncio.gather(self._writer.wait_closed(), return_exceptions=True)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while (message := await _read_message(reader)) is not None:
                await self._dispatch(message)
        finally:
            self._closed = True
            for command, answer in self._commands.values():
                if not answer.done():
                    answer.set_exception(GuestGoneError(f"QEMU closed its monitor during {command}"))
            self._commands.clear()
            async with self._changed:
                self._changed.notify_all()

    async def _dispatch(self, message: dict[str, Any]) -> None:
        if "event" in message:
            async with self._changed:
                self._events.append(message)
                self._changed.notify_all()
            return
        command, answer = self._commands.pop(message.get("id", 0), ("", None))
        if answer is None or answer.done():
            return
        if "error" in message:
            error = message["error"]
            answer.set_exception(QmpError(command, error.get("class", ""), error.get("desc", "")))
        else:
            answer.set_result(message.get("return"))


async def _read_message(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """Return the next message; None at the end of the stream."""
    try:
        line = await reader.readline()
        if not line.endswith(b"\n"):
            return None
        message = json.loads(line)
    except ConnectionError:
        return None
    except ValueError as error:
        raise RemoteProtocolError(f"not a line of JSON of at most {MAX_LINE} bytes from QMP: {error}") from error
    if not isinstance(message, dict):
        raise RemoteProtocolError(f"not a JSON object from QMP: {str(message)[:200]}")
    return message
