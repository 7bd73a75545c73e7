"""The SPICE messages of every channel, and those of the main channel.

Source: ``spice.proto`` of spice-common; spice-protocol 0.14.3, ``spice/enums.h``. Everything is little-endian, packed.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Self
from uuid import UUID

from farplug.errors import RemoteProtocolError
from farplug.spice.types import ChannelType, LinkError
from farplug.text import printable
from farplug.usb.types import Buffer

MAX_CHANNELS = 1024
"""The most channels in a CHANNELS_LIST that we accept."""
_NO_PORT = (0, 0xFFFF)
MAX_TEXT = 1024
"""The most bytes of a name or a notice that we store, and of a new host that we accept."""


class ServerMessage(IntEnum):
    """SPICE_MSG_*, SPICE_MSG_MAIN_* and SPICE_MSG_SPICEVMC_*: messages from servers."""

    MIGRATE = 1
    MIGRATE_DATA = 2
    SET_ACK = 3
    PING = 4
    WAIT_FOR_CHANNELS = 5
    DISCONNECTING = 6
    NOTIFY = 7

    MAIN_MIGRATE_BEGIN = 101
    MAIN_MIGRATE_CANCEL = 102
    MAIN_INIT = 103
    MAIN_CHANNELS_LIST = 104
    MAIN_MOUSE_MODE = 105
    MAIN_MIGRATE_SWITCH_HOST = 111
    MAIN_NAME = 113
    MAIN_UUID = 114

    VMC_DATA = 101
    VMC_COMPRESSED_DATA = 102


class ClientMessage(IntEnum):
    """SPICE_MSGC_*, SPICE_MSGC_MAIN_* and SPICE_MSGC_SPICEVMC_*: messages from clients."""

    ACK_SYNC = 1
    ACK = 2
    PONG = 3
    MIGRATE_FLUSH_MARK = 4

    MAIN_MIGRATE_CONNECT_ERROR = 103
    MAIN_ATTACH_CHANNELS = 104
    MAIN_MOUSE_MODE_REQUEST = 105

    VMC_DATA = 101
    VMC_COMPRESSED_DATA = 102


class MigrateFlags(IntFlag):
    """SPICE_MIGRATE_*."""

    NEED_FLUSH = 1
    NEED_DATA_TRANSFER = 2


def _unpack(layout: struct.Struct, body: Buffer, name: str) -> tuple[int, ...]:
    if len(body) < layout.size:
        raise RemoteProtocolError(f"SPICE {name} of {len(body)} bytes, fewer than {layout.size}")
    return layout.unpack_from(body)


_U32 = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class SetAck:
    """SPICE_MSG_SET_ACK: from now on, acknowledge every ``window`` messages (0: none)."""

    generation: int
    window: int

    _LAYOUT = struct.Struct("<II")

    @classmethod
    def parse(cls, body: Buffer) -> Self:
        """Parse the body. Raises RemoteProtocolError."""
        return cls(*_unpack(cls._LAYOUT, body, "SET_ACK"))


@dataclass(frozen=True, slots=True)
class Migrate:
    """SPICE_MSG_MIGRATE: the VM moves to another host."""

    flags: MigrateFlags

    @classmethod
    def parse(cls, body: Buffer) -> Self:
        """Parse the body. Raises RemoteProtocolError."""
        return cls(MigrateFlags(*_unpack(_U32, body, "MIGRATE")))


@dataclass(frozen=True, slots=True)
class WaitForChannels:
    """SPICE_MSG_WAIT_FOR_CHANNELS: process messages of other channels first: (type, id, serial) of each."""

    channels: tuple[tuple[ChannelType, int, int], ...]

    _LAYOUT = struct.Struct("<BBQ")

    @classmethod
    def parse(cls, body: Buffer) -> Self:
        """Parse the body. Raises RemoteProtocolError."""
        count = body[0] if body else 0
        size = cls._LAYOUT.size
        if len(body) < 1 + count * size:
            raise RemoteProtocolError(
                f"SPICE WAIT_FOR_CHANNELS of {len(body)} bytes, fewer than {1 + count * size} for {count} channels"
            )
        waits = cls._LAYOUT.iter_unpack(memoryview(body)[1 : 1 + count * size])
        return cls(tuple((ChannelType(kind), number, serial) for kind, number, serial in waits))


@dataclass(frozen=True, slots=True)
class Disconnecting:
    """SPICE_MSG_DISCONNECTING: the server will close the connection. ``time``: the server's clock, in nanoseconds."""

    time: int
    reason: LinkError

    _LAYOUT = struct.Struct("<QI")

    @classmethod
    def parse(cls, body: Buffer) -> Self:
        """Parse the body. Raises RemoteProtocolError."""
        time, reason = _unpack(cls._LAYOUT, body, "DISCONNECTING")
        return cls(time, LinkError(reason))


@dataclass(frozen=True, slots=True)
class Notify:
    """SPICE_MSG_NOTIFY: text for a user. ``severity``: 0 information, 1 warning, 2 error."""

    time: int
    severity: int
    visibility: int
    what: int
    text: str

    _LAYOUT = struct.Struct("<QIIII")

    @classmethod
    def parse(cls, body: Buffer) -> Self:
        """Parse the body. Raises RemoteProtocolError."""
        time, severity, visibility, what, size = _unpack(cls._LAYOUT, body, "NOTIFY")
        return cls(time, severity, visibility, what, _text(body, cls._LAYOUT.size, size, "NOTIFY"))


@dataclass(frozen=True, slots=True)
class MainInit:
    """SPICE_MSG_MAIN_INIT: the session begins."""

    session_id: int
    display_hint: int
    supported_mouse_modes: int
    current_mouse_mode: int
    agent_connected: int
    agent_tokens: int
    multimedia_time: int
    ram_hint: int

    _LAYOUT = struct.Struct("<8I")

    @classmethod
    def parse(cls, body: Buffer) -> Self:
        """Parse the body. Raises RemoteProtocolError."""
        return cls(*_unpack(cls._LAYOUT, body, "MAIN_INIT"))


@dataclass(frozen=True, slots=True)
class MouseModes:
    """SPICE_MSG_MAIN_MOUSE_MODE: the modes of the mouse that the VM supports, a mask of SPICE_MOUSE_MODE_*."""

    supported: int
    current: int

    _LAYOUT = struct.Struct("<HH")

    @classmethod
    def parse(cls, body: Buffer) -> Self:
        """Parse the body. Raises RemoteProtocolError."""
        return cls(*_unpack(cls._LAYOUT, body, "MAIN_MOUSE_MODE"))


@dataclass(frozen=True, slots=True, order=True)
class ChannelId:
    """One channel of a session."""

    channel_type: ChannelType
    number: int

    def __str__(self) -> str:
        return f"{self.channel_type} {self.number}"


def parse_channels_list(body: Buffer) -> tuple[ChannelId, ...]:
    """Return the channels of SPICE_MSG_MAIN_CHANNELS_LIST, sorted (servers do not). Raises RemoteProtocolError."""
    (count,) = _unpack(_U32, body, "MAIN_CHANNELS_LIST")
    if count > MAX_CHANNELS:
        raise RemoteProtocolError(f"SPICE MAIN_CHANNELS_LIST of {count} channels, more than {MAX_CHANNELS}")
    if len(body) < 4 + 2 * count:
        raise RemoteProtocolError(
            f"SPICE MAIN_CHANNELS_LIST of {len(body)} bytes, fewer than {4 + 2 * count} for {count} channels"
        )
    pairs = struct.iter_unpack("<BB", memoryview(body)[4 : 4 + 2 * count])
    return tuple(sorted({ChannelId(ChannelType(kind), number) for kind, number in pairs}))


def parse_name(body: Buffer) -> str:
    """Return the VM's name of SPICE_MSG_MAIN_NAME. Raises RemoteProtocolError."""
    (size,) = _unpack(_U32, body, "MAIN_NAME")
    return _text(body, 4, size, "MAIN_NAME")


def parse_uuid(body: Buffer) -> str:
    """Return the VM's UUID of SPICE_MSG_MAIN_UUID, in its usual notation. Raises RemoteProtocolError."""
    if len(body) < 16:
        raise RemoteProtocolError(f"SPICE MAIN_UUID of {len(body)} bytes, fewer than 16")
    return str(UUID(bytes=bytes(body[:16])))


@dataclass(frozen=True, slots=True)
class SwitchHost:
    """SPICE_MSG_MAIN_MIGRATE_SWITCH_HOST and MAIN_MIGRATE_BEGIN, which have the same fields: where the VM moves.

    Attributes:
        port: the plain port; None for 0, and for -1, which QEMU's ``client_migrate_info`` sends.
        tls_port: the TLS port, in the same way.
        host: name or address.
        subject: the subject of the new host's certificate; empty: check the host name.
    """

    port: int | None
    tls_port: int | None
    host: str
    subject: str = ""

    _LAYOUT = struct.Struct("<HHIIII")

    @classmethod
    def parse(cls, body: Buffer) -> Self:
        """Parse the body. Raises RemoteProtocolError, also for a host or a subject of more than MAX_TEXT bytes."""
        name = "MAIN_MIGRATE_SWITCH_HOST"
        port, tls_port, *places = _unpack(cls._LAYOUT, body, name)
        texts = []
        for size, offset in (places[:2], places[2:]):
            if size > MAX_TEXT:
                raise RemoteProtocolError(f"SPICE {name} with {size} bytes of text, more than {MAX_TEXT}")
            texts.append(_text(body, offset, size, name))
        return cls(None if port in _NO_PORT else port, None if tls_port in _NO_PORT else tls_port, *texts)

    def __str__(self) -> str:
        ports = [f"{name} {number}" for name, number in (("port", self.port), ("TLS port", self.tls_port)) if number]
        return " ".join([self.host or "another host", *([f"({', '.join(ports)})"] if ports else [])])


def _text(body: Buffer, offset: int, size: int, name: str) -> str:
    """Return a string with a length, which may end with a NUL; without control characters, for a log."""
    if offset + size > len(body):
        raise RemoteProtocolError(
            f"SPICE {name} with {size} bytes of text at offset {offset}: outside its {len(body)} bytes"
        )
    text = bytes(body[offset : offset + min(size, MAX_TEXT)]).partition(b"\0")[0].decode("utf-8", "replace")
    return printable(text)
