"""A device that sends without pause delays neither a PONG nor another device.

Nothing is timed: the test counts the bytes that the device sends before the answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from tests.redirection.scripted import BULK_IN, ScriptedDevice
from tests.test_slow_store import SpiceGuest
from tests.transport.fake_spice import Channel, FakeSpice, ping, running

from farplug.redirection import Redirection
from farplug.transport.spice_session import SpiceSession
from farplug.transport.spice_target import SpiceTarget
from farplug.usb import Reception, Status, Transfer
from farplug.usbredir import packets

PIECE = 64 << 10
MIB = 1 << 20
AT_ONCE = 16
"""Packets of a reception in one turn of the event loop: 1 MiB."""
REQUESTED = 512
"""Transfers that the guest requests at once: 32 MiB."""
MAX_BEFORE = 16 * MIB
"""Bytes that the device may send before an answer."""


class Flood(ScriptedDevice):
    """A device that completes each transfer at once, and whose receptions send in every turn of the event loop.

    Attributes:
        sent: bytes so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0
        self._data = bytes(PIECE)
        self._next_turn: asyncio.Handle | None = None
        self._in_the_middle: Callable[[], None] | None = None

    def in_the_middle(self, call: Callable[[], None]) -> None:
        """Make a call after the next packet: further packets of the same turn follow."""
        self._in_the_middle = call

    def submit(self, transfer: Transfer) -> None:
        transfer.complete(Status.SUCCESS, self._data)
        self._count()

    def start_receiving(self, reception: Reception) -> Status:
        self._send(reception.endpoint)
        return Status.SUCCESS

    def _send(self, endpoint: int) -> None:
        self._next_turn = asyncio.get_running_loop().call_soon(self._send, endpoint)
        for _ in range(AT_ONCE):
            assert self.listener is not None
            self.listener.received(endpoint, Status.SUCCESS, self._data)
            self._count()

    def _count(self) -> None:
        self.sent += PIECE
        call, self._in_the_middle = self._in_the_middle, None
        if call is not None:
            call()

    async def close(self) -> None:
        if self._next_turn is not None:
            self._next_turn.cancel()
        await super().close()


def receive(guest: SpiceGuest) -> None:
    """Start a reception."""
    guest.send(
        packets.StartBulkReceiving(id=1, stream_id=0, bytes_per_transfer=PIECE, endpoint=BULK_IN, transfers=AT_ONCE)
    )


def request(guest: SpiceGuest) -> None:
    """Request many transfers at once."""
    for _ in range(REQUESTED):
        guest.submit_in(BULK_IN, PIECE)


@pytest.mark.parametrize("begin", [receive, request])
async def test_pongs_during_a_flood(begin: Callable[[SpiceGuest], None]) -> None:
    """The main channel and the channel of another device answer PINGs."""
    guests: dict[int, SpiceGuest] = {}
    ponged: list[int] = []

    async def serve(channel: Channel) -> None:
        guest = guests[channel.mess.channel_id] = SpiceGuest(channel)
        await guest.serve(ponged.append)

    async def until(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(100):
            while not condition():
                await asyncio.sleep(0)

    def send_pings() -> None:
        fake.main_channel.send(ping(70))
        fake.of(1).send(ping(71))

    flood = Flood()
    fake = FakeSpice(vmc_caps=0, usbredir=serve)
    async with running(fake) as number:
        session = await SpiceSession.connect(SpiceTarget(host="127.0.0.1", port=number))
        engines = [Redirection(port) for port in session.ports]
        for engine in engines:
            await engine.open()
        await engines[0].attach(flood)
        await until(lambda: guests[0].connected is not None)
        await guests[0].set_configuration(1)
        flood.in_the_middle(send_pings)
        begin(guests[0])
        await until(lambda: 70 in fake.pongs and 71 in ponged)
        assert flood.sent <= MAX_BEFORE
        await until(lambda: flood.sent >= REQUESTED * PIECE)
        for engine in engines:
            await engine.close()
        await session.close()
