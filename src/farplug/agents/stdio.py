"""The connection to a client on standard input and output, with a bound for its requests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final, Self

from mcp.server.stdio import stdio_server
from mcp.shared.message import SessionMessage
from mcp_types import INVALID_REQUEST, ErrorData, JSONRPCError, JSONRPCNotification, JSONRPCRequest, JSONRPCResponse

MAX_REQUESTS: Final = 64
"""Requests at a time; a further one is refused. While the client does not read the refusal, nothing more is read."""


@asynccontextmanager
async def bounded_stdio() -> AsyncIterator[tuple[Any, Any]]:
    """Return a context manager for the SDK's streams of messages.

    The SDK carries all requests out at once, and reads on also while the client does not read the answers.
    """
    async with stdio_server() as (reader, writer):
        pending: set[str] = set()
        yield _Requests(reader, writer, pending), _Answers(writer, pending)


class _Stream:
    """A stream of the SDK."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()


class _Requests(_Stream):
    """What the client sends, without the requests that are refused.

    Args:
        reader: the messages of the client.
        writer: the messages to it.
        pending: the ids of the requests without an answer.
    """

    def __init__(self, reader: Any, writer: Any, pending: set[str]) -> None:
        super().__init__(reader)
        self._writer = writer
        self._pending = pending

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> SessionMessage | Exception:
        async for item in self._stream:
            message = item.message if isinstance(item, SessionMessage) else None
            if isinstance(message, JSONRPCNotification) and message.method == "notifications/cancelled":
                self._pending.discard(str((message.params or {}).get("requestId")))  # it gets no answer
            elif isinstance(message, JSONRPCRequest):
                id = str(message.id)
                if id in self._pending or len(self._pending) >= MAX_REQUESTS:
                    text = (
                        "a request with this id is pending"
                        if id in self._pending
                        else f"{MAX_REQUESTS} requests are pending: wait for their answers, or cancel some"
                    )
                    error = JSONRPCError(
                        jsonrpc="2.0", id=message.id, error=ErrorData(code=INVALID_REQUEST, message=text)
                    )
                    await self._writer.send(SessionMessage(error))
                    continue
                self._pending.add(id)
            assert isinstance(item, SessionMessage | Exception)
            return item
        raise StopAsyncIteration


class _Answers(_Stream):
    """What the client receives: its requests are pending until their answers are taken."""

    def __init__(self, writer: Any, pending: set[str]) -> None:
        super().__init__(writer)
        self._pending = pending

    async def send(self, item: SessionMessage) -> None:
        try:
            await self._stream.send(item)
        finally:
            if isinstance(item.message, JSONRPCResponse | JSONRPCError):
                self._pending.discard(str(item.message.id))
