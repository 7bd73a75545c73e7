"""The messages of the websocket, without I/O: frames in, calls out.

They are those of the control protocol, one in each text frame. A message with the member ``bytes`` is followed by one
binary frame with that number of bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from farplug.control.messages import MAX_LINE, ErrorData, Failure, Id, Request, parse_request
from farplug.errors import FarplugError, RemoteProtocolError
from farplug.text import printable, shown

MAX_TEXT: Final = MAX_LINE
"""Bytes of a text frame, in both directions."""
MAX_HELLO: Final = 16 << 10
"""Bytes of the first text frame, of a peer that may have no token: JSON of 1 MiB takes 0.1 s to parse."""
MAX_BINARY: Final = 1 << 20
"""Bytes of a binary frame of a browser."""
MAX_BINARY_OF_SESSION: Final = 4 << 20
"""Bytes that follow a message of a session."""


@dataclass(frozen=True, slots=True)
class Call:
    """A request of a browser with what follows it.

    Attributes:
        request: the request.
        payload: the bytes of the binary frame; None: the request has no member ``bytes``.
        size: bytes of the frames, for the bound of what waits.
    """

    request: Request
    payload: bytes | None = None
    size: int = 0

    def with_params(self, params: Mapping[str, Any]) -> Call:
        """Return the same call with other parameters."""
        return replace(self, request=replace(self.request, params=params))

    def encode(self) -> bytes:
        """Return the call as the control protocol has it: a line, and the bytes that follow.

        Raises:
            RemoteProtocolError: a value is not one of JSON's types, or the line is too long.
        """
        message = self.request.to_json()
        if self.payload is not None:
            message["bytes"] = len(self.payload)
        try:
            line = json.dumps(message, allow_nan=False).encode("ascii")
        except ValueError as error:
            raise RemoteProtocolError(f"the request cannot be passed on: {printable(str(error), 200)}") from error
        if len(line) > MAX_LINE:
            raise RemoteProtocolError(f"the request has more than {MAX_LINE} bytes when non-ASCII text is escaped")
        return line + b"\n" + (self.payload or b"")


class FrameReceiver:
    """Pairs the frames of a browser. A receiver that raised an error cannot be used further.

    Attributes:
        max_text: bytes of a text frame.
        waiting: a binary frame must follow.
    """

    def __init__(self) -> None:
        self.max_text = MAX_HELLO
        self.waiting = False
        self._expected = 0
        self._call: Call | None = None

    def receive_text(self, text: str) -> Call | None:
        """Take a text frame; return its call, or None if a binary frame must follow.

        Raises:
            RemoteProtocolError: the frame is not a request, is too large, or should have been a binary one.
        """
        if self._call is not None:
            raise RemoteProtocolError(f"a text frame came in place of a binary frame of {self._expected} bytes")
        size = len(text.encode("utf-8", "surrogatepass"))
        if size > self.max_text:
            raise RemoteProtocolError(f"a text frame has more than {self.max_text} bytes")
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise RemoteProtocolError(f"{shown(text[:100])} is not JSON: {printable(reason, 200)}") from None
        call = Call(parse_request(data), size=size)
        if "bytes" not in data:
            return call
        expected = data["bytes"]
        if type(expected) is not int or not 0 <= expected <= MAX_BINARY:
            raise RemoteProtocolError(f"bytes: {shown(expected)} is not an integer from 0 to {MAX_BINARY}")
        self._call, self._expected, self.waiting = call, expected, True
        return None

    def receive_binary(self, data: bytes) -> Call:
        """Take a binary frame; return the call that it completes.

        Raises:
            RemoteProtocolError: there is no message before it, or it has another size than its message said.
        """
        call = self._call
        if call is None:
            raise RemoteProtocolError("a binary frame without a message before it")
        if len(data) != self._expected:
            raise RemoteProtocolError(f"a binary frame has {len(data)} bytes, its message has bytes: {self._expected}")
        self._call, self.waiting = None, False
        return replace(call, payload=bytes(data), size=call.size + len(data))


def failure_text(id: Id | None, error: FarplugError) -> str:
    """Return the text frame of an error."""
    return json.dumps(Failure(id, ErrorData.of(error)).to_json())


def reply_text(id: Id, result: Any) -> str:
    """Return the text frame of a result."""
    return json.dumps({"id": id, "ok": True, "result": result}, allow_nan=False)


def event_text(event: str, data: Mapping[str, Any]) -> str:
    """Return the text frame of an event."""
    return json.dumps({"event": event, "data": dict(data)}, allow_nan=False)


def payload_size(message: Mapping[str, Any]) -> int | None:
    """Return the number of bytes that follow a message of a session; None: none do, and the member is missing.

    Raises:
        RemoteProtocolError: the number is not valid, or too large.
    """
    if "bytes" not in message:
        return None
    size = message["bytes"]
    if type(size) is not int or not 0 <= size <= MAX_BINARY_OF_SESSION:
        raise RemoteProtocolError(f"bytes: {shown(size)} is not an integer from 0 to {MAX_BINARY_OF_SESSION}")
    return size
