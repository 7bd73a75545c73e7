from __future__ import annotations

import pytest

from farplug.load.disk import LEAST_COUNTED, MAX_COMMANDS, PIECE, LoadStore, Meter

BLOCK = LEAST_COUNTED


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def read(store: LoadStore, offset: int, length: int) -> bytes:
    got: list[bytes] = []
    store.read(offset, length, lambda data, error: got.append(bytes(data)))
    return got[0]


def done(error: OSError | None) -> None:
    assert error is None


def test_a_command_lasts_until_the_next_one(clock: Clock) -> None:
    meter = Meter(clock)
    for now in (1.0, 2.0, 5.0):
        clock.now = now
        meter.end()
        meter.begin(BLOCK)
    assert meter.measured == 2 * BLOCK
    assert meter.take(3 * BLOCK) is None
    assert meter.take(2 * BLOCK) == 4.0
    assert meter.take(BLOCK) is None
    clock.now = 5.5
    meter.end()
    meter.end()
    assert meter.take(1) == 0.5
    assert meter.measured == 0


def test_short_commands_do_not_count_and_old_ones_are_dropped(clock: Clock) -> None:
    meter = Meter(clock)
    meter.begin(BLOCK - 512)
    meter.end()
    assert meter.measured == 0
    for _ in range(MAX_COMMANDS + 10):
        meter.begin(BLOCK)
        meter.end()
    assert meter.measured == MAX_COMMANDS * BLOCK


def test_reads_end_with_writes_and_both_with_a_flush(clock: Clock) -> None:
    store = LoadStore(4 * PIECE, clock)
    read(store, 0, BLOCK)
    clock.now = 1.0
    store.write(0, bytes(BLOCK), done)
    assert store.reads.take(BLOCK) == 1.0
    assert store.writes.take(BLOCK) is None
    clock.now = 3.0
    store.flush(done)
    assert store.writes.take(BLOCK) == 2.0


async def test_what_is_written_is_read_and_the_rest_does_not_compress(clock: Clock) -> None:
    store = LoadStore(3 * PIECE, clock)
    before = read(store, 0, 3 * PIECE)
    assert before[:PIECE] == before[PIECE : 2 * PIECE]
    assert len(set(before[:4096])) > 200
    data = b"written" * 1000
    store.write(PIECE - 3000, data, done)
    after = bytearray(before)
    after[PIECE - 3000 : PIECE - 3000 + len(data)] = data
    assert read(store, 0, 3 * PIECE) == after
    store.zero(2 * PIECE - 512, 1024, done, unmap=True)
    after[2 * PIECE - 512 : 2 * PIECE + 512] = bytes(1024)
    assert read(store, PIECE + 1, PIECE + 4096) == after[PIECE + 1 : 2 * PIECE + 4097]
    assert read(LoadStore(PIECE, clock), 0, PIECE) == before[:PIECE], "another disk has its own content"
    await store.close()


@pytest.mark.parametrize("size", [0, -512, 511])
def test_a_size_that_is_not_whole_blocks(clock: Clock, size: int) -> None:
    with pytest.raises(ValueError, match="blocks"):
        LoadStore(size, clock)
