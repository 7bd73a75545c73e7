from __future__ import annotations

import asyncio

import pytest
from tests.transport.fake_spice import FakeSpice, Recorder, running

from farplug.errors import GuestGoneError, TargetError
from farplug.guest import connect
from farplug.target import parse_target
from farplug.transport.dialer import Stage


async def test_a_spice_guest() -> None:
    fake = FakeSpice()
    stages: list[Stage] = []
    async with running(fake) as port:
        guest = await connect(parse_target(f"spice://127.0.0.1:{port}"), lambda stage, where: stages.append(stage))
        assert guest.is_spice
        assert (guest.name, guest.uuid) == ("testvm", "00010203-0405-0607-0809-0a0b0c0d0e0f")
        assert [port.name for port in guest.ports] == ["usbredir 0", "usbredir 1"]
        assert stages == [Stage.REACH, Stage.TICKET, Stage.CHANNELS]
        closed = asyncio.ensure_future(guest.closed())
        await guest.close()
        assert await closed is None
        guest = await connect(parse_target(f"spice://127.0.0.1:{port}"))
        fake.main_channel.writer.transport.abort()
        assert isinstance(await guest.closed(), GuestGoneError)
        await guest.close()


@pytest.mark.parametrize("text", ["tcp://127.0.0.1:1", "unix:/no/such/socket"])
async def test_a_plain_socket_is_reached_when_it_is_used(text: str) -> None:
    stages: list[Stage] = []
    guest = await connect(parse_target(text), lambda stage, where: stages.append(stage))
    assert not guest.is_spice
    assert (guest.name, guest.uuid, len(guest.ports), stages) == ("", "", 1, [Stage.REACH])
    with pytest.raises(TargetError):
        await guest.ports[0].open(Recorder())
    closed = asyncio.ensure_future(guest.closed())
    await guest.close()
    await guest.close()
    assert await closed is None


async def test_where_we_listen_is_told() -> None:
    told: list[str] = []
    guest = await connect(parse_target("tcp-listen://127.0.0.1:0"), lambda stage, where: told.append(where))
    opening = asyncio.ensure_future(guest.ports[0].open(Recorder()))
    async with asyncio.timeout(5):
        while not told:
            await asyncio.sleep(0.01)
    assert told[0].startswith("listening on 127.0.0.1:")
    assert ":0:" not in told[0]
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    await guest.close()
