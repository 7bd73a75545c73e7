"""Helpers of the tests of stores."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from pathlib import Path

from farplug.store import OverlayStore, Store
from farplug.usb import Buffer

CONTENT = random.Random(7).randbytes(64 * 512)


def content(path: Path) -> bytes:
    return path.read_bytes()


def size(path: Path) -> int:
    return path.stat().st_size


async def read(store: Store, offset: int, length: int) -> bytes:
    future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def done(data: Buffer, error: OSError | None) -> None:
        assert threading.current_thread() is threading.main_thread()
        future.set_result(bytes(data)) if error is None else future.set_exception(error)

    store.read(offset, length, done)
    return await future


async def settle(call: Callable[[Callable[[OSError | None], None]], None]) -> None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def done(error: OSError | None) -> None:
        assert threading.current_thread() is threading.main_thread()
        future.set_result(None) if error is None else future.set_exception(error)

    call(done)
    await future


async def write(store: Store, offset: int, data: Buffer) -> None:
    await settle(lambda done: store.write(offset, data, done))


async def zero(store: Store, offset: int, length: int, *, unmap: bool) -> None:
    await settle(lambda done: store.zero(offset, length, done, unmap=unmap))


async def make_snapshot(base: Path, path: Path) -> None:
    """Make a snapshot with a change in its first block."""
    store = OverlayStore.open(base, path)
    await write(store, 0, b"x" * 512)
    await store.close()
