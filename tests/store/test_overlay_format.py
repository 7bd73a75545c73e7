from __future__ import annotations

import random
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from farplug.errors import ImageError, Reason
from farplug.store.overlay_format import CONTENT_SIZE, HEADER_SIZE, ClusterMap, Header, cluster_size

PATH = Path("snapshot.fps")
HEADER = Header(bytes(range(16)), 1 << 30, 512, 4096, 1_700_000_000_123_456_789, bytes(range(32)), Path("/a/b c"))


def test_header() -> None:
    data = bytes(HEADER)
    assert len(data) == HEADER_SIZE
    assert data[:12] == b"farplug\xf5" + b"\1\0\0\0"
    assert Header.parse(data, PATH) == HEADER
    long = replace(HEADER, base=Path("/" + "/".join(["x" * 255] * 15) + "/\udcff"))
    assert Header.parse(bytes(long), PATH) == long


@pytest.mark.parametrize(
    ("header", "clusters", "sectors", "data_offset"),
    [
        (HEADER, 1 << 18, 65, 1 << 20),
        (replace(HEADER, size=512), 1, 1, 1 << 20),
        (replace(HEADER, size=4097), 2, 1, 1 << 20),
        (replace(HEADER, size=4064 * 4096), 4064, 1, 1 << 20),
        (replace(HEADER, size=4064 * 4096 + 1), 4065, 2, 1 << 20),
        (replace(HEADER, size=1 << 38), 1 << 26, 16514, 9 << 20),
        (replace(HEADER, size=1 << 48, cluster_size=1 << 22), 1 << 26, 16514, 12 << 20),
    ],
)
def test_layout(header: Header, clusters: int, sectors: int, data_offset: int) -> None:
    assert (header.clusters, header.map_sectors, header.data_offset) == (clusters, sectors, data_offset)
    assert header.file_size == data_offset + header.size
    assert Header.parse(bytes(header), PATH) == header


@pytest.mark.parametrize(
    ("size", "expected"), [(512, 4096), (1 << 38, 4096), ((1 << 38) + 1, 8192), (3 << 40, 65536), (1 << 50, 1 << 24)]
)
def test_cluster_size(size: int, expected: int) -> None:
    assert cluster_size(size) == expected


@pytest.mark.parametrize("size", [0, 7, 8, 100, HEADER_SIZE - 1])
def test_a_truncated_header(size: int) -> None:
    with pytest.raises(ImageError) as caught:
        Header.parse(bytes(HEADER)[:size], PATH)
    assert caught.value.reason is (Reason.WRONG_FORMAT if size < 8 else Reason.DAMAGED)


def test_every_damaged_byte_is_detected() -> None:
    source = random.Random(1)
    for at in {*range(160), *source.sample(range(HEADER_SIZE), 200)}:
        data = bytearray(bytes(HEADER))
        data[at] ^= 1 << source.randrange(8)
        with pytest.raises(ImageError) as caught:
            Header.parse(bytes(data), PATH)
        assert caught.value.reason is (Reason.WRONG_FORMAT if at < 8 else Reason.DAMAGED)
        assert str(PATH) in caught.value.message


@pytest.mark.parametrize(
    "change",
    [
        {"cluster_size": 2048},
        {"cluster_size": 12288},
        {"cluster_size": 0},
        {"size": 0},
        {"size": 511},
        *({"block_size": size} for size in (0, 1, 256, 511, 513, 1024, 8192, 1 << 31)),
    ]
    + [{"size": 1 << 60}, {"size": (1 << 38) + 1}],
)
def test_an_impossible_header(change: dict[str, int]) -> None:
    header = replace(HEADER, **change)  # type: ignore[arg-type]
    if not header.cluster_size:
        fields = bytearray(bytes(HEADER))
        fields[44:48] = bytes(4)
        data = _sealed(fields)
    else:
        data = bytes(header)
    with pytest.raises(ImageError, match="cannot have clusters") as caught:
        Header.parse(data, PATH)
    assert caught.value.reason is Reason.DAMAGED


def _sealed(data: bytearray) -> bytes:
    data[12:16] = zlib.crc32(data[16:], zlib.crc32(data[:12])).to_bytes(4, "little")
    return bytes(data)


@pytest.mark.parametrize("size", [512, 2048, 4096])
def test_every_block_size(size: int) -> None:
    assert Header.parse(bytes(replace(HEADER, block_size=size)), PATH).block_size == size


@pytest.mark.parametrize("base", ["", ".", "profile", "../profile", "/a\0b"])
def test_the_path_of_the_image_is_absolute(base: str) -> None:
    with pytest.raises(ImageError, match="it has no absolute path of an image") as caught:
        Header.parse(bytes(replace(HEADER, base=Path(base))), PATH)
    assert caught.value.reason is Reason.DAMAGED


def test_a_newer_version() -> None:
    data = bytearray(bytes(HEADER))
    data[8] = 2
    with pytest.raises(ImageError, match="of format 2, this farplug supports format 1") as caught:
        Header.parse(_sealed(data), PATH)
    assert caught.value.reason is Reason.WRONG_FORMAT


def test_sectors_are_sealed_for_their_place_and_their_file() -> None:
    content = random.Random(2).randbytes(CONTENT_SIZE)
    sector = HEADER.seal(3, content)
    assert len(sector) == 512
    assert HEADER.unseal(3, sector, PATH) == content
    other = replace(HEADER, identity=bytes(16))
    for header, number, data in ((HEADER, 4, sector), (other, 3, sector), (HEADER, 3, bytes(512)), (HEADER, 3, b"")):
        with pytest.raises(ImageError, match="does not match its checksum") as caught:
            header.unseal(number, data, PATH)
        assert caught.value.reason is Reason.DAMAGED


@pytest.mark.parametrize("clusters", [1, 7, 8, 9, 4064, 4065, 10_000])
def test_map_against_a_list(clusters: int) -> None:
    source = random.Random(clusters)
    sectors = -(-clusters // 4064)
    bits = ClusterMap(clusters, bytearray(sectors * CONTENT_SIZE))
    shadow = [False] * clusters
    for _ in range(200):
        first = source.randrange(clusters)
        end = min(first + source.choice((1, 2, 7, 8, 9, 64, 5000)), clusters)
        fresh = not all(shadow[first:end])
        bits.changed.clear()
        bits.mark(first, end)
        shadow[first:end] = [True] * (end - first)
        assert bits.changed == (set(range(first // 4064 + 1, (end - 1) // 4064 + 2)) if fresh else set())
        first = source.randrange(clusters)
        end = source.randrange(first, clusters) + 1
        runs = list(bits.runs(first, end))
        assert [inside for begin, stop, inside in runs for _ in range(begin, stop)] == shadow[first:end]
        assert all(runs[index][2] != runs[index + 1][2] for index in range(len(runs) - 1))
        assert bits.count == sum(shadow)
        assert (first in bits) is shadow[first]
    assert not bits.has_stray_bits
    content = b"".join(bits.content(number) for number in range(1, sectors + 1))
    again = ClusterMap(clusters, bytearray(content))
    assert list(again.runs(0, clusters)) == list(bits.runs(0, clusters))


def test_clusters_that_do_not_exist() -> None:
    for byte, bit, beyond in ((0, 7, False), (1, 0, False), (1, 1, True), (507, 7, True)):
        content = bytearray(CONTENT_SIZE)
        content[byte] = 1 << bit
        assert ClusterMap(9, content).has_stray_bits is beyond
