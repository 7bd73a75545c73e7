"""The address of a SPICE server, and the stages of a connection. Apart from what connects, which is a large import."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Self, TypeAlias

from farplug.errors import Reason, UsageError
from farplug.spice.password import check_password
from farplug.spice.types import CHANNEL_NAMES, ChannelType
from farplug.spice.vv import VvFile
from farplug.transport.connection import TcpAddress


class Stage(StrEnum):
    """The stages of a connection attempt."""

    LISTEN = "listen"
    ACCESS = "access"
    REACH = "reach"
    TLS = "tls"
    TICKET = "ticket"
    CHANNELS = "channels"


Progress: TypeAlias = Callable[[Stage, str], None]
"""Called at the start of a stage, with its address."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpiceTarget:
    """The address of a SPICE server, and the credentials.

    Attributes:
        host: name or address; with a proxy, a name for the proxy. Empty with ``unix_path``.
        port: the plain port; None if there is none. It is used if there is no TLS port, and for a channel that the
            server does not serve on its TLS port; not if :attr:`demands_tls`, unless ``allow_plain``.
        tls_port: the TLS port; None if there is none.
        password: the ticket; empty if there is none.
        ca: certificates to trust, PEM; None: the system's.
        host_subject: the certificate's subject, which is checked instead of the host name; None: check the host name.
        proxy: URL of an HTTP proxy; None if there is none.
        unix_path: path of a UNIX socket, instead of host and ports; None if there is none.
        secure_channels: channels (``main``, ``usbredir``, …, or ``all``) that must use TLS.
        allow_plain: use the plain port although the target demands TLS, except for the channels in
            ``secure_channels``.

    Raises:
        UsageError: there is no address, ``secure_channels`` has an unknown name, or the password is not valid in SPICE.
    """

    host: str = ""
    port: int | None = None
    tls_port: int | None = None
    password: str = field(default="", repr=False)
    ca: str | None = field(default=None, repr=False)
    host_subject: str | None = None
    proxy: str | None = field(default=None, repr=False)
    unix_path: str | None = None
    secure_channels: frozenset[str] = frozenset()
    allow_plain: bool = False

    def __post_init__(self) -> None:
        if self.unix_path is None and (not self.host or (self.port is None and self.tls_port is None)):
            raise UsageError(
                "a SPICE target needs a host with a port or a TLS port, or the path of a UNIX socket",
                reason=Reason.BAD_TARGET,
                remedy="write it as spice://HOST:PORT or spice+tls://HOST:PORT",
            )
        if unknown := self.secure_channels - CHANNEL_NAMES:
            raise UsageError(
                f"secure_channels: {min(unknown)[:40]!r} is not a SPICE channel",
                reason=Reason.BAD_TARGET,
                remedy=f"the channels are {', '.join(sorted(CHANNEL_NAMES))}",
            )
        check_password(self.password)

    @classmethod
    def from_vv(cls, vv: VvFile) -> Self:
        """Return the target that a ``.vv`` file describes."""
        return cls(
            host=vv.host,
            port=vv.port,
            tls_port=vv.tls_port,
            password=vv.password,
            ca=vv.ca or None,
            host_subject=vv.host_subject or None,
            proxy=vv.proxy or None,
            secure_channels=vv.secure_channels,
        )

    @property
    def demands_tls(self) -> bool:
        """Return whether the target has certificates, a host subject, or channels that must use TLS.

        Each channel sends the password. Any server that answers on a plain port can read it.
        """
        return bool(self.ca or self.host_subject or (self.secure_channels and self.tls_port is not None))

    def must_use_tls(self, channel_type: ChannelType) -> bool:
        """Return whether ``secure_channels`` names a channel."""
        return not self.secure_channels.isdisjoint({str(channel_type), "all"})

    def __str__(self) -> str:
        if self.unix_path is not None:
            return self.unix_path
        port = self.port if self.tls_port is None else self.tls_port
        return str(TcpAddress(self.host, port or 0))
