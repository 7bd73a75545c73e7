"""HTTP proxies: a tunnel by CONNECT (RFC 9110, section 9.3.6), as Proxmox's ``.vv`` files ask for.

The host in CONNECT goes to the proxy as it stands in the ``.vv`` file: for Proxmox it is a ticket, not a name.
"""

from __future__ import annotations

import asyncio
import base64
import re
import socket
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import unquote, urlsplit

from farplug.errors import Reason, TargetError, UsageError
from farplug.transport.connection import TcpAddress

DEFAULT_PORT = 3128
"""The port of a proxy that names none (spice-gtk's default, too)."""
MAX_REPLY = 16 << 10
"""The largest header of a proxy's reply that we take, in bytes."""


@dataclass(frozen=True, slots=True)
class HttpProxy:
    """Where an HTTP proxy is, and what it asks for.

    Attributes:
        address: of the proxy.
        credentials: ``user:password``; None if it asks for none.
    """

    address: TcpAddress
    credentials: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, url: str) -> Self:
        """Parse ``[http://][user:password@]host[:port][/]``. Raises UsageError, which never names the password."""
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            host, port = parts.hostname, parts.port
        except ValueError:
            raise UsageError("the proxy's URL is malformed", reason=Reason.BAD_TARGET, remedy=_REMEDY) from None
        if parts.scheme != "http":
            raise UsageError(
                f"a proxy by {parts.scheme[:20]} is not supported, only by http",
                reason=Reason.BAD_TARGET,
                remedy=_REMEDY,
            )
        if not host or parts.path not in ("", "/") or parts.query or parts.fragment:
            raise UsageError("the proxy's URL has no host, or a path", reason=Reason.BAD_TARGET, remedy=_REMEDY)
        credentials = None
        if parts.username is not None:
            user, password = (
                unquote(text or "", errors="surrogateescape") for text in (parts.username, parts.password)
            )
            credentials = f"{user}:{password}"
        return cls(TcpAddress(host, DEFAULT_PORT if port is None else port), credentials)

    def connect_request(self, target: TcpAddress) -> bytes:
        """The CONNECT request. Raises UsageError if the target's host cannot stand in one."""
        if not re.fullmatch(r"[\x21-\x7e]+", target.host):
            raise UsageError(
                "the host holds characters that no proxy takes", reason=Reason.BAD_TARGET, remedy="check the .vv file"
            )
        lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
        if self.credentials is not None:
            encoded = base64.b64encode(self.credentials.encode("utf-8", "surrogateescape"))
            lines.append(f"Proxy-Authorization: Basic {encoded.decode()}")
        return "\r\n".join([*lines, "", ""]).encode("ascii")


_REMEDY = "write it as http://HOST:PORT or http://USER:PASSWORD@HOST:PORT"


async def open_tunnel(sock: socket.socket, proxy: HttpProxy, target: TcpAddress, timeout: float) -> None:
    """Make a socket that is connected to a proxy lead to the target.

    Args:
        sock: connected to the proxy, non-blocking. The caller closes it on failure.
        proxy: who is asked.
        target: where the tunnel leads.
        timeout: seconds.

    Raises:
        UsageError: the target's host cannot stand in a request.
        TargetError: the proxy refused, or does not answer like one.
    """
    request = proxy.connect_request(target)
    loop = asyncio.get_running_loop()
    reply = bytearray()
    try:
        async with asyncio.timeout(timeout):
            await loop.sock_sendall(sock, request)
            while (end := _end_of_header(reply)) < 0:
                if len(reply) >= MAX_REPLY:
                    raise _error(proxy, f"its reply's header is larger than {MAX_REPLY} bytes")
                data = await loop.sock_recv(sock, 4096)
                if not data:
                    raise _error(proxy, f"it closed the connection after {len(reply)} bytes of its reply")
                reply += data
                if not reply.startswith(b"HTTP/"[: len(reply)]):
                    raise _error(proxy, f"it does not speak HTTP: its answer begins with {bytes(reply[:16])!r}")
    except TimeoutError:
        raise _error(proxy, f"no answer to CONNECT within {timeout:g} s") from None
    except OSError as error:
        raise _error(proxy, f"the connection broke: {error.strerror or error}") from error
    status = bytes(reply.splitlines()[0]).decode("latin-1")
    line = "".join(char if char.isprintable() else "?" for char in status[:200])
    match = re.match(r"HTTP/1\.[0-9] ([0-9]{3})\b", line)
    if match is None:
        raise _error(proxy, f"its answer is malformed: {line}")
    if match[1] == "407":
        raise _error(proxy, f"it asks for a password: {line}", _REMEDY)
    if not match[1].startswith("2"):
        raise _error(proxy, f"it refused the tunnel: {line}", "if the .vv file is old, fetch a new one: it expires")
    if len(reply) > end:
        raise _error(proxy, f"{len(reply) - end} bytes came out of the tunnel before we sent any")


def _end_of_header(reply: bytearray) -> int:
    found = re.search(rb"\r?\n\r?\n", reply)
    return found.end() if found else -1


def _error(proxy: HttpProxy, what: str, remedy: str = "check the proxy's address") -> TargetError:
    return TargetError(f"proxy {proxy.address}: {what}", reason=Reason.PROXY, remedy=remedy)
