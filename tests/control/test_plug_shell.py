"""The device for commands in a guest: it goes with its client, and what a caller gets when no shell answers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.control.support import RawClient
from tests.control.test_driving import code, done
from tests.control.test_media import offering
from tests.control.test_server import request

from farplug.app.client import MAX_SHELLS
from farplug.app.guest import SHELL_LINES, Guest
from farplug.control import shell as shell_module
from farplug.control.client import Client
from farplug.control.login import Login
from farplug.control.shell import LINES, open_shell
from farplug.errors import FarplugError, GuestGoneError, Reason


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return what is typed in the VM, which has no shell."""
    typed: list[Any] = []
    call = Client.call

    async def record(client: Client, method: str, params: Any = None, payload: Any = None) -> Any:
        if method not in ("type", "press"):
            return await call(client, method, params, payload)
        typed.append(params.get("text", params.get("keys")))
        return {"confirmed": True, "via": "usb"}

    monkeypatch.setattr(Client, "call", record)
    return typed


async def test_the_device_goes_with_its_client(environment: dict[str, str], folder: Path) -> None:
    assert LINES == SHELL_LINES
    async with offering(environment, 2) as (app, server), RawClient.connect(server.path) as client:
        assert await code(client, "plug-shell", lines="line", serial_number="1") == "bad-setting"
        assert await code(client, "plug-shell", lines="/line", serial_number="../1") == "bad-setting"
        assert await code(client, "plug-shell", lines=str(folder / "none"), serial_number="1") == "not-found"
        connected: list[asyncio.StreamWriter] = []
        ends = [
            await asyncio.start_unix_server(lambda _, writer: connected.append(writer), folder / f"line{number}")
            for number in range(LINES)
        ]
        plugged = await done(client, "plug-shell", lines=str(folder / "line"), serial_number="abc")
        (attachment,) = app.guests["g1"].attachments
        assert plugged == {"attachment": attachment.id, "label": "shell"}
        assert attachment.device.identity.serial_number == "abc"
        assert MAX_SHELLS > 2  # there are two ports
        await done(client, "plug-shell", lines=str(folder / "line"), serial_number="abd")
        assert await code(client, "plug-shell", lines=str(folder / "line"), serial_number="abe") == "no-free-port"
        client.writer.transport.abort()
        while any(not one.over for one in app.guests["g1"].attachments):
            await asyncio.sleep(0.01)
        for end in ends:
            end.close()
        for writer in connected:
            writer.transport.abort()
        await asyncio.sleep(0)


async def test_shells_that_are_being_plugged_in_count(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    go, calls = asyncio.Event(), 0

    async def plug_shell(guest: Guest, lines: str, serial_number: str) -> Any:
        nonlocal calls
        calls += 1
        await go.wait()
        raise GuestGoneError("the guest is closed")

    monkeypatch.setattr(Guest, "plug_shell", plug_shell)
    async with offering(environment, 2) as (_, server), RawClient.connect(server.path) as client:
        for id in range(10):
            client.send(request(id, "plug-shell", lines="/line", serial_number="a"))
        refused = [await client.next() for _ in range(10 - MAX_SHELLS)]
        assert {one["error"]["code"] for one in refused} == {"bad-setting"}
        assert calls == MAX_SHELLS
        go.set()
        assert {(await client.next())["error"]["code"] for _ in range(MAX_SHELLS)} == {"guest-gone"}
        assert await code(client, "plug-shell", lines="/line", serial_number="a") == "guest-gone", "there is room again"


async def test_no_shell_answers(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, folder: Path, typed: list[Any]
) -> None:
    monkeypatch.setattr(shell_module, "RETYPE_INTERVAL", 0.15)
    async with offering(environment, 1) as (app, server), Client.connect(server.path) as client:
        for login, timeout in ((None, 0.2), (Login("root", "secret"), 2)):
            with pytest.raises(FarplugError, match="no shell in the VM answered") as raised:
                async with open_shell(client, prompt_timeout=timeout, login_delay=0, login=login):
                    pytest.fail("it is open")
            assert raised.value.reason is Reason.NO_PROMPT
        assert all(one.over for one in app.guests["g1"].attachments)
        assert [*folder.glob(".shell-*")] == []
        lines = [text.partition("modprobe")[0] for text in typed]
        line = " sh -c '"
        assert lines[:4] == ["ctrl+u", line, "root\n", "secret\n"]
        again = len(lines[4:]) // 2
        assert again > 1, "after a login it is typed again"
        assert lines[4:] == ["ctrl+u", line] * again


@pytest.mark.parametrize("how", ["detached", "closed"])
async def test_the_device_or_the_session_is_gone(environment: dict[str, str], typed: list[Any], how: str) -> None:
    async with offering(environment, 1) as (app, server), Client.connect(server.path) as client:

        async def end() -> None:
            guest = app.guests["g1"]
            while not guest.attachments:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.3)
            if how == "detached":
                await guest.unplug(guest.attachments[0])
            else:
                await server.close()

        ending = asyncio.ensure_future(end())
        with pytest.raises(GuestGoneError):
            async with open_shell(client):
                pytest.fail("it is open")
        await ending
