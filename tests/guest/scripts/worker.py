"""Runs in the guest: some threads write files and remove them, and mark on another disk what has become durable.

``worker.py MARKS``: the files are in /mnt, the marks go to the disk MARKS. A mark is a sector: ``+NAME``, the fsync of
the file has returned; ``-NAME``, it is going to be removed. The host knows by the functions here what is in the files.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
from pathlib import Path

WORKERS, FILES, KEPT = 4, 100, 10
"""Number of workers; of files per worker; of files per worker that exist at a time."""

_SECTOR, _PAGE = 512, 4096
_SIZES = (1, 700, 5000, 40_000)


def file_name(worker: int, number: int) -> str:
    """Return the name of a worker's file."""
    return f"{worker}-{number:04}"


def file_content(name: str) -> bytes:
    """Return the content of a file."""
    size = _SIZES[int(name[2:]) * 7 % len(_SIZES)]
    return (name.encode() * (size // len(name) + 1))[:size]


def parse_mark(sector: bytes) -> tuple[str, str]:
    """``+`` or ``-``, and the name."""
    text = sector.rstrip(b"\0").decode()
    return text[0], text[1:]


def work(worker: int, marks: int) -> None:
    """Write, fsync, mark; mark, remove."""
    with mmap.mmap(-1, _SECTOR) as buffer:  # O_DIRECT wants pages

        def mark(text: str) -> None:
            buffer[:] = text.encode().ljust(_SECTOR, b"\0")
            os.pwrite(marks, buffer, worker * _PAGE)

        for number in range(FILES):
            name = file_name(worker, number)
            with Path("/mnt", name).open("wb") as file:
                file.write(file_content(name))
                file.flush()
                os.fsync(file.fileno())
            mark(f"+{name}")
            if number >= KEPT:
                old = file_name(worker, number - KEPT)
                mark(f"-{old}")
                Path("/mnt", old).unlink()


def main(path: str) -> None:
    """Wait for all of them."""
    marks = os.open(path, os.O_RDWR | os.O_DIRECT)
    threads = [threading.Thread(target=work, args=(worker, marks)) for worker in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
