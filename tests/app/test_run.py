"""The model without a command line: all that ``farplug connect`` does, against a VM on a socket."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.cli.support import FakeGuest, blank
from tests.docs import ROOT, snippets
from tests.leaks import comes
from tests.libusb.fake_libusb import FakeDevice
from tests.machine.trees import Machine
from tests.physical.support import EVERYTHING, on_bench
from tests.transport.fake_spice import Channel, FakeSpice, idle, running

import farplug
from farplug import image as image_package
from farplug.app import auto, kinds
from farplug.app import commands as c
from farplug.app.app import App
from farplug.app.events import Event
from farplug.app.guest import Guest
from farplug.app.settings import GuestSettings, Source, TargetSettings
from farplug.errors import FarplugError, GuestGoneError, Reason, RefusedError, StateError, TargetError, UsageError
from farplug.machine import hotplug
from farplug.machine.hotplug import Watch
from farplug.machine.lock import DeviceLock
from farplug.store.threaded import ThreadedStore
from farplug.testing.scratch import PREFIX
from farplug.transport.spice_session import SpiceSession
from farplug.usbredir import packets as p

ISO = bytes(32768) + b"\1CD001\1".ljust(2048, b"\0") + b"\xffCD001\1".ljust(2048, b"\0")


class Vm:
    """A VM behind a SPICE server.

    Args:
        ports: its usbredir channels.
        options: of the guest's side of each.
    """

    def __init__(self, ports: int, password: str = "", **options: Any) -> None:
        channels = ((1, 0), *((9, number) for number in range(ports)))
        self.spice = FakeSpice(password=password, channels=channels, usbredir=self._behave)
        self.target = ""
        self.guests: list[FakeGuest] = []
        self._options = options

    async def _behave(self, channel: Channel) -> None:
        self.guests.append(guest := FakeGuest(lambda: None, **self._options))
        await guest.behave(channel)

    @property
    def offered(self) -> list[p.DeviceConnect]:
        return [packet for guest in self.guests for packet in guest.seen if isinstance(packet, p.DeviceConnect)]


@asynccontextmanager
async def vm(ports: int = 3, **options: Any) -> AsyncIterator[Vm]:
    one = Vm(ports, **options)
    async with asyncio.timeout(60), running(one.spice) as port:
        one.target = f"spice://127.0.0.1:{port}"
        yield one


class Log:
    """An application and what happens in it, with the order in which things are closed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ask: Any = None) -> None:
        self.app = App(ask)
        self.events: list[Event] = []
        self.closed: list[str] = []
        self.counts: dict[str, int] = {}
        self._changed = asyncio.Event()
        self.app.subscribe(self._event)

        def record(kind: type[Any], method: str, name: str) -> None:
            inner = getattr(kind, method)

            def outer(this: Any) -> Any:
                self.closed.append(name)
                return inner(this)

            monkeypatch.setattr(kind, method, outer)

        record(SpiceSession, "close", "session")
        record(ThreadedStore, "close", "store")
        record(DeviceLock, "release", "lock")
        self._count(monkeypatch, image_package, "folder_store")
        self._count(monkeypatch, auto, "DeviceLock")
        self._count(monkeypatch, kinds, "open_iso")

    def _count(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
        inner = getattr(module, name)
        self.counts[name] = 0

        def outer(*arguments: Any, **options: Any) -> Any:
            self.counts[name] += 1
            return inner(*arguments, **options)

        if isinstance(inner, type):
            outer.release = inner.release  # type: ignore[attr-defined]
        monkeypatch.setattr(module, name, outer)

    def _event(self, event: Event) -> None:
        self.events.append(event)
        if event.name == "removed":
            self.closed.append("device")
        self._changed.set()

    async def until(self, name: str, count: int = 1) -> None:
        while sum(event.name == name for event in self.events) < count:
            self._changed.clear()
            await self._changed.wait()

    def named(self, name: str) -> list[Event]:
        return [event for event in self.events if event.name == name]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    (folder / "shared").mkdir(parents=True)
    (folder / "shared" / "a.txt").write_text("hello")
    blank(folder / "a.raw")
    blank(folder / "b.raw")
    (folder / "a.iso").write_bytes(ISO)
    return folder


@pytest.fixture
def real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    """A USB device of this machine, in port 1-1; libusb is a fake."""
    machine = Machine(tmp_path / "machine")
    machine.add("1-1", 11, product="Key")
    fake = FakeDevice(EVERYTHING, drivers={0: "storage"})
    monkeypatch.setattr(hotplug, "INTERVAL", 0.02)
    monkeypatch.setattr(hotplug, "PAUSE", 0.01)
    monkeypatch.setattr(auto, "Watch", partial(Watch, machine.root))
    monkeypatch.setattr(auto, "find_device", lambda bus, address, **names: on_bench(fake).device)
    return fake


def settings(vm: Vm, *sources: Source, **options: Any) -> GuestSettings:
    return GuestSettings(TargetSettings(vm.target, **options), sources)


def all_sources(files: Path) -> list[Source]:
    return [Source.disk(files / "a.raw"), Source.cdrom(files / "a.iso"), Source.folder(files / "shared")]


def open_files(folder: Path) -> list[str]:
    """The files below a folder, and those without a name (copies of folders), that this process has open."""
    gc.collect()
    links = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            links.append(os.readlink(f"/proc/self/fd/{name}"))
    # The folder of the run's snapshots is locked by a process that has lent a guest.
    return [link for link in links if link.startswith(str(folder)) or ("farplug" in link and PREFIX not in link)]


async def nothing_left(files: Path, before: list[str]) -> None:
    def is_gone() -> bool:
        names = [str(task.get_coro()) for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        is_ours = ["farplug" in name or "Guest" in name or "App." in name for name in names]
        return open_files(files) == before and not any(is_ours)

    await comes(is_gone)


async def cancelled(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_disk_a_cd_a_folder_and_a_real_device(
    files: Path, real: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_files(files)
    async with vm(4) as one:
        log = Log(monkeypatch)
        asked = settings(one, *all_sources(files), Source.usb_device("1-1"))
        guest = log.app.add(asked)
        run = asyncio.create_task(log.app.run(guest))
        await log.until("configured", 4)
        assert [a.label for a in sorted(guest.attachments, key=lambda a: a.port.number)] == [
            "a.raw",
            "cdrom0",
            "shared",
            "Key",
        ], "the order of the settings is that of the ports"
        assert {attachment.state for attachment in guest.attachments} == {farplug.AttachmentState.CONFIGURED}
        assert len(one.offered) == 4
        assert guest.served
        assert list(guest.drives()) == ["cdrom0"]
        assert real.drivers == {}
        log.closed.clear()
        await cancelled(run)
        assert log.closed[:4] == ["device"] * 4
        assert log.closed[4] == "session"
        assert log.closed[5:-1] == ["store"] * len(log.closed[5:-1])
        assert log.closed[-1] == "lock"
        assert log.closed.count("store") >= 3
        assert real.drivers == {0: "storage"}, "the kernel's driver is back"
        left = [packet for guest in one.guests for packet in guest.seen if isinstance(packet, p.DeviceDisconnect)]
        assert len(left) == 4
        assert [event.name for event in log.events[-2:]] == ["closed", "guest-removed"]
        assert log.app.snapshot()["guests"] == {}
        json.dumps([event.to_json() for event in log.events], allow_nan=False)
        await nothing_left(files, before)


async def test_too_few_ports(files: Path, real: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    async with vm(2) as one:
        log = Log(monkeypatch)
        guest = log.app.add(settings(one, Source.usb_device("1-1"), *all_sources(files)))
        run = asyncio.create_task(log.app.run(guest))
        await log.until("configured", 2)
        labels = {attachment.label: attachment.units for attachment in guest.attachments}
        assert labels == {"Key": ("Key",), "a.raw, cdrom0, shared": ("a.raw", "cdrom0", "shared")}
        assert any("3 logical units of one device" in event.message for event in log.named("note"))
        await log.app.do(c.Eject())
        await log.until("medium-ejected")
        assert log.named("medium-ejected")[0].device == "cdrom0"
        await cancelled(run)


@pytest.mark.parametrize("answers", [["right"], ["wrong", "right"], ["wrong", "wrong", "right"]])
async def test_a_wrong_password_is_asked_again_and_nothing_else_is_done_again(
    files: Path, real: FakeDevice, monkeypatch: pytest.MonkeyPatch, answers: list[str]
) -> None:
    refusals: list[Reason] = []

    async def ask(error: FarplugError) -> str | None:
        refusals.append(error.reason)
        return answers[len(refusals) - 1]

    async with vm(4, password="right") as one:
        log = Log(monkeypatch, ask)
        guest = log.app.add(settings(one, *all_sources(files), Source.usb_device("1-1"), password="wrong"))
        run = asyncio.create_task(log.app.run(guest))
        await log.until("configured", 4)
        assert refusals == [Reason.WRONG_PASSWORD] * len(answers)
        assert log.counts == {"folder_store": 1, "DeviceLock": 1, "open_iso": 1}
        assert not {"store", "lock", "session"} & set(log.closed)
        failed = [event for event in log.named("stage") if event.fields["state"] == "failed"]
        assert [event.fields["reason"] for event in failed] == ["wrong-password"] * len(answers)
        assert "right" not in json.dumps([event.to_json() for event in log.events])
        await cancelled(run)


@pytest.mark.parametrize("user", ["none", "gives up", "never knows"])
async def test_no_password(files: Path, real: FakeDevice, monkeypatch: pytest.MonkeyPatch, user: str) -> None:
    asked = 0
    before = open_files(files)

    async def ask(error: FarplugError) -> str | None:
        nonlocal asked
        asked += 1
        return None if user == "gives up" else "wrong"

    async with vm(password="right") as one:
        log = Log(monkeypatch, None if user == "none" else ask)
        guest = log.app.add(settings(one, *all_sources(files), Source.usb_device("1-1"), password="wrong"))
        with pytest.raises(TargetError) as caught:
            await log.app.run(guest)
        assert caught.value.reason is Reason.WRONG_PASSWORD
        assert asked == {"none": 0, "gives up": 1, "never knows": 3}[user]
        failed = [event for event in log.named("stage") if event.fields["state"] == "failed"]
        assert len(failed) == (4 if user == "never knows" else 1)
        assert log.closed[-1] == "lock"
        await nothing_left(files, before)


async def test_a_device_that_is_refused(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_files(files)
    async with vm(filter="-1,-1,-1,-1,0") as one:
        log = Log(monkeypatch)
        with pytest.raises(RefusedError):
            await log.app.run(log.app.add(settings(one, *all_sources(files))))
        assert all(event.fields["state"] == "refused" for event in log.named("refused"))
        assert log.named("refused")
        assert log.app.guests == {}
        await nothing_left(files, before)


@pytest.mark.parametrize("lost", ["channel", "all"])
async def test_a_guest_that_is_lost(files: Path, monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    before = open_files(files)
    async with vm() as one:
        log = Log(monkeypatch)
        guest = log.app.add(settings(one, *all_sources(files)))
        run = asyncio.create_task(log.app.run(guest))
        await log.until("configured", 3)
        if lost == "channel":
            await one.spice.of(1).close()
            await log.until("removed")
            assert not run.done(), "the other devices stay"
            assert len(guest.snapshot()["attachments"]) == 2
        for channel in one.spice.linked:
            await channel.close()
        with pytest.raises(GuestGoneError):
            await run
        assert all(event.fields["error"] is not None for event in log.named("detached"))
        await nothing_left(files, before)


PHASES = ["copying", "reaching", "password", "hello", "staying"]


@pytest.mark.parametrize("how", ["cancel", "close"])
@pytest.mark.parametrize("phase", PHASES)
async def test_the_end_in_each_phase(
    files: Path, real: FakeDevice, monkeypatch: pytest.MonkeyPatch, phase: str, how: str
) -> None:
    before = open_files(files)
    arrived = asyncio.Event()
    loop = asyncio.get_running_loop()
    real_copy = image_package.folder_store
    go_on = threading.Event()

    async def ask(error: FarplugError) -> str | None:
        arrived.set()
        return await loop.create_future()  # type: ignore[no-any-return]

    def copy(path: Path, *, progress: Callable[[int, int], None], **options: Any) -> Any:
        loop.call_soon_threadsafe(arrived.set)
        go_on.wait(100)
        progress(0, 1)  # where a copy that was abandoned ends
        return real_copy(path, progress=progress, **options)

    async def silent(channel: Channel) -> None:
        arrived.set()
        await idle(channel)

    async with vm(4, password="right", silent=phase == "hello") as one:
        log = Log(monkeypatch, ask)
        if phase == "copying":
            monkeypatch.setattr(image_package, "folder_store", copy)
        if phase == "reaching":
            one.spice.main = silent
        password = "wrong" if phase == "password" else "right"
        guest = log.app.add(settings(one, *all_sources(files), Source.usb_device("1-1"), password=password))
        run = asyncio.create_task(log.app.run(guest))
        if phase == "hello":
            await log.until("opened", 4)
        elif phase == "staying":
            await log.until("configured", 4)
        else:
            await arrived.wait()
        loop.call_later(0.05, go_on.set)
        log.closed.clear()
        if how == "cancel":
            await cancelled(run)
        else:
            await asyncio.gather(log.app.close(), log.app.close())
            await run
        assert log.closed[-1] == "lock"
        kinds = list(dict.fromkeys(log.closed))
        assert kinds == [kind for kind in ("device", "session", "store", "lock") if kind in kinds], log.closed
        assert ("session" in kinds) == (phase in ("hello", "staying"))
        assert [event.name for event in log.events][-2:] == ["closed", "guest-removed"]
        assert real.drivers == {0: "storage"}
        assert log.app.guests == {}
        with pytest.raises(GuestGoneError, match="the guest is closed"):
            await guest.connect()
        with pytest.raises(GuestGoneError, match="the guest is closed"):
            await guest.run()
        await nothing_left(files, before)


async def test_closing_while_a_command_copies_a_folder(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_files(files)
    started = asyncio.Event()
    loop = asyncio.get_running_loop()
    go_on = threading.Event()

    def copy(path: Path, *, progress: Callable[[int, int], None], **options: Any) -> Any:
        loop.call_soon_threadsafe(started.set)
        go_on.wait(100)
        progress(0, 1)

    monkeypatch.setattr(image_package, "folder_store", copy)
    async with vm() as one:
        app = App()
        guest = await app.connect(settings(one))
        attach = asyncio.create_task(app.do(c.Attach((Source.folder(files / "shared"),))))
        await started.wait()
        loop.call_later(0.05, go_on.set)
        await app.close()
        with pytest.raises(GuestGoneError, match=r"closed before .*shared.* was plugged in"):
            await attach
        assert guest.attachments == []
        await nothing_left(files, before)


async def test_attaching_and_detaching_while_running(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with vm() as one:
        log = Log(monkeypatch)
        app = log.app
        guest = app.add(settings(one, Source.disk(files / "a.raw")))
        run = asyncio.create_task(app.run(guest))
        await log.until("configured")

        async def do(name: str, **fields: Any) -> Any:
            return json.loads(json.dumps(await app.do(c.from_json(name, fields))))

        async def attach(kind: str, path: Path | str) -> Any:
            (attachment,) = (await do("attach", sources=[{"kind": kind, "path": str(path)}]))["attachments"]
            return attachment

        attached = await attach("disk", files / "b.raw")
        assert (attached["label"], attached["state"]) == ("b.raw", "in use")
        assert (await do("status"))["guests"]["g1"]["attachments"][attached["id"]]["label"] == "b.raw"
        drive = await attach("cdrom", files / "a.iso")
        assert await do("list") == [{"label": "cdrom0", "medium": str(files / "a.iso"), "locked": False}]
        await do("eject", drive="cdrom0")
        await do("insert", path=str(files / "a.iso"))
        assert (await attach("disk", files / "b.raw"))["id"] == attached["id"], "it is plugged in already"
        assert (await attach("disk", files / "a.raw"))["label"] == "a.raw", "that of the settings"
        for kind, path in (("disk", "/no/file"), ("folder", "/no/folder"), ("usb-device", "")):
            with pytest.raises(FarplugError):
                await attach(kind, path)
        with pytest.raises(FarplugError, match="no free port"):
            await attach("folder", files / "shared")
        assert await do("detach", device="a.raw") == {"detached": ["a.raw"]}
        assert not run.done(), "devices that commands plugged in stay"
        again = await attach("disk", files / "a.raw")
        assert again["label"] == "a.raw", "the image and its label are free"
        await do("detach", device=again["id"])
        await do("detach", device=str(files / "a.iso"))
        assert await do("detach", device="cdrom0") == {"detached": []}
        assert await do("detach", device="x" * 8000, guest="g1") == {"detached": []}
        notes = [event.message for event in log.events if event.name == "note"]
        assert "'cdrom0' is not plugged in; plugged in: b.raw" in notes
        assert len(notes[-1]) < 120
        with pytest.raises(UsageError) as caught:
            await do("detach", device="b.raw", guest="y" * 8000)
        assert len(caught.value.message) < 120
        with pytest.raises(UsageError) as caught:
            await do("eject", drive="z" * 8000)
        assert len(caught.value.message) < 120
        with pytest.raises(StateError):
            await do("quit")
        await do("detach", device=attached["id"])
        await run
        assert drive["id"] not in (attached["id"], again["id"])


async def test_an_image_is_free_when_its_device_has_left_by_itself(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with vm(2) as one:
        log = Log(monkeypatch)
        guest = await log.app.connect(settings(one))
        first = await guest.plug(Source.disk(files / "a.raw"))
        await first.configured()
        await one.spice.of(first.port.number).close()
        assert isinstance(await first.ended(), GuestGoneError)
        await log.until("removed")
        await guest._holdings.settle()
        assert open_files(files) == []
        assert guest.attachments == []
        second = await guest.plug(Source.disk(files / "a.raw"))
        assert second.label == "a.raw"
        await log.app.close()
        assert open_files(files) == []


async def test_a_real_device_that_a_command_plugs_is_locked_until_it_has_left(
    files: Path, real: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[str] = []

    async def choose_device(text: str, *, force: bool) -> tuple[object, object]:
        return on_bench(real).device, SimpleNamespace(release=lambda: chosen.append("released"))

    monkeypatch.setattr(auto, "choose_device", choose_device)
    async with vm() as one:
        app = App()
        guest = await app.connect(settings(one))
        async with guest.plug(Source.usb_device("1-1")) as attachment:
            await attachment.configured()
            assert (real.drivers, chosen) == ({}, [])
        assert (real.drivers, chosen) == ({0: "storage"}, ["released"])
        await guest.plug(Source.usb_device("1-1"))
        await app.close()
        assert chosen == ["released"] * 2


async def test_connecting_twice(files: Path) -> None:
    async with vm() as one:
        guest = Guest(settings(one))
        first = asyncio.create_task(guest.connect())
        await asyncio.sleep(0)
        with pytest.raises(StateError, match="being connected"):
            await guest.connect()
        await first
        with pytest.raises(StateError, match="connected already"):
            await guest.connect()
        await guest.close()
        assert sum(channel.mess.connection_id == 0 for channel in one.spice.linked) == 1


async def test_the_short_form(files: Path) -> None:
    before = open_files(files)
    async with vm() as one:
        async with farplug.connect(one.target) as guest, guest.plug(farplug.disk(files / "a.raw")) as attachment:
            await attachment.configured()
            events = attachment.events()
            every = guest.events()
        assert [event.name async for event in events][-3:] == ["figures", "detached", "removed"]
        assert [event.name async for event in every][-1] == "closed"
        assert [event async for event in attachment.events()] == [], "it is over"
        guest = await farplug.connect(one.target)
        assert (await guest.plug(farplug.cdrom(files / "a.iso"))).label == "cdrom0"
        await guest.close()
        with pytest.raises(ZeroDivisionError):
            async with farplug.connect(one.target) as guest:
                raise ZeroDivisionError
        await nothing_left(files, before)
    with pytest.raises(TargetError):
        await farplug.connect("spice://127.0.0.1:1")


async def test_the_password_of_a_target_is_in_no_event(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with vm(password="hunter2") as one:
        log = Log(monkeypatch)
        guest = log.app.add(GuestSettings(TargetSettings(one.target.replace("//", "//:hunter2@"))))
        await guest.connect()
        assert log.app.snapshot()["guests"]["g1"]["target"] == one.target
        text = json.dumps([*(event.to_json() for event in log.events), log.app.snapshot()])
        assert one.target in text
        assert "hunter2" not in text
        await log.app.close()


async def test_the_example_of_the_readme(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = [
        one.text for one in snippets(ROOT / "README.md") if one.language == "python" and "connect(" in one.text
    ]
    monkeypatch.chdir(files)
    (files / "a.raw").rename(files / "drivers.raw")
    seen: list[Event] = []

    def show(event: Event) -> None:
        seen.append(event)

    async with vm() as one:
        assert "spice://vmhost:5900" in example
        lines = example.replace("spice://vmhost:5900", one.target).splitlines()
        imports = [line for line in lines if line.startswith("import ")]
        body = "\n".join(f"    {line}" for line in lines if line not in imports)
        scope: dict[str, Any] = {"print": show}
        exec("\n".join(imports) + f"\nasync def main():\n{body}\n", scope)
        main: Callable[[], Awaitable[None]] = scope["main"]
        task = asyncio.ensure_future(main())
        while not one.offered or not any(event.name == "figures" for event in seen):
            await asyncio.sleep(0.01)
        await one.spice.of(0).close()
        await task
    assert [event.name for event in seen][-1] == "removed"


def test_the_public_names() -> None:
    assert sorted(farplug.__all__) == list(farplug.__all__), "sorted, as the source lists them"
    for name in farplug.__all__:
        assert getattr(farplug, name) is not None
    assert set(farplug.__all__) <= set(dir(farplug))
    annotations = "\n".join(
        line for line in Path(farplug.__file__).read_text().splitlines() if line.startswith('        "')
    )
    assert {line.split('"')[1] for line in annotations.splitlines()} == set(farplug.__all__)


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import farplug", ["socket", "ssl", "asyncio", "cryptography", "usb1", "farplug.app", "farplug.errors"]),
        ("import farplug; farplug.FarplugError; farplug.Reason", ["socket", "ssl", "asyncio", "farplug.app"]),
        (
            "import farplug; farplug.Source; farplug.StorageSettings",
            ["ssl", "cryptography", "usb1", "farplug.transport"],
        ),
        (
            "import farplug; farplug.VirtualDevice; farplug.Function",
            ["ssl", "cryptography", "usb1", "farplug.transport"],
        ),
    ],
)
def test_a_name_imports_what_it_needs_only(code: str, absent: list[str]) -> None:
    show = "import sys; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", f"{code}; {show}"], capture_output=True, text=True, check=True)
    assert set(result.stdout.split()) & set(absent) == set()
