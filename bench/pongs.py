"""Measure how soon a session answers PINGs of a SPICE server, while browsers watch a screen that scrolls.

A SPICE server of the tests, in a process of its own, sends a PING on the main channel and on a USB channel every
20 ms, and 15 whole pictures of text a second. The page has no viewer, one, or a second one on a line of 10 kB/s.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import lz4.block
from tests.spice.test_display import copy, create, lz4_image
from tests.transport.fake_spice import SESSION_ID, Channel, FakeSpice, channels_list, message, ping, running

from disk import QUIET_LOAD, machine
from farplug.spice.framebuffer import Rect
from farplug.spice.types import ChannelType
from jobs import MIB
from page import NO_VIEWER, SLOW, TIMEOUT, VIEWER, WATCHING, Program, Viewer, percentile, served, slow_viewer
from rows import Row, add_rows_option, write_rows

MAIN, USB = CHANNELS = ("main", "usbredir")
WIDTH, HEIGHT, PIECE = 1280, 800, Rect(0, 0, 80, 16)
"""A picture comes in pieces of the size in which QEMU sends a text console."""
PING_INTERVAL, FRAME_INTERVAL = 0.02, 1 / 15


# The SPICE server -----------------------------------------------------------------------------------------------------


def text(colour: int) -> bytes:
    """Return the messages of a picture full of text."""
    row = bytes((colour, colour, colour, 0, 0, 0, 0, 0, 0, 0, 0, 0)) * PIECE.right
    pixels = row[: 4 * PIECE.right] * PIECE.bottom
    image = lz4_image(PIECE.right, PIECE.bottom, [lz4.block.compress(pixels, store_size=False)])
    return b"".join(
        message(304, copy(Rect(x, y, x + PIECE.right, y + PIECE.bottom), image))
        for y in range(0, HEIGHT, PIECE.bottom)
        for x in range(0, WIDTH, PIECE.right)
    )


async def pinged(channel: Channel, name: str, fake: FakeSpice) -> None:
    """Send PINGs on a channel, and print how long each PONG took."""
    sent: dict[int, float] = {}

    async def send() -> None:
        number = 0
        while True:
            sent[number] = time.perf_counter()
            channel.send(ping(number))
            number += 1
            await asyncio.sleep(PING_INTERVAL)

    sending = asyncio.ensure_future(send())
    try:
        while True:
            kind, body = await channel.receive()
            if kind == 3:
                waited = time.perf_counter() - sent.pop(struct.unpack_from("<I", body)[0])
                print(json.dumps([name, waited]), flush=True)
            elif kind == 104 and name == MAIN:
                channel.send(channels_list(fake.channels))
    finally:
        sending.cancel()


async def drawing(channel: Channel) -> None:
    """Send pictures until the client leaves; print when it comes and leaves."""
    print(json.dumps(["display", 1]), flush=True)
    pictures = text(0xAA), text(0x55)
    channel.send(message(3, struct.pack("<II", 1, 20)) + message(314, create(WIDTH, HEIGHT)))
    channel.send(pictures[0] + message(102))

    async def send() -> None:
        while True:
            for picture in pictures:
                channel.send(picture)
                await channel.writer.drain()
                await asyncio.sleep(FRAME_INTERVAL)

    sending = asyncio.ensure_future(send())
    try:
        while await channel.reader.read(1 << 16):
            pass
    finally:
        sending.cancel()
        print(json.dumps(["display", 0]), flush=True)


async def serve() -> None:
    """Serve, and print the port first."""
    fake = FakeSpice(channels=((1, 0), (2, 0), (9, 0)))

    async def main(channel: Channel) -> None:
        channel.send(message(103, struct.pack("<8I", SESSION_ID, 0, 1, 1, 0, 10, 0, 0)))
        await pinged(channel, MAIN, fake)

    fake.main = main
    fake.usbredir = lambda channel: pinged(channel, USB, fake)
    fake.side = {ChannelType.DISPLAY: drawing}
    async with running(fake) as port:
        print(port, flush=True)
        await asyncio.Event().wait()


# The measurement ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Server:
    """The process of the SPICE server.

    Attributes:
        target: what a session connects to.
        waits: seconds from each PING to its PONG, by the channel.
        linked: the display is linked.
    """

    target: str
    waits: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in CHANNELS})
    linked: bool = False

    async def read(self, output: asyncio.StreamReader) -> None:
        while line := await output.readline():
            name, value = json.loads(line)
            if name in self.waits:
                self.waits[name].append(value)
            else:
                self.linked = bool(value)


@asynccontextmanager
async def server() -> AsyncIterator[Server]:
    process = await asyncio.create_subprocess_exec(sys.executable, __file__, "--serve", stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    port = int(await process.stdout.readline())
    made = Server(f"spice://127.0.0.1:{port}")
    reading = asyncio.ensure_future(made.read(process.stdout))
    try:
        yield made
    finally:
        process.terminate()
        await process.wait()
        await asyncio.gather(reading, return_exceptions=True)


Waits = dict[str, dict[str, list[float]]]
"""Seconds from PING to PONG, by who watches and by the channel."""
Memory = dict[str, tuple[int, int]]
"""The largest resident memory of the session and of the page, by who watches."""


async def measured(seconds: float, rounds: int) -> tuple[Waits, Memory]:
    waits: Waits = {way: {name: [] for name in CHANNELS} for way in WATCHING}
    memory: Memory = dict.fromkeys(WATCHING, (0, 0))
    with tempfile.TemporaryDirectory(prefix="farplug-bench-") as folder:
        async with server() as vm, served(vm.target, Path(folder)) as (url, session, page), Viewer.open(url) as viewer:
            for number in range(rounds + 1):
                for way in WATCHING:
                    async with AsyncExitStack() as stack:
                        if way == VIEWER:
                            await viewer.watch()
                        elif way == SLOW:
                            await stack.enter_async_context(slow_viewer(url))
                        vm.waits = {name: [] for name in CHANNELS}
                        used = await largest(seconds, session, page)
                        found = vm.waits
                        if number:
                            for name in CHANNELS:
                                waits[way][name] += found[name]
                            memory[way] = max(memory[way][0], used[0]), max(memory[way][1], used[1])
                await viewer.call("unwatch-screen")
                async with asyncio.timeout(TIMEOUT):
                    while vm.linked:
                        await asyncio.sleep(0.1)
    return waits, memory


async def largest(seconds: float, session: Program, page: Program) -> tuple[int, int]:
    """Return the largest memory of two processes in a time."""
    used = 0, 0
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while True:
                used = max(used[0], session.memory()), max(used[1], page.memory())
                await asyncio.sleep(0.1)
    return used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5, help="for how long each way is measured (default: 5)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds after the warm-up (default: 3)")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    add_rows_option(parser)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve())
        return
    print(machine(), flush=True)
    if (load := os.getloadavg()[0]) > QUIET_LOAD:
        print(f"The machine is busy (load {load:.1f}): PONGs wait for a processor, too.")
    waits, memory = asyncio.run(measured(options.seconds, options.rounds))
    print(f"  {'PING to PONG':<32}" + "".join(f"{way:>26}" for way in WATCHING))
    for name in CHANNELS:
        print(
            f"  {name + ': median, 99 %, longest':<32}" + "".join(f"{show(waits[way][name]):>26}" for way in WATCHING)
        )
    for index, name in enumerate(("session", "page")):
        values = (f"{memory[way][index] / MIB:.0f} MiB" for way in WATCHING)
        print(f"  {name + ', largest memory':<32}" + "".join(f"{value:>26}" for value in values))
    write_rows(
        options.rows,
        (
            Row(
                "PING to PONG while browsers watch a screen that scrolls: 99 %",
                f"{name} channel, {'a slow viewer beside one' if way == SLOW else way}",
                f"{1000 * percentile(waits[way][name], 0.99):.1f} ms",
            )
            for name in CHANNELS
            for way in (NO_VIEWER, VIEWER, SLOW)
        ),
    )


def show(waits: list[float]) -> str:
    return f"{1000 * statistics.median(waits):.1f}, {1000 * percentile(waits, 0.99):.1f}, {1000 * max(waits):.1f} ms"


if __name__ == "__main__":
    main()
