"""Fuzz the input from SPICE servers: display, cursor and inputs channels.

RemoteProtocolError and Unsupported are expected. Any other exception is a bug. Whatever arrives, the picture keeps its
size, and changes only in cells that are counted as changed.
"""

from __future__ import annotations

import random
import struct
from pathlib import Path

import lz4.block

from farplug.errors import RemoteProtocolError
from farplug.spice.channel import Message
from farplug.spice.cursor import Cursor, CursorChannel
from farplug.spice.display import Display, DisplayChannel, DisplayMessage
from farplug.spice.images import Unsupported
from farplug.spice.inputs import InputsChannel
from farplug.spice.link import LinkResult
from harness import run

VECTORS = Path(__file__).parents[1] / "tests/data/spice-display-vectors.txt"


def vectors(channel: str) -> list[tuple[int, bytes]]:
    found = []
    for line in VECTORS.read_text().splitlines():
        words = line.split()
        if words[0] == channel:
            found.append((int(words[1]), bytes.fromhex(line.rpartition("|")[2].strip())))
    return found


DISPLAY, CURSOR = vectors("display"), vectors("cursor")
NUMBERS = (0, 1, 2, 7, 64, 255, 4096, 16384, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def damage(rng: random.Random, data: bytes) -> bytes:
    damaged = bytearray(data)
    for _ in range(rng.choice((0, 1, 2, 4))):
        at = rng.randrange(len(damaged) + 1)
        match rng.randrange(3):
            case 0:
                damaged[at : at + 4] = struct.pack("<I", rng.choice(NUMBERS))
            case 1:
                del damaged[at:]
            case _:
                damaged[at : at + 1] = rng.randbytes(1)
    return bytes(damaged)


def check(holds: bool) -> None:
    assert holds


def copy(rng: random.Random) -> tuple[int, bytes]:
    """Return a COPY with an image of its size, most of them valid."""
    width, height = rng.randrange(1, 90), rng.randrange(1, 90)
    left, top = rng.randrange(-20, 100), rng.randrange(-20, 100)
    pixels = rng.choice((rng.randbytes, bytes))(4 * width * height)
    if rng.random() < 0.5:
        cut = rng.randrange(len(pixels))
        blocks = [lz4.block.compress(pixels[:cut], store_size=False)] if cut else []
        blocks.append(lz4.block.compress(pixels[cut:], store_size=False, dict=pixels[:cut][-65536:]))
        data = b"".join(struct.pack(">I", len(block)) + block for block in blocks)
        image = struct.pack("<QBBII", 1, 109, 0, width, height) + struct.pack("<IBB", len(data) + 2, 1, 8) + data
    else:
        image = struct.pack("<QBBII", 1, 0, 0, width, height)
        image += struct.pack("<BBIIII", 8, rng.choice((0, 4)), width, height, 4 * width, 0) + pixels
    head = struct.pack("<IiiiiB", 0, top, left, top + height, left + width, 0)
    return 304, head + struct.pack("<IiiiiHBBiiI", 57, 0, 0, height, width, 8, 0, 0, 0, 0, 0) + image


def fuzz_display(rng: random.Random) -> None:
    display = Display()
    width, height = rng.randrange(1, 200), rng.randrange(1, 200)
    display.handle(Message(314, memoryview(struct.pack("<5I", 0, width, height, 32, 1))))
    display.handle(Message(102, memoryview(b"")))
    for _ in range(20):
        picture = display.shown
        assert picture is not None
        before, serial = bytes(picture.pixels), picture.serial
        kind, body = copy(rng) if rng.random() < 0.5 else rng.choice(DISPLAY)
        if rng.random() < 0.1:
            kind = rng.choice([*DisplayMessage])
        if kind not in [*DisplayMessage]:
            continue
        try:
            display.handle(Message(kind, memoryview(damage(rng, body))))
        except (RemoteProtocolError, Unsupported) as refused:
            check(len(str(refused)) < 300)
        assert len(picture.pixels) == len(before)
        changed = bytearray(before)
        pitch = 4 * picture.width
        for rect in picture.changed_since(serial):
            for row in range(rect.top, rect.bottom):
                part = slice(row * pitch + 4 * rect.left, row * pitch + 4 * rect.right)
                changed[part] = picture.pixels[part]
        assert changed == picture.pixels


def fuzz_channels(rng: random.Random) -> None:
    link = LinkResult(rng.random() < 0.7, (), (rng.getrandbits(32),), b"")
    channel = rng.choice((DisplayChannel, CursorChannel, InputsChannel))("fuzz 0", link)
    display, cursor = Display(), Cursor()
    stream = b""
    for _ in range(rng.randrange(15)):
        kind, body = rng.choice((*DISPLAY, *CURSOR, (111, b""), (101, b"\0\0"), (102, b"\0\0")))
        body = damage(rng, body)
        stream += (
            struct.pack("<HI", kind, len(body)) if link.mini_header else struct.pack("<QHII", 1, kind, len(body), 0)
        )
        stream += body
    step = rng.choice((1, 9, 1000, 1 << 20))
    try:
        for at in range(0, len(stream), step):
            channel.receive_data(memoryview(stream)[at : at + step])
            while (event := channel.next_event()) is not None:
                if isinstance(event, Message) and isinstance(channel, DisplayChannel):
                    try:
                        display.handle(event)
                    except Unsupported:
                        display.begin()
                elif isinstance(event, Message):
                    cursor.handle(event)
            channel.data_to_send()
    except RemoteProtocolError as refused:
        check(len(str(refused)) < 300)


def one_case(rng: random.Random) -> None:
    rng.choice((fuzz_display, fuzz_channels))(rng)


if __name__ == "__main__":
    run("display", one_case)
