from __future__ import annotations

import os
from pathlib import Path

import pytest

from farplug.errors import ImageError, Reason
from farplug.store import open_iso
from farplug.store.iso import is_iso

BLOCK = 2048


def image(*descriptors: tuple[int, bytes], blocks: int = 40) -> bytes:
    """An image with volume descriptors of these identifiers in these blocks."""
    content = bytearray(blocks * BLOCK)
    for block, identifier in descriptors:
        content[block * BLOCK : block * BLOCK + 7] = b"\1" + identifier + b"\1"
    return bytes(content)


ISO = image((16, b"CD001"), (17, b"CD001"))


@pytest.mark.parametrize(
    ("begin", "expected"),
    [
        (ISO, True),
        (image((16, b"BEA01"), (17, b"NSR02"), (18, b"TEA01")), True),
        (image((31, b"NSR03")), True),
        (image((16, b"CD001"), blocks=17), True),
        (image((16, b"CD001"))[: 16 * BLOCK + 6], True),
        (image((16, b"CD001"))[: 16 * BLOCK + 5], False),
        (image((15, b"CD001")), False),
        (image((32, b"CD001")), False),
        (image((16, b"CDROM")), False),
        (b"", False),
        (bytes(40 * BLOCK), False),
    ],
)
def test_is_iso(begin: bytes, expected: bool) -> None:
    assert is_iso(begin) is expected


async def test_an_iso(tmp_path: Path) -> None:
    path = tmp_path / "name.iso"
    path.write_bytes(ISO)
    store, again = open_iso(path), open_iso(str(path))
    assert (store.block_size, store.block_count, store.read_only) == (BLOCK, 40, True)
    assert (store.name, store.serial_number) == (str(path), again.serial_number)
    await store.close()
    await again.close()


async def test_an_iso_cut_in_the_middle_of_a_block(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "name.iso"
    path.write_bytes(ISO + b"tail")
    store = open_iso(path)
    assert store.block_count == 40
    assert "the last 4 bytes are no whole block" in caplog.text
    await store.close()


async def test_an_iso_that_was_cut_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "name.iso"
    content = bytearray(ISO)
    for blocks, told in ((40, False), (41, True), (2**32 - 1, True)):
        content[16 * BLOCK + 80 : 16 * BLOCK + 84] = blocks.to_bytes(4, "little")
        path.write_bytes(content)
        caplog.clear()
        await open_iso(path).close()
        assert (f"has 40 blocks, but its volume has {blocks}: it is cut off" in caplog.text) is told


@pytest.mark.parametrize(
    ("content", "what", "remedy"),
    [
        (b"", "it has 0 bytes", "downloaded whole"),
        (ISO[: 16 * BLOCK], "it has 32768 bytes", "downloaded whole"),
        (bytes(40 * BLOCK), "no volume of ISO 9660 or UDF", "plug it as one: --usb-disk {path}"),
        (b"QFI\xfb" + bytes(100), "a qcow2 image", "qemu-img convert -O raw {path} disk.raw"),
        (bytes(0x40) + b"\x7f\x10\xda\xbe", "a VDI image", "qemu-img convert"),
        (b"\x1f\x8b\x08" + bytes(90000), "gzip data", "unpack it first"),
        (b"PK\x03\x04" + bytes(90000), "a zip archive", "unpack it first"),
        (b"\0" + b"\xff" * 10 + b"\0" + bytes(90000), "2352-byte sectors", "bchunk {path}"),
        (bytes(510) + b"\x55\xaa" + bytes(90000), "an MBR or a FAT volume", "plug it as a disk: --usb-disk {path}"),
        (bytes(510) + b"\x55\xaaEFI PART" + bytes(90000), "a disk image with a GPT", "--usb-disk {path}"),
    ],
)
def test_what_is_none(tmp_path: Path, content: bytes, what: str, remedy: str) -> None:
    path = tmp_path / "name.iso"
    path.write_bytes(content)
    with pytest.raises(ImageError, match="is no ISO image: it ") as caught:
        open_iso(path)
    assert caught.value.reason is Reason.NOT_AN_ISO
    assert what in caught.value.message
    assert remedy.format(path=path) in caught.value.remedy


def test_a_hybrid_is_a_cd_too(tmp_path: Path) -> None:
    """It has an MBR, so that it can be written to a stick."""
    hybrid = bytearray(ISO)
    hybrid[510:512] = b"\x55\xaa"
    assert is_iso(bytes(hybrid))


@pytest.mark.parametrize(("blocks", "fits"), [(2**32 - 1, True), (2**32, False)])
async def test_what_a_drive_cannot_count(tmp_path: Path, blocks: int, fits: bool) -> None:
    path = tmp_path / "large.iso"
    path.write_bytes(ISO)
    os.truncate(path, blocks * BLOCK)
    if fits:
        store = open_iso(path)
        assert store.block_count == blocks
        await store.close()
    else:
        with pytest.raises(ImageError, match="has 4294967296 blocks, a CD-ROM drive counts to 4294967295") as caught:
            open_iso(path)
        assert caught.value.reason is Reason.TOO_LARGE


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    locked = tmp_path / "locked"
    for path, reason in (
        (tmp_path / "missing", Reason.NOT_FOUND),
        (tmp_path, Reason.NOT_A_FILE),
        (pipe, Reason.NOT_A_FILE),
        (Path(f"{locked}\0"), Reason.NOT_FOUND),
    ):
        with pytest.raises(ImageError) as caught:
            open_iso(path)
        assert caught.value.reason is reason
