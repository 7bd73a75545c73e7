"""Reference pictures, and strips of screens."""

from __future__ import annotations

import os
import random
import struct
import zlib
from pathlib import Path

import pytest
from tests.app.test_screen import decode_png as decode_rgb
from tests.app.test_screen import rgb

from farplug.app.png import decode_png, encode_png
from farplug.app.screen import Frame
from farplug.errors import ImageError, Reason
from farplug.testing.pictures import STRIP_SIDE, Reference, colours_only, count_differing, reduced, strip

PIL = pytest.importorskip("PIL.Image")


def frame(width: int, height: int, seed: int = 1) -> Frame:
    return Frame(width, height, random.Random(seed).randbytes(4 * width * height), 1)


def cut(whole: Frame, x: int, y: int, width: int, height: int) -> Frame:
    rows = [whole.pixels[4 * (row * whole.width + x) :][: 4 * width] for row in range(y, y + height)]
    return Frame(width, height, b"".join(rows), 1)


def saved(path: Path, picture: Frame, transparent: tuple[tuple[int, int], ...] = ()) -> Path:
    """Write a picture, with transparent pixels whose colour is another one."""
    image = PIL.frombytes("RGB", (picture.width, picture.height), rgb(picture.pixels)).convert("RGBA")
    for position in transparent:
        image.putpixel(position, (1, 2, 3, 0))
    image.save(path)
    return path


def test_a_part_of_a_screen_is_found(tmp_path: Path) -> None:
    screen = frame(97, 61)
    for x, y, width, height in ((0, 0, 97, 61), (13, 7, 20, 10), (96, 60, 1, 1), (0, 60, 97, 1), (77, 0, 20, 61)):
        part = cut(screen, x, y, width, height)
        reference = Reference(saved(tmp_path / "part.png", part))
        assert reference.find(screen) == (x, y)
        assert reference.differing(screen, x, y) == 0
        assert reference.compared == width * height
        other = Frame(97, 61, bytes(len(screen.pixels)), 1)
        assert reference.find(other) is None
        assert reference.differing(other, x, y) == width * height
    assert reference.differing(screen, 96, 0) == reference.compared, "it reaches beyond the edge"
    assert reference.differing(screen, -1, 0) == reference.compared


def test_transparent_pixels_are_not_compared(tmp_path: Path) -> None:
    screen = frame(40, 30)
    holes = tuple((x, y) for x in range(12) for y in range(8) if (x + y) % 3)
    reference = Reference(saved(tmp_path / "part.png", cut(screen, 20, 11, 12, 8), holes))
    assert reference.compared == 12 * 8 - len(holes)
    assert reference.find(screen) == (20, 11)
    changed = bytearray(screen.pixels)
    changed[4 * ((11 + holes[0][1]) * 40 + 20 + holes[0][0])] ^= 0xFF
    assert reference.find(Frame(40, 30, bytes(changed), 2)) == (20, 11)
    changed[4 * (11 * 40 + 20)] ^= 1  # (0, 0) is compared
    assert reference.find(Frame(40, 30, bytes(changed), 2)) is None
    assert reference.differing(Frame(40, 30, bytes(changed), 2), 20, 11) == 1


def test_a_part_of_one_colour_is_found(tmp_path: Path) -> None:
    pixels = bytearray(4 * 300 * 200)
    for row in range(100, 104):
        pixels[4 * (row * 300 + 50) : 4 * (row * 300 + 60)] = b"\x21\x43\x65\0" * 10
    path = saved(tmp_path / "part.png", Frame(10, 4, b"\x21\x43\x65\xaa" * 40, 1))
    assert Reference(path).find(Frame(300, 200, bytes(pixels), 1)) == (50, 100)


def test_files_that_are_not_references(tmp_path: Path) -> None:
    def reason(content: bytes | None) -> Reason:
        path = tmp_path / "a.png"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ImageError, match=r"a\.png") as caught:
            Reference(path)
        return caught.value.reason

    good = encode_png(2, 2, bytes(16))
    assert reason(None) is Reason.NOT_FOUND
    assert reason(b"GIF89a") is Reason.WRONG_FORMAT
    assert reason(good[:-20]) is Reason.DAMAGED
    assert reason(good[:20] + b"\xff" + good[21:]) is Reason.DAMAGED
    saved(tmp_path / "clear.png", frame(1, 1), ((0, 0),))
    assert reason((tmp_path / "clear.png").read_bytes()) is Reason.EMPTY


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
def test_png_files_of_other_programs(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.png"
    smooth = PIL.linear_gradient("L").resize((61, 37))  # PIL chooses filters for it
    image = PIL.merge("RGBA", (smooth, smooth.rotate(90), smooth.rotate(180), smooth.rotate(45)))
    image = image.convert(mode)
    image.save(path, optimize=True)
    width, height, pixels = decode_png(path.read_bytes())
    assert (width, height) == (61, 37)
    expected = image.convert("RGBA").tobytes()
    assert [pixels[at::4] for at in (2, 1, 0, 3)] == [expected[at::4] for at in range(4)]


@pytest.mark.parametrize("colours", [2, 3, 16])
def test_png_files_with_a_small_palette(tmp_path: Path, colours: int) -> None:
    image = PIL.linear_gradient("L").resize((13, 9)).convert("RGB").quantize(colours)
    image.save(tmp_path / "a.png", bits={2: 1, 3: 2, 16: 4}[colours])
    expected = image.convert("RGB").tobytes()
    _, _, pixels = decode_png((tmp_path / "a.png").read_bytes())
    assert rgb(pixels) == expected


def test_every_filter(tmp_path: Path) -> None:
    """PIL reads what the specification says about each filter type."""
    raw = b"".join(bytes([kind]) + os.urandom(3 * 5) for kind in (*range(5), *range(4, -1, -1)))
    data = encode_png(5, 10, bytes(200))
    packed = zlib.compress(raw)
    at = data.index(b"IDAT") - 4
    body = b"IDAT" + packed
    data = data[:at] + struct.pack(">I", len(packed)) + body + struct.pack(">I", zlib.crc32(body)) + data[-12:]
    (tmp_path / "a.png").write_bytes(data)
    assert rgb(decode_png(data)[2]) == PIL.open(tmp_path / "a.png").tobytes()


def test_png_files_that_are_refused() -> None:
    def header(width: int, height: int, *rest: int) -> bytes:
        body = b"IHDR" + struct.pack(">IIBBBBB", width, height, *rest)
        good = encode_png(1, 1, bytes(4))
        return good[:12] + body + struct.pack(">I", zlib.crc32(body)) + good[33:]

    for data, reason in (
        (header(1 << 20, 1 << 20, 8, 2, 0, 0, 0), Reason.TOO_LARGE),
        (header(0, 1, 8, 2, 0, 0, 0), Reason.TOO_LARGE),
        (header(1, 1, 16, 2, 0, 0, 0), Reason.WRONG_FORMAT),
        (header(1, 1, 4, 2, 0, 0, 0), Reason.WRONG_FORMAT),
        (header(1, 1, 8, 2, 0, 0, 1), Reason.WRONG_FORMAT),
        (header(1, 1, 8, 5, 0, 0, 0), Reason.WRONG_FORMAT),
        (header(1, 2, 8, 2, 0, 0, 0), Reason.DAMAGED),
        (header(1, 1, 8, 6, 0, 0, 0), Reason.DAMAGED),
    ):
        with pytest.raises(ImageError) as caught:
            decode_png(data)
        assert caught.value.reason is reason


def test_pixels_that_differ_are_counted() -> None:
    one = bytearray(colours_only(frame(50, 20)))
    other = bytearray(one)
    assert count_differing(bytes(one), bytes(other)) == 0
    for pixel, colour in ((0, 0), (1, 2), (17, 1), (999, 2), (999, 0)):
        other[4 * pixel + colour] ^= 0x80 if colour == 2 else 1
    assert count_differing(bytes(one), bytes(other)) == 4


def test_a_strip_has_all_pictures(tmp_path: Path) -> None:
    pictures = [frame(5, 3, 1), frame(9, 2, 2)]
    width, height, pixels = decode_rgb(strip(pictures))
    assert (width, height) == (9, 3 + 4 + 2)
    for row in range(3):
        assert pixels[27 * row :][:27] == rgb(pictures[0].pixels)[15 * row :][:15] + b"\xff" * 12
    assert pixels[27 * 3 : 27 * 7] == b"\xff" * 27 * 4
    assert pixels[27 * 7 :] == rgb(pictures[1].pixels)


def test_large_screens_lose_rows_and_columns_in_a_strip() -> None:
    large = frame(2 * STRIP_SIDE + 1, 5)
    small = reduced(large)
    assert (small.width, small.height) == (-(-large.width // 3), 2)
    assert [small.pixel(x, 1) for x in (0, 1)] == [large.pixel(0, 3), large.pixel(3, 3)]
    assert reduced(small) is small
