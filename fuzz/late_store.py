"""A store in memory whose operations take a while: they are done in their order, and completed in any order."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable

from farplug.store import MemoryStore, ReadDone, WriteDone
from farplug.store.base import Stopped, never_stopped
from farplug.usb import Buffer

BLOCK_SIZE = 512


class LateStore(MemoryStore):
    """A store that works only in :meth:`go`. It checks that a disk keeps the contract of a store.

    Args:
        source: chooses what is completed next, and what fails.
        blocks: the number of blocks, of 512 bytes.
        read_only: as for every store; a write is a failure of the caller.
        failing: the share of the flushes that fail.
        alone: continue without calls of :meth:`go`, in later turns of the event loop.
    """

    def __init__(
        self, source: random.Random, blocks: int, *, read_only: bool = False, failing: float = 0, alone: bool = False
    ) -> None:
        super().__init__(blocks * BLOCK_SIZE, read_only=read_only)
        self.unmaps = source.random() < 0.5
        self._source = source
        self._failing = failing
        self._alone = alone
        self._late = True
        self._work: deque[Callable[[], None]] = deque()
        self._completions: list[Callable[[], None]] = []

    def read(self, offset: int, length: int, done: ReadDone) -> None:
        self._check_range(offset, length)

        def read() -> None:
            data = bytes(self.content[offset : offset + length])
            self._complete(lambda: done(data, None))

        self._do(read)

    def write(self, offset: int, data: Buffer, done: WriteDone) -> None:
        self._check_range(offset, len(data))
        assert not self.read_only
        assert not offset % BLOCK_SIZE
        assert not len(data) % BLOCK_SIZE
        before = bytes(data)

        def write() -> None:
            assert bytes(data) == before, "the caller changed the data before it was written"
            self.content[offset : offset + len(before)] = before
            self._complete(lambda: done(None))

        self._do(write)

    def zero(self, offset: int, length: int, done: WriteDone, *, unmap: bool, stopped: Stopped = never_stopped) -> None:
        assert self.unmaps or not unmap
        self.write(offset, bytes(length), done)

    def flush(self, done: WriteDone) -> None:
        error = OSError(5, "broken") if self._late and self._source.random() < self._failing else None
        self._do(lambda: self._complete(lambda: done(error)))

    def go(self, count: int = 1) -> None:
        """Do or complete operations, ``count`` steps at most."""
        for _ in range(count):
            if self._work and (not self._completions or self._source.random() < 0.5):
                self._work.popleft()()
            elif self._completions:
                self._completions.pop(self._source.randrange(len(self._completions)))()

    def go_all(self) -> None:
        """Complete all operations; further ones are completed at once."""
        self._late = False
        while self._work or self._completions:
            self.go()

    def _check_range(self, offset: int, length: int) -> None:
        assert 0 <= offset <= offset + length <= len(self.content)

    def _do(self, work: Callable[[], None]) -> None:
        if not self._late and not self._work:
            work()
            return
        self._work.append(work)
        if self._alone:
            for _ in range(2):  # to be done, and to be completed
                asyncio.get_running_loop().call_soon(self.go)

    def _complete(self, completion: Callable[[], None]) -> None:
        if self._late or self._completions:
            self._completions.append(completion)
        else:
            completion()
