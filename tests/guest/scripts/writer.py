"""Runs in the guest: writes numbered records to a disk forever, and prints the durable ones on the console.

``writer.py KIND SERIAL FIRST`` waits until the disk with that serial number is there, writes until it is gone, waits
again, and goes on; FIRST is the number of the first record. KIND is ``blocks`` (on the disk itself) or ``files`` (on
its ext4 file system). The lines on the console: ``<up>``, ``<12>`` for record 12, whose fsync has returned, and
``<down>``. The host knows by the functions here what each record holds.
"""

from __future__ import annotations

import itertools
import mmap
import os
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

FIRST_SECTOR, SECTORS = 2048, 4096
"""Where blocks are written."""
KEPT = 30
"""Number of files that exist at a time."""

_HEADER = struct.Struct("<QQ")
_FOLDER = "/mnt"


def place(number: int) -> tuple[int, int]:
    """First sector and number of sectors of a record of blocks."""
    count = 1 + number * 7 % 48
    return FIRST_SECTOR + number * 40503 % (SECTORS - count), count


def sector(number: int, lba: int) -> bytes:
    """Return the content of a sector of a record."""
    return _HEADER.pack(number, lba) * 32


def writer_of(content: bytes, lba: int) -> int | None:
    """The record that wrote a sector; None if no record, or more than one, did."""
    number, _ = _HEADER.unpack_from(content)
    return number if content == sector(number, lba) else None


def file_name(number: int) -> str:
    """Return the name of a file."""
    return f"{number:06}"


def file_content(number: int) -> bytes:
    """Return the content of a file."""
    size = 1 + number * 7919 % 60000
    return (file_name(number).encode() * (size // 6 + 1))[:size]


def say(text: object) -> None:
    """One line on the console: the host has it when this returns."""
    console = os.open("/dev/ttyS0", os.O_WRONLY | os.O_NOCTTY)
    try:
        os.write(console, f"<{text}>\n".encode())
        termios.tcdrain(console)
    finally:
        os.close(console)


def find(serial: str) -> str | None:
    """The node of the disk with a USB serial number."""
    for block in Path("/sys/block").glob("sd*"):
        try:
            found = (block / "device/../../../../serial").read_text().strip()
            if found == serial:
                # The device's node comes a moment after its folder, and can be opened a moment later still.
                os.close(os.open(f"/dev/{block.name}", os.O_RDONLY))
                return f"/dev/{block.name}"
        except OSError:
            continue
    return None


def write_blocks(disk: str, numbers: Iterator[int]) -> None:
    """Records in turn through the page cache and fdatasync, and past it with O_DSYNC: the disk gets FUA writes then."""
    cached, direct = os.open(disk, os.O_RDWR), os.open(disk, os.O_RDWR | os.O_DIRECT | os.O_DSYNC)
    try:
        for number in numbers:
            first, count = place(number)
            with mmap.mmap(-1, count * 512) as buffer:  # O_DIRECT wants pages
                buffer[:] = b"".join(sector(number, lba) for lba in range(first, first + count))
                if os.pwrite(cached if number % 2 else direct, buffer, first * 512) != len(buffer):
                    raise OSError("written in part")
                if number % 2:
                    os.fdatasync(cached)
            say(number)
    finally:
        os.close(cached)
        os.close(direct)


def write_files(disk: str, numbers: Iterator[int]) -> None:
    """Files that are written, renamed and removed, on a journal that is replayed by each mount."""
    subprocess.run(["mount", "-t", "ext4", disk, _FOLDER], check=True, capture_output=True)
    try:
        for number in numbers:
            path = Path(_FOLDER, file_name(number))
            with path.with_suffix(".new").open("wb") as file:
                file.write(file_content(number))
                file.flush()
                os.fsync(file.fileno())
            path.with_suffix(".new").rename(path)
            sync(_FOLDER)
            # Linux 6.1 says of a folder that it is durable when the journal was given up between the rename and the
            # fsync (the disk is gone, its removal tried to commit). For a file this is correct.
            sync(path)
            say(number)
            Path(_FOLDER, file_name(number - KEPT)).unlink(missing_ok=True)
    finally:
        subprocess.run(["umount", "-l", _FOLDER], check=True, capture_output=True)


def sync(path: str | Path) -> None:
    """fsync a file or a folder."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


KINDS: dict[str, Callable[[str, Iterator[int]], None]] = {"blocks": write_blocks, "files": write_files}


def main(kind: str, serial: str, first: str) -> None:
    """Write forever."""
    numbers = itertools.count(int(first))
    while True:
        while (disk := find(serial)) is None:
            time.sleep(0.01)
        say("up")
        try:
            KINDS[kind](disk, numbers)
        except (OSError, subprocess.CalledProcessError):
            say("down")
        while find(serial) is not None:
            time.sleep(0.01)


if __name__ == "__main__":
    main(*sys.argv[1:])
