from __future__ import annotations

import os
from pathlib import Path

import pytest

from farplug.cli.log import remedy_lines
from farplug.errors import ImageError, Reason
from farplug.store import open_iso
from farplug.store.content import Content

BLOCK = 2048


def image(*descriptors: tuple[int, bytes], blocks: int = 40) -> bytes:
    """An image with volume descriptors of these identifiers in these blocks."""
    content = bytearray(blocks * BLOCK)
    for block, identifier in descriptors:
        content[block * BLOCK : block * BLOCK + 7] = b"\1" + identifier + b"\1"
    return bytes(content)


def high_sierra() -> bytes:
    """An image with a volume descriptor of the High Sierra format."""
    content = bytearray(40 * BLOCK)
    content[16 * BLOCK + 8 : 16 * BLOCK + 15] = b"\1CDROM\1"
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
        (high_sierra(), True),
        (b"", False),
        (bytes(40 * BLOCK), False),
    ],
)
def test_what_is_a_cd(begin: bytes, expected: bool) -> None:
    assert Content(len(begin), begin, begin[-512:]).is_cd is expected


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
    assert "the VM does not see the last 4 bytes" in caplog.text
    await store.close()


async def test_a_truncated_iso(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "name.iso"
    content = bytearray(ISO)
    for blocks, logged in ((40, False), (41, True), (2**32 - 1, True)):
        content[16 * BLOCK + 80 : 16 * BLOCK + 84] = blocks.to_bytes(4, "little")
        path.write_bytes(content)
        caplog.clear()
        await open_iso(path).close()
        assert (f"is truncated: it has 40 of the {blocks} blocks of its volume" in caplog.text) is logged


@pytest.mark.parametrize(
    ("content", "what", "remedy"),
    [
        (b"", "too short for an ISO image (0 bytes)", "downloaded completely"),
        (ISO[: 16 * BLOCK], "too short for an ISO image (32768 bytes)", "downloaded completely"),
        (bytes(40 * BLOCK), "not an ISO image: it has no volume", "if it is the image of a disk: --usb-disk {path}"),
        (b"QFI\xfb\0\0\0\3" + bytes(100), "a qcow2 image, not an ISO", "qemu-img convert -O raw {path} {raw}"),
        (b"PK\x03\x04\x14" + bytes(90000), "a zip archive, not an ISO", "unzip {path}"),
        (
            bytes(510) + b"\x55\xaa" + bytes(90000),
            "an MBR or a FAT volume, not",
            "plug it in as a disk: --usb-disk {path}",
        ),
        (bytes(510) + b"\x55\xaaEFI PART" + bytes(90000), "a disk image with a GPT, not", "--usb-disk {path}"),
        (bytes(4096) + b"EFI PART" + bytes(90000), "a disk image with a GPT, not", "--usb-disk {path}"),
        (b"ER\x02\0".ljust(512, b"\0") + b"PM" + bytes(90000), "partition map or volume of Apple", "--usb-disk {path}"),
        (
            b"ER\x08\0".ljust(2048, b"\0") + b"PM" + bytes(90000),
            "partition map or volume of Apple",
            "--usb-disk {path}",
        ),
        (bytes(1024) + b"H+\0\4" + bytes(90000), "partition map or volume of Apple", "--usb-disk {path}"),
    ],
)
async def test_files_that_are_not_an_iso(tmp_path: Path, content: bytes, what: str, remedy: str) -> None:
    path = tmp_path / "a name.iso"
    path.write_bytes(content)
    with pytest.raises(ImageError) as caught:
        open_iso(path)
    assert caught.value.reason is Reason.NOT_AN_ISO
    assert what in caught.value.message
    lines = remedy_lines(caught.value.remedy)
    assert remedy.format(path=f"'{path}'", raw=f"'{path.with_suffix('.raw')}'") in "\n".join(lines)
    assert lines[-1] == "to plug its bytes as a CD: --force"
    if len(content) >= BLOCK:
        store = open_iso(path, force=True)
        assert store.block_count == len(content) // BLOCK
        await store.close()


def test_a_hybrid_is_a_cd_too(tmp_path: Path) -> None:
    """It has an MBR, so that it can be written to a stick."""
    hybrid = bytearray(ISO)
    hybrid[510:512] = b"\x55\xaa"
    assert Content(len(hybrid), bytes(hybrid), b"").is_cd


@pytest.mark.parametrize(("blocks", "fits"), [(2**32 - 1, True), (2**32, False)])
async def test_more_blocks_than_a_drive_can_report(tmp_path: Path, blocks: int, fits: bool) -> None:
    path = tmp_path / "large.iso"
    path.write_bytes(ISO)
    os.truncate(path, blocks * BLOCK)
    if fits:
        store = open_iso(path)
        assert store.block_count == blocks
        await store.close()
    else:
        with pytest.raises(ImageError, match="has 4294967296 blocks, a CD-ROM drive 4294967295 at most") as caught:
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
        (Path("/dev/zero"), Reason.NOT_A_FILE),
    ):
        with pytest.raises(ImageError) as caught:
            open_iso(path)
        assert caught.value.reason is reason
        assert caught.value.remedy.setting != "usb_disk"
