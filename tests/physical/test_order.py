"""Whatever happens, transfers of an endpoint reach libusb in the order of their submission, and end exactly once.

A guest that submits and cancels at random, from its completions too, a device that fails, stalls and hangs, and memory
that is short for a moment: all drawn from a seed.
"""

from __future__ import annotations

import asyncio
import random
import threading
from functools import partial

import pytest
import usb1
from tests.libusb.fake_libusb import FakeDevice, FakeLibrary, FakeTransfer
from tests.physical.support import BULK, BULK_IN, BULK_OUT, EVERYTHING, Bench, opened

from farplug.physical import transfers
from farplug.physical.transfers import MAX_PIECE, MIN_PIECE
from farplug.usb import Transfer

LENGTHS = (0, 512, MIN_PIECE, 4 * MIN_PIECE, MAX_PIECE, MAX_PIECE + 1, 3 * MAX_PIECE)
STEPS = 80
AT_ONCE = 3
"""Nested submissions: those that the guest makes in a completion."""


def _wait(answer: threading.Event) -> None:
    answer.wait(100)


class Chaos:
    """One run."""

    def __init__(self, bench: Bench, seed: int) -> None:
        self.bench = bench
        self.submitted: list[Transfer] = []
        self.ended: list[Transfer] = []
        self.moved: list[Transfer] = []
        """In the order in which libusb got them; long ones several times."""
        self._draw = random.Random(seed)
        self._inside = 0
        self._hangs: list[threading.Event] = []
        self._calls: list[asyncio.Future[None]] = []
        bench.handle.rule = self._move

    def _move(self, usb: FakeTransfer) -> None:
        self.moved.append(usb.getUserData().transfer)

    def submit(self) -> None:
        endpoint, length = self._draw.choice((BULK_IN, BULK_OUT)), self._draw.choice(LENGTHS)
        data = b"" if endpoint == BULK_IN else bytes(length)
        transfer = Transfer(BULK, endpoint, self._end, length=length, data=data)
        self.submitted.append(transfer)
        self.bench.device.submit(transfer)

    def _end(self, transfer: Transfer) -> None:
        self.ended.append(transfer)
        drawn = self._draw.random()
        if drawn < 0.35 and self._inside < AT_ONCE:
            self._inside += 1
            self.submit()
            self._inside -= 1
        elif drawn > 0.9:
            self.cancel()

    def cancel(self) -> None:
        if pending := [transfer for transfer in self.submitted if transfer.status is None]:
            self.bench.device.cancel(self._draw.choice(pending))

    def cancel_all(self) -> None:
        session = self.bench.device._session
        assert session is not None
        session.transfers.cancel_all(self._draw.choice((None, [BULK_IN])))

    def finish(self) -> None:
        if in_flight := self.bench.in_flight[:2]:
            usb = self._draw.choice(in_flight)
            size = len(usb.buffer)
            status, actual = self._draw.choice(
                (
                    *((usb1.TRANSFER_COMPLETED, size),) * 4,
                    (usb1.TRANSFER_COMPLETED, size // 2),
                    (usb1.TRANSFER_ERROR, size // 3),
                    (usb1.TRANSFER_STALL, 0),
                )
            )
            usb.finish(status=status, actual=actual)

    def refuse(self) -> None:
        errors = (usb1.USBErrorNoMem(), usb1.USBErrorIO(), None)
        self.bench.handle.refusals = [self._draw.choice(errors) for _ in range(self._draw.randrange(5))]

    def hang(self) -> None:
        session, answer = self.bench.device._session, threading.Event()
        assert session is not None
        self._hangs.append(answer)
        self._calls.append(asyncio.ensure_future(session.gate.call(partial(_wait, answer))))

    def answer(self) -> None:
        if self._hangs:
            self._hangs.pop(0).set()

    async def run(self) -> None:
        """Many steps, then let all that is pending end."""
        steps = (self.submit, self.cancel, self.finish, self.hang, self.answer, self.refuse, self.cancel_all)
        for step in self._draw.choices(steps, (35, 10, 30, 8, 8, 4, 2), k=STEPS):
            step()
            if self._draw.random() < 0.6:
                await asyncio.sleep(self._draw.choice((0, 0, 0.002)))
        self.bench.handle.refusals = []
        self._inside = AT_ONCE
        while self._hangs:
            self.answer()
        await asyncio.gather(*self._calls)
        async with asyncio.timeout(100):
            while len(self.ended) < len(self.submitted):
                while self.bench.in_flight:
                    usb = self.bench.in_flight[0]
                    usb.finish(actual=len(usb.buffer))
                await asyncio.sleep(0.002)


@pytest.mark.parametrize("polls", [True, False])
@pytest.mark.parametrize("seed", range(40))
async def test_order(seed: int, polls: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(transfers, "MEMORY_PAUSE", 0.002)
    library = FakeLibrary(fake := FakeDevice(EVERYTHING))
    library.polls_nothing = not polls
    async with opened(fake, library=library) as bench:
        chaos = Chaos(bench, seed)
        await chaos.run()
        assert len(chaos.ended) == len(set(chaos.ended)) == len(chaos.submitted)
        for endpoint in (BULK_IN, BULK_OUT):
            moved = [chaos.submitted.index(one) for one in chaos.moved if one.endpoint == endpoint]
            assert moved == sorted(moved)
        session = bench.device._session
        assert session is not None
        assert not session.gate.shut
    assert "Traceback" not in caplog.text
