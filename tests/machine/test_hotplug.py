from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.machine.trees import BOOT_KEYBOARD, BOOT_MOUSE, KEYBOARD_KEYS, Machine

from farplug.errors import Reason, SetupError
from farplug.machine import hotplug
from farplug.machine.device_info import DeviceInfo
from farplug.machine.hotplug import Arrived, Change, Departed, Watch
from farplug.machine.listing import list_devices


@pytest.fixture(autouse=True)
def _short_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hotplug, "INTERVAL", 0.02)
    monkeypatch.setattr(hotplug, "PAUSE", 0.01)


async def take(changes: AsyncIterator[Change], count: int = 1) -> list[tuple[str, str]]:
    """The next changes: what happened, and in which port."""
    return [_brief(await asyncio.wait_for(anext(changes), 100)) for _ in range(count)]


def _brief(change: Change) -> tuple[str, str]:
    return type(change).__name__, change.device.port


async def test_plugged_in_and_unplugged(machine: Machine) -> None:
    machine.add("1-1", 2)
    async with Watch(machine.root) as watch:
        assert [device.port for device in watch.present] == ["1-1"]
        changes = aiter(watch)
        machine.add("1-2", 3)
        assert await take(changes) == [("Arrived", "1-2")]
        assert [device.port for device in watch.present] == ["1-1", "1-2"]
        machine.remove("1-1")
        assert await take(changes) == [("Departed", "1-1")]
        assert [device.port for device in watch.present] == ["1-2"]


async def test_a_device_that_changes_between_two_looks(machine: Machine) -> None:
    machine.add("1-1", 2)
    async with Watch(machine.root) as watch:
        machine.remove("1-1")
        machine.add("1-1", 3, 0x0483, 0xDF11)
        changes = aiter(watch)
        assert await take(changes, 2) == [("Departed", "1-1"), ("Arrived", "1-1")]
        assert watch.present[0].id == "0483:df11"


async def test_an_address_that_is_used_again_in_another_port(machine: Machine) -> None:
    machine.add("1-1", 2)
    async with Watch(machine.root) as watch:
        machine.remove("1-1")
        machine.add("1-2", 2)
        assert await take(aiter(watch), 2) == [("Departed", "1-1"), ("Arrived", "1-2")]


async def test_a_device_is_reported_when_udev_is_done(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hotplug, "SETUP_TIMEOUT", 60)
    allowed = False
    monkeypatch.setattr(os, "access", lambda path, mode: allowed and Path(path).exists())
    async with Watch(machine.root) as watch:
        changes = aiter(watch)
        machine.add("1-1", 2)
        waiting = asyncio.ensure_future(anext(changes))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        allowed = True
        change = await asyncio.wait_for(waiting, 100)
        assert isinstance(change, Arrived)
        assert change.device.obstacle is None


async def test_a_device_that_never_becomes_usable_is_reported_with_its_obstacle(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hotplug, "SETUP_TIMEOUT", 0.1)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    async with Watch(machine.root) as watch:
        machine.add("1-1", 2)
        change = await asyncio.wait_for(anext(aiter(watch)), 100)
        assert change.device.obstacle is not None
        assert change.device.obstacle.reason is Reason.NO_PERMISSION


async def test_plugged_in_anew_at_the_same_address(machine: Machine) -> None:
    machine.add("1-1", 2)
    async with Watch(machine.root) as watch:
        machine.remove("1-1")
        machine.add("1-1", 2)
        assert await take(aiter(watch), 2) == [("Departed", "1-1"), ("Arrived", "1-1")]


async def test_a_device_that_is_being_reset_is_still_there(machine: Machine) -> None:
    folder = machine.add("1-1", 2, dev="189:1")
    async with Watch(machine.root) as watch:
        changes = aiter(watch)
        (folder / "devnum").write_text("0\n")  # what Linux shows meanwhile
        machine.add("1-2", 3)
        assert await take(changes) == [("Arrived", "1-2")]
        (folder / "devnum").write_text("2\n")
        machine.remove("1-2")
        assert await take(changes) == [("Departed", "1-2")]
        assert [device.key for device in watch.present] == [(1, 2)]


async def test_permission_that_is_given_late_is_reported(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hotplug, "SETUP_TIMEOUT", 0.1)
    allowed = False
    monkeypatch.setattr(os, "access", lambda path, mode: allowed and Path(path).exists())
    async with Watch(machine.root) as watch:
        changes = aiter(watch)
        machine.add("1-1", 2)
        first = await asyncio.wait_for(anext(changes), 100)
        assert first.device.obstacle is not None
        waiting = asyncio.ensure_future(anext(changes))
        await asyncio.sleep(0.2)
        assert not waiting.done(), "it was reported twice"
        allowed = True
        second = await asyncio.wait_for(waiting, 100)
        assert isinstance(second, Arrived)
        assert second.device.obstacle is None
        assert watch.present == [second.device]
        machine.remove("1-1")
        assert await take(changes) == [("Departed", "1-1")]


async def test_only_new_devices_are_read(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading attributes of a device that hangs takes as long as it hangs."""
    machine.add("1-1", 2)
    async with Watch(machine.root) as watch:
        looked: list[str] = []

        def look(root: Path, ports: list[str]) -> list[DeviceInfo]:
            looked.extend(ports)
            return list_devices(root, ports)

        monkeypatch.setattr(hotplug, "list_devices", look)
        machine.add("1-2", 3)
        assert await take(aiter(watch)) == [("Arrived", "1-2")]
        assert set(looked) == {"1-2"}


@pytest.mark.parametrize("protocol", [BOOT_KEYBOARD, BOOT_MOUSE])
async def test_a_keyboard_or_mouse_is_not_reported_before_the_kernel_reads_it(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, protocol: tuple[int, int, int]
) -> None:
    """The driver's link is there before the driver has looked at the device."""
    monkeypatch.setattr(hotplug, "SETUP_TIMEOUT", 60)
    async with Watch(machine.root) as watch:
        folder = machine.add("1-1", 2, 1, 2, (protocol,), drivers=("usbhid",))
        waiting = asyncio.ensure_future(anext(aiter(watch)))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        machine.input(folder, "1-1:1.0", key=KEYBOARD_KEYS)
        change = await asyncio.wait_for(waiting, 100)
        assert change.device.in_use_as is not None


async def test_a_keyboard_is_reported_when_the_kernel_knows_it(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hotplug, "SETUP_TIMEOUT", 60)
    async with Watch(machine.root) as watch:
        folder = machine.add("1-1", 2, 1, 2, (BOOT_KEYBOARD,))
        waiting = asyncio.ensure_future(anext(aiter(watch)))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        machine.input(folder, "1-1:1.0", key=KEYBOARD_KEYS)
        machine.link(folder / "1-1:1.0/driver", "usbhid")
        change = await asyncio.wait_for(waiting, 100)
        assert change.device.in_use_as is not None


async def test_a_device_that_is_unplugged_before_its_report_is_never_reported(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hotplug, "SETUP_TIMEOUT", 60)
    async with Watch(machine.root) as watch:
        changes = aiter(watch)
        waiting = asyncio.ensure_future(anext(changes))
        machine.add("1-1", 2, node=False)
        await asyncio.sleep(0.2)
        machine.remove("1-1")
        await asyncio.sleep(0.2)
        machine.add("1-2", 3)
        assert _brief(await asyncio.wait_for(waiting, 100)) == ("Arrived", "1-2")


async def test_usb_that_is_unloaded(machine: Machine) -> None:
    machine.add("1-1", 2)
    async with Watch(machine.root) as watch:
        machine.devices.rename(machine.root / "unloaded")
        changes = aiter(watch)
        assert await take(changes) == [("Departed", "1-1")]
        (machine.root / "unloaded").rename(machine.devices)
        assert await take(changes) == [("Arrived", "1-1")]


async def test_usb_that_is_unloaded_while_a_device_is_plugged_in(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:

    unloaded = [SetupError("this machine has no USB", reason=Reason.NO_USB)]

    def fail_once(root: Path, ports: list[str]) -> object:
        if unloaded:
            raise unloaded.pop()
        return list_devices(root, ports)

    async with Watch(machine.root) as watch:
        machine.add("1-1", 2)
        monkeypatch.setattr(hotplug, "list_devices", fail_once)
        assert await take(aiter(watch)) == [("Arrived", "1-1")]


async def test_no_usb(tmp_path: Path) -> None:
    with pytest.raises(SetupError):
        async with Watch(tmp_path):
            raise AssertionError


class Uevents:
    """Stands for the kernel's end of the socket."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kernel, self._ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._ours.setblocking(False)
        monkeypatch.setattr("socket.socket", lambda *_: self)

    def bind(self, address: object) -> None:
        assert address == (0, 1)

    def fileno(self) -> int:
        return self._ours.fileno()

    def recv(self, size: int) -> bytes:
        return self._ours.recv(size)

    def close(self) -> None:
        self._ours.close()
        self.kernel.close()


async def test_the_kernels_messages_trigger_a_look(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    uevents = Uevents(monkeypatch)
    monkeypatch.setattr(hotplug, "INTERVAL", 3600)
    async with Watch(machine.root) as watch:
        waiting = asyncio.ensure_future(anext(aiter(watch)))
        machine.add("1-1", 2)
        uevents.kernel.send(b"add@/devices/x\0SUBSYSTEM=net\0")
        uevents.kernel.send(b"")
        await asyncio.sleep(0.2)
        assert not waiting.done()
        uevents.kernel.send(b"add@/devices/y\0ACTION=add\0SUBSYSTEM=usb\0")
        assert _brief(await asyncio.wait_for(waiting, 100)) == ("Arrived", "1-1")


async def test_messages_that_were_lost(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    uevents = Uevents(monkeypatch)
    monkeypatch.setattr(hotplug, "INTERVAL", 3600)

    def overflow(size: int) -> bytes:
        Uevents.recv(uevents, size)
        raise OSError(105, "No buffer space available")

    monkeypatch.setattr(uevents, "recv", overflow)
    async with Watch(machine.root) as watch:
        waiting = asyncio.ensure_future(anext(aiter(watch)))
        machine.add("1-1", 2)
        uevents.kernel.send(b"anything")
        assert isinstance(await asyncio.wait_for(waiting, 100), Arrived)


@pytest.mark.parametrize("where", ["socket", "bind"])
async def test_without_the_kernels_messages(machine: Machine, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def refuse(*_: object) -> socket.socket:
        raise OSError(97, "Address family not supported by protocol")

    if where == "bind":
        monkeypatch.setattr(Uevents, "bind", refuse)
        Uevents(monkeypatch)
    else:
        monkeypatch.setattr("socket.socket", refuse)
    machine.add("1-1", 2)
    async with Watch(machine.root) as watch:
        machine.remove("1-1")
        assert isinstance(await asyncio.wait_for(anext(aiter(watch)), 100), Departed)


async def test_too_many_open_files(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A device that cannot be read is not unplugged."""
    real = os.open

    def full(path: object, *arguments: object, **options: object) -> int:
        if str(path).startswith(str(machine.root)):
            raise OSError(errno.EMFILE, "too many")
        return real(path, *arguments, **options)  # type: ignore[arg-type]

    machine.add("1-1", 2)
    async with Watch(machine.root) as watch:
        monkeypatch.setattr(os, "open", full)
        change = asyncio.ensure_future(anext(aiter(watch)))
        async with asyncio.timeout(100):
            while "too many open files" not in caplog.text:
                await asyncio.sleep(0.01)
        with pytest.raises(SetupError, match="this process has too many open files") as caught:
            list_devices(machine.root)
        assert caught.value.reason is Reason.IO_ERROR
        await asyncio.sleep(0.2)  # ten looks
        assert caplog.text.count("too many open files") == 1
        monkeypatch.setattr(os, "open", real)
        machine.add("1-2", 3)
        assert _brief(await asyncio.wait_for(change, 100)) == ("Arrived", "1-2")
        assert [device.port for device in watch.present] == ["1-1", "1-2"]
