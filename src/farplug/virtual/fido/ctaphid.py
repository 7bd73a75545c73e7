"""CTAPHID: messages of several clients of a security key, in reports of 64 bytes. Sans-IO.

Source: CTAP 2.1, chapter 11.2.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

REPORT_SIZE: Final = 64
"""Bytes of every report."""
MAX_MESSAGE: Final = 7609
"""Bytes of the largest message: an initialization packet and 128 continuation packets."""
BROADCAST: Final = 0xFFFFFFFF
"""The channel on which clients ask for a channel of their own."""
MESSAGE_TIMEOUT: Final = 3.0
"""Seconds that the key waits for the next packet of a message. A guest without KVM is slow."""

PROTOCOL_VERSION: Final = 2
WINK_CAPABILITY, CBOR_CAPABILITY = 0x01, 0x04

_FIRST_DATA, _NEXT_DATA = REPORT_SIZE - 7, REPORT_SIZE - 5
_NONCE_SIZE = 8
_MAX_CHANNEL: Final = BROADCAST - 1


class HidCommand(IntEnum):
    """A command of CTAPHID, without its bit 7."""

    PING = 0x01
    MSG = 0x03
    INIT = 0x06
    WINK = 0x08
    CBOR = 0x10
    CANCEL = 0x11
    KEEPALIVE = 0x3B
    ERROR = 0x3F


class HidError(IntEnum):
    """The reason of an error of CTAPHID (chapter 11.2.9.1.6)."""

    INVALID_CMD = 0x01
    INVALID_LEN = 0x03
    INVALID_SEQ = 0x04
    MSG_TIMEOUT = 0x05
    CHANNEL_BUSY = 0x06
    INVALID_CHANNEL = 0x0B


class _Refused(Exception):
    """A report is refused with an error."""

    def __init__(self, error: HidError) -> None:
        super().__init__(error.name)
        self.error = error


class KeepaliveStatus(IntEnum):
    """What a request waits for."""

    PROCESSING = 1
    USER_PRESENCE = 2


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A complete message of a client, which waits for :meth:`CtapHid.reply`.

    Attributes:
        channel: of the client.
        command: ``MSG``, ``CBOR`` or ``WINK``.
        data: the message.
    """

    channel: int
    command: HidCommand
    data: bytes


@dataclass(frozen=True, slots=True)
class Cancelled:
    """A client cancelled its request, or began again with INIT, after which no reply to the request is sent."""

    request: Request


@dataclass(slots=True)
class _Message:
    """A message of which packets are missing."""

    channel: int
    command: int
    size: int
    data: bytearray
    due: float
    sequence: int = 0


class CtapHid:
    """The end of the key: takes reports of the guest, and queues the reports to send.

    One request is processed at a time. Others are refused with CHANNEL_BUSY, whatever channel they are on. Channels
    occupy no memory: those up to the last one that was assigned are valid.

    Args:
        capabilities: capability flags in the reply to INIT.
        version: major, minor and build version of the device.
    """

    def __init__(self, capabilities: int, version: tuple[int, int, int] = (0, 0, 0)) -> None:
        self._capabilities = capabilities
        self._version = version
        self._last_channel = 0
        self._message: _Message | None = None
        self._current: Request | None = None
        self._reports: deque[bytes] = deque()

    @property
    def due(self) -> float | None:
        """Return when :meth:`check_time` must be called at the latest; None: no packet is missing."""
        return None if self._message is None else self._message.due

    def is_current(self, request: Request) -> bool:
        """Return whether the client still waits for the reply to a request."""
        return self._current is request

    @property
    def has_reports(self) -> bool:
        """Return whether there are reports to send."""
        return bool(self._reports)

    def take_reports(self) -> list[bytes]:
        """Return the reports to send, and forget them."""
        reports = list(self._reports)
        self._reports.clear()
        return reports

    def check_time(self, now: float) -> None:
        """Abandon a message whose next packet is late."""
        if self._message is not None and now >= self._message.due:
            self._fail(self._message.channel, HidError.MSG_TIMEOUT)
            self._message = None

    def receive(self, report: bytes, now: float) -> Request | Cancelled | None:
        """Take a report of the guest. One that is shorter than 64 bytes is filled with zeros.

        Args:
            report: the report; bytes behind the first 64 are ignored.
            now: the time in seconds, of a clock that does not go back.
        """
        self.check_time(now)
        report = report[:REPORT_SIZE].ljust(REPORT_SIZE, b"\0")
        channel = int.from_bytes(report[:4], "big")
        try:
            if report[4] & 0x80:
                size = int.from_bytes(report[5:7], "big")
                return self._begin(channel, report[4] & 0x7F, size, report[7:], now)
            return self._continue(channel, report[4], report[5:], now)
        except _Refused as refused:
            self._fail(channel, refused.error)
            return None

    def reply(self, request: Request, data: bytes) -> None:
        """Queue the reply to a request; nothing if its client does not wait for it any more.

        Raises:
            ValueError: the reply is too long.
        """
        if self._current is request:
            self._current = None
            self._send(request.channel, request.command, data)

    def fail(self, request: Request, error: HidError) -> None:
        """Queue an error as the reply to a request; nothing if its client does not wait for it any more."""
        if self._current is request:
            self._current = None
            self._fail(request.channel, error)

    def keep_alive(self, request: Request, status: KeepaliveStatus) -> None:
        """Queue a report that the request is still being processed; nothing if its client does not wait any more."""
        if self._current is request:
            self._send(request.channel, HidCommand.KEEPALIVE, bytes((status,)))

    def _begin(self, channel: int, command: int, size: int, data: bytes, now: float) -> Request | Cancelled | None:
        if command == HidCommand.INIT:
            return self._initialize(channel, size, data)
        if not 0 < channel <= self._last_channel:
            raise _Refused(HidError.INVALID_CHANNEL)
        if command == HidCommand.CANCEL:
            mine = self._current is not None and self._current.channel == channel
            return Cancelled(self._current) if mine and self._current is not None else None
        if self._message is not None and self._message.channel == channel:
            self._message = None  # the client began a message within another
            raise _Refused(HidError.INVALID_SEQ)
        if self._message is not None or self._current is not None:
            raise _Refused(HidError.CHANNEL_BUSY)
        if size > MAX_MESSAGE:
            raise _Refused(HidError.INVALID_LEN)
        self._message = _Message(channel, command, size, bytearray(data[:size]), now + MESSAGE_TIMEOUT)
        return self._complete(self._message)

    def _continue(self, channel: int, sequence: int, data: bytes, now: float) -> Request | None:
        message = self._message
        if message is None or message.channel != channel:
            return None  # of a message that was refused or abandoned (chapter 11.2.4)
        if sequence != message.sequence:
            self._message = None
            raise _Refused(HidError.INVALID_SEQ)
        message.sequence += 1
        message.data += data[: message.size - len(message.data)]
        message.due = now + MESSAGE_TIMEOUT
        return self._complete(message)

    def _complete(self, message: _Message) -> Request | None:
        """Return the request of a message if no packet of it is missing."""
        if len(message.data) < message.size:
            return None
        self._message = None
        data = bytes(message.data)
        match message.command:
            case HidCommand.PING:
                self._send(message.channel, HidCommand.PING, data)
                return None
            case HidCommand.WINK if data:
                raise _Refused(HidError.INVALID_LEN)
            case HidCommand.MSG | HidCommand.CBOR if not data:
                raise _Refused(HidError.INVALID_LEN)
            case HidCommand.MSG | HidCommand.CBOR | HidCommand.WINK:
                self._current = Request(message.channel, HidCommand(message.command), data)
                return self._current
        raise _Refused(HidError.INVALID_CMD)

    def _initialize(self, channel: int, size: int, data: bytes) -> Cancelled | None:
        """Assign a channel, or abandon what is in progress on one that was assigned (chapter 11.2.9.1.3)."""
        if channel != BROADCAST and not 0 < channel <= self._last_channel:
            raise _Refused(HidError.INVALID_CHANNEL)
        if size != _NONCE_SIZE:
            raise _Refused(HidError.INVALID_LEN)
        cancelled = None
        assigned = channel
        if channel == BROADCAST:
            assigned = self._last_channel = self._last_channel % _MAX_CHANNEL + 1
        else:
            if self._message is not None and self._message.channel == channel:
                self._message = None
            if self._current is not None and self._current.channel == channel:
                cancelled, self._current = Cancelled(self._current), None
        reply = data[:_NONCE_SIZE] + assigned.to_bytes(4, "big")
        self._send(channel, HidCommand.INIT, reply + bytes((PROTOCOL_VERSION, *self._version, self._capabilities)))
        return cancelled

    def _fail(self, channel: int, error: HidError) -> None:
        self._send(channel, HidCommand.ERROR, bytes((error,)))

    def _send(self, channel: int, command: HidCommand, data: bytes) -> None:
        if len(data) > MAX_MESSAGE:
            raise ValueError(f"a message of {len(data)} bytes is longer than {MAX_MESSAGE}")
        address = channel.to_bytes(4, "big")
        head = address + bytes((0x80 | command,)) + len(data).to_bytes(2, "big")
        self._reports.append(head + data[:_FIRST_DATA].ljust(_FIRST_DATA, b"\0"))
        for sequence, at in enumerate(range(_FIRST_DATA, len(data), _NEXT_DATA)):
            packet = data[at : at + _NEXT_DATA].ljust(_NEXT_DATA, b"\0")
            self._reports.append(address + bytes((sequence,)) + packet)
