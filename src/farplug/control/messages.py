"""The messages of the control protocol, without I/O: bytes in, frozen dataclasses out, and the reverse.

A message is a JSON object on a line of its own::

    {"id": 1, "method": "status", "params": {}}                          Request
    {"id": 1, "ok": true, "result": {...}}                               Reply
    {"id": 1, "ok": false, "error": {"code": "not-found", ...}}          Failure
    {"event": "attached", "data": {...}}                                 Notification

A message with the member ``bytes`` is followed by that number of raw bytes, its payload.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Generic, NoReturn, Self, TypeAlias, TypeVar

from farplug.errors import FarplugError, Reason, Remedy, RemoteProtocolError, SessionError
from farplug.exit_codes import exit_code
from farplug.text import printable, shown

PROTOCOL_VERSION: Final = "1.1"
"""Major and minor version. Peers of the same major version understand each other."""
VERSION_REMEDY: Final = "use the version of farplug that started the session"
MAX_LINE: Final = 1 << 20
"""Bytes of a message, without its newline and its payload."""
MAX_PAYLOAD: Final = 4 << 20
"""Bytes of a payload that a session sends."""
MAX_CLIENT_PAYLOAD: Final = 1 << 20
"""Bytes of a payload that a client sends."""
MAX_ID: Final = 64
"""Characters of an id that is a string. An integer id is below 2^53, which every JSON parser represents."""
MAX_METHOD: Final = 64
"""Characters of the name of a method or of an event."""
MAX_MESSAGE: Final = 8192
"""Characters of a text of an error, such as its message."""
MAX_TIME: Final = 1 << 40
"""Seconds since 1970 that a client reads."""
MAX_ALTERNATIVES: Final = 4
"""Remedies that a client reads of one error, each the alternative of the one before."""

HELLO: Final = "hello"
SUBSCRIBE: Final = "subscribe"
UNSUBSCRIBE: Final = "unsubscribe"
DROPPED: Final = "dropped"
"""The event that stands in the place of events that a slow client lost."""
ENDED: Final = "session-ended"
"""The last event of a session that ends in order."""
CLIENT_EVENTS: Final = (
    *("cursor", "driving", "inputs", "media-progress", "media-read", "screen", "screen-state", "serial", "typing"),
)
"""The events for one client, which it does not subscribe to: they follow methods that say so."""

Id: TypeAlias = int | str
Buffer: TypeAlias = bytes | bytearray | memoryview
"""Bytes of a payload."""


@dataclass(frozen=True, slots=True)
class Request:
    """A call of a method.

    Attributes:
        id: chosen by the client; unique among its pending requests.
        method: the name of the method.
        params: the method's parameters.
        payload: raw bytes beside the parameters; None: there are none.
    """

    id: Id
    method: str
    params: Mapping[str, Any] = field(default_factory=dict)
    payload: Buffer | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the message as JSON's types."""
        return {"id": self.id, "method": self.method, "params": dict(self.params)}


@dataclass(frozen=True, slots=True)
class Reply:
    """The result of a request.

    Attributes:
        id: of the request.
        result: JSON's types.
        payload: raw bytes beside the result; None: there are none.
    """

    id: Id
    result: Any = None
    payload: Buffer | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the message as JSON's types."""
        return {"id": self.id, "ok": True, "result": self.result}


@dataclass(frozen=True, slots=True)
class ErrorData:
    """An error as the protocol carries it.

    Attributes:
        code: the reason; stable.
        message: one line for a person.
        exit_code: of a command that ends with this error.
        remedy: advice to the user.
    """

    code: str
    message: str
    exit_code: int
    remedy: Remedy = field(default_factory=Remedy)

    @classmethod
    def of(cls, error: FarplugError) -> Self:
        """Return what the protocol carries of an error."""
        return cls(str(error.reason), error.message, int(exit_code(error)), error.remedy)

    @classmethod
    def parse(cls, data: object) -> Self:
        """Return the error that a JSON value is: what :meth:`to_json` returned. Unknown fields are ignored.

        Raises:
            RemoteProtocolError: it is not an error.
        """
        if not isinstance(data, dict):
            raise RemoteProtocolError(f"error: {shown(data)} is not an object")
        code, message, number = data.get("code"), data.get("message"), data.get("exit_code", 1)
        if not isinstance(code, str) or not isinstance(message, str) or type(number) is not int:
            raise RemoteProtocolError(f"error: {shown(data)} has no valid code, message and exit_code")
        return cls(printable(code, MAX_METHOD), printable(message, MAX_MESSAGE), number, _remedy(data))

    def to_json(self) -> dict[str, Any]:
        """Return the error as JSON's types."""
        return {
            "code": self.code,
            "message": self.message,
            **self.remedy.as_dict(),
            "exit_code": self.exit_code,
        }

    def error(self) -> SessionError:
        """Return the exception of a client that received this error.

        A reason that this version of farplug does not know becomes ``session-error``.
        """
        known = self.code in Reason._value2member_map_
        reason = Reason(self.code) if known else Reason.SESSION_ERROR
        return SessionError(self.message, reason=reason, exit_code=self.exit_code, remedy=self.remedy)


@dataclass(frozen=True, slots=True)
class Failure:
    """The error of a request, or of what was not a request.

    Attributes:
        id: of the request; None: the error concerns the connection, which is closed after it.
        error: why.
        payload: an error has none.
    """

    id: Id | None
    error: ErrorData
    payload: None = None

    def to_json(self) -> dict[str, Any]:
        """Return the message as JSON's types."""
        return {"id": self.id, "ok": False, "error": self.error.to_json()}


@dataclass(frozen=True, slots=True)
class Notification:
    """An event.

    Attributes:
        event: the name of the event.
        data: its fields.
        payload: raw bytes beside the fields; None: there are none.
    """

    event: str
    data: Mapping[str, Any] = field(default_factory=dict)
    payload: Buffer | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the message as JSON's types."""
        return {"event": self.event, "data": dict(self.data)}


FromServer: TypeAlias = Reply | Failure | Notification
Message: TypeAlias = Request | FromServer
MessageT = TypeVar("MessageT", bound=Message)


def encode(message: Message) -> bytes:
    """Return a message as a line, in ASCII, and its payload behind the line.

    Raises:
        ValueError: the line is longer than :data:`MAX_LINE`, the payload is longer than the peer accepts, or a value is
            not one of JSON's types.
    """
    data, payload = message.to_json(), message.payload
    if payload is not None:
        most = MAX_CLIENT_PAYLOAD if isinstance(message, Request) else MAX_PAYLOAD
        if len(payload) > most:
            raise ValueError(f"a payload of {len(payload)} bytes is longer than {most} bytes")
        data["bytes"] = len(payload)
    line = json.dumps(data, allow_nan=False, separators=(", ", ": ")).encode("ascii")
    if len(line) > MAX_LINE:
        raise ValueError(f"a message of {len(line)} bytes is longer than {MAX_LINE} bytes")
    return line + b"\n" if payload is None else b"".join((line, b"\n", payload))


class Receiver(Generic[MessageT]):
    """Splits received bytes into messages.

    Call :meth:`receive_data`, then :meth:`next_message` until it returns None. A receiver that raised an error raises
    it again: the peer's stream cannot be continued.

    Args:
        parse: :func:`parse_request` in a server, :func:`parse_reply` in a client.
        max_payload: bytes of the longest payload that is accepted.
    """

    def __init__(self, parse: Callable[[Any], MessageT], max_payload: int) -> None:
        self._parse = parse
        self._max_payload = max_payload
        self._buffer = bytearray()
        self._searched = 0
        """Bytes of the buffer without a newline."""
        self._waiting: tuple[MessageT, int] | None = None
        """A message whose payload, of this length, is not there yet."""
        self._error: RemoteProtocolError | None = None

    def receive_data(self, data: bytes) -> None:
        """Take bytes of the peer. The caller bounds them: it reads on only if :meth:`next_message` returned None."""
        if self._error is None:
            self._buffer += data

    def next_message(self) -> MessageT | None:
        """Return the next message; None: more bytes are needed.

        Raises:
            RemoteProtocolError: the peer sent a line that is too long, or is not a message, or has a payload that is
                too long.
        """
        while self._waiting is None:
            line = self._next_line()
            if line is None:
                return None
            message, size = self._message(line)
            if size is None:
                return message
            self._waiting = message, size
        message, size = self._waiting
        if len(self._buffer) < size:
            return None
        self._waiting = None
        payload = bytes(memoryview(self._buffer)[:size])
        del self._buffer[:size]
        return replace(message, payload=payload)  # type: ignore[arg-type]  # _message() refused a failure with one

    def receive_eof(self) -> None:
        """Take note that the peer sends nothing more.

        Raises:
            RemoteProtocolError: the stream ends within a message.
        """
        if (self._buffer or self._waiting) and self._error is None:
            where = "line" if self._waiting is None else "payload"
            self._fail(f"the stream ends within a {where}, after {len(self._buffer)} bytes")

    def _next_line(self) -> bytes | None:
        """Return the next line that is not empty; None: it is not complete."""
        if self._error is not None:
            raise self._error
        if not self._searched and self._buffer[:1].isspace():  # an empty line has no effect, nor have 100,000 of them
            del self._buffer[: len(self._buffer) - len(self._buffer.lstrip())]
        end = self._buffer.find(b"\n", self._searched, MAX_LINE + 1)
        if end < 0:
            if len(self._buffer) > MAX_LINE:
                self._fail(f"a line is longer than {MAX_LINE} bytes")
            self._searched = len(self._buffer)
            return None
        line = bytes(memoryview(self._buffer)[:end])
        del self._buffer[: end + 1]
        self._searched = 0
        return line

    def _message(self, line: bytes) -> tuple[MessageT, int | None]:
        """Return the message of a line, and the length of its payload; None: it has none."""
        try:
            data = json.loads(line.decode(), parse_constant=_no_constant, parse_float=_finite)
        except (ValueError, RecursionError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
            self._fail(f"{shown(line)} is not JSON: {printable(reason, 200)}")
        try:
            message = self._parse(data)
        except RemoteProtocolError as error:
            self._fail(error.message)
        size = data.get("bytes")
        if size is None:
            return message, None
        if type(size) is not int or not 0 <= size <= self._max_payload:
            self._fail(f"bytes: {shown(size)} is not an integer from 0 to {self._max_payload}")
        if isinstance(message, Failure):
            self._fail("an error has no payload")
        return message, size

    def _fail(self, message: str) -> NoReturn:
        self._buffer.clear()
        self._error = RemoteProtocolError(message)
        raise self._error


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return value


def parse_request(data: object) -> Request:
    """Return the request that a JSON value is. Unknown fields are ignored.

    Raises:
        RemoteProtocolError: it is not a request.
    """
    if not isinstance(data, dict):
        raise RemoteProtocolError(f"a request is an object, not {shown(data)}")
    return Request(_id(data.get("id")), _name(data, "method"), _object(data, "params"))


def parse_reply(data: object) -> FromServer:
    """Return the message of a server that a JSON value is. Unknown fields are ignored.

    Raises:
        RemoteProtocolError: it is not a reply, an error or an event.
    """
    if not isinstance(data, dict):
        raise RemoteProtocolError(f"a message is an object, not {shown(data)}")
    if "event" in data:
        return Notification(_name(data, "event"), _object(data, "data"))
    ok = data.get("ok")
    if ok is True:
        return Reply(_id(data.get("id")), data.get("result"))
    if ok is False:
        id = data.get("id")
        return Failure(None if id is None else _id(id), ErrorData.parse(data.get("error")))
    raise RemoteProtocolError(f"{shown(data)} is neither a reply nor an event")


def _id(data: object) -> Id:
    if (type(data) is int and abs(data) < 1 << 53) or (isinstance(data, str) and len(data) <= MAX_ID):
        return data
    raise RemoteProtocolError(
        f"id: {shown(data)} is neither an integer below 2^53 nor a string of at most {MAX_ID} characters"
    )


def _name(data: Mapping[str, Any], field: str) -> str:
    name = data.get(field)
    if isinstance(name, str) and 0 < len(name) <= MAX_METHOD:
        return name
    raise RemoteProtocolError(f"{field}: {shown(name)} is not a string of 1 to {MAX_METHOD} characters")


def _object(data: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    value = data.get(field, {})
    if isinstance(value, dict):
        return value
    raise RemoteProtocolError(f"{field}: {shown(value)} is not an object")


def _remedy(data: object, depth: int = 0) -> Remedy:
    """Return the remedy among the fields of an error; fields of a wrong type count as missing."""
    if not isinstance(data, dict):
        return Remedy()

    def text(name: str) -> str:
        value = data.get(name)
        return value[:MAX_MESSAGE] if isinstance(value, str) else ""

    value = data.get("value")
    alternative = _remedy(data.get("alternative"), depth + 1) if depth < MAX_ALTERNATIVES - 1 else Remedy()
    return Remedy(
        text("remedy"),
        setting=text("setting"),
        value=value if isinstance(value, str | int | bool) else None,
        command=text("command"),
        alternative=alternative or None,
    )


@dataclass(frozen=True, slots=True)
class Hello:
    """What a session is: the result of ``hello``.

    Attributes:
        session: the session's name.
        target: where the VM is, without a password.
        pid: the process.
        started: when the session began, in seconds since 1970.
        log: path of the log file; None: the session has a terminal.
        farplug_version: the version of the program.
        protocol_version: :data:`PROTOCOL_VERSION` of the session.
        supported_methods: the names of all methods.
        supported_events: the names of all events.
    """

    session: str
    target: str
    pid: int
    started: float
    log: str | None
    farplug_version: str
    protocol_version: str
    supported_methods: tuple[str, ...]
    supported_events: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the result of ``hello`` as JSON's types."""
        return {
            "server_name": "farplug",
            "protocol_version": self.protocol_version,
            "farplug_version": self.farplug_version,
            "session": self.session,
            "target": self.target,
            "pid": self.pid,
            "started": self.started,
            "log": self.log,
            "supported_methods": list(self.supported_methods),
            "supported_events": list(self.supported_events),
        }

    @classmethod
    def parse(cls, data: object) -> Self:
        """Return the hello that the result of ``hello`` describes. Unknown fields are ignored.

        Raises:
            RemoteProtocolError: it is not that of a farplug session, or the session has another major version.
        """
        if not isinstance(data, dict) or data.get("server_name") != "farplug":
            raise RemoteProtocolError("the peer is not a farplug session")
        version = data.get("protocol_version")
        if not isinstance(version, str) or major(version) != major(PROTOCOL_VERSION):
            raise RemoteProtocolError(
                f"the session has version {shown(version)} of the control protocol, not {PROTOCOL_VERSION}",
                remedy=VERSION_REMEDY,
            )
        session, target, log = data.get("session"), data.get("target"), data.get("log")
        pid, started = data.get("pid"), data.get("started")
        program = data.get("farplug_version")
        if not (
            isinstance(session, str)
            and isinstance(target, str)
            and type(pid) is int
            and isinstance(started, int | float)
            and abs(started) < MAX_TIME
            and isinstance(program, str)
            and isinstance(log, str | None)
        ):
            raise RemoteProtocolError(f"{shown(data)} is not a valid hello")
        return cls(
            printable(session, MAX_METHOD),
            printable(target, MAX_MESSAGE),
            pid,
            float(started),
            log,
            printable(program, MAX_METHOD),
            printable(version, MAX_METHOD),
            _names(data.get("supported_methods")),
            _names(data.get("supported_events")),
        )


def major(version: str) -> str:
    """Return the major part of a version ``major.minor``."""
    return version.partition(".")[0]


def _names(data: object) -> tuple[str, ...]:
    return tuple(name for name in data if isinstance(name, str)) if isinstance(data, list) else ()
