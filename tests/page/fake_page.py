"""The part of the page's server and of a session, scripted: what the front end is tested with.

Run by hand, ``python -m tests.page.fake_page``, it serves a page with a VM to look at.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from farplug.app.png import encode_png
from farplug.app.state import apply

STATIC = Path(__file__).parents[2] / "src/farplug/web/static"
TOKEN = "secret"
TIMEOUT = 60.0
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
Json = dict[str, Any]


class Refused(Exception):
    """A request fails with these fields."""

    def __init__(self, code: str, message: str, **fields: Any) -> None:
        super().__init__(message)
        self.fields = {"code": code, "message": message, "exit_code": 1, **fields}


@dataclass(frozen=True)
class Call:
    """A request that the page sent."""

    method: str
    params: Json
    data: bytes | None


Handler = Callable[[Json, bytes | None], Any]
LATER = object()
"""What a handler returns if :meth:`FakePage.finish` replies to the request."""


class FakePage:
    """A page's server with one session, in a thread of its own.

    Attributes:
        calls: the requests of the page, in their order.
        handlers: what replies to a method; a test may replace them.
        snapshot: of the session.
        server: the reply to the page's hello.
        rows: the sessions of the board.
        uploads: files that were uploaded.
        refuses: no websocket is accepted.
    """

    def __init__(self, *, session: str | None = "web1", role: str = "full", web_root: bool = True) -> None:
        self.calls: list[Call] = []
        self.refuses = False
        self.server: Json = {
            "server_name": "farplug page",
            "farplug_version": "0.1.0",
            "machine": "desk-7",
            "user": "mia",
            "role": role,
            "session": session,
            "web_root": {"name": "images"} if web_root else None,
            "uploads": {"quota": 50_000_000_000, "used": 8_800_000_000},
            "supported_methods": ["sessions", "open", "close", "files", "command"],
        }
        self.hello: Json = {
            "server_name": "farplug",
            "protocol_version": "1.1",
            "farplug_version": "0.1.0",
            "session": "web1",
            "target": "spice+tls://vmhost.lab:5901",
            "pid": 4711,
            "started": time.time() - 1090,
            "log": None,
            "supported_methods": ["attach", "check-text", "layouts", "press", "type"],
            "supported_events": [],
        }
        self.snapshot: Json = {"last_event": 10, "guests": {"g1": guest()}}
        self.rows: list[Json] = []
        self.driver: Json = {"holder": None, "watchers": 0}
        self.screen = (320, 200)
        self.uploads: dict[str, bytearray] = {}
        self.devices: list[Json] = []
        self.files: dict[str, list[Json]] = {"": []}
        self.medium = 0
        self.plugged = 0
        self.sources: dict[str, list[Json]] = {}
        self.handlers: dict[str, Handler] = {
            "hello": lambda params, data: self.server,
            "sessions": lambda params, data: self.rows,
            "watch-sessions": lambda params, data: None,
            "unwatch-sessions": lambda params, data: None,
            "open": lambda params, data: self.hello,
            "close": lambda params, data: None,
            "subscribe": lambda params, data: {"subscribed": [], "snapshot": self.snapshot},
            "list": lambda params, data: self.drives(),
            "watch-screen": self._watch,
            "screen-ack": lambda params, data: None,
            "drive": self._drive,
            "key": lambda params, data: None,
            "keys-up": lambda params, data: None,
            "pointer": lambda params, data: None,
            "press": lambda params, data: {"via": "usb", "confirmed": True},
            "type": lambda params, data: {"via": "usb", "confirmed": True},
            "stop-typing": lambda params, data: None,
            "layouts": lambda params, data: {
                "layouts": [{"name": "us", "title": "English (US)"}, {"name": "de", "title": "German"}],
                "current": "us",
            },
            "check-text": self._check_text,
            "devices": lambda params, data: {"machine": "desk-7", "devices": self.devices},
            "files": self._files,
            "command": self._command,
            "attach": self._attach,
            "detach": self._detach,
            "media-offer": self._offer,
            "media-data": lambda params, data: None,
            "media-withdraw": lambda params, data: None,
        }
        self._changed = threading.Condition()
        self._sockets: list[WebSocket] = []
        self._open: dict[str, tuple[WebSocket, Any]] = {}
        self._tasks: set[asyncio.Future[Any]] = set()
        self.offered: dict[str, str] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running = threading.Event()
        routes = [
            Route("/", self._index),
            Route("/static/{name:path}", self._static),
            Route("/screenshot.png", self._picture),
            Route("/media/{name}", self._media, methods=["PUT"]),
            WebSocketRoute("/ws", self._websocket),
        ]
        self._server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_config=None, lifespan="off"))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/#token={TOKEN}"

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._running.wait(TIMEOUT)
        return self

    def __exit__(self, *args: object) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(TIMEOUT)
        self._listener.close()

    def _run(self) -> None:
        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            self._running.set()
            await self._server.serve(sockets=[self._listener])

        asyncio.run(serve())

    # What a test does

    def emit(self, name: str, data: Json, payload: bytes | None = None, encoding: str | None = None) -> None:
        """Send an event that belongs to the connection, to all."""
        message: Json = {"event": name, "data": data}
        if encoding is not None:
            message["encoding"] = encoding
        if payload is not None:
            message["bytes"] = len(payload)
        self._send(message, payload)

    def event(self, name: str, **fields: Any) -> None:
        """Send an event of the session; the snapshot follows."""
        data = {"id": self.snapshot["last_event"] + 1, "time": time.time(), "level": "info", "guest": "g1", **fields}
        data.setdefault("message", name)
        if name == "figures":
            data.setdefault("errors", 0)
        self.snapshot = apply(self.snapshot, {"event": name, **data})
        self.emit(name, data)

    def picture(
        self,
        width: int,
        height: int,
        pixels: bytes,
        *rects: tuple[int, int, int, int],
        last: bool = True,
        encoding: str | None = None,
    ) -> None:
        """Send a message ``screen``."""
        data = {
            "display": 0,
            "width": width,
            "height": height,
            "serial": 1,
            "rects": rects or [(0, 0, width, height)],
            "last": last,
        }
        self.emit("screen", data, pixels, encoding)

    def of(self, method: str) -> list[Call]:
        """Return the requests of a method so far."""
        with self._changed:
            return [call for call in self.calls if call.method == method]

    def wait(self, method: str, count: int = 1, matching: Callable[[Json], bool] = lambda params: True) -> Call:
        """Wait for the ``count``-th request of a method; return it."""
        found: list[Call] = []

        def there() -> bool:
            found[:] = [call for call in self.calls if call.method == method and matching(call.params)]
            return len(found) >= count

        with self._changed:
            if not self._changed.wait_for(there, TIMEOUT):
                raise AssertionError(f"no {method}: {[call.method for call in self.calls]}")
        return found[count - 1]

    def finish(self, method: str, error: Refused | None = None) -> None:
        """Reply to the last request of a method whose handler returned :data:`LATER`."""
        websocket, id = self._open.pop(method)
        reply = (
            {"id": id, "ok": True, "result": None} if error is None else {"id": id, "ok": False, "error": error.fields}
        )
        self._on_loop(lambda: websocket.state.queue.put_nowait((reply, None)))

    def drop(self, code: int = 1012) -> None:
        """End all websockets."""
        self._on_loop(lambda: self._close_all(code))

    def attachment(self, id: str, port: str, **fields: Any) -> None:
        """Let a device be attached, and be in use."""
        shown = {**attachment(id, port), **fields}
        self.sources[id] = shown["sources"]
        origins = [{"kind": one["kind"], "snapshot": one.get("snapshot", False)} for one in shown["sources"]]
        about = {name: value for name, value in shown.items() if name != "id"}
        self.event(
            "attaching", attachment=id, device=shown["label"], **{**about, "state": "connecting", "sources": origins}
        )
        common = {"attachment": id, "device": shown["label"], "port": port}
        titles = [f"{unit} ({self.medium_of(shown)})" if unit.startswith("cdrom") else unit for unit in shown["units"]]
        self.event("opened", **common, state="waiting", number=0, units=titles, message="opened")
        self.event(
            "attached",
            **common,
            state="attached",
            level="good",
            device_name=shown["identity"],
            speed=shown["speed"],
            message=f"attached as {shown['identity']} at SuperSpeed (5 Gb/s)",
        )
        self.event(
            "configured",
            **common,
            state="in use",
            level="good",
            configuration=1,
            message="configured by the guest (configuration 1)",
        )

    def medium_of(self, shown: Json) -> str:
        """Return the name of the medium in the drive of an attachment."""
        path: str = next((one["path"] for one in shown["sources"] if one["kind"] == "cdrom"), "a.iso")
        return path.rpartition("/")[2]

    # Its replies

    def drives(self) -> list[Json]:
        return [
            {"label": one["units"][0], "medium": source["path"], "locked": False}
            for one in self.snapshot["guests"]["g1"]["attachments"].values()
            for source in self.sources[one["id"]]
            if source["kind"] == "cdrom"
        ]

    def _watch(self, params: Json, data: bytes | None) -> Json:
        self._later("driving", self.driver)
        self._later("inputs", {"locks": ["num"], "mouse": "absolute"})
        self._later("screen-state", {"display": 0, "state": "shown"})
        width, height = self.screen
        self._later(
            "screen",
            {
                "display": 0,
                "width": width,
                "height": height,
                "serial": 1,
                "last": True,
                "rects": [[0, 0, width, height]],
            },
            sample(width, height),
        )
        return {"width": width, "height": height, "serial": 1}

    def _drive(self, params: Json, data: bytes | None) -> Json:
        self.driver = {"holder": {"name": "mia", "you": True} if params["take"] else None, "watchers": 1}
        self._later("driving", self.driver)
        return {"holder": "mia" if params["take"] else None}

    def _check_text(self, params: Json, data: bytes | None) -> Json:
        lacking = "öß€" if params.get("layout", "us") == "us" else ""
        return {
            "missing": [
                {"index": index, "char": char, "layouts": ["de"]}
                for index, char in enumerate(params["text"])
                if char in lacking
            ]
        }

    def _files(self, params: Json, data: bytes | None) -> Json:
        if params["path"] not in self.files:
            raise Refused("not-found", f"{params['path']} does not exist")
        return {"path": params["path"], "entries": self.files[params["path"]], "free": 41_200_000_000}

    def _command(self, params: Json, data: bytes | None) -> Json:
        method, fields = params["method"], params["params"]
        if method == "attach":
            options = {
                "disk": "--usb-disk",
                "read-only-disk": "--usb-disk-ro",
                "cdrom": "--usb-cdrom",
                "folder": "--usb-folder",
                "usb-device": "--usb-device",
            }
            words = " ".join(f"{options.get(one['kind'])} {one.get('path')}" for one in fields["sources"])
            return {"command": f"farplug attach -s web1 {words}"}
        words = " ".join(str(value) for value in fields.values())
        return {"command": f"farplug {method} -s web1 {words}"}

    def _attach(self, params: Json, data: bytes | None) -> Json:
        source = params["sources"][0]
        number = params.get("port", 0)
        self.plugged += 1
        id = f"g1.a{100 + self.plugged}"
        path = source.get("path", source["kind"])
        if path.startswith("client:"):
            path = f"{path}/{self.offered[path.removeprefix('client:')]}"
        name = path if path.startswith("client:") else path.rpartition("/")[2]
        identity = f"1d6b:0104 farplug Virtual {'CD-ROM' if source['kind'] == 'cdrom' else 'Disk'}"
        label = "cdrom0" if source["kind"] == "cdrom" else name
        self._on_loop(
            lambda: self.attachment(
                id,
                f"usbredir {number}",
                label=label,
                units=[label],
                identity=identity,
                sources=[{**source, "path": path}],
            )
        )
        return {"attachments": [{**attachment(id, f"usbredir {number}"), "label": label}]}

    def _detach(self, params: Json, data: bytes | None) -> Json:
        found = self.snapshot["guests"]["g1"]["attachments"][params["device"]]
        common = {"attachment": found["id"], "device": found["label"], "port": found["port"], "state": "detached"}
        self._on_loop(lambda: self.event("detached", **common, error=None, level="good", message="detached"))
        self._on_loop(lambda: self.event("removed", **common))
        return {"detached": [found["label"]]}

    def _offer(self, params: Json, data: bytes | None) -> Json:
        self.medium += 1
        self.offered = {**self.offered, f"m{self.medium}": params["file"]}
        return {"media": f"m{self.medium}"}

    # The wire

    def _on_loop(self, run: Callable[[], object]) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(run)

    def _later(self, name: str, data: Mapping[str, Any], payload: bytes | None = None) -> None:
        self._on_loop(lambda: self.emit(name, dict(data), payload))

    def _close_all(self, code: int) -> None:
        for one in self._sockets:
            task = asyncio.ensure_future(one.close(code))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _send(self, message: Json, payload: bytes | None) -> None:
        def send() -> None:
            for one in list(self._sockets):
                queue: asyncio.Queue[tuple[Json, bytes | None]] = one.state.queue
                queue.put_nowait((message, payload))

        self._on_loop(send)

    async def _websocket(self, websocket: WebSocket) -> None:
        if self.refuses:
            await websocket.close(1012)
            return
        await websocket.accept()
        websocket.state.queue = asyncio.Queue()
        writer = asyncio.create_task(self._write(websocket))
        try:
            await self._read(websocket)
        except (WebSocketDisconnect, RuntimeError):
            pass
        finally:
            if websocket in self._sockets:
                self._sockets.remove(websocket)
            writer.cancel()

    async def _write(self, websocket: WebSocket) -> None:
        while True:
            message, payload = await websocket.state.queue.get()
            await websocket.send_text(json.dumps(message))
            if payload is not None:
                await websocket.send_bytes(payload)

    async def _read(self, websocket: WebSocket) -> None:
        while True:
            request = json.loads(await websocket.receive_text())
            data = await websocket.receive_bytes() if "bytes" in request else None
            method, params = request["method"], request.get("params", {})
            if method == "hello":
                if params.get("token") != TOKEN:
                    await websocket.close(4401)
                    return
                self._sockets.append(websocket)
            try:
                if method not in self.handlers:
                    raise Refused("unknown-command", f"'{method}' is not a method")
                result = self.handlers[method](params, data)
                reply = {"id": request["id"], "ok": True, "result": result}
            except Refused as error:
                result, reply = None, {"id": request["id"], "ok": False, "error": error.fields}
            if result is LATER:
                self._open[method] = (websocket, request["id"])
            else:
                websocket.state.queue.put_nowait((reply, None))
            with self._changed:
                self.calls.append(Call(method, params, data))
                self._changed.notify_all()

    async def _index(self, request: Request) -> Response:
        return FileResponse(STATIC / "index.html", headers=HEADERS)

    async def _static(self, request: Request) -> Response:
        path = STATIC / request.path_params["name"]
        kinds = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
        if not path.is_file():
            return Response(status_code=404)
        return FileResponse(path, media_type=kinds[path.suffix], headers=HEADERS)

    async def _picture(self, request: Request) -> Response:
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return Response(status_code=401)
        return Response(encode_png(320, 200, sample(320, 200)), media_type="image/png", headers=HEADERS)

    async def _media(self, request: Request) -> Response:
        name = request.path_params["name"]
        body = await request.body()
        there = self.uploads.setdefault(name, bytearray())
        span = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+)", request.headers["content-range"])
        assert span is not None
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return JSONResponse({"error": {"code": "no-permission", "message": "wrong token"}}, 401)
        status = 200
        if span[1] is not None:
            if int(span[1]) != len(there):
                status = 409
            else:
                there += body
        complete = len(there) == int(span[3])
        digest = hashlib.sha256(there).hexdigest() if complete else None
        return JSONResponse({"received": len(there), "complete": complete, "sha256": digest, "path": name}, status)


def guest(ports: int = 4, **fields: Any) -> Json:
    """Return a guest of a snapshot."""
    return {
        "id": "g1",
        "target": "spice+tls://vmhost.lab:5901",
        "state": "connected",
        "attempt": None,
        "name": "testvm",
        "uuid": "",
        "ports": [{"name": f"usbredir {number}", "state": "ready", "error": None} for number in range(ports)],
        "capture": None,
        "attachments": {},
        **fields,
    }


def attachment(id: str, port: str, **fields: Any) -> Json:
    """Return an attachment of a snapshot: a disk in use."""
    return {
        "id": id,
        "label": "scratch.raw",
        "units": ["scratch.raw"],
        "details": [""],
        "port": port,
        "state": "in use",
        "error": None,
        "identity": "1d6b:0104 farplug Virtual Disk",
        "speed": "super",
        "figures": {"read": 0, "written": 0, "commands": 0, "rate": 0, "memory": 0},
        "sources": [],
        "questions": [],
        **fields,
    }


def sample(width: int, height: int) -> bytes:
    """Return a picture: dark blue to the left, lighter to the right, B G R X."""
    row = b"".join(bytes((60 + x * 120 // width, 30 + x * 60 // width, 20 + x * 30 // width, 0)) for x in range(width))
    return row * height


def main() -> None:
    with FakePage() as page:
        page.devices = [
            {
                "id": "1-2",
                "name": "Yubico YubiKey 5 NFC",
                "vendor_id": "1050",
                "product_id": "0407",
                "serial": "",
                "bus": 1,
                "address": 4,
                "port": "1-2",
                "speed": "full",
                "classes": ["HID"],
                "state": "free",
            },
        ]
        page.attachment("g1.a1", "usbredir 0", sources=[{"kind": "disk", "path": "/srv/scratch.raw"}])
        print(page.url, flush=True)  # noqa: T201
        threading.Event().wait()


if __name__ == "__main__":
    main()
