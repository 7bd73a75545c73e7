"""One websocket: it greets the browser, answers the methods of the page, and relays the others to a session."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol

from farplug.control.messages import Id, major
from farplug.errors import FarplugError, InternalError, Reason, RemoteProtocolError, StateError, UsageError
from farplug.rate_limit import limited_logger
from farplug.text import printable, shown
from farplug.version import __version__
from farplug.web import methods, shell
from farplug.web.board import INTERVAL, Board
from farplug.web.files import NoFiles, WebRoot
from farplug.web.line import ScreenLine
from farplug.web.link import SessionLink
from farplug.web.messages import MAX_TEXT, Call, FrameReceiver, event_text, failure_text, reply_text
from farplug.web.security import Role, Tokens
from farplug.web.uploads import SCHEME, Uploads

log = limited_logger(__name__)

VERSION: Final = "1.1"
"""The version of the control protocol that the page has."""
MAX_PENDING: Final = 16
"""Requests of a browser whose replies are not sent; further ones wait."""
MAX_WAITING: Final = 64
MAX_WAITING_BYTES: Final = 4 << 20
"""Requests of a browser that wait, and their bytes; with more, nothing is read of it."""
HELLO_TIMEOUT: Final = 10.0
"""Seconds in which a browser sends ``hello``."""
BINARY_TIMEOUT: Final = 10.0
"""Seconds in which the binary frame follows its message."""
DEFLATE: Final = "deflate"
"""The encoding of pictures for slow lines: the format of RFC 1950, which HTTP names so."""
MAX_CLIENT_NAME: Final = 64
"""Characters of the name of a client."""

BAD_TOKEN: Final = 4401
TOO_MANY_BAD_TOKENS: Final = 4429
PROTOCOL_ERROR: Final = 4400
INTERNAL_ERROR: Final = 4500
TOO_MANY: Final = 4503
"""Close codes of the websocket."""


class Browser(Protocol):
    """The browser's end of a websocket."""

    async def receive(self) -> str | bytes:
        """Return the next frame.

        Raises:
            BrowserGone: the websocket is closed.
        """
        ...

    async def send(self, text: str, payload: bytes | None = None) -> None:
        """Send a text frame, and a binary frame behind it. Return when there is room for more.

        Raises:
            BrowserGone: the websocket is closed.
        """
        ...

    async def close(self, code: int, reason: str) -> None:
        """Close the websocket."""
        ...


class BrowserGone(Exception):
    """The websocket is closed."""


@dataclass(frozen=True, slots=True)
class Site:
    """What all websockets of a page share.

    Attributes:
        tokens: who may use it.
        board: the sessions.
        uploads: what browsers uploaded.
        root: the files that a browser may name; None: none.
        session: the name of the only session; None: all.
        machine: the name of this machine.
        user: the name of the user whose sessions they are.
    """

    tokens: Tokens
    board: Board
    uploads: Uploads
    root: WebRoot | None = None
    session: str | None = None
    machine: str = ""
    user: str = ""

    def existing(self, path: str) -> str:
        """Return the absolute path of an upload, or of a file below the web root.

        Raises:
            UsageError: there is none.
        """
        if path.startswith(SCHEME):
            return self.uploads.existing(path)
        return (self.root or NoFiles()).existing(path)

    def new(self, path: str) -> str:
        """Return the absolute path of a file below the web root, which may not exist yet.

        Raises:
            UsageError: it cannot be there.
        """
        return (self.root or NoFiles()).new(path)


class Relay:
    """Serves one websocket.

    Args:
        site: what all websockets share.
        browser: the browser.
        admitted: called when the browser has sent a valid token; raises an error if there are too many.
    """

    def __init__(self, site: Site, browser: Browser, admitted: Callable[[], None]) -> None:
        self._site = site
        self._browser = browser
        self._admitted = admitted
        self._role = Role.VIEW
        self._client = ""
        self._line: ScreenLine | None = None
        """Whether pictures are compressed; None: the browser takes none that are."""
        self._frames = FrameReceiver()
        self._waiting: deque[Call] = deque()
        self._pending: set[Id] = set()
        self._changed = asyncio.Event()
        """Something was received, is done, or is over."""
        self._sending = asyncio.Lock()
        self._opening = asyncio.Lock()
        self._link: SessionLink | None = None
        self._relaying: asyncio.Task[None] | None = None
        self._displays: set[tuple[str, int]] = set()
        """Sessions with displays that the browser watches."""
        self._board: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Serve the browser until its websocket, or this task, ends."""
        try:
            if await self._greet():
                self._start(self._receive())
                self._start(self._dispatch())
                await self._over
        except BrowserGone:
            pass
        except RemoteProtocolError as error:
            await self._close(PROTOCOL_ERROR, error)
        except InternalError as error:
            await self._close(INTERNAL_ERROR, error)
        finally:
            await self._end()

    # Greeting -----------------------------------------------------------------------------------------------------

    async def _greet(self) -> bool:
        """Receive ``hello``; return whether the browser may use the page."""
        try:
            async with asyncio.timeout(HELLO_TIMEOUT):
                call = await self._next()
        except TimeoutError:
            raise RemoteProtocolError(f"no hello came in {HELLO_TIMEOUT:g} seconds") from None
        params = call.request.params
        if call.request.method != methods.HELLO:
            raise RemoteProtocolError("the first request must be hello")
        role = self._site.tokens.role(params.get("token"))
        if role is None or role is Role.AGENT:
            limited = self._site.tokens.limited
            log.warning("a browser sent a wrong token")
            await self._browser.close(
                TOO_MANY_BAD_TOKENS if limited else BAD_TOKEN,
                "too many wrong tokens" if limited else "the token is not valid",
            )
            return False
        version = params.get("protocol_version")
        if not isinstance(version, str) or major(version) != major(VERSION):
            raise RemoteProtocolError(f"the page has version {VERSION} of the protocol, the browser {shown(version)}")
        try:
            self._admitted()
        except FarplugError as error:
            await self._close(TOO_MANY, error)
            return False
        self._role = role
        self._frames.max_text = MAX_TEXT
        encodings = params.get("encodings")
        if isinstance(encodings, list) and DEFLATE in encodings:
            self._line = ScreenLine()
        name = params.get("client_name")
        self._client = printable(name, MAX_CLIENT_NAME) if isinstance(name, str) else ""
        try:
            hello = await asyncio.to_thread(self._hello)
        except FarplugError as error:  # the folder of uploads cannot be used any more
            await self._close(INTERNAL_ERROR, error)
            return False
        await self._send(reply_text(call.request.id, hello))
        return True

    def _hello(self) -> dict[str, Any]:
        site, full = self._site, self._role is Role.FULL
        return {
            "server_name": "farplug page",
            "protocol_version": VERSION,
            "farplug_version": __version__,
            "machine": site.machine,
            "user": site.user,
            "role": str(self._role),
            "session": site.session,
            "web_root": {"name": site.root.path} if site.root is not None and full else None,
            "uploads": site.uploads.to_json() if full else None,
            "supported_methods": methods.methods(self._role),
        }

    # Receiving ----------------------------------------------------------------------------------------------------

    async def _next(self) -> Call:
        """Return the next request of the browser.

        Raises:
            RemoteProtocolError: what came is not a request, or its binary frame did not come in time.
        """
        while True:
            try:
                async with asyncio.timeout(BINARY_TIMEOUT if self._frames.waiting else None):
                    frame = await self._browser.receive()
            except TimeoutError:
                raise RemoteProtocolError(f"no binary frame came in {BINARY_TIMEOUT:g} seconds") from None
            if isinstance(frame, bytes):
                return self._frames.receive_binary(frame)
            call = self._frames.receive_text(frame)
            if call is not None:
                return call

    async def _receive(self) -> None:
        """Receive requests, as long as not too many wait."""
        while True:
            while len(self._waiting) >= MAX_WAITING or sum(call.size for call in self._waiting) >= MAX_WAITING_BYTES:
                self._changed.clear()
                await self._changed.wait()
            call = await self._next()
            self._waiting.append(call)
            self._changed.set()

    async def _dispatch(self) -> None:
        """Begin requests, as long as not too many are pending."""
        while True:
            if self._waiting and len(self._pending) < MAX_PENDING:
                await self._begin(self._waiting.popleft())
                self._changed.set()
            else:
                self._changed.clear()
                await self._changed.wait()

    async def _begin(self, call: Call) -> None:
        request = call.request
        if request.id in self._pending:
            raise RemoteProtocolError(f"id: {shown(request.id)} is that of a pending request")
        self._pending.add(request.id)
        try:
            methods.check(self._role, request.method)
            if request.method in methods.OWN:
                if call.payload is not None:
                    raise UsageError(f"{request.method} has no payload", reason=Reason.BAD_SETTING)
                self._start(self._answer(call))
            elif request.method in methods.WITH_PATHS:
                self._start(self._pass_with_paths(call))
            else:
                await self._pass(call)
        except RemoteProtocolError:
            raise
        except FarplugError as error:
            await self._fail(request.id, error)

    # The page's own methods ---------------------------------------------------------------------------------------

    async def _answer(self, call: Call) -> None:
        try:
            result = await self._result(call.request.method, call.request.params)
        except FarplugError as error:
            await self._fail(call.request.id, error)
        else:
            await self._send(reply_text(call.request.id, result))
            self._done(call.request.id)

    async def _result(self, method: str, params: Mapping[str, Any]) -> Any:
        match method:
            case "sessions":
                return await self._site.board.rows()
            case "watch-sessions":
                if self._board is None or self._board.done():
                    self._board = self._start(self._show_board())
                return None
            case "unwatch-sessions":
                if self._board is not None:
                    self._board.cancel()
                return None
            case "open":
                return await self._open(self._site.board.check(params.get("session")))
            case "close":
                async with self._opening:
                    await self._leave()
                return None
            case "files":
                return await asyncio.to_thread((self._site.root or NoFiles()).list, _text(params, "path"))
            case "remove-upload":
                await asyncio.to_thread(self._site.uploads.remove, _text(params, "path"))
                return await asyncio.to_thread(self._site.uploads.to_json)
            case "command":
                return {"command": await asyncio.to_thread(self._command, params)}
        raise StateError("the browser has sent hello already")

    def _command(self, params: Mapping[str, Any]) -> str:
        method, of_method = params.get("method"), params.get("params", {})
        if not isinstance(method, str) or not isinstance(of_method, dict):
            raise UsageError("command has no valid method and params", reason=Reason.BAD_SETTING)
        link = self._link
        if link is None:
            raise _not_open()
        if method in methods.WITH_PATHS:
            of_method = methods.with_absolute_paths(method, of_method, self._site)
        return shell.command(link.name, method, of_method)

    async def _show_board(self) -> None:
        last: list[dict[str, Any]] | None = None
        while True:
            try:
                rows = await self._site.board.rows()
            except FarplugError as error:
                log.warning("the sessions cannot be listed: %s", error)
            else:
                if rows != last:
                    last = rows
                    await self._send(event_text("sessions", {"sessions": rows}))
            await asyncio.sleep(INTERVAL)

    # The session --------------------------------------------------------------------------------------------------

    async def _open(self, name: str) -> dict[str, Any]:
        async with self._opening:
            await self._leave()
            link = await SessionLink.connect(name, self._site.board.path(name), self._client or "a browser")
            self._link = link
            self._relaying = self._start(self._relay(link))
            return link.hello

    async def _relay(self, link: SessionLink) -> None:
        """Pass on what a session sends. Its end is an event."""
        try:
            reason = await link.relay(self._deliver, partial(self._replied, link))
        except RemoteProtocolError as error:
            log.warning("%s", error)
            reason = "lost"
        if self._link is not link:
            return
        self._link = self._relaying = None
        await self._drop(link)
        await self._send(event_text("session-ended", {"reason": reason, "session": link.name}))

    async def _deliver(self, text: str, message: dict[str, Any], payload: bytes | None) -> None:
        """Send a message of the session: what others type not to those who only watch, pictures in fewer bytes."""
        event = message.get("event")
        if event == "input" and self._role is Role.VIEW:
            data = {name: value for name, value in message["data"].items() if name != "text"}  # it may be a password
            text = json.dumps({**message, "data": data})
        elif event == "screen" and payload and self._line is not None:
            if self._line.level:
                encoded = await asyncio.to_thread(zlib.compress, payload, self._line.level)
                if len(encoded) < len(payload):
                    payload = encoded
                    text = json.dumps({**message, "bytes": len(payload), "encoding": DEFLATE})
            self._line.sent(message["data"]["serial"], len(payload), asyncio.get_running_loop().time())
        await self._send(text, payload)

    async def _leave(self) -> None:
        """Close the connection to the session, if there is one."""
        link, self._link = self._link, None
        relaying, self._relaying = self._relaying, None
        if link is not None and relaying is not None:
            link.close()
            await asyncio.wait([relaying])  # it delivers a message with its payload, or none of the two
            await self._drop(link)

    async def _drop(self, link: SessionLink) -> None:
        """Close a connection, and report that its requests are lost."""
        link.close()
        self._unwatch()
        for id in list(link.pending):
            del link.pending[id]
            await self._fail(id, link.gone())

    def _unwatch(self) -> None:
        for name, _ in self._displays:
            self._site.board.watched[name] -= 1
        self._displays.clear()

    async def _pass(self, call: Call) -> None:
        link = self._link
        if link is None:
            raise _not_open()
        if call.request.method == "screen-ack" and self._line is not None:
            self._line.acknowledged(call.request.params.get("serial"), asyncio.get_running_loop().time())
        await link.send(call)

    async def _pass_with_paths(self, call: Call) -> None:
        try:
            method, params = call.request.method, call.request.params
            params = await asyncio.to_thread(methods.with_absolute_paths, method, params, self._site)
            await self._pass(call.with_params(params))
        except RemoteProtocolError:
            raise
        except FarplugError as error:
            await self._fail(call.request.id, error)

    def _replied(self, link: SessionLink, call: Call, ok: bool) -> None:
        request = call.request
        watched = link.name, request.params.get("display", 0)
        if ok and request.method == "watch-screen" and watched not in self._displays:
            self._displays.add(watched)
            self._site.board.watched[link.name] += 1
        elif ok and request.method == "unwatch-screen" and watched in self._displays:
            self._displays.discard(watched)
            self._site.board.watched[link.name] -= 1
        self._done(request.id)

    # Sending ------------------------------------------------------------------------------------------------------

    async def _send(self, text: str, payload: bytes | None = None) -> None:
        async with self._sending:
            await self._browser.send(text, payload)

    async def _fail(self, id: Id, error: FarplugError) -> None:
        await self._send(failure_text(id, error))
        self._done(id)

    def _done(self, id: Id) -> None:
        self._pending.discard(id)
        self._changed.set()

    async def _close(self, code: int, error: FarplugError) -> None:
        """Send an error that concerns the websocket, and close it."""
        log.warning("a browser is refused: %s", error)
        try:
            await self._send(failure_text(None, error))
            await self._browser.close(code, error.message.encode()[:100].decode(errors="ignore"))
        except BrowserGone:
            pass

    # Tasks --------------------------------------------------------------------------------------------------------

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is None or self._over.done():
            return
        if not isinstance(error, BrowserGone | RemoteProtocolError):
            log.error("a request of the page failed", exc_info=error)
            error = InternalError(error)
        self._over.set_exception(error)

    async def _end(self) -> None:
        link, self._link = self._link, None
        self._unwatch()
        if link is not None:
            link.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)


def _not_open() -> StateError:
    return StateError("no session is open", remedy="open one first")


def _text(params: Mapping[str, Any], name: str) -> str:
    value = params.get(name, "")
    if isinstance(value, str):
        return value
    raise UsageError(f"{name}: {shown(value)} is not a string", reason=Reason.BAD_SETTING)
