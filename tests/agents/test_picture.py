"""Pictures: what is drawn, compared and scaled."""

from __future__ import annotations

import random
from typing import Any

import pytest

from farplug.agents.picture import MAX_PIXELS, Box, Picture, Screen, fitted_size
from farplug.errors import RemoteProtocolError


def noise(width: int, height: int) -> Picture:
    return Picture(width, height, random.Random(1).randbytes(4 * width * height))


def event(width: int, height: int, *rects: list[int], last: bool = True) -> dict[str, Any]:
    return {"width": width, "height": height, "rects": [*rects], "last": last}


@pytest.mark.parametrize(
    ("size", "fitted"),
    [
        ((1280, 800), (1280, 800)),
        ((640, 480), (640, 480)),
        ((1920, 1080), (1280, 720)),
        ((3840, 2160), (1280, 720)),
        ((1080, 1920), (720, 1280)),
        ((1280, 1024), (1131, 905)),
        ((1, 16384), (1, 1280)),
    ],
)
def test_an_image_is_small_enough_and_never_larger(size: tuple[int, int], fitted: tuple[int, int]) -> None:
    assert fitted_size(*size) == fitted
    assert fitted[0] * fitted[1] <= MAX_PIXELS


@pytest.mark.parametrize("size", [(2560, 1440), (1366, 1025), (1279, 1281), (4001, 7), (3, 3000)])
def test_a_scaled_picture_has_the_mean_of_what_it_covers(size: tuple[int, int]) -> None:
    flat = Picture(*size, bytes((10, 200, 30, 40)) * (size[0] * size[1]))
    small = flat.fitted()
    assert (small.width, small.height) == fitted_size(*size)
    assert small.pixels == bytes((10, 200, 30, 40)) * (small.width * small.height)


def test_each_pixel_of_a_picture_is_in_the_scaled_one() -> None:
    """A thin line does not vanish: a change of any pixel changes the scaled picture."""
    width, height, new = 30, 20, (20, 7)
    black = bytes(4 * width * height)
    for at in range(width * height):
        white = bytearray(black)
        white[4 * at : 4 * at + 4] = b"\xff\xff\xff\xff"
        small = Picture(width, height, bytes(white)).scaled(*new).pixels
        assert any(small), divmod(at, width)


def test_halving_is_exact() -> None:
    picture = noise(8, 6)
    small = picture.scaled(4, 3)
    for y in range(3):
        for x in range(4):
            for colour in range(4):
                four = [picture.pixels[4 * ((2 * y + b) * 8 + 2 * x + a) + colour] for b in (0, 1) for a in (0, 1)]
                assert sum(four) // 4 - small.pixels[4 * (y * 4 + x) + colour] in (0, 1)


def test_a_screen_and_its_changes() -> None:
    screen, whole = Screen(), noise(40, 30)
    mark = screen.mark()
    screen.apply(event(40, 30, [0, 0, 40, 10], last=False), whole.pixels[: 4 * 400])
    assert not screen.complete
    screen.apply(event(40, 30, [0, 10, 40, 20]), whole.pixels[4 * 400 :])
    assert screen.complete
    assert screen.picture() == whole
    assert mark.changed == Box(0, 0, 40, 30)
    later = screen.mark()
    part = whole.cut(Box(5, 6, 15, 16))
    screen.apply(event(40, 30, [5, 6, 10, 10]), part.pixels)
    assert later.changed is None, "equal pixels do not count"
    screen.apply(event(40, 30, [5, 6, 1, 1], [20, 20, 2, 2]), b"\1\2\3\4" * 5)
    assert later.changed == Box(5, 6, 22, 22)
    assert screen.same(whole, Box(0, 0, 5, 30))
    assert not screen.same(whole, Box(0, 0, 6, 30))
    screen.drop(mark)
    screen.apply(event(20, 30, [0, 0, 20, 30]), bytes(4 * 600))
    assert not screen.same(whole, Box(0, 0, 1, 1))
    assert (mark.changed, later.changed) == (Box(0, 0, 40, 30), Box(0, 0, 22, 30))


@pytest.mark.parametrize(
    ("data", "payload"),
    [
        (event(0, 1), b""),
        (event(1 << 14, 1 << 14), b""),
        (event(True, 1), b""),
        ({"width": 1, "height": 1, "rects": None}, b""),
        (event(2, 2, [0, 0, 2, 2]), bytes(15)),
        (event(2, 2, [0, 0, 1, 1]), bytes(8)),
        (event(2, 2, [0, 0, 1, 1]), None),
        (event(2, 2, [-1, 0, 1, 1]), bytes(4)),
        (event(2, 2, [1, 1, 2, 1]), bytes(8)),
        (event(2, 2, [0, 0, 0, 1]), b""),
        (event(2, 2, [0, 0, 1]), bytes(4)),
        (event(2, 2, ["0", 0, 1, 1]), bytes(4)),  # type: ignore[list-item]
    ],
)
def test_what_is_not_a_picture_is_refused(data: dict[str, Any], payload: bytes | None) -> None:
    with pytest.raises(RemoteProtocolError):
        Screen().apply(data, payload)
