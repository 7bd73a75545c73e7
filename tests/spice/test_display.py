"""The display channel: messages that QEMU 7.2 sent, and drawing compared with a plain model."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import lz4.block
import pytest

from farplug.errors import RemoteProtocolError
from farplug.spice import display as display_module
from farplug.spice.channel import Message
from farplug.spice.display import (
    CAPABILITIES,
    CLIP_WORK,
    MAX_CLIP,
    MAX_ROWS,
    ROW_WORK,
    Display,
    DisplayChannel,
    DisplayMessage,
)
from farplug.spice.framebuffer import CELL, Framebuffer, Picture, Rect
from farplug.spice.images import MAX_BLOCKS, Unsupported, decode_image
from farplug.spice.link import LinkResult
from farplug.spice.types import pack_capabilities

VECTORS = Path(__file__).parents[1] / "data/spice-display-vectors.txt"
COPY, FILL, COPY_BITS, CREATE, DESTROY, MARK = 304, 302, 104, 314, 315, 102


def vectors(channel: str, kind: int) -> list[bytes]:
    """Return the bodies of real messages."""
    lines = [line for line in VECTORS.read_text().splitlines() if line.startswith(f"{channel} {kind} ")]
    assert lines
    return [bytes.fromhex(line.rpartition("|")[2].strip()) for line in lines]


def create(width: int, height: int, number: int = 0, form: int = 32, flags: int = 1) -> bytes:
    return struct.pack("<5I", number, width, height, form, flags)


def base(rect: Rect, clips: list[Rect] | None = None, surface: int = 0) -> bytes:
    head = struct.pack("<IiiiiB", surface, rect.top, rect.left, rect.bottom, rect.right, clips is not None)
    if clips is not None:
        head += struct.pack("<I", len(clips))
        head += b"".join(struct.pack("<4i", clip.top, clip.left, clip.bottom, clip.right) for clip in clips)
    return head


def image(kind: int, width: int, height: int, data: bytes) -> bytes:
    return struct.pack("<QBBII", 1, kind, 0, width, height) + data


def bitmap(width: int, height: int, pixels: bytes, *, form: int = 8, top_down: bool = True, stride: int = 0) -> bytes:
    size = 3 if form == 7 else 4
    fields = form, 4 * top_down, width, height, stride or width * size, 0
    return image(0, width, height, struct.pack("<BBIIII", *fields) + pixels)


def lz4_image(width: int, height: int, blocks: list[bytes], *, form: int = 8, top_down: bool = True) -> bytes:
    data = b"".join(struct.pack(">I", len(block)) + block for block in blocks)
    return image(109, width, height, struct.pack("<IBB", 2 + len(data), top_down, form) + data)


def copy(
    rect: Rect,
    picture: bytes,
    left: int = 0,
    top: int = 0,
    *,
    clips: list[Rect] | None = None,
    rop: int = 8,
    mask: int = 0,
) -> bytes:
    head = base(rect, clips)
    right, bottom = left + rect.right - rect.left, top + rect.bottom - rect.top
    rest = struct.pack("<iiiiHBBiiI", top, left, bottom, right, rop, 0, 0, 0, 0, mask)
    return head + struct.pack("<I", len(head) + 4 + len(rest)) + rest + picture


def scaled() -> bytes:
    body = bytearray(copy(Rect(0, 0, 2, 2), bitmap(4, 4, bytes(64))))
    body[25:41] = struct.pack("<4i", 0, 0, 4, 4)
    return bytes(body)


def fill(rect: Rect, colour: int, clips: list[Rect] | None = None, rop: int = 8) -> bytes:
    return base(rect, clips) + struct.pack("<BIHBiiI", 1, colour, rop, 0, 0, 0, 0)


def plain(rect: Rect) -> bytes:
    return base(rect) + struct.pack("<BiiI", 0, 0, 0, 0)


def copy_bits(rect: Rect, x: int, y: int) -> bytes:
    return base(rect) + struct.pack("<ii", x, y)


def display(width: int = 8, height: int = 6) -> Display:
    made = Display()
    draw(made, CREATE, create(width, height))
    draw(made, MARK)
    return made


def draw(display: Display, kind: int, body: bytes = b"") -> None:
    display.handle(Message(kind, memoryview(body)))


def shown(display: Display) -> Framebuffer:
    assert display.shown is not None
    return display.shown


def pixel(framebuffer: Framebuffer, x: int, y: int) -> bytes:
    at = 4 * (y * framebuffer.width + x)
    return bytes(framebuffer.pixels[at : at + 4])


def test_real_messages() -> None:
    made = Display()
    (created,) = vectors("display", CREATE)
    draw(made, CREATE, created)
    for body in vectors("display", 317):
        draw(made, 317, body)
    assert made.monitors == (Rect(0, 0, 1280, 800),)
    assert made.shown is None, "the picture is not complete"
    draw(made, MARK)
    picture = shown(made)
    assert (picture.width, picture.height, made.complete) == (1280, 800, True)
    cached = [body for body in vectors("display", COPY) if body[57 + 8] == 103]
    assert len(cached) == 1
    with pytest.raises(Unsupported, match="an image of type 103"):  # we ask the server not to use a cache
        draw(made, COPY, cached[0])
    for body in vectors("display", COPY):
        before = picture.serial
        if body in cached:
            continue
        draw(made, COPY, body)
        _, top, left, bottom, right = struct.unpack_from("<I4i", body)
        (changed,) = picture.changed_since(before)
        assert changed.intersection(Rect(left, top, right, bottom)) == Rect(left, top, right, bottom)
    assert bytes(picture.pixels[4 * (23 * 1280 + 39) :][:16]) == bytes.fromhex("e7e8e900" * 4)  # BITMAP, row 23, x 39
    for body in vectors("display", FILL):
        draw(made, FILL, body)
    for body in vectors("display", COPY_BITS):
        draw(made, COPY_BITS, body)
    draw(made, DESTROY, vectors("display", DESTROY)[0])
    assert shown(made) is picture, "the last picture stays"


def test_the_channel_begins_with_the_compression_and_init() -> None:
    link = LinkResult(True, (), pack_capabilities([1, 4, 6, 12]), b"")
    assert b"".join(map(bytes, DisplayChannel("display 0", link).data_to_send())).hex() == (
        "670001000000" + "01" + "670001000000" + "07" + "65000e000000" + "00" * 14
    )
    old = LinkResult(True, (), pack_capabilities([1, 4, 12]), b"")
    assert b"".join(map(bytes, DisplayChannel("display 0", old).data_to_send())).hex() == "65000e000000" + "00" * 14
    assert pack_capabilities(CAPABILITIES) == (0x162,)


def test_messages_of_64_mib_are_accepted_and_no_larger_ones() -> None:
    channel = DisplayChannel("display 0", LinkResult(True, (), (), b""))
    channel.receive_data(memoryview(struct.pack("<HI", COPY, (64 << 20) + (64 << 10))))
    assert channel.next_event() is None
    channel = DisplayChannel("display 0", LinkResult(True, (), (), b""))
    channel.receive_data(memoryview(struct.pack("<HI", COPY, (64 << 20) + (64 << 10) + 1)))
    with pytest.raises(RemoteProtocolError, match="MAX_MESSAGE"):
        channel.next_event()


@pytest.mark.parametrize("top_down", [True, False])
@pytest.mark.parametrize("stride", [0, 80])
def test_copies_of_bitmaps(top_down: bool, stride: int) -> None:
    made = display()
    rows = [bytes([row] * 16) for row in range(3)]
    pixels = b"".join(row.ljust(stride or 16, b"?") for row in rows)
    picture = bitmap(4, 3, pixels, top_down=top_down, stride=stride)
    draw(made, COPY, copy(Rect(1, 2, 5, 5), picture))
    assert [pixel(shown(made), 1, 2 + row)[0] for row in range(3)] == ([0, 1, 2] if top_down else [2, 1, 0])
    draw(made, COPY, copy(Rect(0, 0, 2, 1), picture, left=1, top=1))
    assert pixel(shown(made), 0, 0)[0] == 1


def test_lz4_images_of_several_blocks_share_a_dictionary() -> None:
    pixels = random.Random(1).randbytes(8 * 3 * 4) * 2
    first, second = pixels[:96], pixels[96:]
    blocks = [
        lz4.block.compress(first, store_size=False),
        lz4.block.compress(second, store_size=False, dict=first),
    ]
    assert len(blocks[1]) < 30, "the second block refers to the first one"
    made = display()
    draw(made, COPY, copy(Rect(0, 0, 8, 6), lz4_image(8, 6, blocks)))
    assert bytes(shown(made).pixels) == pixels
    draw(made, COPY, copy(Rect(0, 0, 8, 6), lz4_image(8, 6, blocks, form=9, top_down=False)))
    assert bytes(shown(made).pixels) == b"".join(pixels[at : at + 32] for at in range(160, -1, -32))


def test_images_of_24_bits() -> None:
    made = display(2, 1)
    draw(made, COPY, copy(Rect(0, 0, 2, 1), bitmap(2, 1, b"abcdef?", form=7, stride=7)))
    assert bytes(shown(made).pixels) == b"abc\0def\0"
    block = lz4.block.compress(b"ABCDEF", store_size=False)
    draw(made, COPY, copy(Rect(0, 0, 2, 1), lz4_image(2, 1, [block], form=7)))
    assert bytes(shown(made).pixels) == b"ABC\0DEF\0"


def test_clips_and_boxes_beyond_the_surface() -> None:
    made = display()
    everywhere = Rect(-(1 << 31), -(1 << 31), (1 << 31) - 1, (1 << 31) - 1)
    draw(made, FILL, fill(everywhere, 0x010203))
    assert set(bytes(shown(made).pixels)[::4]) == {3}
    draw(made, FILL, fill(everywhere, 0x0000FF, clips=[Rect(0, 0, 1, 1), Rect(7, 5, 100, 100), Rect(3, 3, 3, 9)]))
    blue = [at for at in range(48) if shown(made).pixels[4 * at] == 0xFF]
    assert blue == [0, 47]
    picture = bitmap(16, 16, bytes(range(256)) * 4)
    draw(made, COPY, copy(Rect(-8, -8, 8, 8), picture))
    assert pixel(shown(made), 0, 0) == bytes(range(256))[(8 * 16 + 8) * 4 % 256 :][:4]


def test_plain_operations() -> None:
    made = display()
    draw(made, 307, plain(Rect(0, 0, 2, 1)))
    draw(made, 306, plain(Rect(1, 0, 2, 1)))
    draw(made, 308, plain(Rect(2, 0, 3, 1)))
    assert [pixel(shown(made), x, 0)[:3] for x in range(3)] == [b"\xff" * 3, bytes(3), b"\xff" * 3]
    draw(made, 103)
    assert pixel(shown(made), 0, 0) == bytes(4)


def test_pictures_are_shown_when_they_are_complete() -> None:
    made = display()
    draw(made, FILL, fill(Rect(0, 0, 8, 6), 7))
    first = shown(made)
    made.begin()
    draw(made, CREATE, create(8, 6))
    draw(made, FILL, fill(Rect(0, 0, 8, 6), 9))
    assert shown(made) is first
    assert pixel(first, 0, 0)[0] == 7
    draw(made, MARK)
    assert shown(made) is not first
    assert pixel(shown(made), 0, 0)[0] == 9
    assert [*shown(made).changed_since(first.serial)] == [Rect(0, 0, 8, 6)]
    draw(made, DESTROY, struct.pack("<I", 0))
    draw(made, FILL, fill(Rect(0, 0, 8, 6), 1))  # of a surface that is gone
    assert pixel(shown(made), 0, 0)[0] == 9
    draw(made, CREATE, create(3, 2))
    assert (shown(made).width, shown(made).height) == (3, 2), "another mode, after the first picture"


def test_surfaces_that_are_not_the_screen_are_not_drawn() -> None:
    made = display()
    draw(made, CREATE, create(100, 100, number=5, form=8, flags=0))
    draw(made, FILL, base(Rect(0, 0, 8, 6), surface=5) + fill(Rect(0, 0, 8, 6), 9)[21:])
    assert not any(shown(made).pixels)
    draw(made, DESTROY, struct.pack("<I", 5))
    draw(made, FILL, fill(Rect(0, 0, 1, 1), 9))
    assert any(shown(made).pixels)


@pytest.mark.parametrize(
    ("kind", "body", "text"),
    [
        (COPY, copy(Rect(0, 0, 1, 1), bitmap(1, 1, bytes(4)), rop=64), "raster operation 64"),
        (COPY, copy(Rect(0, 0, 1, 1), bitmap(1, 1, bytes(4)), mask=5), "a mask"),
        (COPY, copy(Rect(0, 0, 1, 1), bitmap(1, 1, bytes(4), form=5)), "format 5"),
        (COPY, copy(Rect(0, 0, 1, 1), lz4_image(1, 1, [b"x"], form=6)), "format 6"),
        (COPY, copy(Rect(0, 0, 1, 1), image(105, 1, 1, b"")), "type 105"),
        (COPY, scaled(), "another size"),
        (FILL, fill(Rect(0, 0, 1, 1), 0, rop=64), "raster operation 64"),
        (FILL, base(Rect(0, 0, 1, 1)) + b"\x02" + bytes(30), "pattern"),
        (FILL, fill(Rect(0, 0, 8, 6), 0, clips=[Rect(0, 0, 8, 6), Rect(7, 5, 8, 6)]), "overlaps"),
        (306, base(Rect(0, 0, 1, 1)) + struct.pack("<BiiI", 0, 0, 0, 9), "mask"),
        (COPY_BITS, base(Rect(0, 0, 8, 6), [Rect(0, 0, 1, 1), Rect(2, 0, 3, 1)]) + bytes(8), "clip region"),
        *((kind, b"", DisplayMessage(kind).name) for kind in (101, 303, 305, 309, 310, 311, 312, 313, 318)),
    ],
)
def test_what_is_not_supported_changes_nothing(kind: int, body: bytes, text: str) -> None:
    made = display()
    before = shown(made).serial
    with pytest.raises(Unsupported, match=text):
        draw(made, kind, body)
    assert shown(made).serial == before


BLOCK = lz4.block.compress(bytes(192), store_size=False)
WHOLE = Rect(0, 0, 8, 6)


@pytest.mark.parametrize(
    ("kind", "body", "text"),
    [
        (CREATE, create(0, 5), "0x5"),
        (CREATE, create(16385, 1), "16385x1"),
        (CREATE, create(16384, 1025), "16777216 in all"),
        (CREATE, create(5, 5, form=16), "format 16"),
        (CREATE, b"", "not complete"),
        (DESTROY, b"", "not complete"),
        (317, struct.pack("<HH", 17, 17), "17 monitors"),
        (317, struct.pack("<HH", 1, 1), "not complete"),
        (FILL, fill(Rect(2, 0, 1, 1), 0), "corners"),
        (FILL, fill(WHOLE, 0)[:30], "not complete"),
        (FILL, base(WHOLE)[:-1] + b"\x02", "type 2"),
        (FILL, base(WHOLE)[:-1] + b"\x01" + struct.pack("<I", MAX_CLIP + 1), "4097 rectangles"),
        (FILL, base(WHOLE)[:-1] + b"\x01" + struct.pack("<I", 2) + bytes(20), "not complete"),
        (COPY, base(WHOLE), "not complete"),
        (COPY, copy(WHOLE, b""), "outside its message"),
        (COPY, copy(WHOLE, bitmap(7, 6, bytes(168))), "0,0 to 8,6 of an image of 7x6"),
        (COPY, copy(WHOLE, bitmap(8, 6, bytes(192)), left=-1), "-1,0"),
        (COPY, copy(WHOLE, bitmap(8, 6, bytes(191))), "191 are there"),
        (COPY, copy(WHOLE, bitmap(8, 6, bytes(192), stride=31)), "rows of 31"),
        (COPY, copy(WHOLE, bitmap(8, 6, bytes(192), stride=70000)), "rows of 70000"),
        (COPY, copy(WHOLE, image(0, 8, 6, b"")), "bitmap of 0"),
        (COPY, copy(WHOLE, image(0, 9, 6, bitmap(8, 6, bytes(192))[18:])), "8x6 pixels in an image of 9x6"),
        (COPY, copy(WHOLE, image(109, 8, 6, b"")), "LZ4 image of 0"),
        (COPY, copy(WHOLE, image(109, 16384, 16384, b"")), "16384x16384"),
        (COPY, copy(WHOLE, image(109, 8, 6, struct.pack("<IBB", 1, 1, 8))), "1 bytes"),
        (COPY, copy(WHOLE, image(109, 8, 6, struct.pack("<IBB", 3, 1, 8))), "3 bytes, of which 2"),
        (COPY, copy(WHOLE, lz4_image(8, 6, [])), "0 bytes of pixels, fewer than 192"),
        (COPY, copy(WHOLE, lz4_image(8, 6, [BLOCK])[:-1]), "of which"),
        (COPY, copy(WHOLE, lz4_image(8, 6, [b"\xff" * 9])), "damaged"),
        (COPY, copy(WHOLE, lz4_image(8, 5, [BLOCK])), "damaged"),
        (COPY, copy(WHOLE, lz4_image(8, 6, [b"\0"] * 3)), "without pixels"),
        (COPY, copy(WHOLE, lz4_image(80, 60, [b"\x10x"] * (MAX_BLOCKS + 1))), "more than 4096 blocks"),
    ],
)
def test_invalid_messages(kind: int, body: bytes, text: str) -> None:
    with pytest.raises(RemoteProtocolError, match=text):
        draw(display(), kind, body)


def test_rows_of_narrow_rectangles_are_bounded() -> None:
    made = display(64, 8192)
    columns = [Rect(x, 0, x + 1, 8192) for x in range(17)]
    assert MAX_ROWS == 16 * 8192
    made.work = 0
    draw(made, FILL, fill(Rect(0, 0, 64, 8192), 1, clips=columns[:16]))
    assert made.work > MAX_ROWS * ROW_WORK
    assert pixel(shown(made), 15, 8191)[0] == 1
    with pytest.raises(Unsupported, match="many narrow parts"):
        draw(made, FILL, fill(Rect(0, 0, 64, 8192), 2, clips=columns))
    assert pixel(shown(made), 0, 0)[0] == 1
    made.work = 0
    draw(made, FILL, fill(Rect(0, 0, 64, 8192), 2, clips=[Rect(-1, -1, 0, 0)] * 4096))
    assert made.work >= 4096 * CLIP_WORK, "rectangles outside take time, too"


def test_large_images_can_be_decoded_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display_module, "LARGE", 48)
    pixels = bytes(range(192))
    large = [
        lz4_image(8, 6, [lz4.block.compress(pixels, store_size=False)]),
        lz4_image(8, 6, [lz4.block.compress(pixels[:144], store_size=False)], form=7),
        bitmap(8, 6, pixels[:144], form=7),
    ]
    for picture in large:
        made, whole = display(), display()
        message = Message(COPY, memoryview(copy(Rect(0, 0, 8, 6), picture)))
        offset = made.handle(message, decode=False)
        assert offset == len(message.body) - len(picture)
        assert not any(shown(made).pixels)
        made.draw(message, decode_image(message.body, offset))
        assert whole.handle(message) is None
        assert shown(made).pixels == shown(whole).pixels
        assert any(shown(made).pixels)
    made = display()
    for small in (
        bitmap(8, 6, pixels),  # large, and is not decoded
        lz4_image(2, 1, [lz4.block.compress(b"abcdefgh", store_size=False)]),
    ):
        width, height = struct.unpack_from("<II", small, 10)
        assert made.handle(Message(COPY, memoryview(copy(Rect(0, 0, width, height), small))), decode=False) is None
    assert made.handle(Message(COPY, memoryview(copy(Rect(9, 9, 17, 15), large[0]))), decode=False) is None, "outside"
    with pytest.raises(RemoteProtocolError, match="outside its message"):
        made.handle(Message(COPY, memoryview(copy(Rect(0, 0, 8, 6), large[0][:10]))), decode=False)


def test_an_image_that_is_too_short_is_refused_before_it_is_decompressed() -> None:
    data = lz4_image(8, 6, [BLOCK])
    with pytest.raises(RemoteProtocolError, match="of which"):
        decode_image(memoryview(data)[:-2], 0)


def test_copying_within_the_surface_equals_a_model() -> None:
    rng = random.Random(7)
    width, height = 40, 30
    made = display(width, height)
    draw(made, COPY, copy(Rect(0, 0, width, height), bitmap(width, height, rng.randbytes(4 * width * height))))
    for _ in range(300):
        left, top = rng.randrange(-5, width), rng.randrange(-5, height)
        rect = Rect(left, top, left + rng.randrange(1, 30), top + rng.randrange(1, 30))
        x, y = rng.randrange(-5, width), rng.randrange(-5, height)
        before = bytes(shown(made).pixels)
        draw(made, COPY_BITS, copy_bits(rect, x, y))
        for row in range(height):
            for column in range(width):
                at = (row, column)
                if rect.left <= column < rect.right and rect.top <= row < rect.bottom:
                    source = row + y - rect.top, column + x - rect.left
                    if 0 <= source[0] < height and 0 <= source[1] < width:
                        at = source
                start = 4 * (at[0] * width + at[1])
                assert pixel(shown(made), column, row) == before[start : start + 4]


def test_changed_cells_hold_all_changes() -> None:
    rng = random.Random(3)
    framebuffer = Framebuffer(200, 150)
    for _ in range(300):
        before, serial = bytes(framebuffer.pixels), framebuffer.serial
        for _ in range(rng.randrange(4)):
            left, top = rng.randrange(200), rng.randrange(150)
            rect = Rect(left, top, rng.randrange(left, 200) + 1, rng.randrange(top, 150) + 1)
            framebuffer.fill(rect, rng.randbytes(4))
        rects = [*framebuffer.changed_since(serial)]
        inside = bytearray(200 * 150)
        for rect in rects:
            assert rect.intersection(framebuffer.bounds) == rect
            for row in range(rect.top, rect.bottom):
                at = row * 200
                assert not any(inside[at + rect.left : at + rect.right]), "rectangles do not overlap"
                inside[at + rect.left : at + rect.right] = b"\1" * (rect.right - rect.left)
        for at in range(200 * 150):
            if before[4 * at : 4 * at + 4] != framebuffer.pixels[4 * at : 4 * at + 4]:
                assert inside[at]
        cells = sum(-(-(r.right - r.left) // CELL) * -(-(r.bottom - r.top) // CELL) for r in rects)
        assert framebuffer.cells_changed_since(serial) == cells
        assert not [*framebuffer.changed_since(framebuffer.serial)]


def test_rows_of_a_rectangle() -> None:
    framebuffer = Framebuffer(3, 3)
    framebuffer.pixels[:] = bytes(range(36))
    assert [*map(bytes, framebuffer.rows(Rect(1, 1, 3, 3)))] == [bytes(range(16, 24)), bytes(range(28, 36))]
    assert [*map(bytes, framebuffer.rows(Rect(0, 1, 3, 3)))] == [bytes(range(12, 36))]


def test_a_picture_of_full_width_is_copied_at_once() -> None:
    framebuffer = Framebuffer(4, 4)
    framebuffer.put(Rect(0, 1, 4, 3), Picture(4, 3, 16, True, bytes(range(48))), 0, 1)
    assert bytes(framebuffer.pixels) == bytes(16) + bytes(range(16, 48)) + bytes(16)
