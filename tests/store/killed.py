"""The process that is killed. Each line of input starts one; it reports what it does until it is killed or done.

Lines of output: ``pid``; ``issued``, ``written``, ``called``, ``flushed`` and numbers, as in :mod:`tests.store.power`;
``progress`` of a commit; ``end`` when the process is dead. It remains a zombie until the next one starts, so
that no other process gets its number.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from pathlib import Path

from tests.store.power import ZEROS, Event, FlushCalled, FlushDone, Host, Issued, WriteDone

from farplug.store import FileStore, OverlayStore, overlay

BLOCKS = range(2000)

left = 0
"""Number of lines that may still be written; below 1: no limit."""


def report(event: Event) -> None:
    match event:
        case Issued(number, block, contents):
            write_line(f"issued {number} {block} {len(contents)} {int(contents[0] == ZEROS)}")
        case WriteDone(number):
            write_line(f"written {number}")
        case FlushCalled(number):
            write_line(f"called {number}")
        case FlushDone(number):
            write_line(f"flushed {number}")
        case _:
            pass


def write_line(line: str) -> None:
    """Write a line in one call; after the last line that may be written, kill this process."""
    global left
    os.write(1, line.encode() + b"\n")
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)


async def write(base: Path, snapshot: Path | None, seed: int) -> None:
    store = FileStore.open(base) if snapshot is None else OverlayStore.open(base, snapshot)
    host = Host(store, random.Random(seed), report, BLOCKS, seed << 16)
    while True:
        host.turn()
        while host.pending > 8:
            await asyncio.sleep(0)


def commit(base: Path, snapshot: Path) -> None:
    def progress(done: int, total: int) -> None:
        write_line(f"progress {done}")
        time.sleep(0.0002)

    overlay.commit(snapshot, base, progress=progress)


def work(kind: str, base: str, snapshot: str, seed: str, reported: str) -> None:
    global left
    left = int(reported)
    if kind == "commit":
        commit(Path(base), Path(snapshot))
    else:
        asyncio.run(write(Path(base), Path(snapshot) if kind == "snapshot" else None, int(seed)))


def main() -> None:
    pid = 0
    for line in sys.stdin:
        if pid:
            os.waitpid(pid, 0)
        pid = os.fork()
        if not pid:
            work(*line.rstrip("\n").split("\t"))
            os._exit(0)
        write_line(f"pid {pid}")
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        write_line("end")


if __name__ == "__main__":
    main()
