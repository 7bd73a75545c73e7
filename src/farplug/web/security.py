"""Who may use the page: hosts and origins, tokens, and the headers of every answer.

A page of the Internet that runs in the browser of this machine can send requests to 127.0.0.1. It can neither choose
``Host`` and ``Origin``, nor read the token, which is in the fragment of the URL and in no cookie.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from enum import StrEnum
from hmac import compare_digest
from typing import TYPE_CHECKING, Any, Final

from farplug.rate_limit import limited_logger
from farplug.text import shown

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = limited_logger(__name__)

TOKEN_BYTES: Final = 32
"""Random bytes of a token."""
MAX_TOKEN: Final = 128
"""Characters of a token that is compared."""
MAX_BAD_TOKENS: Final = 5
BAD_TOKENS_INTERVAL: Final = 10.0
"""Wrong tokens in this number of seconds; further wrong ones get the status 429, or the close code 4429."""
LOOPBACK_HOSTS: Final = ("127.0.0.1", "localhost", "[::1]")
"""Names of this machine in a URL."""

HEADERS: Final[Mapping[str, str]] = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
"""Headers of every answer."""


class Role(StrEnum):
    """What the owner of a token may do."""

    FULL = "full"
    VIEW = "view"
    """See sessions and screens, and change nothing."""
    AGENT = "agent"
    """Use the MCP server, and nothing else."""


def _new() -> str:
    return secrets.token_urlsafe(TOKEN_BYTES)


@dataclass(slots=True)
class Tokens:
    """The tokens of a page, and the wrong ones that came recently.

    A correct token is accepted however many wrong ones came, so that no other user of this machine can lock the user
    out.

    Attributes:
        full: gives all rights.
        view: gives the rights of :attr:`Role.VIEW`; None: there is none.
        agent: gives the rights of :attr:`Role.AGENT`; None: there is none.
    """

    full: str
    view: str | None = None
    agent: str | None = field(default=None, kw_only=True)
    _clock: Callable[[], float] = time.monotonic
    _bad: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_BAD_TOKENS))

    @classmethod
    def make(cls, *, view: bool = False, agent: bool = False) -> Tokens:
        """Return new tokens."""
        return cls(_new(), _new() if view else None, agent=_new() if agent else None)

    def role(self, token: object) -> Role | None:
        """Return the role of a token; None: it is not valid, and counts as a wrong one."""
        text = token.encode("utf-8", "replace") if isinstance(token, str) and len(token) <= MAX_TOKEN else b""
        tokens = ((Role.FULL, self.full), (Role.VIEW, self.view or _new()), (Role.AGENT, self.agent or _new()))
        for role in [role for role, one in tokens if compare_digest(text, one.encode())]:
            return role
        self._bad.append(self._clock())
        return None

    @property
    def limited(self) -> bool:
        """Return whether more than :data:`MAX_BAD_TOKENS` wrong tokens came in :data:`BAD_TOKENS_INTERVAL` seconds.

        Call it after :meth:`role` returned None.
        """
        if len(self._bad) < MAX_BAD_TOKENS:
            return False
        return self._clock() - self._bad[0] < BAD_TOKENS_INTERVAL

    def bearer(self, authorization: str | None) -> Role | None:
        """Return the role of the header ``Authorization: Bearer TOKEN`` (RFC 6750); None: it is not valid."""
        scheme, _, token = (authorization or "").partition(" ")
        return self.role(token.strip() if scheme.lower() == "bearer" else None)


@dataclass(frozen=True, slots=True)
class Origins:
    """The hosts by which the page may be addressed.

    Attributes:
        hosts: names and addresses as they stand in a URL, such as ``127.0.0.1``, ``[::1]`` and ``*.example.org``, whose
            ``*`` is one label.
        port: of the page.
        tls: the page is served over TLS.
    """

    hosts: frozenset[str]
    port: int
    tls: bool = False

    @classmethod
    def of(cls, hosts: Iterable[str], port: int, *, tls: bool = False) -> Origins:
        """Return the origins of a page with these hosts besides those of the loopback interface."""
        return cls(frozenset((*LOOPBACK_HOSTS, *(host.lower() for host in hosts))), port, tls)

    def allows_host(self, header: str) -> bool:
        """Return whether a value of the header ``Host`` is the page's, with its port (RFC 9110, section 7.2)."""
        host, mark, port = header.lower().rpartition(":")
        if not mark or port.endswith("]"):  # the scheme's default port
            host, port = header.lower(), "443" if self.tls else "80"
        return port == str(self.port) and self._is_host(host)

    def allows_origin(self, header: str) -> bool:
        """Return whether a value of the header ``Origin`` is the page's (RFC 6454, section 7)."""
        scheme, mark, host = header.partition("://")
        return bool(mark) and scheme == ("https" if self.tls else "http") and self.allows_host(host)

    def _is_host(self, host: str) -> bool:
        first, _, rest = host.partition(".")
        return "*" not in host and (host in self.hosts or (bool(first) and f"*.{rest}" in self.hosts))


class Shield:
    """ASGI middleware that refuses other hosts and origins, and adds :data:`HEADERS` to every answer.

    ``Host`` must be there once. ``Origin`` may be missing, but not of a websocket: browsers always send it then.
    """

    def __init__(self, app: ASGIApp, origins: Origins) -> None:
        self._app = app
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request; see the ASGI specification."""

        async def with_headers(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                message["headers"] = _merged(message.get("headers", ()))
            await send(message)

        problem = self._problem(scope)
        if problem:
            log.warning("the page refused a request: %s", problem)
            await refuse(scope, with_headers, 403, problem)
            return
        answered = False

        async def watched(message: Message) -> None:
            nonlocal answered
            answered = True
            await with_headers(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            log.exception("a request of the page failed")
            if not answered:
                await refuse(scope, with_headers, 500, "internal error: please report it")

    def _problem(self, scope: Scope) -> str:
        headers: list[tuple[bytes, bytes]] = list(scope["headers"])
        hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
        origins = [value.decode("latin-1") for name, value in headers if name == b"origin"]
        if len(hosts) != 1 or not self._origins.allows_host(hosts[0]):
            return f"the header Host is {shown(', '.join(hosts))}, which is not an address of this page"
        if len(origins) > 1 or not all(map(self._origins.allows_origin, origins)):
            return f"the header Origin is {shown(', '.join(origins))}, which is not this page"
        if scope["type"] == "websocket" and not origins:
            return "the header Origin is missing"
        return ""


def _merged(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    own = {name.encode(): value.encode() for name, value in HEADERS.items()}
    return [*((name, value) for name, value in headers if name.lower() not in own), *own.items()]


async def refuse(scope: MutableMapping[str, Any], send: Send, status: int, text: str) -> None:
    """Answer a request, or a websocket before it is accepted, with a status and a line of text."""
    kind = "websocket.http.response" if scope["type"] == "websocket" else "http.response"
    body = f"{text}\n".encode("utf-8", "replace")
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": f"{kind}.start", "status": status, "headers": headers})
    await send({"type": f"{kind}.body", "body": body})
