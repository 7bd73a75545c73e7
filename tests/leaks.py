"""Count what a leak would change, before and after."""

from __future__ import annotations

import asyncio
import gc
import os
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Left:
    """Numbers of tasks, open files and child processes of this process."""

    tasks: int
    files: int
    children: int

    @classmethod
    def now(cls) -> Left:
        gc.collect()
        return cls(len(asyncio.all_tasks()), len(os.listdir("/proc/self/fd")), children())


def children(name: str = "") -> int:
    """Return the number of child processes with a name, of this process."""
    found = 0
    for task in Path("/proc/self/task").iterdir():
        for child in (task / "children").read_text().split():
            found += Path(f"/proc/{child}/comm").read_text().startswith(name)
    return found


async def no_more_than(before: Left) -> None:
    """Check that nothing has leaked. A child process and a transport need turns of the event loop to end.

    A task or a file that was counted before may have been about to end: less than before is no leak.
    """
    for _ in range(50):
        now = Left.now()
        if now.tasks <= before.tasks and now.files <= before.files and now.children <= before.children:
            return
        await asyncio.sleep(0.02)
    pytest.fail(f"{now} after {before}: {asyncio.all_tasks()}")
