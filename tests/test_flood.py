"""A device that floods delays nobody else: no PONG, no other device.

Nothing is timed: what counts is how much more of the flood there is before the answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from tests.redirection.scripted import BULK_IN, ScriptedDevice
from tests.test_slow_store import SpiceGuest
from tests.transport.fake_spice import Channel, FakeSpice, ping, running

from farplug.redirection import Redirection
from farplug.transport.dialer import SpiceTarget
from farplug.transport.spice_session import SpiceSession
from farplug.usb import Reception, Status, Transfer
from farplug.usbredir import packets as p

PIECE = 64 << 10
MIB = 1 << 20
AT_ONCE = 16
"""Packets of a reception that arrive in one turn of the event loop: 1 MiB."""
ASKED = 512
"""Transfers that the guest asks for at once: 32 MiB."""
BEFORE = 16 * MIB
"""More of the flood than that does not come before an answer."""


class Flood(ScriptedDevice):
    """Has data whenever it is asked, and when it is not: as much as the event loop takes.

    Attributes:
        poured: bytes so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.poured = 0
        self._data = bytes(PIECE)
        self._pouring: asyncio.Handle | None = None
        self._in_the_middle: Callable[[], None] | None = None

    def in_the_middle(self, call: Callable[[], None]) -> None:
        """Make a call when the next packet has been poured: others of the same turn are to come."""
        self._in_the_middle = call

    def submit(self, transfer: Transfer) -> None:
        transfer.complete(Status.SUCCESS, self._data)
        self._count()

    def start_receiving(self, reception: Reception) -> Status:
        self._pour(reception.endpoint)
        return Status.SUCCESS

    def _pour(self, endpoint: int) -> None:
        self._pouring = asyncio.get_running_loop().call_soon(self._pour, endpoint)
        for _ in range(AT_ONCE):
            assert self.listener is not None
            self.listener.received(endpoint, Status.SUCCESS, self._data)
            self._count()

    def _count(self) -> None:
        self.poured += PIECE
        call, self._in_the_middle = self._in_the_middle, None
        if call is not None:
            call()

    async def close(self) -> None:
        if self._pouring is not None:
            self._pouring.cancel()
        await super().close()


def receive(guest: SpiceGuest) -> None:
    """The guest wants all that the device has, unasked."""
    guest.send(p.StartBulkReceiving(id=1, stream_id=0, bytes_per_transfer=PIECE, endpoint=BULK_IN, transfers=AT_ONCE))


def ask(guest: SpiceGuest) -> None:
    """The guest asks for much at once."""
    for _ in range(ASKED):
        guest.submit_in(BULK_IN, PIECE)


@pytest.mark.parametrize("begin", [receive, ask])
async def test_pongs_beside_a_flood(begin: Callable[[SpiceGuest], None]) -> None:
    """Of the main channel, and of the one of another device."""
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
        assert flood.poured <= BEFORE
        await until(lambda: flood.poured >= ASKED * PIECE)
        for engine in engines:
            await engine.close()
        await session.close()
