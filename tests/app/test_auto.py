from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NoReturn, cast

import pytest
from tests.leaks import Left, no_more_than
from tests.machine.trees import Machine

from farplug.app import auto as module
from farplug.app.attachment import Attachment, Place
from farplug.app.auto import AutoPlugger
from farplug.app.policy import Policy, Rules
from farplug.app.settings import Follow
from farplug.errors import (
    DeviceError,
    FarplugError,
    GuestGoneError,
    PortError,
    Reason,
    RefusedError,
    SetupError,
    UsageError,
)
from farplug.machine import hotplug
from farplug.machine.choose import Choice
from farplug.machine.device_info import DeviceInfo
from farplug.machine.hotplug import Watch
from farplug.machine.listing import list_devices
from farplug.machine.lock import DeviceLock
from farplug.usb.device import Device
from farplug.usbredir.rules import parse_rules

LOST = DeviceError("the device is gone", reason=Reason.DEVICE_LOST)
FAULT = DeviceError("the device broke", reason=Reason.DEVICE_FAULT)
REFUSED = RefusedError("the guest refused it", reason=Reason.REJECTED)
NO_PORT = PortError("no free port", reason=Reason.NO_FREE_PORT)


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hotplug, "INTERVAL", 0.02)
    monkeypatch.setattr(hotplug, "PAUSE", 0.01)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


class FakeDevice:
    def __init__(self, found: DeviceInfo) -> None:
        self.found = found


class FakeAttachment:
    """What the hub gives for a device: it ends when the test says so."""

    def __init__(self, device: FakeDevice) -> None:
        self.device = device
        self.unplugged = False
        self._ended: asyncio.Future[FarplugError | None] = asyncio.get_running_loop().create_future()

    @property
    def over(self) -> bool:
        return self._ended.done()

    def end(self, error: FarplugError | None) -> None:
        self._ended.set_result(error)

    async def ended(self) -> FarplugError | None:
        return await asyncio.shield(self._ended)

    async def unplug(self) -> None:
        self.unplugged = True
        self.end(None)


class Scene:
    """A machine, a keeper, a guest, and a listener."""

    def __init__(self, machine: Machine, *choices: str, **options: object) -> None:
        self.machine = machine
        self.notes: list[str] = []
        self.skips: list[FarplugError] = []
        self.attachments: list[FakeAttachment] = []
        self.forgotten: list[object] = []
        self.places: dict[str, Place | None] = {}
        self.labels: dict[str, str] = {}
        self.kept: list[Place] = []
        self.refuses: dict[str, FarplugError] = {}
        self.lost: set[str] = set()
        self.gone: set[int] = set()
        self.ready = asyncio.Event()
        self.ready.set()
        rules = {
            name: parse_rules(str(options.pop(name))) for name in ("allowed", "on_connect", "later") if name in options
        }
        policy = Policy(Rules([Choice.parse(one) for one in choices], **rules, **options))  # type: ignore[arg-type]
        self.keeper = AutoPlugger(policy, self, Watch(machine.root), self.find)
        self.running: asyncio.Task[NoReturn] | None = None

    async def find(self, found: DeviceInfo) -> Device:
        if found.port in self.lost:
            raise LOST
        return cast(Device, FakeDevice(found))

    # The hub

    async def plug_usb(self, device: Device, label: str, place: Place | None) -> Attachment:
        fake = cast(FakeDevice, device)
        self.labels[fake.found.port] = label
        self.places[fake.found.port] = place
        await self.ready.wait()
        if fake.found.address in self.gone:
            raise LOST
        if fake.found.port in self.refuses:
            raise self.refuses[fake.found.port]
        self.attachments.append(FakeAttachment(fake))
        return cast(Attachment, self.attachments[-1])

    def forget(self, attachment: Attachment) -> None:
        self.forgotten.append(attachment)

    # The listener

    def note(self, text: str) -> None:
        self.notes.append(text)

    def skipped(self, error: FarplugError) -> None:
        self.skips.append(error)

    # The test's hands

    @asynccontextmanager
    async def running_keeper(self) -> AsyncIterator[None]:
        try:
            await self.keeper.prepare()
            self.running = asyncio.create_task(self.keeper.run(self, self.kept))
            yield
        finally:
            if self.running is not None:
                self.running.cancel()
                await asyncio.wait([self.running])
            await self.keeper.close()
            await self.keeper.close()

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(100):
            while not condition():
                await asyncio.sleep(0.01)

    async def plugged(self, *ports: str) -> None:
        """Wait until just these are in the guest."""
        await self.until(lambda: [a.device.found.port for a in self.attachments if not a.over] == list(ports))

    async def failed(self) -> BaseException | None:
        assert self.running is not None
        await asyncio.wait([self.running], timeout=100)
        return self.running.exception()


async def test_named_devices_have_their_places(machine: Machine) -> None:
    machine.add("1-1", 2, 0x1209, 1)
    machine.add("1-2", 3, 0x1209, 2)
    scene = Scene(machine, "port:1-2", "port:1-7", "port:1-1", wait=True, later="allow")
    scene.kept = [Place(number) for number in range(3)]
    async with scene.running_keeper():
        await scene.until(lambda: len(scene.attachments) == 2)
        assert (scene.places["1-2"], scene.places["1-1"]) == (scene.kept[0], scene.kept[2])
        assert scene.kept[1].is_passed, "no wait for a device that is not there"
        machine.add("1-3", 4, 0x1209, 3)
        machine.add("1-7", 5, 0x1209, 4)
        await scene.until(lambda: len(scene.attachments) == 4)
        assert scene.places["1-7"] is scene.kept[1]
        assert scene.places["1-3"] is None, "a rule took it"


async def test_a_named_device_that_cannot_be_plugged_gives_way(machine: Machine) -> None:
    machine.add("1-1", 2)
    scene = Scene(machine, "1-1")
    scene.kept = [Place(0)]
    scene.lost.add("1-1")
    async with scene.running_keeper():
        assert isinstance(await scene.failed(), DeviceError)
        assert scene.kept[0].is_passed


def is_locked(found: DeviceInfo) -> bool:
    try:
        DeviceLock(found).release()
    except DeviceError:
        return True
    return False


async def test_named_devices_are_plugged_and_locked(machine: Machine) -> None:
    machine.add("1-1", 2)
    machine.add("1-2", 3)
    scene = Scene(machine, "port:1-1", "port:1-2")
    async with scene.running_keeper():
        await scene.plugged("1-1", "1-2")
        found = [attachment.device.found for attachment in scene.attachments]
        assert [is_locked(one) for one in found] == [True, True]
        assert scene.notes == []
        assert scene.labels == {"1-1": "1209:0001", "1-2": "1209:0001"}
    assert [is_locked(one) for one in found] == [False, False]


async def test_without_libusb_nothing_is_begun(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> NoReturn:
        raise SetupError("libusb-1.0 cannot be loaded", reason=Reason.NO_LIBUSB)

    machine.add("1-1", 2)
    monkeypatch.setattr(module, "Library", missing)
    scene = Scene(machine, "1-1")
    with pytest.raises(SetupError, match="libusb"):
        await scene.keeper.prepare()
    await scene.keeper.close()


async def test_how_many_ports_are_needed(machine: Machine) -> None:
    machine.add("1-1", 2)
    machine.add("1-2", 3, 5, 6)
    scene = Scene(machine, "port:1-1", "dead:beef", on_connect="allow", wait=True)
    try:
        await scene.keeper.prepare()
        assert scene.keeper.named == 2, "one that is still to come needs a port too"
        assert scene.notes == ["waiting for dead:beef to be plugged in"]
    finally:
        await scene.keeper.close()


async def test_a_keyboard_that_was_named(machine: Machine) -> None:
    machine.keyboard("1-1", 2)
    scene = Scene(machine, "1-1")
    async with scene.running_keeper():
        await scene.plugged("1-1")
    assert "046d:c31c (port 1-1): it is a keyboard of this machine" in scene.notes[0]


@pytest.mark.parametrize("choice", ["dead:beef", "1209:0001"])
async def test_what_cannot_be_chosen_is_reported_before_the_guest_is_reached(machine: Machine, choice: str) -> None:
    machine.add("1-1", 2)
    machine.add("1-2", 3)
    scene = Scene(machine, choice)
    with pytest.raises((DeviceError, UsageError)):
        await scene.keeper.prepare()
    await scene.keeper.close()


async def test_another_farplug_has_it(machine: Machine) -> None:
    machine.add("1-1", 2)
    machine.add("1-2", 3)
    async with Scene(machine, "1-1").running_keeper():
        scene = Scene(machine, "port:1-2", "port:1-1")
        with pytest.raises(
            DeviceError, match=r"1209:0001 \(port 1-1\) cannot be plugged in: another farplug uses it"
        ) as caught:
            await scene.keeper.prepare()
        assert caught.value.reason is Reason.BUSY
        await scene.keeper.close()
        rules = Scene(machine, on_connect="allow")
        async with rules.running_keeper():
            await rules.plugged("1-2")
            await rules.until(lambda: rules.skips)
        assert [error.reason for error in rules.skips] == [Reason.BUSY]


@pytest.mark.parametrize("reports", [True, False])
async def test_pulled_out_and_plugged_in_again(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, reports: bool
) -> None:
    monkeypatch.setattr(module, "REMOVAL_TIMEOUT", 0.1)
    machine.add("1-1", 2)
    scene = Scene(machine, "1-1")
    async with scene.running_keeper():
        await scene.plugged("1-1")
        machine.remove("1-1")
        if reports:
            scene.attachments[0].end(LOST)
        await scene.plugged()
        machine.add("1-1", 3)
        await scene.plugged("1-1")
        assert scene.attachments[0].unplugged is not reports
        assert scene.attachments[1].device.found.address == 3
        assert scene.forgotten == scene.attachments[:1]
    assert scene.notes == [
        "1209:0001 (port 1-1) was pulled out; when it comes back it goes into the VM again",
        "1209:0001 (port 1-1) is back: it goes into the VM",
    ]
    assert scene.skips == []


async def test_a_new_one_waits_until_the_former_has_left_the_port(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REMOVAL_TIMEOUT", 60)
    machine.add("1-1", 2)
    scene = Scene(machine, "1-1", follow=Follow.PORT)
    async with scene.running_keeper():
        await scene.plugged("1-1")
        machine.remove("1-1")
        machine.add("1-1", 3, 0x0483, 0xDF11)
        await scene.until(lambda: len(scene.notes) == 2)
        await asyncio.sleep(0.1)
        assert len(scene.attachments) == 1
        scene.attachments[0].end(LOST)
        await scene.plugged("1-1")
        assert scene.attachments[1].device.found.id == "0483:df11"


async def test_waiting_for_one(machine: Machine) -> None:
    scene = Scene(machine, "1209:0001", wait=True)
    async with scene.running_keeper():
        machine.add("1-7", 9)
        await scene.plugged("1-7")
    assert scene.notes == [
        "waiting for 1209:0001 to be plugged in",
        "1209:0001 (port 1-7) was plugged in: it goes into the VM",
    ]


async def test_rules_for_what_comes_later(machine: Machine) -> None:
    machine.add("1-1", 2)
    scene = Scene(machine, later="allow class=storage")
    async with scene.running_keeper():
        machine.add("1-2", 3)
        await scene.plugged("1-2")
        machine.add("1-3", 4, authorized="0")
        await scene.until(lambda: scene.skips)
        machine.remove("1-1")
        machine.remove("1-2")
        await scene.until(lambda: len(scene.notes) == 3)
    assert [error.reason for error in scene.skips] == [Reason.NOT_AUTHORIZED]


@pytest.mark.parametrize("error", [FAULT, REFUSED, NO_PORT, GuestGoneError("gone")])
@pytest.mark.parametrize("attached", [True, False])
async def test_a_named_device_that_cannot_be_plugged_ends_it(
    machine: Machine, error: FarplugError, attached: bool
) -> None:
    machine.add("1-1", 2)
    machine.add("1-2", 3)
    scene = Scene(machine, "port:1-1", "port:1-2")
    if not attached:
        scene.refuses["1-2"] = error
    async with scene.running_keeper():
        if attached:
            await scene.plugged("1-1", "1-2")
            scene.attachments[1].end(error)
        assert await scene.failed() is error


async def test_a_named_device_that_disappears_between_list_and_open(machine: Machine) -> None:
    machine.add("1-1", 2)
    scene = Scene(machine, "1-1")
    scene.lost = {"1-1"}
    async with scene.running_keeper():
        assert await scene.failed() is LOST


async def test_pulled_out_and_plugged_in_again_before_the_guest_is_ready(machine: Machine) -> None:
    """The guest says hello hours later: the first device is not there any more, which is not a failure."""
    machine.add("1-1", 2)
    scene = Scene(machine, "1-1")
    scene.ready.clear()
    async with scene.running_keeper():
        await scene.until(lambda: scene.labels)
        machine.remove("1-1")
        machine.add("1-1", 3)
        await scene.until(lambda: len(scene.notes) == 2)
        scene.gone.add(2)
        scene.ready.set()
        await scene.plugged("1-1")
        assert scene.attachments[0].device.found.address == 3


async def test_one_that_is_lost_but_still_there_is_reported(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOSS_TIMEOUT", 0.1)
    machine.add("1-1", 2)
    scene = Scene(machine, "1-1")
    async with scene.running_keeper():
        await scene.plugged("1-1")
        scene.attachments[0].end(LOST)
        await scene.until(lambda: scene.skips)
        assert "still plugged in here: it does not answer" in scene.skips[0].message
        assert scene.skips[0].reason is Reason.DEVICE_LOST
        machine.remove("1-1")
        machine.add("1-1", 3)
        await scene.plugged("1-1")
    assert len(scene.skips) == 1


@pytest.mark.parametrize("rules", [{"wait": True}, {"follow": Follow.PORT}])
async def test_one_that_may_come_back_and_disappears_between_list_and_open(
    machine: Machine, rules: dict[str, object]
) -> None:
    machine.add("1-1", 2)
    scene = Scene(machine, "1-1", **rules)
    scene.lost = {"1-1"}
    async with scene.running_keeper():
        await asyncio.sleep(0.1)
        scene.lost = set()
        machine.remove("1-1")
        machine.add("1-1", 3)
        await scene.plugged("1-1")


async def test_one_that_came_back_and_disappears_at_once_may_come_again(machine: Machine) -> None:
    machine.add("1-1", 2)
    scene = Scene(machine, "1-1")
    async with scene.running_keeper():
        await scene.plugged("1-1")
        machine.remove("1-1")
        scene.attachments[0].end(LOST)
        scene.lost = {"1-1"}
        machine.add("1-1", 3)
        await scene.until(lambda: len(scene.notes) == 2)
        scene.lost = set()
        machine.remove("1-1")
        machine.add("1-1", 4)
        await scene.plugged("1-1")
    assert scene.skips == []


@pytest.mark.parametrize("error", [FAULT, REFUSED, NO_PORT])
async def test_a_device_that_a_rule_took_may_fail(machine: Machine, error: FarplugError) -> None:
    machine.add("1-1", 2)
    machine.add("1-2", 3)
    scene = Scene(machine, on_connect="allow")
    scene.refuses["1-2"] = error
    async with scene.running_keeper():
        await scene.until(lambda: scene.skips)
        await scene.plugged("1-1")
        assert scene.skips == [error]
        scene.refuses.clear()
        machine.remove("1-2")
        await asyncio.sleep(0.1)
        machine.add("1-2", 4)
        await scene.plugged("1-1", "1-2")


async def test_the_guest_is_gone(machine: Machine) -> None:
    machine.add("1-1", 2)
    scene = Scene(machine, on_connect="allow")
    async with scene.running_keeper():
        await scene.plugged("1-1")
        scene.attachments[0].end(GuestGoneError("gone"))
        assert isinstance(await scene.failed(), GuestGoneError)


async def test_a_defect_is_not_hidden(machine: Machine) -> None:
    machine.add("1-1", 2)
    scene = Scene(machine, "1-1")
    scene.refuses["1-1"] = cast(FarplugError, ZeroDivisionError())
    async with scene.running_keeper():
        assert isinstance(await scene.failed(), ZeroDivisionError)


async def test_it_leaves_nothing_behind(machine: Machine) -> None:
    machine.add("1-1", 2)
    async with Scene(machine, "1-1").running_keeper():
        pass
    before = Left.now()
    for _ in range(3):
        scene = Scene(machine, "1-1")
        async with scene.running_keeper():
            await scene.plugged("1-1")
    await no_more_than(before)


async def test_pulled_out_while_it_is_plugged_in_and_reports_nothing(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REMOVAL_TIMEOUT", 0.05)
    machine.add("1-1", 2)
    scene = Scene(machine, "1-1")
    scene.ready.clear()
    async with scene.running_keeper():
        await scene.until(lambda: scene.labels)
        machine.remove("1-1")
        await scene.until(lambda: any("was pulled out" in text for text in scene.notes))
        scene.ready.set()
        await scene.until(lambda: scene.attachments and scene.attachments[0].unplugged)
        await scene.plugged()


async def test_a_lock_that_comes_after_it_was_given_up_is_released(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go, locked = threading.Event(), threading.Event(), threading.Event()

    class SlowLock(DeviceLock):
        def __init__(self, found: DeviceInfo) -> None:
            begun.set()
            go.wait(60)
            super().__init__(found)
            locked.set()

    monkeypatch.setattr(module, "DeviceLock", SlowLock)
    machine.add("1-1", 2)
    (found,) = list_devices(machine.root)
    scene = Scene(machine, "1-1")
    preparing = asyncio.ensure_future(scene.keeper.prepare())
    assert await asyncio.to_thread(begun.wait, 60)
    preparing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await preparing
    await scene.keeper.close()
    go.set()
    assert await asyncio.to_thread(locked.wait, 60)
    async with asyncio.timeout(60):
        while True:
            try:
                DeviceLock(found).release()
                break
            except FarplugError:
                await asyncio.sleep(0.01)
