"""The disk of a loaded session: pseudo-random blocks in memory, and a clock at its commands."""

from __future__ import annotations

import random
import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from farplug.store.base import BLOCK_SIZE, ReadDone, Stopped, Store, WriteDone, never_stopped
from farplug.usb.types import Buffer

PIECE = 1 << 20
"""Bytes of the pattern, which all disks share and repeat, and of the pieces in which written data is kept."""
LEAST_COUNTED = 32 << 10
"""Bytes of the shortest command that counts as load: a guest looks for partitions and filesystems with shorter ones."""
MAX_COMMANDS = 4096
"""Commands that a meter keeps for its next reading; of more the oldest are dropped."""

_PATTERN = memoryview(random.Random(1).randbytes(PIECE)).toreadonly()
"""Data that does not compress: a channel with LZ4 would otherwise carry less than it should."""


@dataclass(slots=True)
class _Command:
    size: int
    begun: float
    over: float | None = None


class Meter:
    """Measures how long the guest needs for an amount of data in one direction.

    A command lasts from its arrival until the next one arrives: its data and its status have reached the guest then, so
    the time includes the way through all proxies in both directions. The last command of a burst lasts until the guest
    sends something else, such as a flush.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._commands: deque[_Command] = deque(maxlen=MAX_COMMANDS)
        self.changed: Callable[[], None] = lambda: None
        """Called when a command is over."""

    def begin(self, size: int) -> None:
        """Take note that a command arrived."""
        if size >= LEAST_COUNTED:
            self._commands.append(_Command(size, self._clock()))

    def end(self) -> None:
        """Take note that the guest has gone on: the last command is over."""
        if self._commands and self._commands[-1].over is None:
            self._commands[-1].over = self._clock()
            self.changed()

    @property
    def measured(self) -> int:
        """Return the bytes of commands that are over and were not taken yet."""
        return sum(command.size for command in self._commands if command.over is not None)

    def take(self, size: int) -> float | None:
        """Return the seconds that the guest needed for the next ``size`` bytes, or more, to the end of a command.

        These bytes do not count again.

        Returns:
            The time from the arrival of the first command until the last one was over; None: less data was moved yet.
        """
        total = 0
        for count, command in enumerate(self._commands, start=1):
            if command.over is None:
                return None
            total += command.size
            if total >= size:
                seconds = command.over - self._commands[0].begun
                for _ in range(count):
                    self._commands.popleft()
                return seconds
        return None


class LoadStore(Store):
    """Pseudo-random blocks. What the guest writes is kept in memory, and is lost when the store is closed.

    Args:
        size: bytes, whole blocks. It bounds the memory; before the guest writes, the store needs none.
        clock: returns seconds.

    Attributes:
        reads: measures reads.
        writes: measures writes.

    Raises:
        ValueError: the size is not a positive number of blocks.
    """

    name = "load"
    temporary = True

    def __init__(self, size: int, clock: Callable[[], float]) -> None:
        if size <= 0 or size % BLOCK_SIZE:
            raise ValueError(f"{size} bytes are not a positive number of {BLOCK_SIZE}-byte blocks")
        self.block_count = size // BLOCK_SIZE
        self.serial_number = secrets.token_hex(8).upper()
        self.reads = Meter(clock)
        self.writes = Meter(clock)
        self._written: dict[int, bytearray] = {}

    def _goes_on(self) -> None:
        self.reads.end()
        self.writes.end()

    def read(self, offset: int, length: int, done: ReadDone) -> None:
        self._goes_on()
        self.reads.begin(length)
        done(self._content(offset, length), None)

    def _content(self, offset: int, length: int) -> Buffer:
        number, begin = divmod(offset, PIECE)
        if begin + length <= PIECE:
            return memoryview(self._written.get(number, _PATTERN))[begin : begin + length]
        content = bytearray()
        while len(content) < length:
            number, begin = divmod(offset + len(content), PIECE)
            content += memoryview(self._written.get(number, _PATTERN))[begin : begin + length - len(content)]
        return content

    def write(self, offset: int, data: Buffer, done: WriteDone) -> None:
        self._goes_on()
        self.writes.begin(len(data))
        self._put(offset, memoryview(data))
        done(None)

    def _put(self, offset: int, data: memoryview) -> None:
        while data:
            number, begin = divmod(offset, PIECE)
            part = data[: PIECE - begin]
            if number not in self._written:
                self._written[number] = bytearray(_PATTERN)
            self._written[number][begin : begin + len(part)] = part
            offset, data = offset + len(part), data[len(part) :]

    def zero(self, offset: int, length: int, done: WriteDone, *, unmap: bool, stopped: Stopped = never_stopped) -> None:
        self._goes_on()
        self._put(offset, memoryview(bytes(length)))
        done(None)

    def flush(self, done: WriteDone) -> None:
        self._goes_on()
        done(None)

    async def close(self) -> None:
        """Release the memory."""
        self._written.clear()
