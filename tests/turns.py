"""A meter of the work that the event loop does in one turn, in units that do not depend on the machine."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any, Self

import pytest

from farplug.store import MemoryStore, ReadDone, WriteDone
from farplug.usb import Buffer
from farplug.usbredir.filter import Rule
from farplug.usbredir.protocol import Connection, Event, Role


class TurnMeter:
    """Counts, while it is entered, what the event loop's thread does in each turn.

    It counts on its own, not what the code under test counts:

    * ``calls``: system calls that read or write a file,
    * ``bytes``: bytes that these calls, and stores in memory, have copied,
    * ``text``: characters of filters that were parsed,
    * ``packets``: packets of the guest that were handled.

    Args:
        monkeypatch: replaces the functions that are counted.

    Attributes:
        most: the most of each in one turn.
        total: the sum of each.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most: Counter[str] = Counter()
        self.total: Counter[str] = Counter()
        self._now: Counter[str] = Counter()
        self._thread = threading.get_ident()
        self._tick: asyncio.Handle | None = None
        self._count_files(monkeypatch)
        self._count_memory(monkeypatch)
        self._count_packets(monkeypatch)

    def _count(self, what: str, amount: int) -> None:
        if self._tick is not None and threading.get_ident() == self._thread:
            self._now[what] += amount

    def _count_files(self, monkeypatch: pytest.MonkeyPatch) -> None:
        preadv, pwrite = os.preadv, os.pwrite

        def counted_preadv(fd: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
            self._count("calls", 1)
            got = preadv(fd, buffers, offset, flags)
            self._count("bytes", got)
            return got

        def counted_pwrite(fd: int, data: Buffer, offset: int) -> int:
            self._count("calls", 1)
            self._count("bytes", len(data))
            return pwrite(fd, data, offset)

        monkeypatch.setattr(os, "preadv", counted_preadv)
        monkeypatch.setattr(os, "pwrite", counted_pwrite)

    def _count_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        read, write = MemoryStore.read, MemoryStore.write

        def counted_read(store: MemoryStore, offset: int, length: int, done: ReadDone) -> None:
            self._count("bytes", length)
            read(store, offset, length, done)

        def counted_write(store: MemoryStore, offset: int, data: Buffer, done: WriteDone) -> None:
            self._count("bytes", len(data))
            write(store, offset, data, done)

        monkeypatch.setattr(MemoryStore, "read", counted_read)
        monkeypatch.setattr(MemoryStore, "write", counted_write)

    def _count_packets(self, monkeypatch: pytest.MonkeyPatch) -> None:
        next_event, parse = Connection.next_event, Rule.parse.__func__  # type: ignore[attr-defined]

        def counted_event(connection: Connection) -> Event | None:
            event = next_event(connection)
            if event is not None and connection.role is Role.HOST:
                self._count("packets", 1)
            return event

        def counted_parse(cls: type[Rule], text: str, separators: str = ",") -> Rule:
            self._count("text", len(text))
            parsed: Rule = parse(cls, text, separators)
            return parsed

        monkeypatch.setattr(Connection, "next_event", counted_event)
        monkeypatch.setattr(Rule, "parse", classmethod(counted_parse))

    async def __aenter__(self) -> Self:
        self._next_turn()
        return self

    async def __aexit__(self, *exception: object) -> None:
        assert self._tick is not None
        self._tick.cancel()
        self._end_turn()
        self._tick = None

    def _next_turn(self) -> None:
        self._end_turn()
        self._tick = asyncio.get_running_loop().call_soon(self._next_turn)

    def _end_turn(self) -> None:
        self.total += self._now
        self.most |= self._now
        self._now.clear()
