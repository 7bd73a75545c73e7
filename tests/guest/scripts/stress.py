"""Runs in the guest: readers, writers and a stream of failing commands side by side on a disk, all of them checked.

``stress.py DISK SECONDS``: the disk's sectors hold their own numbers, 32 bits each, little endian. Writes a JSON
object: how much each kind of worker has done. ``stress.py DISK 0`` reads one block again and again instead, and writes
how many seconds each time took.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import mmap
import os
import random
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

READERS, WRITERS = 8, 2
SECTOR = 512
MOST = 256
"""Sectors of one transfer."""
READ_AREA, WRITE_AREA = 65536, 16384
"""Sectors: the readers' common one, from the first sector on, and each writer's own behind it."""
READS = 100

SG_IO = 0x2285
SG_HEADER = struct.Struct("@iiBBHIPPPIIiPBBBBHHiII")
"""struct sg_io_hdr (Linux, include/uapi/scsi/sg.h)."""
TO_DEVICE, FROM_DEVICE = -2, -3
CHECK_CONDITION = 2
TIMEOUT = 60_000

BEYOND = 0x7FFFFFFF
FAILING = (
    (struct.pack(">BBIBHB", 0x28, 0, BEYOND, 0, 128, 0), FROM_DEVICE, 65536),
    (struct.pack(">BBIBHB", 0x2A, 0, BEYOND, 0, 128, 0), TO_DEVICE, 65536),
    (struct.pack(">BBQIBB", 0x88, 0, BEYOND, 8, 0, 0), FROM_DEVICE, 4096),
    (bytes((0x12, 1, 0xC0, 2, 0, 0)), FROM_DEVICE, 512),
    (bytes((0xFF, 0, 0, 0, 0, 0)), FROM_DEVICE, 512),
    (bytes((0x1A, 0, 0x3B, 0, 255, 0)), FROM_DEVICE, 255),
)
"""Commands that the disk must refuse: out of range, unknown page, unknown operation code."""

done: Counter[str] = Counter()
"""By each kind of worker; and what went wrong."""


def read(disk: int, buffer: mmap.mmap, number: int) -> None:
    """Read some sectors: each must hold its number."""
    count = random.randint(1, MOST)
    first = random.randrange(READ_AREA - count)
    with memoryview(buffer)[: count * SECTOR] as part:
        if os.preadv(disk, [part], first * SECTOR) != len(part):
            raise OSError(f"short read at {first}")
        with part.cast("I") as numbers:
            for word in (0, 127):
                if numbers[word::128].tolist() != list(range(first, first + count)):
                    raise OSError(f"wrong data at {first}")


def write(disk: int, buffer: mmap.mmap, area: int, number: int) -> None:
    """Write some sectors, and read them back."""
    count = random.randint(1, MOST)
    first = READ_AREA + area * WRITE_AREA + random.randrange(WRITE_AREA - count)
    content = struct.pack("<II", first, number) * (64 * count)
    buffer[: len(content)] = content
    with memoryview(buffer)[: len(content)] as part:
        if os.pwritev(disk, [part], first * SECTOR) != len(part):
            raise OSError(f"short write at {first}")
        part[:] = bytes(len(part))
        if os.preadv(disk, [part], first * SECTOR) != len(part) or part != content:
            raise OSError(f"wrong data at {first} after a write")


def fail(disk: int, number: int) -> None:
    """A command that the disk must refuse."""
    cdb, direction, length = FAILING[number % len(FAILING)]
    data, sense = ctypes.create_string_buffer(length), ctypes.create_string_buffer(64)
    command = ctypes.create_string_buffer(cdb, len(cdb))
    addresses = ctypes.addressof(data), ctypes.addressof(command), ctypes.addressof(sense)
    fields = (ord("S"), direction, len(cdb), len(sense), 0, length, *addresses, TIMEOUT, *[0] * 12)
    header = bytearray(SG_HEADER.pack(*fields))
    fcntl.ioctl(disk, SG_IO, header)
    status, _, _, _, host_status, driver_status = SG_HEADER.unpack(header)[13:19]
    if (status, host_status) != (CHECK_CONDITION, 0):
        raise OSError(f"{cdb.hex()}: status {status}, host {host_status}, driver {driver_status}")


def work(kind: str, until: float, step: Callable[[int], None]) -> None:
    """Take steps until the time is over, one at least."""
    try:
        while True:
            step(done[kind])
            done[kind] += 1
            if time.monotonic() >= until:
                break
    except OSError as error:
        done[f"{kind}: {error}"] += 1


def stress(disk: int, seconds: float) -> dict[str, int]:
    """All side by side."""
    until = time.monotonic() + seconds
    steps: list[tuple[str, Callable[[int], None]]] = [
        ("failing", partial(fail, disk)),
        *(("reader", partial(read, disk, _buffer())) for _ in range(READERS)),
        *(("writer", partial(write, disk, _buffer(), area)) for area in range(WRITERS)),
    ]
    threads = [threading.Thread(target=work, args=(kind, until, step)) for kind, step in steps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return dict(done)


def latencies(disk: int) -> list[float]:
    """Return the latencies of reads of one block, without the cache."""
    taken = []
    with _buffer() as buffer:
        for _ in range(READS):
            begin = time.monotonic()
            os.preadv(disk, [memoryview(buffer)[:4096]], 0)
            taken.append(time.monotonic() - begin)
    return taken


def _buffer() -> mmap.mmap:
    """O_DIRECT wants pages."""
    return mmap.mmap(-1, MOST * SECTOR)


def main(path: str, seconds: str) -> None:
    """Do what the arguments say."""
    disk = os.open(path, os.O_RDWR | os.O_DIRECT)
    json.dump(stress(disk, float(seconds)) if float(seconds) else latencies(disk), sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
