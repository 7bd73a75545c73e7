"""The link: how a SPICE channel begins. Link messages of both sides, then the ticket. No I/O.

Source: spice-protocol 0.14.3, ``spice/protocol.h``. Everything is little-endian and packed.

::

    client: SpiceLinkHeader SpiceLinkMess caps       server: SpiceLinkHeader SpiceLinkReply caps
    client: u32 mechanism, 128 bytes of ticket       server: u32 result
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Self

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import load_der_public_key

from farplug.errors import Reason, Remedy, RemoteProtocolError, TargetError
from farplug.spice.password import check_password
from farplug.spice.types import (
    ChannelType,
    CommonCapability,
    LinkError,
    has_capability,
    pack_capabilities,
)
from farplug.usb.types import Buffer

log = logging.getLogger(__name__)

MAGIC = b"REDQ"
VERSION_MAJOR = 2
VERSION_MINOR = 2

MAX_LINK_REPLY = 4096
"""The largest SpiceLinkReply that we accept, in bytes: 178 bytes and a few capability words."""
MAX_CAPABILITY_WORDS = 256
"""The most capability words in one set that we accept."""
PUBLIC_KEY_SIZE = 162
"""SPICE_TICKET_PUBKEY_BYTES: an RSA-1024 key as SubjectPublicKeyInfo."""
TICKET_KEY_BITS = 1024
"""SPICE_TICKET_KEY_PAIR_LENGTH"""

_HEADER = struct.Struct("<4sIII")
_MESS = struct.Struct("<IBBIII")
_REPLY = struct.Struct(f"<I{PUBLIC_KEY_SIZE}sIII")
_U32 = struct.Struct("<I")


class AuthMechanism(IntEnum):
    """The authentication mechanism, which follows the link if both sides have AUTH_SELECTION."""

    SPICE = 1
    SASL = 2


SERVER_LOG = "read the log of QEMU, or of the SPICE proxy if there is one"
_LINK_ERRORS: dict[LinkError, tuple[Reason, str, str]] = {
    LinkError.ERROR: (Reason.LINK_REFUSED, "the server refused the link", SERVER_LOG),
    LinkError.INVALID_MAGIC: (Reason.NOT_SPICE, "the server did not recognise a SPICE client", "check the port"),
    LinkError.INVALID_DATA: (
        Reason.LINK_REFUSED,
        "the server reports a damaged link message",
        "check whether a proxy or a tunnel between here and the server changes the data",
    ),
    LinkError.VERSION_MISMATCH: (
        Reason.LINK_REFUSED,
        "the server has another version of SPICE, or requires a capability that farplug lacks",
        f"use a server (or a proxy) with SPICE {VERSION_MAJOR}.{VERSION_MINOR}",
    ),
    LinkError.NEED_SECURED: (
        Reason.NEEDS_TLS,
        "the server demands TLS",
        "use its TLS port: spice+tls://HOST:TLS_PORT, or a .vv file with tls-port",
    ),
    LinkError.NEED_UNSECURED: (
        Reason.LINK_REFUSED,
        "the server demands a connection without TLS for this channel",
        "use its plain port: spice://HOST:PORT",
    ),
    LinkError.PERMISSION_DENIED: (
        Reason.WRONG_PASSWORD,
        "the password is wrong or has expired",
        "check the password; if it is a ticket that expires, get a new one (a new .vv file)",
    ),
    LinkError.BAD_CONNECTION_ID: (
        Reason.LINK_REFUSED,
        "the session no longer exists",
        "connect again; another client may have taken over the session: a SPICE server serves one client at a time",
    ),
    LinkError.CHANNEL_NOT_AVAILABLE: (
        Reason.CHANNEL_IN_USE,
        "the channel is not available",
        "detach the device that uses the channel, or add a usbredir channel to the VM",
    ),
}

_CHANNEL_DENIED = (
    Reason.CHANNEL_DENIED,
    "the server accepted the password of the session, and refuses this channel: the ticket has expired, or a SPICE "
    "proxy does not permit the channel",
    "connect again with a new ticket (a new .vv file); if that fails at once, the administrator of the proxy must "
    "permit the channel",
)
"""Of PERMISSION_DENIED on any channel but main."""

_OTHER_PROTOCOLS: tuple[tuple[bytes, Reason, str, str], ...] = (
    (
        b"HTTP",
        Reason.NOT_SPICE,
        "an HTTP server",
        Remedy(
            "check the port; if this is an HTTP proxy, set it as the proxy (proxy= in a .vv file)",
            setting="target.proxy",
        ),
    ),
    (b"<htm", Reason.NOT_SPICE, "an HTTP server", "check the port"),
    (b"RFB ", Reason.NOT_SPICE, "a VNC server", "give the VM a SPICE display, or use the port of the one that it has"),
    (b"SSH-", Reason.NOT_SPICE, "an SSH server", "check the port"),
    (b"\x15\x03", Reason.NEEDS_TLS, "a TLS server", "it is a TLS port: use spice+tls://HOST:PORT"),
    (b"\0\0\0\0", Reason.NOT_SPICE, "a plain usbredir socket", "use tcp://HOST:PORT or unix:PATH for it"),
)
"""The first bytes of other protocols, with reason, description and remedy."""


class LinkPhase(StrEnum):
    """What we wait for."""

    REPLY = "a link reply"
    TICKET_RESULT = "the ticket's result"
    DONE = "nothing more"


class LinkFailure(TargetError):
    """The link failed.

    Attributes:
        error: the server's link error; None if it did not send one.
        phase: what we waited for.
    """

    def __init__(
        self, message: str, *, reason: Reason, remedy: str = "", error: LinkError | None, phase: LinkPhase
    ) -> None:
        super().__init__(message, reason=reason, remedy=remedy)
        self.error = error
        self.phase = phase


def _with_header(body: bytes) -> bytes:
    return _HEADER.pack(MAGIC, VERSION_MAJOR, VERSION_MINOR, len(body)) + body


@dataclass(frozen=True, slots=True)
class LinkMess:
    """SpiceLinkMess: the channel that the client links.

    Attributes:
        connection_id: 0 for the main channel; for the others the session id of MAIN_INIT.
        common_caps: capability words of all channel types.
        channel_caps: capability words of this channel type.
    """

    connection_id: int
    channel_type: ChannelType
    channel_id: int
    common_caps: tuple[int, ...] = ()
    channel_caps: tuple[int, ...] = ()

    def __str__(self) -> str:
        caps = f"common caps {self.common_caps}, channel caps {self.channel_caps}"
        return f"{self.channel_type} {self.channel_id} in session {self.connection_id:#x}, {caps}"

    def __bytes__(self) -> bytes:
        """Return the message with its SpiceLinkHeader."""
        caps = self.common_caps + self.channel_caps
        counts = len(self.common_caps), len(self.channel_caps)
        fixed = _MESS.pack(self.connection_id, self.channel_type, self.channel_id, *counts, _MESS.size)
        return _with_header(fixed + struct.pack(f"<{len(caps)}I", *caps))

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Parse the body, without the header. Raises RemoteProtocolError."""
        if len(body) < _MESS.size:
            raise RemoteProtocolError(f"SPICE link message of {len(body)} bytes, fewer than {_MESS.size}")
        connection_id, channel_type, channel_id, common, channel, offset = _MESS.unpack_from(body)
        caps = _parse_capabilities(body, common, channel, offset, _MESS.size)
        return cls(connection_id, ChannelType(channel_type), channel_id, *caps)


@dataclass(frozen=True, slots=True)
class LinkReply:
    """SpiceLinkReply: whether the server accepts the link, and the key for the ticket."""

    error: LinkError
    public_key: bytes = bytes(PUBLIC_KEY_SIZE)
    common_caps: tuple[int, ...] = ()
    channel_caps: tuple[int, ...] = ()

    def __bytes__(self) -> bytes:
        """Return the message with its SpiceLinkHeader."""
        caps = self.common_caps + self.channel_caps
        fixed = _REPLY.pack(
            self.error, self.public_key, len(self.common_caps), len(self.channel_caps), _REPLY.size if caps else 0
        )
        return _with_header(fixed + struct.pack(f"<{len(caps)}I", *caps))

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Parse the body, without the header. Raises RemoteProtocolError."""
        if len(body) == _U32.size:  # a proxy may answer with the error alone
            return cls(LinkError(*_U32.unpack(body)))
        if len(body) < _REPLY.size:
            raise RemoteProtocolError(f"SPICE link reply of {len(body)} bytes, fewer than {_REPLY.size}")
        error, key, common, channel, offset = _REPLY.unpack_from(body)
        if error:  # an error reply has no capabilities, and caps_offset 0
            return cls(LinkError(error), key)
        return cls(LinkError.OK, key, *_parse_capabilities(body, common, channel, offset, _REPLY.size))


def _parse_capabilities(
    body: bytes, common: int, channel: int, offset: int, least: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    for count in (common, channel):
        if count > MAX_CAPABILITY_WORDS:
            raise RemoteProtocolError(f"SPICE link with {count} capability words, more than {MAX_CAPABILITY_WORDS}")
    total = common + channel
    if total and (offset < least or offset + 4 * total > len(body)):
        raise RemoteProtocolError(
            f"SPICE link with {total} capability words at offset {offset}: outside its {len(body)} bytes"
        )
    words = struct.unpack_from(f"<{total}I", body, offset) if total else ()
    return words[:common], words[common:]


def encrypt_ticket(public_key: bytes, password: bytes) -> bytes:
    """Return the 128 bytes of a ticket: password and NUL, encrypted with RSA-OAEP, SHA-1 and MGF1-SHA1.

    Raises:
        RemoteProtocolError: the key is not an RSA-1024 key.
    """
    try:
        key = load_der_public_key(public_key)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise RemoteProtocolError(f"the server's ticket key cannot be read: {error}") from None
    if not isinstance(key, rsa.RSAPublicKey) or key.key_size != TICKET_KEY_BITS:
        raise RemoteProtocolError(f"the server's ticket key is not an RSA key of {TICKET_KEY_BITS} bits")
    oaep = padding.OAEP(padding.MGF1(hashes.SHA1()), hashes.SHA1(), None)
    try:
        return key.encrypt(password + b"\0", oaep)
    except ValueError as error:
        raise RemoteProtocolError(f"the server's ticket key cannot be used: {error}") from None


@dataclass(frozen=True, slots=True)
class LinkResult:
    """The result of a link.

    Attributes:
        mini_header: both sides have the capability: headers of messages have 6 bytes instead of 18.
        common_caps: the server's capability words of all channel types.
        channel_caps: the server's capability words of this channel type.
        trailing: the bytes received after the link: the channel's first ones.
    """

    mini_header: bool
    common_caps: tuple[int, ...]
    channel_caps: tuple[int, ...]
    trailing: bytes


@dataclass(slots=True)
class LinkClient:
    """The client's side of one link.

    Send :meth:`data_to_send`, pass received bytes to :meth:`receive_data`, send again, until there is a :attr:`result`.

    Args:
        mess: the channel; its common capabilities are the three of a client without SASL.
        password: the ticket; empty if there is none.
        name: the channel's, for messages and logs.
        tls: the connection uses TLS.

    Raises:
        UsageError: the password is not valid in SPICE, see :func:`check_password`.
    """

    mess: LinkMess
    password: str = field(default="", repr=False)
    name: str = "main"
    tls: bool = False
    phase: LinkPhase = field(default=LinkPhase.REPLY, init=False)
    result: LinkResult | None = field(default=None, init=False)
    _password: bytes = field(default=b"", init=False, repr=False)
    _received: bytearray = field(default_factory=bytearray, init=False, repr=False)
    _output: list[bytes] = field(default_factory=list, init=False, repr=False)
    _machine: Generator[None, None, None] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._password = check_password(self.password)
        self._machine = self._run()
        next(self._machine)

    @classmethod
    def for_channel(
        cls,
        channel_type: ChannelType,
        channel_id: int,
        *,
        connection_id: int,
        capabilities: Iterable[int],
        password: str,
    ) -> Self:
        """Make the link of a channel, with our common capabilities: ticket authentication and the mini header.

        Args:
            channel_type: the type of the channel.
            channel_id: the number of the channel among those of its type.
            connection_id: 0 for the main channel, otherwise the session id.
            capabilities: bit numbers of our capabilities of this channel type.
            password: the ticket.
        """
        common = pack_capabilities(
            [CommonCapability.AUTH_SELECTION, CommonCapability.AUTH_SPICE, CommonCapability.MINI_HEADER]
        )
        mess = LinkMess(connection_id, channel_type, channel_id, common, pack_capabilities(capabilities))
        name = "main" if channel_type is ChannelType.MAIN else f"{channel_type} {channel_id}"
        return cls(mess, password, name)

    def data_to_send(self) -> list[bytes]:
        """Return the queued buffers, in order, and empty the queue."""
        output, self._output = self._output, []
        return output

    def receive_data(self, data: Buffer) -> None:
        """Pass in bytes from the server.

        Raises:
            LinkFailure: the server refused the link, or is not a SPICE server.
            RemoteProtocolError: the server violated the protocol.
        """
        self._received += data
        try:
            next(self._machine)
        except StopIteration:
            pass

    def receive_eof(self) -> LinkFailure:
        """Return the error of a connection that the server closed before the link was complete."""
        if self.phase is LinkPhase.DONE:
            message = "the server closed the connection after the link, without a message"
            remedy = SERVER_LOG
        elif self.phase is LinkPhase.TICKET_RESULT:
            message = "the server closed the connection after it received the ticket"
            remedy = SERVER_LOG
        elif self._received:
            message = f"the server closed the connection after {len(self._received)} bytes of {self.phase}"
            remedy = "check that the port is the VM's SPICE port"
        else:
            message = "the server closed the connection without a link reply"
            remedy = "check that the port is the VM's SPICE port; "
            remedy += SERVER_LOG if self.tls else "if it is its TLS port, use spice+tls://HOST:PORT"
        return self._failure(message, Reason.LINK_REFUSED, remedy)

    def _run(self) -> Generator[None, None, None]:
        self._send(bytes(self.mess), f"link {self.mess}")
        header = yield from self._read_header()
        body = yield from self._read(header)
        reply = LinkReply.parse(body)
        if log.isEnabledFor(logging.DEBUG):
            caps = f"common caps {reply.common_caps}, channel caps {reply.channel_caps}"
            log.debug("< %s: link reply %s, %s", self.name, reply.error.name, caps)
        if reply.error:
            raise self._refused(reply.error)

        if has_capability(reply.common_caps, CommonCapability.AUTH_SELECTION):
            if not has_capability(reply.common_caps, CommonCapability.AUTH_SPICE):
                raise self._failure(
                    "the server accepts SASL authentication only, and farplug sends tickets",
                    Reason.LINK_REFUSED,
                    "turn off SASL in the VM's SPICE settings, and use a ticket",
                )
            self._output.append(_U32.pack(AuthMechanism.SPICE))
        self.phase = LinkPhase.TICKET_RESULT
        self._send(encrypt_ticket(reply.public_key, self._password), "ticket")
        (code,) = _U32.unpack((yield from self._read(_U32.size)))
        result = LinkError(code)
        log.debug("< %s: ticket result %s", self.name, result.name)
        main = self.mess.channel_type is ChannelType.MAIN
        if result is LinkError.PERMISSION_DENIED and main and not self._password:
            raise self._failure(
                "the VM requires a password, and none was given",
                Reason.NO_PASSWORD,
                Remedy("give one", setting="target.password"),
                result,
            )
        if result:
            raise self._refused(result)

        self.phase = LinkPhase.DONE
        self.result = LinkResult(
            # for_channel() always sets our bit
            mini_header=has_capability(reply.common_caps, CommonCapability.MINI_HEADER)
            and has_capability(self.mess.common_caps, CommonCapability.MINI_HEADER),
            common_caps=reply.common_caps,
            channel_caps=reply.channel_caps,
            trailing=bytes(self._received),
        )

    def _read_header(self) -> Generator[None, None, int]:
        while MAGIC.startswith(self._received[:4]) and len(self._received) < _HEADER.size:
            yield
        if not self._received.startswith(MAGIC):
            while len(self._received) < 4 and any(first.startswith(self._received) for first, *_ in _OTHER_PROTOCOLS):
                yield
            raise self._not_spice()
        _, major, _, size = _HEADER.unpack((yield from self._read(_HEADER.size)))
        if major != VERSION_MAJOR:
            raise self._failure(
                f"the server has version {major} of SPICE, farplug has {VERSION_MAJOR}.{VERSION_MINOR}",
                Reason.LINK_REFUSED,
                f"use a server (or a proxy) with SPICE {VERSION_MAJOR}.{VERSION_MINOR}",
            )
        if size > MAX_LINK_REPLY:
            raise RemoteProtocolError(f"{self.name}: SPICE link reply of {size} bytes, more than {MAX_LINK_REPLY}")
        return int(size)

    def _read(self, size: int) -> Generator[None, None, bytes]:
        while len(self._received) < size:
            yield
        taken = bytes(self._received[:size])
        del self._received[:size]
        return taken

    def _send(self, data: bytes, what: str) -> None:
        log.debug("> %s: %s", self.name, what)
        self._output.append(data)

    def _refused(self, error: LinkError) -> LinkFailure:
        reason, message, remedy = _LINK_ERRORS.get(
            error, (Reason.LINK_REFUSED, "the server refused the link", SERVER_LOG)
        )
        if error is LinkError.PERMISSION_DENIED and self.mess.channel_type is not ChannelType.MAIN:
            reason, message, remedy = _CHANNEL_DENIED
        return self._failure(f"{message}: {error}", reason, remedy, error)

    def _not_spice(self) -> LinkFailure:
        for first, reason, what, remedy in _OTHER_PROTOCOLS:
            if self._received.startswith(first):
                return self._failure(f"there is {what} on this port", reason, remedy)
        answer = bytes(self._received[:16])
        return self._failure(
            f"there is no SPICE server on this port: the answer begins with {answer!r}",
            Reason.NOT_SPICE,
            "check the port: the port of SPICE is often 5900 or 5930",
        )

    def _failure(self, message: str, reason: Reason, remedy: str = "", error: LinkError | None = None) -> LinkFailure:
        # The main channel represents the whole server: its name would mean nothing to a user.
        where = "" if self.mess.channel_type is ChannelType.MAIN else f"{self.name}: "
        return LinkFailure(f"{where}{message}", reason=reason, remedy=remedy, error=error, phase=self.phase)
