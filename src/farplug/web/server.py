"""The web server of the page: files of the page, uploads, pictures of screens, and the websocket.

::

    async with Page.serve(PageSettings(session="web1")) as page:
        print(page.url)
        ...
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import getpass
import importlib.resources
import ipaddress
import logging
import os
import re
import socket
import ssl
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
)
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast
from urllib.parse import quote

import uvicorn
from cryptography import x509
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from farplug.control.messages import ErrorData
from farplug.errors import FarplugError, Reason, Remedy, SetupError, UsageError, from_oserror
from farplug.shell import shell_word
from farplug.text import shown
from farplug.web.board import Board
from farplug.web.files import WebRoot, private_folder
from farplug.web.messages import MAX_TEXT
from farplug.web.relay import BrowserGone, Relay, Site
from farplug.web.security import Origins, Role, Shield, Tokens
from farplug.web.uploads import DEFAULT_QUOTA, Piece, Uploads, WrongOffset, temporary_folder

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

Agents: TypeAlias = "AbstractAsyncContextManager[ASGIApp]"
"""Serves ``/mcp`` while it is entered."""
MCP: Final = "/mcp"
"""The path of the MCP server."""
MAX_WEBSOCKETS: Final = 32
"""Browsers that use the page."""
MAX_GREETINGS: Final = 32
"""Websockets that sent no valid token yet."""
MAX_CONNECTIONS: Final = 256
"""Connections, also those whose TLS handshake is not complete; further ones are closed."""
HANDSHAKE_TIMEOUT: Final = 10.0
"""Seconds of a TLS handshake."""
REQUEST_TIMEOUT: Final = 10.0
"""Seconds in which the header of a request comes."""
SEND_TIMEOUT: Final = 10.0
"""Seconds in which a peer takes a part of an answer that waits for it."""
MAX_PICTURE_BYTES: Final = 128 << 20
"""Bytes of the pictures that are being sent; further ones are refused."""
PICTURE_PIECE: Final = 64 << 10
"""Bytes of a picture that are passed on at a time."""
BACKLOG: Final = 128
"""Connections that wait to be accepted."""
MAX_FRAGMENTS: Final = 1024
"""Frames of one message of a websocket."""
PARSE_AT_ONCE: Final = 12 << 10
"""Bytes of a websocket that are parsed in one turn of the event loop: a frame has 6 bytes at least."""
PING_INTERVAL: Final = 20.0
PING_TIMEOUT: Final = 600.0
"""Seconds between pings of a websocket, and in which it answers: on a slow line a picture may be in its way."""
STOP_TIMEOUT: Final = 2
"""Seconds in which requests end when the page ends."""
SWEEP_INTERVAL: Final = 60.0
"""Seconds between two looks for abandoned uploads."""

_PART: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}", re.ASCII)
TYPES: Final[Mapping[str, str]] = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/vnd.microsoft.icon",
    ".woff2": "font/woff2",
}
"""Media types of files of the page; other files are not served."""
_STATUS: Final[Mapping[Reason, int]] = {
    Reason.VIEW_ONLY: 403,
    Reason.NO_SESSION: 404,
    Reason.NOT_FOUND: 404,
    Reason.EXISTS: 409,
    Reason.IN_USE: 409,
    Reason.TOO_LARGE: 413,
    Reason.BUSY: 503,
    Reason.TIMED_OUT: 504,
    Reason.NO_SPACE: 507,
}
"""Statuses of errors; that of others is 400 for an error of the caller, else 502."""


@dataclass(frozen=True, slots=True)
class PageSettings:
    """What a page is for, and where it listens.

    Attributes:
        session: the name of the only session; None: all sessions of this user.
        address: where the page listens: an address or a name of this machine.
        port: 0: any.
        web_root: the folder below which browsers may name files; None: none.
        upload_quota: bytes of all uploads.
        view_only: make a second link, with which one can only watch.
        certificate: PEM file with the server's certificate, and those that lead to its authority; None: no TLS.
        key: PEM file with its private key.
    """

    session: str | None = None
    address: str = "127.0.0.1"
    port: int = 0
    web_root: str | None = None
    upload_quota: int = DEFAULT_QUOTA
    view_only: bool = False
    certificate: str | None = None
    key: str | None = None


class Page:
    """A page that is served. Made by :meth:`serve`.

    Attributes:
        url: with the token, for the browser of the user.
        view_url: with the token with which one can only watch; None: there is none.
        port: where it listens.
        tokens: who may use it.
        mcp_url: the address of the MCP server, which takes the token for agents; None: there is none.
        private: a folder that only this user can read, which is removed with the page.
    """

    def __init__(self, settings: PageSettings, site: Site, port: int, host: str, private: Path) -> None:
        self.port = port
        self.tokens = site.tokens
        self.private = private
        scheme = "https" if settings.certificate else "http"
        self._base = f"{scheme}://{host}:{port}/#token="
        self._named = f"&session={quote(settings.session)}" if settings.session else ""
        self._agents: ASGIApp | None = None
        self._site = site
        self._websockets = self._greetings = 0
        self._picture_bytes = 0

    @property
    def url(self) -> str:
        """Return the address of the page with its token."""
        return f"{self._base}{self.tokens.full}{self._named}"

    @property
    def view_url(self) -> str | None:
        """Return the address of the page with the token for watching; None: there is none."""
        return None if self.tokens.view is None else f"{self._base}{self.tokens.view}{self._named}"

    @property
    def mcp_url(self) -> str | None:
        """Return the address of the MCP server; None: there is none."""
        return None if self.tokens.agent is None else self._base.partition("/#")[0] + MCP

    @classmethod
    @asynccontextmanager
    async def serve(
        cls, settings: PageSettings, environment: Mapping[str, str] | None = None, agents: Agents | None = None
    ) -> AsyncIterator[Page]:
        """Return a context manager that serves a page.

        Args:
            settings: what it is for.
            environment: the environment variables; None: those of this process.
            agents: an MCP server, for clients with the token for agents.

        Raises:
            UsageError: the web root, the certificate or the key cannot be used; or the page would be reachable from
                other machines without TLS.
            SetupError: the address or the port cannot be used, or a folder cannot be made.
        """
        root = None if settings.web_root is None else WebRoot.of(settings.web_root)
        context = _tls(settings)
        with _listener(settings) as listener, tempfile.TemporaryDirectory(prefix="farplug-page-") as private:
            async with AsyncExitStack() as stack:
                board = Board(Path(private), settings.session, environment)
                if root is None:
                    parent = private_folder(None if environment is None else dict(environment))
                    folder = stack.enter_context(temporary_folder(parent))
                else:
                    folder = Path(root.path) / "uploads"
                    if folder.is_symlink():
                        raise UsageError(
                            f"{folder} is a symbolic link", reason=Reason.OUTSIDE_WEB_ROOT, remedy="make it a folder"
                        )
                uploads = Uploads(folder, settings.upload_quota)
                uploads.to_json()  # raises now, and not for each browser, if the folder cannot be used
                stack.callback(uploads.close)
                tokens = Tokens.make(view=settings.view_only, agent=agents is not None)
                site = Site(tokens, board, uploads, root, settings.session, socket.gethostname(), _user())
                port = listener.getsockname()[1]
                names = [] if context is None else _names(settings)
                page = cls(settings, site, port, _host(settings, names), Path(private))
                origins = Origins.of([*names, _in_url(settings.address)], port, tls=context is not None)
                await stack.enter_async_context(_swept(uploads))
                await stack.enter_async_context(_served(Shield(page._app(), origins), listener, context))
                if agents is not None:
                    page._agents = await stack.enter_async_context(agents)
                yield page

    def _app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/", _index),
                Route("/static/{path:path}", _static),
                Route("/screenshot.png", self._screenshot),
                Route("/media/{name}", self._put, methods=["PUT"]),
                Route(MCP, _Endpoint(self._mcp)),
                WebSocketRoute("/ws", self._websocket),
            ],
            exception_handlers={FarplugError: _failed},
        )

    # Requests -----------------------------------------------------------------------------------------------------

    def _role(self, request: Request, *, agent: bool = False) -> Role | Response:
        """Return the role of a request; or the answer, if its token is not valid here."""
        role = self.tokens.bearer(request.headers.get("authorization"))
        if role is not None and (role is Role.AGENT) is agent:
            return role
        if role is not None:
            return PlainTextResponse("this token is for another address of the page\n", 403)
        if self.tokens.limited:
            return PlainTextResponse("too many wrong tokens\n", 429, {"Retry-After": "10"})
        return PlainTextResponse("the token is not valid\n", 401, {"WWW-Authenticate": "Bearer"})

    async def _screenshot(self, request: Request) -> Response:
        role = self._role(request)
        if isinstance(role, Response):
            return role
        name, display = request.query_params.get("session"), request.query_params.get("display", "0")
        if name is None or not re.fullmatch(r"\d{1,4}", display, re.ASCII):
            raise UsageError("session or display is not valid", reason=Reason.BAD_SETTING)
        board = self._site.board
        make = board.thumbnail if "thumbnail" in request.query_params else board.screenshot
        return _Picture(await make(name, int(display)), self._sending_picture)

    @contextmanager
    def _sending_picture(self, size: int) -> Iterator[None]:
        """Return a context manager that counts the bytes of a picture that is being sent.

        Raises:
            SetupError: ``busy``: there are too many.
        """
        if self._picture_bytes + size > MAX_PICTURE_BYTES:
            raise SetupError(
                f"other browsers still take {self._picture_bytes >> 20} MiB of pictures",
                reason=Reason.BUSY,
                remedy="try again when their downloads have ended",
            )
        self._picture_bytes += size
        try:
            yield
        finally:
            self._picture_bytes -= size

    async def _mcp(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on to the MCP server."""
        app: ASGIApp | Response | None = self._agents
        if app is not None and isinstance(role := self._role(Request(scope), agent=True), Response):
            app = role
        await (app or PlainTextResponse("not found\n", 404))(scope, receive, send)

    async def _put(self, request: Request) -> Response:
        role = self._role(request)
        if isinstance(role, Response):
            return role
        if role is Role.VIEW:
            raise UsageError("this link only lets you watch", reason=Reason.VIEW_ONLY)
        headers = request.headers
        piece = Piece.parse(headers.get("content-range"), headers.get("content-length"))
        try:
            return JSONResponse(await self._site.uploads.put(request.path_params["name"], piece, request.stream()))
        except WrongOffset as error:
            return JSONResponse(error.status, 409)
        except (ClientDisconnect, TimeoutError):
            return PlainTextResponse("the upload was interrupted\n", 408)

    # The websocket ------------------------------------------------------------------------------------------------

    async def _websocket(self, websocket: WebSocket) -> None:
        if self._greetings >= MAX_GREETINGS:
            await websocket.send_denial_response(PlainTextResponse("too many websockets\n", 503))
            return
        greeting = True

        def left_greeting() -> None:
            nonlocal greeting
            if greeting:
                greeting = False
                self._greetings -= 1

        def admitted() -> None:
            if self._websockets >= MAX_WEBSOCKETS:
                raise SetupError(
                    f"{MAX_WEBSOCKETS} browsers use this page", reason=Reason.BUSY, remedy="close one, and try again"
                )
            self._websockets += 1
            left_greeting()

        self._greetings += 1
        try:
            await websocket.accept()
            await Relay(self._site, _Browser(websocket), admitted).run()
        finally:
            if greeting:
                left_greeting()
            else:
                self._websockets -= 1
            with contextlib.suppress(RuntimeError, OSError, WebSocketDisconnect):  # it is closed
                await websocket.close()


class _Browser:
    """The browser's end of a websocket of Starlette."""

    def __init__(self, websocket: WebSocket) -> None:
        self._websocket = websocket

    async def receive(self) -> str | bytes:
        try:
            message = await self._websocket.receive()
        except (RuntimeError, OSError):
            raise BrowserGone from None
        if message["type"] != "websocket.receive":
            raise BrowserGone
        text = message.get("text")
        return text if isinstance(text, str) else bytes(message.get("bytes") or b"")

    async def send(self, text: str, payload: bytes | None = None) -> None:
        try:
            await self._websocket.send_text(text)
            if payload is not None:
                await self._websocket.send_bytes(payload)
        except (WebSocketDisconnect, RuntimeError, OSError):
            raise BrowserGone from None

    async def close(self, code: int, reason: str) -> None:
        try:
            await self._websocket.close(code, reason)
        except (WebSocketDisconnect, RuntimeError, OSError):
            raise BrowserGone from None


class _Picture(Response):
    """A PNG file, of which the connection gets as much as the peer takes.

    Args:
        picture: the file.
        sending: counts its bytes while it is being sent.
    """

    media_type = "image/png"

    def __init__(self, picture: bytes, sending: Callable[[int], AbstractContextManager[None]]) -> None:
        super().__init__(picture)
        self._picture = memoryview(picture)
        self._sending = sending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        picture = self._picture
        with self._sending(len(picture)):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            for start in range(0, len(picture), PICTURE_PIECE):
                piece = bytes(picture[start : start + PICTURE_PIECE])
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


class _Endpoint:
    """An ASGI application as the endpoint of a route, which takes functions for something else."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


# Files of the page ------------------------------------------------------------------------------------------------


async def _index(request: Request) -> Response:
    return _file("index.html")


async def _static(request: Request) -> Response:
    return _file(request.path_params["path"])


def static_folder() -> Traversable:
    """Return the folder of the package with the files of the page."""
    return importlib.resources.files("farplug.web").joinpath("static")


def _file(path: str) -> Response:
    parts = path.split("/")
    kind = TYPES.get(os.path.splitext(parts[-1])[1])
    found = static_folder()
    if kind is not None and len(parts) <= 4 and all(map(_PART.fullmatch, parts)):
        for part in parts:
            found = found.joinpath(part)
        if found.is_file():
            return Response(found.read_bytes(), media_type=kind)
    return PlainTextResponse("not found\n", 404)


async def _failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, FarplugError)
    status = _STATUS.get(error.reason, 400 if isinstance(error, UsageError) else 502)
    return JSONResponse({"error": ErrorData.of(error).to_json()}, status)


# The server -------------------------------------------------------------------------------------------------------


class _HttpProtocol(H11Protocol):
    """The HTTP protocol of uvicorn, with bounds for peers that send no request, or do not take the answer."""

    _waiting: asyncio.TimerHandle | None = None
    """Closes the connection; None: a request is being answered, or the connection is a websocket."""
    _upgraded = False
    _taking: asyncio.TimerHandle | None = None
    """Looks whether the peer takes the answer that waits for it; None: no answer waits."""
    _unsent = 0
    """Bytes of an answer that the peer had not taken at the last look."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        if len(self.connections) > MAX_CONNECTIONS:
            self.transport.abort()
        else:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._stop_looking()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unsent = self.transport.get_write_buffer_size()
        self._taking = self.loop.call_later(SEND_TIMEOUT, self._look)

    def resume_writing(self) -> None:
        self._stop_looking()
        super().resume_writing()

    def _look(self) -> None:
        """Abort the connection if the peer has taken nothing since the last look."""
        self._taking = None
        left = self.transport.get_write_buffer_size()
        if left == self._unsent:
            self.transport.abort()
        else:
            self._unsent = left
            self._taking = self.loop.call_later(SEND_TIMEOUT, self._look)

    def _stop_looking(self) -> None:
        if self._taking is not None:
            self._taking.cancel()
            self._taking = None

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        elif not self._upgraded:
            self._wait()

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection that is idle; abort one whose peer does not take the answer."""
        left = self.transport.get_write_buffer_size()
        if left == 0:
            super().timeout_keep_alive_handler()
        elif left == self._unsent:
            self.transport.abort()
        else:
            self._unsent = left
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def handle_websocket_upgrade(self, event: Any) -> None:
        self._upgraded = True
        self._stop_waiting()
        super().handle_websocket_upgrade(event)

    def _wait(self) -> None:
        if self._waiting is None:
            self._waiting = asyncio.get_running_loop().call_later(REQUEST_TIMEOUT, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None


class _Handshakes:
    """The TLS handshakes of a server, which count as connections.

    The event loop would shake hands before uvicorn has the connection: without a bound, and for a minute.

    Args:
        context: of the server's TLS.
    """

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        self._pending: dict[asyncio.Transport, asyncio.Task[None]] = {}

    def protocol(self, **arguments: Any) -> asyncio.Protocol:
        """Return the protocol of a new connection, without TLS yet; the arguments are those of uvicorn."""
        return _Handshake(self, _HttpProtocol(**arguments))

    def begin(self, transport: asyncio.Transport, handshake: _Handshake) -> None:
        """Begin the handshake of a connection."""
        transport.pause_reading()
        if len(self._pending) + len(handshake.http.connections) >= MAX_CONNECTIONS:
            transport.abort()
        else:
            self._pending[transport] = asyncio.ensure_future(self._shake(transport, handshake))

    async def _shake(self, transport: asyncio.Transport, handshake: _Handshake) -> None:
        try:
            encrypted = await asyncio.get_running_loop().start_tls(
                transport, handshake, self._context, server_side=True, ssl_handshake_timeout=HANDSHAKE_TIMEOUT
            )
        except (OSError, asyncio.CancelledError):
            transport.abort()
        else:
            handshake.end(encrypted)
        finally:
            del self._pending[transport]

    async def close(self) -> None:
        """End all handshakes."""
        tasks = [*self._pending.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


class _Handshake(asyncio.Protocol):
    """A connection until its TLS handshake is complete.

    Args:
        handshakes: those of the server.
        http: the protocol of the connection afterwards.
    """

    def __init__(self, handshakes: _Handshakes, http: _HttpProtocol) -> None:
        self.http = http
        self._handshakes = handshakes
        self._received = b""
        """What came with the end of the handshake."""
        self._lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._handshakes.begin(transport, self)

    def data_received(self, data: bytes) -> None:
        self._received += data

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True

    def end(self, transport: asyncio.Transport | None) -> None:
        """Pass the connection on, unless it is lost."""
        if transport is None or self._lost:
            return
        transport.set_protocol(self.http)
        self.http.connection_made(transport)
        if self._received:
            self.http.data_received(self._received)


class _WebSocketProtocol(WebSocketsSansIOProtocol):
    """The websocket protocol of uvicorn, with bounds for what a peer can make it keep, and for its work in one turn."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unparsed = bytearray()
        self._parsing: asyncio.Handle | None = None
        """Parses the rest in the next turn."""

    def data_received(self, data: bytes) -> None:
        if not self._unparsed and len(data) <= PARSE_AT_ONCE:
            super().data_received(data)
            return
        self._unparsed += data
        if self._parsing is None:
            self._parse()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._parsing is not None:
            self._parsing.cancel()
        super().connection_lost(exc)

    async def receive(self) -> Any:
        message = await super().receive()
        if self._unparsed:
            self.transport.pause_reading()  # the rest comes first
        return message

    def _parse(self) -> None:
        """Parse a part of what was received, and the rest in the next turn; then read on."""
        self._parsing = None
        piece = bytes(memoryview(self._unparsed)[:PARSE_AT_ONCE])
        del self._unparsed[:PARSE_AT_ONCE]
        super().data_received(piece)
        if self.transport.is_closing():
            return
        if self._unparsed:
            self.transport.pause_reading()
            self._parsing = self.loop.call_soon(self._parse)
        elif not self.read_paused:
            self.transport.resume_reading()

    def handle_cont(self, event: Any) -> None:
        if len(self.frames) >= MAX_FRAGMENTS:
            self.transport.abort()
        else:
            super().handle_cont(event)

    def handle_ping(self) -> None:
        if self.writable.is_set():
            super().handle_ping()
        else:
            self.transport.abort()  # the peer reads no answers


class _Server(uvicorn.Server):
    """A server that leaves signals to its caller."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()


@asynccontextmanager
async def _served(app: Any, listener: socket.socket, context: ssl.SSLContext | None) -> AsyncIterator[None]:
    for name in ("uvicorn", "uvicorn.error"):  # lines about invalid requests, which any peer can cause
        logger = logging.getLogger(name)
        logger.propagate = False
        logger.handlers = [logging.NullHandler()]

    handshakes = None if context is None else _Handshakes(context)
    config = uvicorn.Config(
        app,
        http=_HttpProtocol if handshakes is None else cast("type[asyncio.Protocol]", handshakes.protocol),
        ws=_WebSocketProtocol,
        ws_max_size=MAX_TEXT,
        ws_per_message_deflate=False,  # it would compress files of browsers, too
        ws_ping_interval=PING_INTERVAL,
        ws_ping_timeout=PING_TIMEOUT,
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=STOP_TIMEOUT,
    )
    server = _Server(config)
    serving = asyncio.ensure_future(server.serve([listener]))
    started = asyncio.ensure_future(server.listening.wait())
    try:
        await asyncio.wait([serving, started], return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            await serving
        yield
    finally:
        started.cancel()
        server.should_exit = True
        if handshakes is not None:
            await handshakes.close()
        await asyncio.wait([serving])


@asynccontextmanager
async def _swept(uploads: Uploads) -> AsyncIterator[None]:
    """Return a context manager that removes abandoned uploads."""
    task = asyncio.ensure_future(_sweep(uploads))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def _sweep(uploads: Uploads) -> None:
    while True:
        await asyncio.sleep(SWEEP_INTERVAL)
        uploads.sweep()


# Where the page listens -------------------------------------------------------------------------------------------


@contextmanager
def _listener(settings: PageSettings) -> Iterator[socket.socket]:
    """Return a context manager with the socket on which the page listens."""
    address, port = settings.address, settings.port
    try:
        family, kind, _, _, where = socket.getaddrinfo(
            address.strip("[]") or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, ValueError) as error:
        remedy = Remedy("name an address of this machine, such as 127.0.0.1")
        if with_port := re.fullmatch(r"[^:]*:(\d{1,5})|\[.*\]:(\d{1,5})", address):
            number = int(with_port[1] or with_port[2])
            remedy = Remedy("name the address alone; the port is a setting of its own", setting="port", value=number)
        raise UsageError(f"{shown(address)} cannot be resolved", reason=Reason.UNRESOLVABLE, remedy=remedy) from error
    if settings.certificate is None and not ipaddress.ip_address(str(where[0]).partition("%")[0]).is_loopback:
        raise UsageError(
            f"{shown(address)} is reached from other machines, and without TLS the network between can read the token",
            reason=Reason.NEEDS_TLS,
            remedy=Remedy(
                "let the page listen on this machine only, and reach it through ssh:",
                command=f"ssh -L {port or 8000}:127.0.0.1:{port or 8000} {socket.gethostname()}",
                alternative=Remedy("or serve it over TLS, with a certificate and its key", setting="tls_cert"),
            ),
        )
    listener = socket.socket(family, kind)
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setblocking(False)
        try:
            listener.bind(where)
            listener.listen(BACKLOG)
        except OSError as error:
            raise _not_listening(f"{_in_url(address)}:{port}", error) from error
        yield listener
    finally:
        listener.close()


def _not_listening(where: str, error: OSError) -> SetupError:
    if error.errno == errno.EADDRINUSE:
        return SetupError(
            f"another program listens on {where}",
            reason=Reason.IN_USE,
            remedy=Remedy("choose another port; 0 takes any that is free", setting="port", value=0),
        )
    return from_oserror(where, error, as_=SetupError, problem="cannot be listened on", remedy="choose another one")


def _user() -> str:
    """Return the name of this user; its number in a container that knows no name for it."""
    try:
        return getpass.getuser()
    except (ImportError, KeyError, OSError):
        if sys.platform == "win32":
            return ""
        return str(os.geteuid())


def _in_url(address: str) -> str:
    """Return an address as it stands in a URL."""
    return f"[{address.strip('[]')}]" if ":" in address else address


def _host(settings: PageSettings, names: list[str]) -> str:
    """Return the host of the page's URL."""
    if settings.address.strip("[]") not in ("", "0.0.0.0", "::"):
        return _in_url(settings.address)
    return next((name for name in names if "*" not in name), socket.gethostname())


# TLS --------------------------------------------------------------------------------------------------------------


def _tls(settings: PageSettings) -> ssl.SSLContext | None:
    """Return the context of the server's TLS; None: there is none.

    Raises:
        UsageError: one of the two files is missing, or they cannot be used.
    """
    certificate, key = settings.certificate, settings.key
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise UsageError(
            f"TLS needs a certificate and its key, and the {'key' if key is None else 'certificate'} is missing",
            reason=Reason.BAD_OPTION,
            remedy=Remedy("name both files", setting="tls_key" if key is None else "tls_cert"),
        )
    for path in (certificate, key):
        try:
            with open(path, "rb") as file:
                file.read(1)
        except (OSError, ValueError) as error:
            raise from_oserror(path, error, as_=UsageError, remedy="name a file in PEM form") from error

    def no_password() -> str:
        raise UsageError(
            f"{key} is encrypted",
            reason=Reason.BAD_OPTION,
            remedy=Remedy("decrypt it first:", command=f"openssl pkey -in {shell_word(key)} -out plain-key.pem"),
        )

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key, no_password)
    except ssl.SSLError as error:
        raise UsageError(
            f"{certificate} and {key} are not a certificate and its key: {error.reason or error}",
            reason=Reason.BAD_OPTION,
            remedy="name PEM files that belong together",
        ) from error
    return context


def _names(settings: PageSettings) -> list[str]:
    """Return the hosts for which the certificate is: its subject alternative names."""
    assert settings.certificate is not None
    try:
        certificate = x509.load_pem_x509_certificate(Path(settings.certificate).read_bytes())
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return [socket.gethostname(), socket.getfqdn()]
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{settings.certificate} cannot be read: {error}",
            reason=Reason.BAD_OPTION,
            remedy="name a certificate in PEM form",
        ) from error
    addresses = [_in_url(str(address)) for address in names.get_values_for_type(x509.IPAddress)]
    return [*names.get_values_for_type(x509.DNSName), *addresses]
