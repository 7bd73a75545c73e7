from __future__ import annotations

import errno

import pytest

from farplug.store import MemoryStore
from farplug.usb import Buffer


async def test_read_and_write() -> None:
    store = MemoryStore(b"\x01" * 512 + b"\x02" * 512)
    assert (store.block_count, store.block_size, store.read_only) == (2, 512, False)
    assert int(store.serial_number, 16) >= 0
    assert len(store.serial_number) == 16
    answers: list[Buffer | OSError | None] = []
    store.write(510, b"abcd", answers.append)
    store.flush(answers.append)
    store.read(509, 6, lambda data, error: answers.extend((data, error)))
    assert answers == [None, None, b"\x01abcd\x02", None]
    await store.close()


def test_read_only() -> None:
    store = MemoryStore(512, read_only=True, serial_number="ABC")
    answers: list[OSError | None] = []
    store.write(0, b"x", answers.append)
    assert isinstance(answers[0], OSError)
    assert answers[0].errno == errno.EROFS
    assert store.content == bytes(512)
    assert store.serial_number == "ABC"


@pytest.mark.parametrize("content", [0, b"", 511, b"x" * 513])
def test_whole_blocks_only(content: bytes | int) -> None:
    with pytest.raises(ValueError, match="512-byte blocks"):
        MemoryStore(content)


async def test_zero() -> None:
    store = MemoryStore(b"x" * 8192, block_size=4096)
    assert (store.block_size, store.block_count, store.unmaps) == (4096, 2, False)
    answers: list[object] = []
    store.zero(100, 200, answers.append, unmap=True)
    store.refresh()
    assert answers == [None]
    assert store.content == b"x" * 100 + bytes(200) + b"x" * 7892
    with pytest.raises(ValueError, match="4096-byte blocks"):
        MemoryStore(512, block_size=4096)
