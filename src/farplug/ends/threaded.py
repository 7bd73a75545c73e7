"""Peers that are written in a thread: a terminal that is stopped and a slow file system block a write."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

from farplug.descriptors import write_all
from farplug.ends.base import Peer
from farplug.threads import run_in_daemon_thread
from farplug.usb.types import Buffer


class ThreadedPeer(Peer):
    """A peer behind a file descriptor that blocks.

    Attributes:
        writing: the write that has not ended, also if its caller was cancelled.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        self.name = name
        self.writing: asyncio.Future[None] | None = None
        self._descriptor = descriptor

    async def write(self, items: Sequence[Buffer]) -> None:
        if self.writing is not None:  # the order stays
            await asyncio.wait([self.writing])
        data = b"".join(items)
        self.writing = asyncio.ensure_future(run_in_daemon_thread(partial(write_all, self._descriptor, data)))
        await asyncio.shield(self.writing)
