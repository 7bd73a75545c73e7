"""Measure what the page costs, with a websocket as a browser has it, in one guest, in one run.

Four parts: ``scroll`` (the processor time of a frame, while text scrolls on the VM's console), ``key`` (from a key to
the first pixel that it changes), ``iso`` (an ISO image of the browser, beside the same file on this machine), ``slow``
(a second viewer on a line of 10 kB/s: what it costs the other viewer, the memory, the disk and the SPICE connection).

The disk is measured in three ways: without a viewer (the session has closed the channel of the display), with one, and
with one beside a slow one. Meanwhile a client of the session's socket measures how soon the session replies: PINGs of
the SPICE server are answered by the same event loop.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import re
import socket
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Origin

from disk import QUIET_LOAD, VOLUME_DESCRIPTOR, machine
from farplug.cli.demo import SHELL
from farplug.control.client import Client
from farplug.errors import FarplugError
from farplug.vm.qemu import QemuGuest
from farplug.vm.qemu_config import LOOPBACK, GuestConfig, SpicePort
from jobs import MIB, Job, measure
from rows import Row, add_rows_option, write_rows

PARTS = ("scroll", "key", "iso", "slow")
NO_VIEWER, VIEWER, SLOW = WATCHING = ("no viewer", "one viewer", "and a slow one")
"""Who watches while a disk is measured."""
PROGRAM = (sys.executable, "-c", "from farplug.cli.script import main; main()")
NAME = "bench"
"""The name of the session."""
DISK_SIZE = 64 * MIB
_BLOCKS = DISK_SIZE // MIB
_READ = f"dd if=$d of=/dev/null bs=1M iflag=direct count={_BLOCKS} 2>&1 | grep -q '^{_BLOCKS}+0 records in'"
READ = Job("read once", _READ, DISK_SIZE)
READ_AGAIN = Job("read several times", " && ".join([_READ] * 8), 8 * DISK_SIZE)
"""Takes long enough to be measured on a fast disk."""
SCROLL = "while :; do seq -s ' ' 3000; done"
"""Text of the whole width, all of which changes."""
SCROLL_GENTLY = "while :; do seq -s ' ' 100; sleep 0.1; done"
"""Leaves the VM's only processor time for the disk."""
SLOW_RATE = 10_000
"""Bytes per second of the slow viewer."""
SLOW_GOAL = 0.95
"""The goal for a disk with a slow viewer, to one without."""
QUIET = 0.3
"""Seconds without a change of the screen, between two keys."""
WARM_UP_KEYS = 3
TIMEOUT = 120.0
TICKS = os.sysconf("SC_CLK_TCK")


class Picture:
    """What a display shows."""

    def __init__(self) -> None:
        self.width = 0
        self.pixels = bytearray()

    def apply(self, data: Mapping[str, Any], payload: bytes) -> bool:
        """Apply a part of the picture; return whether a pixel is another one than before."""
        width: int = data["width"]
        size = 4 * width * data["height"]
        changed = width != self.width or size != len(self.pixels)
        if changed:
            self.width, self.pixels = width, bytearray(size)
        at = 0
        for x, y, columns, rows in data["rects"]:
            for row in range(y, y + rows):
                start, length = 4 * (row * width + x), 4 * columns
                new = payload[at : at + length]
                if self.pixels[start : start + length] != new:
                    changed = True
                    self.pixels[start : start + length] = new
                at += length
        return changed


class Viewer:
    """A browser's websocket: it watches the screen, and acknowledges each message at once.

    Attributes:
        frames: complete pictures that came.
        received: bytes of pixels that came.
        wire: the bytes that these had on the line.
        size: width and height of the picture.
        lost: the events of a VM that was lost, or of a session that ended.
        slow: the line is slow.
    """

    def __init__(self, websocket: ClientConnection) -> None:
        self.slow = False
        self.frames = 0
        self.received = self.wire = 0
        self.size = (0, 0)
        self.lost: list[str] = []
        self.picture: Picture | None = None
        """None: the pixels are not compared."""
        self.files: dict[str, bytes] = {}
        """What it offers, by the ids of the media."""
        self.announced = asyncio.Event()
        """The text of a message with pixels came: the pixels follow."""
        self._websocket = websocket
        self._id = 0
        self._replies: dict[int, asyncio.Future[Any]] = {}
        self._changes: asyncio.Queue[float] = asyncio.Queue()
        self._reading = asyncio.get_running_loop().create_task(self._read())

    @classmethod
    @asynccontextmanager
    async def open(cls, url: str, line: socket.socket | None = None) -> AsyncIterator[Self]:
        """Connect to a page, and open its session.

        Args:
            url: what the page printed.
            line: a connection to the page; None: a new one.
        """
        address, _, token = url.partition("/#token=")
        uri = f"ws{address.removeprefix('http')}/ws"
        options: dict[str, Any] = {} if line is None else {"sock": line}
        async with connect(
            uri, origin=Origin(address), compression=None, max_size=None, proxy=None, ping_interval=None, **options
        ) as websocket:
            viewer = cls(websocket)
            try:
                hello: dict[str, Any] = {
                    "protocol_version": "1.1",
                    "client_name": "bench",
                    "token": token.partition("&")[0],
                    "encodings": ["deflate"],
                }
                await viewer.call("hello", hello)
                await viewer.call("open", {"session": NAME})
                yield viewer
            finally:
                if line is not None:
                    websocket.transport.abort()  # the closing handshake takes as long as all that the line holds
                viewer._reading.cancel()
                await asyncio.gather(viewer._reading, return_exceptions=True)

    async def watch(self) -> None:
        """Watch the screen, and wait for the first whole picture."""
        frames = self.frames
        await self.call("watch-screen")
        async with asyncio.timeout(TIMEOUT):
            while self.frames == frames:
                await self._changes.get()

    async def call(self, method: str, params: Mapping[str, Any] | None = None) -> Any:
        """Send a request; return its result."""
        reply = asyncio.get_running_loop().create_future()
        self._replies[await self.send(method, params)] = reply
        async with asyncio.timeout(TIMEOUT):
            return await reply

    async def send(self, method: str, params: Mapping[str, Any] | None = None, payload: bytes | None = None) -> int:
        """Send a request; return its id."""
        self._id += 1
        id = self._id
        message = {"id": id, "method": method, "params": params or {}}
        if payload is None:
            await self._websocket.send(json.dumps(message))
        else:
            await self._websocket.send(json.dumps({**message, "bytes": len(payload)}))
            await self._websocket.send(payload)
        return id

    async def change(self, timeout: float) -> float:
        """Wait for the next changed pixel; return when it came, by the clock of time.perf_counter.

        Raises:
            TimeoutError: nothing changed.
        """
        async with asyncio.timeout(timeout):
            return await self._changes.get()

    async def _read(self) -> None:
        with contextlib.suppress(ConnectionClosed):
            while True:
                message = json.loads(await self._websocket.recv())
                if message.get("event") == "screen":
                    self.announced.set()
                payload = await self._websocket.recv() if "bytes" in message else b""
                assert isinstance(payload, bytes)
                wire = len(payload)
                if "encoding" in message:
                    payload = zlib.decompress(payload)
                if "event" in message:
                    await self._take(message["event"], message["data"], payload, wire)
                elif (reply := self._replies.pop(message["id"], None)) is not None and not reply.done():
                    if message["ok"]:
                        reply.set_result(message["result"])
                    else:
                        reply.set_exception(RuntimeError(message["error"]["message"]))
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(RuntimeError("the page closed the websocket"))

    async def _take(self, event: str, data: dict[str, Any], payload: bytes, wire: int) -> None:
        if event == "screen":
            now = time.perf_counter()
            self.wire += wire
            self.frames += data["last"]
            self.received += len(payload)
            self.size = data["width"], data["height"]
            if self.picture is None or self.picture.apply(data, payload):
                self._changes.put_nowait(now)
            await self.send("screen-ack", {"serial": data["serial"]})
        elif event == "media-read":
            begin = data["offset"]
            part = self.files[data["media"]][begin : begin + data["length"]]
            await self.send("media-data", {"media": data["media"], "read": data["read"]}, part)
        elif event in ("lost", "session-ended") or (event == "screen-state" and data["state"] == "lost"):
            self.lost.append(event)


@asynccontextmanager
async def slow_line(port: int) -> AsyncIterator[socket.socket]:
    """Connect to the page through a line that carries SLOW_RATE bytes per second from it; yield the browser's end."""
    loop = asyncio.get_running_loop()
    page = socket.socket()
    page.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # the line holds little: the page has to wait
    page.setblocking(False)
    await loop.sock_connect(page, (LOOPBACK, port))
    ours, browser = socket.socketpair()
    ours.setblocking(False)

    async def down() -> None:
        while data := await loop.sock_recv(page, SLOW_RATE // 10):
            await loop.sock_sendall(ours, data)
            await asyncio.sleep(len(data) / SLOW_RATE)
        ours.shutdown(socket.SHUT_WR)

    async def up() -> None:
        while data := await loop.sock_recv(ours, 65536):
            await loop.sock_sendall(page, data)

    tasks = [loop.create_task(down()), loop.create_task(up())]
    try:
        yield browser
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for end in (page, ours, browser):
            end.close()


@dataclass(frozen=True, slots=True)
class Program:
    """A process that is measured."""

    pid: int

    def cpu(self) -> float:
        """Return the processor time, user and system, in seconds."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def memory(self) -> int:
        """Return the resident memory in bytes."""
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())
        assert found
        return int(found[1]) * 1024

    def files(self) -> int:
        """Return the number of open files."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))


@dataclass(slots=True)
class Scrolled:
    """What the viewer got while text scrolled, and what that took.

    Attributes:
        seconds: for how long.
        frames: complete pictures.
        received: bytes of pixels.
        session_cpu: processor time of the session, in seconds.
        page_cpu: that of the page.
        session_memory: the largest resident memory of the session, in bytes.
        page_memory: that of the page.
        replies: seconds from requests to the replies of the session.
    """

    seconds: float = 0.0
    frames: int = 0
    received: int = 0
    session_cpu: float = 0.0
    page_cpu: float = 0.0
    session_memory: int = 0
    page_memory: int = 0
    replies: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Figures:
    """All results; parts that were not measured are empty.

    Attributes:
        size: width and height of the picture.
        idle: processor time per second of the session and of the page, while nothing changes.
        scrolled: with one viewer.
        keys: seconds from keys to pixels.
        iso: bytes per second of an image, by where it is; one value for each round.
        iso_cpu: processor time of the session and of the page for an image of the browser, in seconds per GiB.
        slow: with the slow viewer as the second one.
        slow_frames: complete pictures of the slow viewer.
        slow_received: bytes of pixels that the slow viewer acknowledged.
        disk: bytes per second of a disk, by who watches; one value for each round.
        waits: seconds from requests on the session's socket to the replies, while the disk is read, by who watches.
        memory: the largest resident memory of the session and of the page meanwhile, in bytes, by who watches.
        channels: ids of the SPICE connections, before and after.
        lost: the events of a VM that was lost.
    """

    size: tuple[int, int] = (0, 0)
    idle: tuple[float, float] = (0.0, 0.0)
    scrolled: Scrolled | None = None
    keys: list[float] = field(default_factory=list)
    iso: dict[str, list[float]] = field(default_factory=dict)
    iso_cpu: list[tuple[float, float]] = field(default_factory=list)
    slow: Scrolled | None = None
    slow_frames: int = 0
    slow_received: int = 0
    disk: dict[str, list[float]] = field(default_factory=dict)
    waits: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, tuple[int, int]] = field(default_factory=dict)
    channels: tuple[list[str], list[str]] = field(default_factory=lambda: ([], []))
    lost: list[str] = field(default_factory=list)


class Bench:
    """Measures the parts.

    Args:
        options: of the command line.
        guest: the VM.
        folder: the web root.
        url: of the page.
        session: the session's process.
        page: the page's process.
    """

    def __init__(
        self, options: argparse.Namespace, guest: QemuGuest, folder: Path, url: str, session: Program, page: Program
    ) -> None:
        self.figures = Figures()
        self._options = options
        self._guest = guest
        self._folder = folder
        self._url = url
        self._session = session
        self._page = page

    async def run(self, parts: tuple[str, ...]) -> None:
        before = await channels(self._guest)
        async with Viewer.open(self._url) as viewer:
            await viewer.call("subscribe", {"events": ["lost", "reconnecting"]})
            await viewer.watch()
            self.figures.size = viewer.size
            for part in parts:
                await getattr(self, f"_measure_{part}")(viewer)
                print(f"  {part}: done", file=sys.stderr, flush=True)
            self.figures.lost = viewer.lost
        self.figures.channels = before, await channels(self._guest)

    # Parts --------------------------------------------------------------------------------------------------------

    async def _measure_scroll(self, viewer: Viewer) -> None:
        begin, seconds = (self._session.cpu(), self._page.cpu()), self._options.seconds / 2
        await asyncio.sleep(seconds)
        self.figures.idle = (self._session.cpu() - begin[0]) / seconds, (self._page.cpu() - begin[1]) / seconds
        self.figures.scrolled = await self._scroll(viewer)

    async def _measure_key(self, viewer: Viewer) -> None:
        viewer.picture = Picture()
        await viewer.call("unwatch-screen")
        await viewer.watch()
        await viewer.call("drive", {"take": True})
        await self._until_quiet(viewer)
        try:
            for number in range(self._options.keys + WARM_UP_KEYS):
                # Enter after a line: the shell has nothing to execute, since the first character begins a comment.
                code = "Enter" if number % 40 == 39 else "Digit3" if number % 40 == 0 else "KeyA"
                modifier = code == "Digit3"
                if modifier:
                    await viewer.call("key", {"code": "ShiftLeft", "down": True})
                begin = time.perf_counter()
                await viewer.send("key", {"code": code, "down": True})
                came = await viewer.change(TIMEOUT)
                if number >= WARM_UP_KEYS:
                    self.figures.keys.append(came - begin)
                await viewer.call("keys-up")
                await self._until_quiet(viewer)
        finally:
            viewer.picture = None
            await viewer.call("drive", {"take": False})

    async def _measure_iso(self, viewer: Viewer) -> None:
        """Measure an ISO of the browser, and the same file on this machine. Each time the browser offers it anew."""
        content = (self._folder / "image.iso").read_bytes()
        for number in range(self._options.rounds + 1):
            for way in ("machine", "browser"):
                path, media = "image.iso", ""
                if way == "browser":
                    offer = {"file": "image.iso", "size": len(content)}
                    media = (await viewer.call("media-offer", offer))["media"]
                    viewer.files[media] = content
                    path = f"client:{media}"
                async with self._plugged(viewer, "cdrom", path) as disk:
                    session, page = self._session.cpu(), self._page.cpu()
                    speed, size = await measure(self._guest, READ, disk)
                    cpu = (self._session.cpu() - session) / size * 2**30, (self._page.cpu() - page) / size * 2**30
                if media:
                    await viewer.call("media-withdraw", {"media": media})
                    del viewer.files[media]
                if number:
                    self.figures.iso.setdefault(way, []).append(speed)
                    if way == "browser":
                        self.figures.iso_cpu.append(cpu)

    async def _measure_slow(self, viewer: Viewer) -> None:
        async with slow_viewer(self._url) as slow:
            self.figures.slow = await self._scroll(viewer)
            self.figures.slow_frames, self.figures.slow_received = slow.frames, slow.received
        async with self._plugged(viewer, "read-only-disk", "image.iso") as disk, self._in_guest(SCROLL_GENTLY):
            for number in range(self._options.rounds + 1):
                for way in WATCHING:
                    async with self._watched(viewer, way), self._waiting(way if number else None):
                        speed, _ = await measure(self._guest, READ_AGAIN, disk)
                    if number:
                        self.figures.disk.setdefault(way, []).append(speed)

    @asynccontextmanager
    async def _watched(self, viewer: Viewer, way: str) -> AsyncIterator[None]:
        """Let no viewer, one, or a slow one beside it, watch the screen; at the end, the viewer watches."""
        if way == SLOW:
            async with slow_viewer(self._url):
                yield
            return
        if way == NO_VIEWER:
            await viewer.call("unwatch-screen")
            async with asyncio.timeout(TIMEOUT):
                while await channels(self._guest, DISPLAY):
                    await asyncio.sleep(0.5)
        yield
        if way == NO_VIEWER:
            await viewer.watch()

    @asynccontextmanager
    async def _waiting(self, way: str | None) -> AsyncIterator[None]:
        """Measure how soon the session replies, and the memory; for a way of None, nothing is kept."""
        waits: list[float] = []
        session = page = 0

        async def ask(client: Client) -> None:
            nonlocal session, page
            while True:
                begin = time.perf_counter()
                await client.call("layouts")
                waits.append(time.perf_counter() - begin)
                session, page = max(session, self._session.memory()), max(page, self._page.memory())
                await asyncio.sleep(0.05)

        async with Client.connect(self._folder / "run" / "farplug" / f"{NAME}.sock") as client:
            asking = asyncio.ensure_future(ask(client))
            try:
                yield
            finally:
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
        if way is not None:
            self.figures.waits.setdefault(way, []).extend(waits)
            before = self.figures.memory.get(way, (0, 0))
            self.figures.memory[way] = max(before[0], session), max(before[1], page)

    # What they have in common -------------------------------------------------------------------------------------

    async def _scroll(self, viewer: Viewer) -> Scrolled:
        """Let text scroll, and measure."""
        result = Scrolled()
        async with self._in_guest(SCROLL):
            await asyncio.sleep(1)  # the first frames after a pause
            start, frames, received = time.perf_counter(), viewer.frames, viewer.received
            session, page = self._session.cpu(), self._page.cpu()
            while (seconds := time.perf_counter() - start) < self._options.seconds:
                begin = time.perf_counter()
                await viewer.call("layouts")
                result.replies.append(time.perf_counter() - begin)
                result.session_memory = max(result.session_memory, self._session.memory())
                result.page_memory = max(result.page_memory, self._page.memory())
                await asyncio.sleep(0.5)
            result.seconds, result.frames, result.received = (
                seconds,
                viewer.frames - frames,
                viewer.received - received,
            )
            result.session_cpu, result.page_cpu = self._session.cpu() - session, self._page.cpu() - page
        await self._until_quiet(viewer)
        return result

    async def _until_quiet(self, viewer: Viewer) -> None:
        """Wait until the screen does not change."""
        with contextlib.suppress(TimeoutError):
            while True:
                await viewer.change(QUIET)

    @asynccontextmanager
    async def _in_guest(self, command: str) -> AsyncIterator[None]:
        """Run a command in the guest whose output is on the screen; at the end, stop it."""
        await self._guest.check(f"({command}) </dev/null >/dev/tty1 2>/dev/null & echo $! >/tmp/screen.pid")
        try:
            yield
        finally:
            await self._guest.check("kill $(cat /tmp/screen.pid); pkill -x seq; :", timeout=TIMEOUT)

    @asynccontextmanager
    async def _plugged(self, viewer: Viewer, kind: str, path: str) -> AsyncIterator[str]:
        """Plug a file in; yield the guest's disk."""
        before = await self._disks()
        source = {"kind": kind, "path": path}
        (attachment,) = (await viewer.call("attach", {"sources": [source]}))["attachments"]
        try:
            async with asyncio.timeout(TIMEOUT):
                while not (new := await self._disks() - before) or not await self._readable(new):
                    await asyncio.sleep(0.1)
            yield f"/dev/{new.pop()}"
        finally:
            await viewer.call("detach", {"device": attachment["id"]})
            async with asyncio.timeout(TIMEOUT):
                while await self._disks() - before:
                    await asyncio.sleep(0.1)

    async def _disks(self) -> set[str]:
        return set((await self._guest.check("ls /sys/block", timeout=TIMEOUT)).split())

    async def _readable(self, names: set[str]) -> bool:
        command = " && ".join(f"dd if=/dev/{name} of=/dev/null bs=4k count=1 2>/dev/null" for name in names)
        return (await self._guest.run(command, timeout=TIMEOUT)).exit_code == 0


MAIN, DISPLAY, USBREDIR = 1, 2, 9
"""Types of channels. Source: spice-protocol, enums.h, SPICE_CHANNEL_*."""


async def channels(guest: QemuGuest, *types: int) -> list[str]:
    """Return the SPICE connections that QEMU has, of types of channels; without types, of those that stay."""
    result = await guest.qmp.execute("query-spice")
    assert isinstance(result, dict)
    return sorted(
        f"{one['connection-id']}/{one['channel-type']}/{one['channel-id']}/{one['port']}"
        for one in result.get("channels", [])
        if one["channel-type"] in (types or (MAIN, USBREDIR))
    )


# Processes ------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def slow_viewer(url: str) -> AsyncIterator[Viewer]:
    """Let a slow viewer watch, with a picture on its way."""
    port = int(url.partition("/#")[0].rpartition(":")[2])
    async with slow_line(port) as line, Viewer.open(url, line) as viewer:
        await viewer.send("watch-screen")
        async with asyncio.timeout(TIMEOUT):
            await viewer.announced.wait()
        yield viewer


@asynccontextmanager
async def served(target: str, folder: Path) -> AsyncIterator[tuple[str, Program, Program]]:
    """Start a session of a target, and the page; yield the page's link, the session and the page."""
    run = folder / "run"
    run.mkdir(mode=0o700)
    environment = {
        **os.environ,
        **dict.fromkeys(("XDG_STATE_HOME", "XDG_CACHE_HOME"), str(folder)),
        "XDG_RUNTIME_DIR": str(run),
    }

    async def start(*arguments: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *PROGRAM, *arguments, env=environment, stdout=asyncio.subprocess.PIPE
        )

    connecting = await start("connect", target, "--name", NAME, "--detach")
    await connecting.communicate()
    if connecting.returncode:
        sys.exit("bench: farplug connect --detach failed")
    try:
        page = await start("page", "-s", NAME, "--json", "--web-root", str(folder))
        try:
            assert page.stdout is not None
            url = json.loads(await page.stdout.readline())["url"]
            listing = await start("ls", "--json")
            (session,) = json.loads((await listing.communicate())[0])
            yield url, Program(session["pid"]), Program(page.pid)
        finally:
            if page.returncode is None:
                page.terminate()
            await page.wait()
    finally:
        await (await start("stop", "-s", NAME)).communicate()


async def measured(options: argparse.Namespace, parts: tuple[str, ...]) -> Figures:
    config = GuestConfig(
        ports=(SpicePort(), SpicePort()),
        modules=("bochs", "usbhid", "hid_generic"),
        memory=512,
        kernel_arguments=("console=tty0", "usb_storage.delay_use=0"),
        extra_arguments=("-device", "VGA"),
    )
    with tempfile.TemporaryDirectory(prefix="farplug-bench-") as name:
        folder = Path(name)
        image = bytearray(os.urandom(DISK_SIZE))
        image[VOLUME_DESCRIPTOR : VOLUME_DESCRIPTOR + 7] = b"\1CD001\1"
        (folder / "image.iso").write_bytes(image)
        async with QemuGuest(config) as guest:
            await guest.booted(TIMEOUT)
            # Nothing but keys and commands changes the screen.
            await guest.check("dmesg -n 1; echo 0 >/sys/class/graphics/fbcon/cursor_blink")
            shell = asyncio.ensure_future(guest.run(SHELL, timeout=100_000))
            try:
                async with served(guest.targets[0], folder) as (url, session, page):
                    bench = Bench(options, guest, folder, url, session, page)
                    await bench.run(parts)
                    return bench.figures
            finally:
                shell.cancel()
                await asyncio.gather(shell, return_exceptions=True)


# Results --------------------------------------------------------------------------------------------------------------


def percentile(values: list[float], part: float) -> float:
    """Return the smallest value that is not below a part of the values."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * part) - 1)]


def table(figures: Figures) -> str:
    """Return all results as text."""
    width, height = figures.size
    lines = [f"  {width}x{height} pixels, 4 bytes each; shares are of one processor"]

    def row(name: str, *values: str) -> None:
        lines.append(f"  {name:<44}" + "".join(f"{value:>18}" for value in values))

    ways = [(name, one) for name, one in (("alone", figures.scrolled), ("slow viewer", figures.slow)) if one]
    if ways:
        row("while text scrolls, for the fast viewer", *(name for name, _ in ways))
        rows: tuple[tuple[str, Callable[[Scrolled], str]], ...] = (
            ("frames per second", lambda one: f"{one.frames / one.seconds:.1f}"),
            ("pixels", lambda one: f"{one.received / one.seconds / 1e6:.1f} MB/s"),
            ("session, processor time of a frame", lambda one: f"{1000 * one.session_cpu / max(one.frames, 1):.1f} ms"),
            ("page, processor time of a frame", lambda one: f"{1000 * one.page_cpu / max(one.frames, 1):.1f} ms"),
            ("session, share", lambda one: f"{100 * one.session_cpu / one.seconds:.0f} %"),
            ("page, share", lambda one: f"{100 * one.page_cpu / one.seconds:.0f} %"),
            ("session, largest resident memory", lambda one: f"{one.session_memory / MIB:.0f} MiB"),
            ("page, largest resident memory", lambda one: f"{one.page_memory / MIB:.0f} MiB"),
            ("reply of the session, median", lambda one: f"{1000 * statistics.median(one.replies):.0f} ms"),
            ("reply of the session, 95 %", lambda one: f"{1000 * percentile(one.replies, 0.95):.0f} ms"),
        )
        for name, show in rows:
            row(name, *(show(one) for _, one in ways))
    if figures.scrolled:
        session, page = figures.idle
        row("share while nothing changes: session, page", f"{100 * session:.1f} %", f"{100 * page:.1f} %")
    if figures.keys:
        row(
            f"key to changed pixel ({len(figures.keys)} keys): median, 95 %",
            f"{1000 * statistics.median(figures.keys):.0f} ms",
            f"{1000 * percentile(figures.keys, 0.95):.0f} ms",
        )
    if figures.iso:
        row("ISO of the browser, of this machine, ratio", *compared(figures.iso, "browser", "machine").shown())
        session, page = (statistics.median(values) for values in zip(*figures.iso_cpu, strict=True))
        row("ISO of the browser: session, page", f"{session:.1f} s/GiB", f"{page:.1f} s/GiB")
    if figures.slow:
        row(
            f"slow viewer ({SLOW_RATE / 1000:.0f} kB/s): frames, pixels",
            str(figures.slow_frames),
            f"{figures.slow_received / 1e6:.2f} MB",
        )
    if figures.disk:
        row("while a disk is read, and who watches", *WATCHING)
        row("bytes per second", *(f"{statistics.median(figures.disk[way]) / 1e6:.1f} MB/s" for way in WATCHING))
        row("to one viewer: ratio of the rounds", *(compared(figures.disk, way, VIEWER).shown()[2] for way in WATCHING))
        row(
            "reply of the session, median",
            *(f"{1000 * statistics.median(figures.waits[way]):.1f} ms" for way in WATCHING),
        )
        row(
            "reply of the session, 99 %", *(f"{1000 * percentile(figures.waits[way], 0.99):.1f} ms" for way in WATCHING)
        )
        for number, name in enumerate(("session", "page")):
            row(
                f"{name}, largest resident memory",
                *(f"{figures.memory[way][number] / MIB:.0f} MiB" for way in WATCHING),
            )
    same = figures.channels[0] == figures.channels[1] and not figures.lost
    row("SPICE connections of the session", f"{len(figures.channels[0])}, {'all stayed' if same else 'NOT the same'}")
    return "\n".join(lines)


def table_rows(figures: Figures) -> list[Row]:
    """Return the rows of make bench's table."""
    part, lines = "the page", []
    if scrolled := figures.scrolled:
        lines.append(Row(part, "frames while text scrolls", f"{scrolled.frames / scrolled.seconds:.1f} frames/s"))
        for name, cpu in (("session", scrolled.session_cpu), ("page", scrolled.page_cpu)):
            lines.append(Row(part, f"{name}, a frame", f"{1000 * cpu / max(scrolled.frames, 1):.1f} ms CPU"))
    if figures.keys:
        lines.append(Row(part, "key to changed pixel", f"{1000 * statistics.median(figures.keys):.0f} ms"))
    if figures.iso:
        iso = compared(figures.iso, "browser", "machine")
        lines.append(
            Row(f"{part}: an ISO of the browser; beside one of this machine", "read", iso.ours, iso.theirs, iso.ratio)
        )
    for way, goal in ((NO_VIEWER, None), (SLOW, SLOW_GOAL)) if figures.disk else ():
        disk = compared(figures.disk, way, VIEWER)
        what = "a slow viewer, too" if way == SLOW else way
        group = f"{part}: a disk at full speed; beside that with one viewer"
        lines.append(Row(group, what, disk.ours, disk.theirs, disk.ratio, goal))
    return lines


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two speeds, as text, and the ratios of the rounds."""

    ours: str
    theirs: str
    ratios: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Return the median of the ratios."""
        return statistics.median(self.ratios)

    def shown(self) -> tuple[str, str, str]:
        """Return the speeds, and the median of the ratios with the smallest and the largest one."""
        return self.ours, self.theirs, f"{self.ratio:.2f} ({min(self.ratios):.2f}-{max(self.ratios):.2f})"


def compared(speeds: Mapping[str, list[float]], ours: str, theirs: str) -> Comparison:
    """Return two speeds and their ratios."""
    ratios = tuple(one / other for one, other in zip(speeds[ours], speeds[theirs], strict=True))
    first, second = (f"{statistics.median(speeds[way]) / 1e6:.1f} MB/s" for way in (ours, theirs))
    return Comparison(first, second, ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="measure this part (may be repeated)")
    parser.add_argument("--seconds", type=float, default=20, help="for how long text scrolls (default: 20)")
    parser.add_argument("--keys", type=int, default=50, help="keys after the warm-up (default: 50)")
    parser.add_argument("--rounds", type=int, default=3, help="pairs after the warm-up (default: 3)")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    add_rows_option(parser)
    options = parser.parse_args()
    parts = tuple(part for part in PARTS if not options.part or part in options.part)
    load = os.getloadavg()[0]
    print(machine(), flush=True)
    if load > QUIET_LOAD:
        print(f"The machine is busy (load {load:.1f}): the page needs more than one process, and is slower than usual.")
    started = time.monotonic()
    try:
        figures = asyncio.run(measured(options, parts))
    except FarplugError as error:
        sys.exit(f"bench: {error}")
    print(table(figures))
    print(f"\n{time.monotonic() - started:.0f} s, load {load:.1f} before and {os.getloadavg()[0]:.1f} after")
    write_rows(options.rows, table_rows(figures))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "figures": asdict(figures)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
