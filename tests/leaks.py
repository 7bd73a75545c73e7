"""Count what a leak would change, before and after."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

TIMEOUT = 60
"""Seconds until what is left counts as a leak: more than a busy machine needs to end a task or a process."""


@dataclass(frozen=True)
class Left:
    """Numbers of tasks, open files and child processes of this process."""

    tasks: int
    files: int
    children: int

    @classmethod
    def now(cls) -> Left:
        gc.collect()
        return cls(len(asyncio.all_tasks()), len(descriptors()), children())


def descriptors() -> set[str]:
    """Return the numbers of the open file descriptors of this process."""
    return set(os.listdir("/proc/self/fd"))


def children(name: str = "") -> int:
    """Return the number of child processes with a name, of this process."""
    found = 0
    for task in Path("/proc/self/task").iterdir():
        for child in _read(task / "children").split():
            found += _read(Path(f"/proc/{child}/comm")).startswith(name)
    return found


def _read(path: Path) -> str:
    """Return the text of a file in /proc; none if its thread or process has ended meanwhile."""
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


async def no_more_than(before: Left) -> None:
    """Check that nothing has leaked. A child process and a transport need turns of the event loop to end.

    A task or a file that was counted before may have been about to end: less than before is not a leak.
    """
    now = before

    def is_gone() -> bool:
        nonlocal now
        now = Left.now()
        return now.tasks <= before.tasks and now.files <= before.files and now.children <= before.children

    try:
        await comes(is_gone)
    except TimeoutError:
        pytest.fail(f"{now} after {before}: {asyncio.all_tasks()}")


async def comes(condition: Callable[[], bool], timeout: float = TIMEOUT) -> None:
    """Wait until something is true of this process.

    Raises:
        TimeoutError: it is not true in time.
    """
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.02)
