"""Transfer blocks; the expected bytes are written from the tables of NCM 1.0, chapter 3."""

from __future__ import annotations

import random
import struct

import pytest

from farplug.virtual.ntb import BlockReader, BlockWriter

FRAME = bytes(range(60))


def block(
    *entries: tuple[int, int],
    signature: bytes = b"NCMH",
    header: int = 12,
    length: int | None = None,
    table: int = 12,
    table_signature: bytes = b"NCM0",
    table_length: int | None = None,
    following: int = 0,
    size: int = 200,
) -> bytes:
    """Return a block with one table at byte 12."""
    words = b"".join(struct.pack("<HH", *entry) for entry in (*entries, (0, 0)))
    data = struct.pack("<4sHHHH", signature, header, 7, size if length is None else length, table)
    data += struct.pack("<4sHH", table_signature, 8 + len(words) if table_length is None else table_length, following)
    return (data + words).ljust(size, b"\xee")


def frames(data: bytes) -> list[bytes]:
    return [bytes(frame) for frame in BlockReader(1514).frames(data)]


def test_one_frame() -> None:
    (made,) = BlockWriter().blocks([FRAME], 2048)
    assert made[:28] == bytes.fromhex("4e434d48 0c00 0000 5800 0c00 4e434d30 1000 0000 1c00 3c00 0000 0000")
    assert made[28:] == FRAME
    assert frames(made) == [FRAME]


def test_frames_are_aligned_and_blocks_are_numbered() -> None:
    writer = BlockWriter()
    (made,) = writer.blocks([FRAME[:15], FRAME[:14], FRAME[:17]], 2048)
    assert [struct.unpack_from("<HH", made, 20 + 4 * n) for n in range(4)] == [(36, 15), (52, 14), (68, 17), (0, 0)]
    assert len(made) == 85
    assert frames(made) == [FRAME[:15], FRAME[:14], FRAME[:17]]
    (again,) = writer.blocks([FRAME], 2048)
    assert struct.unpack_from("<H", again, 6) == (1,)
    assert list(writer.blocks([], 2048)) == []


@pytest.mark.parametrize("size", [2048, 16384])
def test_blocks_hold_what_fits(size: int) -> None:
    source = random.Random(size)
    sent = [source.randbytes(source.choice((14, 60, 61, 1000, 1513, 1514))) for _ in range(200)]
    made = list(BlockWriter().blocks(sent, size))
    assert [frame for one in made for frame in frames(one)] == sent
    assert max(map(len, made)) <= size
    assert sum(map(len, made)) < sum(map(len, sent)) + len(sent) * 7 + len(made) * 24


def test_a_table_after_the_frames_as_windows_writes_it() -> None:
    data = struct.pack("<4sHHHH", b"NCMH", 12, 0, 12 + 60 + 60 + 24, 12 + 120) + FRAME + FRAME[::-1]
    data += struct.pack("<4sHH6H", b"NCM0", 20, 0, 12, 60, 72, 60, 0, 0) + bytes(4)
    assert frames(data) == [FRAME, FRAME[::-1]]


def test_several_tables_and_a_length_of_zero() -> None:
    data = bytearray(block((100, 60), following=40, length=0))
    data[40:56] = struct.pack("<4sHHHHHH", b"NCM0", 16, 0, 160, 14, 0, 0)
    assert frames(bytes(data)) == [b"\xee" * 60, b"\xee" * 14]
    assert frames(block((0, 0))) == []
    assert frames(block((100, 60), (0, 5), table_length=20)) == [b"\xee" * 60]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "has 0 bytes"),
        (block()[:11], "has 11 bytes"),
        (block(signature=b"NCMX"), "does not begin with a header"),
        (block(signature=b"ncmh"), "does not begin with a header"),
        (block(header=16), "does not begin with a header"),
        (block(length=201), "a length of 201 bytes, and it has 200"),
        (block(table=8), "a table begins at byte 8"),
        (block(table=13), "a table begins at byte 13"),
        (block(table=188), "a table begins at byte 188"),
        (block(table=65532), "a table begins at byte 65532"),
        (block(table_signature=b"NCM1"), "another signature"),
        (block(table_signature=b"ncm0"), "another signature"),
        (block(table_length=12), "a table has 12 bytes"),
        (block(table_length=18), "a table has 18 bytes"),
        (block(table_length=65532), "a table has 65532 bytes"),
        (block((8, 60)), "a frame of 60 bytes begins at byte 8"),
        (block((150, 60)), "a frame of 60 bytes begins at byte 150"),
        (block((65535, 65535)), "a frame of 65535 bytes begins at byte 65535"),
        (block((100, 13)), "a frame has 13 bytes"),
        (block((100, 1515), size=2000), "a frame has 1515 bytes"),
        (block((100, 80), (100, 80), (100, 80)), "its frames overlap"),
        (block((100, 60), following=12), "its tables lead to each other"),
    ],
)
def test_blocks_that_are_not_valid(data: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        frames(data)


def test_no_block_becomes_more_than_it_is() -> None:
    """4000 entries that name the same frame would be 6 MB; 4000 tables that lead to each other, a loop."""
    many = struct.pack("<4sHHHH", b"NCMH", 12, 0, 16384, 12) + struct.pack("<4sHH", b"NCM0", 14000, 0)
    many += struct.pack("<HH", 14100, 1514) * 3498
    with pytest.raises(ValueError, match="overlap"):
        frames(many.ljust(16384, b"\0"))
