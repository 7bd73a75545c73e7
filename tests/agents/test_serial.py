"""The serial line of an agent: the session plugs it in, and a test is the VM at its other end."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import cast

import pytest
from tests.agents.support import agent, console
from tests.control.support import RawClient
from tests.control.test_driving import done
from tests.control.test_screens import Console

from farplug.agents import machine as machine_module
from farplug.agents import serial as serial_module
from farplug.agents.policy import Policy
from farplug.ends.base import End
from farplug.virtual.device import VirtualDevice
from farplug.virtual.serial import SerialLine


@pytest.fixture(autouse=True)
def _unused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the VM not configure the device: no function reads what is sent, but the test."""
    monkeypatch.setattr(machine_module, "USE_TIMEOUT", 0.1)


def end_of(one: Console) -> End:
    """Return the end of the line as the VM's device has it."""
    (guest,) = one.app.guests.values()
    (attachment,) = [each for each in guest.attachments if not each.over]
    (function,) = cast(VirtualDevice, attachment.device).functions
    assert isinstance(function, SerialLine)
    assert function.end is not None
    return function.end


async def test_a_conversation(environment: dict[str, str]) -> None:
    policy = Policy(secrets={"root": "hunter2"})
    async with console(environment, silent=True) as one, agent(one, policy) as acting:
        assert await acting.text("serial_read") == ""
        end = end_of(one)
        await end.write((b"boot\r\n\x1b[1mvm login: ",))
        assert await acting.text("serial_expect", text="login:") == "boot\n\N{REPLACEMENT CHARACTER}[1mvm login:"
        assert await acting.text("serial_write", text="root\n") == "sent 5 bytes"
        assert await acting.text("serial_write", secret="root", text="") == "sent 0 bytes and the secret root"
        received = b""
        while len(received) < 12:
            received += b"".join(await end.read())
        assert received == b"root\nhunter2"
        reading = asyncio.ensure_future(acting.text("serial_read", timeout=50))
        await end.write((b"\xff\n",))
        assert (await reading).strip() in ("", "\N{REPLACEMENT CHARACTER}"), "the rest of the line came first"
        answer = await acting.text("serial_expect", text="nothing", timeout=0.05)
        assert answer.startswith("timeout: after 0.05 seconds the VM has not written this.")
        assert "no secret 'x'" in await acting.refused("serial_write", secret="x")
        (guest,) = one.app.guests.values()
    assert all(one.over for one in guest.attachments), "it is unplugged at the end"


async def test_what_is_not_read_is_bounded(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serial_module, "MAX_KEPT", 10)
    async with console(environment, silent=True) as one, agent(one) as acting:
        await acting.text("serial_read")
        await end_of(one).write((b"0123456789abcdef",))
        assert await acting.text("serial_expect", text="f") == "6789abcdef"
        await end_of(one).write((b"0123456789abcdef",))
        await acting.text("serial_expect", text="nothing", timeout=0.1)
        assert await acting.text("serial_read") == "[6 bytes before were lost]\n6789abcdef"


async def test_a_line_that_is_unplugged(environment: dict[str, str]) -> None:
    async with console(environment, silent=True) as one, agent(one) as acting:
        await acting.text("serial_read")
        waiting = asyncio.ensure_future(acting.refused("serial_expect", text="login:"))
        await asyncio.sleep(0.1)
        (guest,) = one.app.guests.values()
        await guest.unplug(guest.attachments[0])
        assert "the serial line was unplugged" in await waiting
        assert await acting.text("serial_write", text="a") == "sent 1 bytes", "it is plugged in again"
        await one.server.close()
        assert "[no-session]" in await acting.refused("serial_expect", text="x")


async def test_a_vm_that_reads_nothing(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serial_module, "MAX_UNSENT", 3)
    async with console(environment, silent=True) as one, agent(one) as acting:
        assert "the VM does not read what was sent before" in await acting.refused("serial_write", text="four")


async def test_nothing_is_written_while_a_person_drives(environment: dict[str, str], tmp_path: Path) -> None:
    async with console(environment, silent=True) as one, agent(one) as acting:
        await acting.text("serial_read")
        async with RawClient.connect(one.server.path) as person:
            await done(person, "drive", take=True, client="Ann")
            while acting.server.machine.holder is None:
                await asyncio.sleep(0.001)
            assert "a person took over" in await acting.refused("serial_write", text="a")
            assert await acting.text("serial_read") == ""
