"""What gets killed. Each line of input starts a process that works until it is killed or done, and tells what it does.

Lines of output: ``pid``; ``issued``, ``written``, ``called``, ``flushed`` and numbers, as in :mod:`tests.store.power`;
``progress`` of a commit; ``end`` when the process is dead. It remains a zombie until the next one, so that its number
is nobody else's.
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
"""How many things may be told; below 1: any number."""


def tell(event: Event) -> None:
    match event:
        case Issued(number, block, contents):
            say(f"issued {number} {block} {len(contents)} {int(contents[0] == ZEROS)}")
        case WriteDone(number):
            say(f"written {number}")
        case FlushCalled(number):
            say(f"called {number}")
        case FlushDone(number):
            say(f"flushed {number}")
        case _:
            pass


def say(line: str) -> None:
    """Tell it at once and whole; the last thing that may be told is the end."""
    global left
    os.write(1, line.encode() + b"\n")
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)


async def write(base: Path, snapshot: Path | None, seed: int) -> None:
    store = FileStore.open(base) if snapshot is None else OverlayStore.open(base, snapshot)
    host = Host(store, random.Random(seed), tell, BLOCKS, seed << 16)
    while True:
        host.turn()
        while host.pending > 8:
            await asyncio.sleep(0)


def commit(snapshot: Path) -> None:
    def progress(done: int, total: int) -> None:
        say(f"progress {done}")
        time.sleep(0.0002)

    overlay.commit(snapshot, progress=progress)


def work(kind: str, base: str, snapshot: str, seed: str, told: str) -> None:
    global left
    left = int(told)
    if kind == "commit":
        commit(Path(snapshot))
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
        say(f"pid {pid}")
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        say("end")


if __name__ == "__main__":
    main()
