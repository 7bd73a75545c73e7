"""The MCP server over HTTP: an ASGI application, for a web server that checks who may use it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from mcp.server.transport_security import TransportSecuritySettings

from farplug.agents.server import AgentServer

if TYPE_CHECKING:
    from starlette.types import ASGIApp

MAX_SESSIONS: Final = 16
"""Clients at a time; a client that goes without a word counts for half an hour."""
MAX_REQUEST: Final = 1 << 20
"""Bytes of a request."""


@asynccontextmanager
async def http_app(server: AgentServer, path: str) -> AsyncIterator[ASGIApp]:
    """Return a context manager for the server as an ASGI application ("streamable HTTP"); at its end all clients leave.

    All clients are one party: they share the last image, the keyboard and the mouse.

    Args:
        server: the MCP server.
        path: of the only endpoint.

    The application checks neither ``Host`` nor ``Origin`` nor a token.
    """
    app = server.streamable_http_app(
        streamable_http_path=path,
        max_sessions=MAX_SESSIONS,
        max_request_body_size=MAX_REQUEST,
        transport_security=TransportSecuritySettings(enable_dns_rebinding_protection=False),
    )
    async with app.router.lifespan_context(app):
        yield app
