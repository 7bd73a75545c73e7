from __future__ import annotations

import asyncio

import pytest
from tests.transport.fake_spice import FakeSpice, Recorder, running

from farplug.errors import GuestGoneError, TargetError
from farplug.target import open_session, parse_target
from farplug.transport.spice_target import Stage


async def test_a_spice_session() -> None:
    fake = FakeSpice()
    stages: list[Stage] = []
    async with running(fake) as port:
        session = await open_session(
            parse_target(f"spice://127.0.0.1:{port}"), lambda stage, where: stages.append(stage)
        )
        assert session.reached
        assert session.exclusive
        assert (session.name, session.uuid) == ("testvm", "00010203-0405-0607-0809-0a0b0c0d0e0f")
        assert [port.name for port in session.ports] == ["usbredir 0", "usbredir 1"]
        assert stages == [Stage.REACH, Stage.TICKET, Stage.CHANNELS]
        closed = asyncio.ensure_future(session.closed())
        await session.close()
        assert await closed is None
        session = await open_session(parse_target(f"spice://127.0.0.1:{port}"))
        fake.main_channel.writer.transport.abort()
        assert isinstance(await session.closed(), GuestGoneError)
        await session.close()


@pytest.mark.parametrize("text", ["tcp://127.0.0.1:1", "unix:/no/such/socket"])
async def test_a_plain_socket_is_connected_when_its_port_is_opened(text: str) -> None:
    stages: list[Stage] = []
    session = await open_session(parse_target(text), lambda stage, where: stages.append(stage))
    assert not session.reached
    assert not session.exclusive
    assert (session.name, session.uuid, len(session.ports), stages) == ("", "", 1, [Stage.REACH])
    with pytest.raises(TargetError):
        await session.ports[0].open(Recorder())
    closed = asyncio.ensure_future(session.closed())
    await session.close()
    await session.close()
    assert await closed is None


async def test_the_address_of_a_listening_port_is_reported() -> None:
    reported: list[str] = []
    session = await open_session(parse_target("tcp-listen://127.0.0.1:0"), lambda stage, where: reported.append(where))
    opening = asyncio.ensure_future(session.ports[0].open(Recorder()))
    async with asyncio.timeout(100):
        while not reported:
            await asyncio.sleep(0.01)
    assert reported[0].startswith("listening on 127.0.0.1:")
    assert ":0:" not in reported[0]
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    await session.close()
