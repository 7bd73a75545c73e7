"""The connection of one browser to one session."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from farplug.control.messages import ENDED, HELLO, MAX_LINE, PROTOCOL_VERSION, ErrorData, Id
from farplug.errors import (
    FarplugError,
    GuestGoneError,
    Reason,
    RemoteProtocolError,
    SetupError,
    TargetError,
    UsageError,
    from_oserror,
)
from farplug.text import printable, shown
from farplug.web.messages import Call, payload_size

CONNECT_TIMEOUT: Final = 10.0
"""Seconds in which a session answers ``hello``."""
_HELLO_ID: Final = "hello"


class SessionLink:
    """A connection to the control socket of a session. Made by :meth:`connect`.

    Attributes:
        name: of the session.
        hello: the result of its ``hello``.
        pending: the requests that it did not reply to.
        announced: the session sent that it ends.
    """

    def __init__(self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.name = name
        self.hello: dict[str, Any] = {}
        self.pending: dict[Id, Call] = {}
        self.announced = False
        self._reader = reader
        self._writer = writer

    @classmethod
    async def connect(cls, name: str, path: Path, client: str) -> SessionLink:
        """Connect to a session, and greet it.

        Args:
            name: of the session.
            path: of its socket.
            client: the name of the client that the session gets.

        Raises:
            UsageError: ``no-session``: it does not run.
            FarplugError: it does not answer, or refuses the client.
        """
        if sys.platform == "win32":
            raise SetupError("Python has no UNIX sockets on Windows", reason=Reason.UNSUPPORTED_SYSTEM)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                reader, writer = await asyncio.open_unix_connection(path, limit=MAX_LINE)
                link = cls(name, reader, writer)
                try:
                    await link._greet(client)
                except BaseException:
                    link.close()
                    raise
                return link
        except TimeoutError:
            raise TargetError(f"the session {name} does not answer", reason=Reason.TIMED_OUT) from None
        except (FileNotFoundError, ConnectionRefusedError):
            raise UsageError(
                f"no session {name} is running", reason=Reason.NO_SESSION, remedy="start it, or choose another one"
            ) from None
        except (OSError, ValueError) as error:
            raise from_oserror(path, error, as_=SetupError, problem="cannot be used") from error

    async def _greet(self, client: str) -> None:
        params = {"client_name": client, "protocol_version": PROTOCOL_VERSION}
        self._writer.write(json.dumps({"id": _HELLO_ID, "method": HELLO, "params": params}).encode() + b"\n")
        _, message, _ = await self._next()
        result = message.get("result")
        if message.get("ok") is not True or not isinstance(result, dict):
            raise ErrorData.parse(message.get("error")).error()
        self.hello = result

    async def send(self, call: Call) -> None:
        """Send a request, and wait until the session reads.

        Raises:
            GuestGoneError: the session has ended.
        """
        self.pending[call.request.id] = call
        try:
            self._writer.write(call.encode())
            await self._writer.drain()
        except FarplugError:
            del self.pending[call.request.id]
            raise
        except OSError:
            if self.pending.pop(call.request.id, None) is not None:  # else its loss was reported
                raise self.gone() from None

    async def relay(
        self,
        deliver: Callable[[str, dict[str, Any], bytes | None], Awaitable[None]],
        replied: Callable[[Call, bool], None],
    ) -> str:
        """Deliver what the session sends until it ends; return how: ``ended`` in order, or ``lost``.

        The next message is read when the one before was delivered: a slow browser costs no memory.

        Args:
            deliver: takes a message as a text frame, the same parsed, and what follows it.
            replied: is called after the reply to a request was delivered, with whether that was a result.
        """
        try:
            while not self._writer.is_closing():
                line, message, payload = await self._next()
                if message.get("event") == ENDED:
                    self.announced = True
                    continue
                await deliver(line, message, payload)
                call = self.pending.pop(message.get("id") or 0, None) if "ok" in message else None
                if call is not None:
                    replied(call, message["ok"] is True)
        except GuestGoneError:
            pass
        return "ended" if self.announced else "lost"

    def close(self) -> None:
        """Close the connection at once."""
        self._writer.transport.abort()

    def gone(self) -> GuestGoneError:
        """Return the error of requests after the session has ended."""
        return GuestGoneError(f"the session {self.name} has ended", reason=Reason.SESSION_GONE)

    async def _next(self) -> tuple[str, dict[str, Any], bytes | None]:
        """Return the next message as text and parsed, and what follows it.

        Raises:
            GuestGoneError: the connection has ended.
            RemoteProtocolError: it is not a message.
        """
        try:
            line = await self._reader.readuntil(b"\n")
            message = json.loads(line)
            if not isinstance(message, dict) or not isinstance(message.get("id"), int | str | None):
                raise RemoteProtocolError(f"the session {self.name} sent {shown(message)}")
            size = payload_size(message)
            payload = None if size is None else await self._reader.readexactly(size)
        except asyncio.LimitOverrunError:
            raise RemoteProtocolError(f"the session {self.name} sent a line of more than {MAX_LINE} bytes") from None
        except (asyncio.IncompleteReadError, OSError):
            raise self.gone() from None
        except (ValueError, RecursionError) as error:
            raise RemoteProtocolError(f"the session {self.name} sent no JSON: {printable(str(error), 200)}") from None
        return line.decode().rstrip("\n"), message, payload
