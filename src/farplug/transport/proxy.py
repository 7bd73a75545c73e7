"""HTTP proxies: a tunnel by CONNECT (RFC 9110, section 9.3.6), which ``.vv`` files of Proxmox need.

The host in CONNECT is that of the ``.vv`` file, unchanged: for Proxmox it is a ticket, not a name.
"""

from __future__ import annotations

import asyncio
import base64
import re
import socket
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import unquote

from farplug.errors import Reason, TargetError, UsageError
from farplug.spice.host import split_host_and_port
from farplug.text import printable
from farplug.transport.connection import TcpAddress

DEFAULT_PORT = 3128
"""The default port of a proxy, as in spice-gtk."""
MAX_REPLY = 16 << 10
"""The largest header of a proxy's reply that we accept, in bytes."""


@dataclass(frozen=True, slots=True)
class HttpProxy:
    """An HTTP proxy.

    Attributes:
        address: of the proxy.
        credentials: ``user:password``; None if the proxy needs none.
    """

    address: TcpAddress
    credentials: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, url: str) -> Self:
        """Parse ``[http://][user:password@]host[:port][/]``. Raises UsageError, never with the password in it."""
        scheme, separator, rest = url.partition("://")
        if not separator:
            scheme, rest = "http", url
        if not re.fullmatch("[A-Za-z][A-Za-z0-9+.-]*", scheme):
            raise _bad("it has no scheme")
        if scheme.lower() != "http":
            raise UsageError(
                f"{scheme[:20]} proxies are not supported, only http", reason=Reason.BAD_TARGET, remedy=_REMEDY
            )
        if re.search(r"[\x00-\x20\x7f]", rest):
            raise _bad("it contains a space or a control character")
        authority = re.split("[/?#]", rest, maxsplit=1)[0]
        if rest[len(authority) :] not in ("", "/"):
            raise _bad("nothing may follow the port")
        credentials, at, address = authority.rpartition("@")
        try:
            host, port = split_host_and_port(address, port_required=False)
        except ValueError as error:
            raise _bad(str(error)) from None
        if not host:
            raise _bad("it has no host")
        if port == 0:
            raise _bad("a port is a number from 1 to 65535")
        user, _, password = (unquote(text, errors="surrogateescape") for text in credentials.partition(":"))
        return cls(TcpAddress(host, DEFAULT_PORT if port is None else port), f"{user}:{password}" if at else None)

    def connect_request(self, target: TcpAddress) -> bytes:
        """Return the CONNECT request. Raises UsageError if the target's host is not valid in a request."""
        if not re.fullmatch(r"[\x21-\x7e]+", target.host):
            raise UsageError(
                "the host contains characters that are not valid in a request to a proxy",
                reason=Reason.BAD_TARGET,
                remedy="check the .vv file",
            )
        lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
        if self.credentials is not None:
            encoded = base64.b64encode(self.credentials.encode("utf-8", "surrogateescape"))
            lines.append(f"Proxy-Authorization: Basic {encoded.decode()}")
        return "\r\n".join([*lines, "", ""]).encode("ascii")


_REMEDY = "write it as http://HOST:PORT or http://USER:PASSWORD@HOST:PORT"


def _bad(why: str) -> UsageError:
    return UsageError(f"the proxy's URL is not valid: {why}", reason=Reason.BAD_TARGET, remedy=_REMEDY)


async def open_tunnel(sock: socket.socket, proxy: HttpProxy, target: TcpAddress, timeout: float) -> None:
    """Open a tunnel to the target on a socket that is connected to a proxy.

    Args:
        sock: connected to the proxy, non-blocking. The caller closes it on failure.
        proxy: the proxy.
        target: the end of the tunnel.
        timeout: seconds.

    Raises:
        UsageError: the target's host is not valid in a request.
        TargetError: the proxy refused the tunnel, or its reply is not valid.
    """
    request = proxy.connect_request(target)
    loop = asyncio.get_running_loop()
    reply = bytearray()
    try:
        async with asyncio.timeout(timeout):
            await loop.sock_sendall(sock, request)
            while (end := _end_of_header(reply)) < 0:
                if len(reply) >= MAX_REPLY:
                    raise _error(proxy, f"the header of its reply is larger than {MAX_REPLY} bytes")
                data = await loop.sock_recv(sock, 4096)
                if not data:
                    raise _error(proxy, f"it closed the connection after {len(reply)} bytes of its reply")
                reply += data
                if not reply.startswith(b"HTTP/"[: len(reply)]):
                    raise _error(proxy, f"its reply is not HTTP, and begins with {bytes(reply[:16])!r}")
    except TimeoutError:
        raise _error(proxy, f"no reply to CONNECT within {timeout:g} s") from None
    except OSError as error:
        raise _error(proxy, f"the connection broke: {error.strerror or error}") from error
    status = bytes(reply.splitlines()[0]).decode("latin-1")
    line = printable(status, 200)
    match = re.match(r"HTTP/1\.[0-9] ([0-9]{3})\b", line)
    if match is None:
        raise _error(proxy, f"its reply is malformed: {line}")
    if match[1] == "407":
        raise _error(proxy, f"it requires a password: {line}", _REMEDY)
    if not match[1].startswith("2"):
        raise _error(proxy, f"it refused the tunnel: {line}", "if the .vv file is old, get a new one: it expires")
    if len(reply) > end:
        raise _error(proxy, f"{len(reply) - end} bytes came through the tunnel before we sent anything")


def _end_of_header(reply: bytearray) -> int:
    found = re.search(rb"\r?\n\r?\n", reply)
    return found.end() if found else -1


def _error(proxy: HttpProxy, what: str, remedy: str = "check the proxy's address") -> TargetError:
    return TargetError(f"proxy {proxy.address}: {what}", reason=Reason.PROXY, remedy=remedy)
