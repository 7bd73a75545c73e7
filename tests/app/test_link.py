"""Ports that stay linked, and a VM that is lost, moves, and comes back: against SPICE servers on sockets."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from tests.app.test_run import ISO, Vm, vm
from tests.cli.support import FakeGuest, blank
from tests.transport.fake_spice import free_port
from tests.transport.test_spice_session import SWITCH_HOST, destination

from farplug.app import link, retry, target_command
from farplug.app.app import App
from farplug.app.attachment import Attachment, Description
from farplug.app.commands import Attach, Detach, Reconnect
from farplug.app.events import Event
from farplug.app.guest import Guest
from farplug.app.settings import GuestSettings, ReconnectSettings, Source, TargetSettings
from farplug.errors import (
    FarplugError,
    GuestGoneError,
    PortError,
    Reason,
    RefusedError,
    StateError,
    TargetError,
    UsageError,
)
from farplug.store import FileStore, MemoryStore
from farplug.virtual.disk import disk_device


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "DELAYS", (0.01, 0.02))
    monkeypatch.setattr(retry, "MOVED_DELAY", 0.01)
    monkeypatch.setattr(retry, "FLAP_TIME", 0.0)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name in ("a.raw", "b.raw", "c.raw"):
        blank(tmp_path / name)
    (tmp_path / "a.iso").write_bytes(ISO)
    return tmp_path


class Running:
    """An application with one guest that runs, and its events."""

    def __init__(self, settings: GuestSettings) -> None:
        self.app = App()
        self.events: list[Event] = []
        self._changed = asyncio.Event()
        self.app.subscribe(self._event)
        self.guest = self.app.add(settings)
        self.run = asyncio.ensure_future(self.app.run(self.guest))

    def _event(self, event: Event) -> None:
        self.events.append(event)
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            if self.run.done():
                self.run.result()
            self._changed.clear()
            await self._changed.wait()

    async def named(self, name: str, count: int = 1) -> Event:
        """Wait for an event; return it."""
        await self.until(lambda: sum(event.name == name for event in self.events) >= count)
        return [event for event in self.events if event.name == name][count - 1]

    async def in_use(self) -> None:
        await self.until(lambda: {one.state for one in self.guest.attachments} == {"in use"})

    @property
    def places(self) -> dict[str, tuple[str, int]]:
        """Label, id and port of what is plugged in."""
        return {one.label: (one.id, one.port.number) for one in self.guest.attachments if not one.over}


@asynccontextmanager
async def running(target: TargetSettings | str, *sources: Source, **options: Any) -> AsyncIterator[Running]:
    where = target if isinstance(target, TargetSettings) else TargetSettings(target)
    one = Running(GuestSettings(where, sources, **{"stay": True, "reconnect": ReconnectSettings(), **options}))
    try:
        yield one
    finally:
        one.run.cancel()
        with suppress(asyncio.CancelledError, FarplugError):
            await one.run


async def lose(one: Vm) -> None:
    """End the session as a SPICE server does: the usbredir channels first."""
    for channel in [*one.spice.linked[1:], one.spice.linked[0]]:
        await channel.close()
    one.spice.linked.clear()


async def test_a_session_without_devices_links_all_ports_and_stays() -> None:
    async with vm(3) as one, running(one.target) as session:
        await session.named("ready")
        await session.until(lambda: len(one.spice.linked) == 4)
        assert {channel.mess.channel_id for channel in one.spice.linked if channel.mess.connection_id} == {0, 1, 2}
        await session.until(lambda: {port.state for port in session.guest._link.ports} == {"ready"})
        snapshot = session.guest.snapshot()
        assert snapshot["ports"] == [{"name": f"usbredir {n}", "state": "ready", "error": None} for n in range(3)]
        assert (snapshot["state"], snapshot["name"]) == ("connected", "testvm")
        assert not session.run.done()


async def test_a_ticket_that_is_over_concerns_no_port_that_is_linked(files: Path) -> None:
    async with vm(2) as one, running(one.target, reconnect=None) as session:
        await session.named("ready")
        while (linked := len(one.spice.linked)) < 3:  # main and both ports; "ready" waits for one port
            await asyncio.sleep(0.001)
        one.spice.password = "another ticket"
        for name in ("a.raw", "b.raw", "a.raw"):
            (attached,) = (await session.app.do(Attach((Source.disk(files / name),))))["attachments"]
            assert attached["state"] == "in use"
            assert await session.app.do(Detach(name)) == {"detached": [name]}
        assert len(one.spice.linked) == linked
        assert session.guest.attachments == []


async def test_a_vm_that_is_back_has_its_devices_in_their_ports_and_their_order(files: Path) -> None:
    sources = (Source.disk(files / "a.raw"), Source.cdrom(files / "a.iso"), Source.disk(files / "b.raw"))
    async with vm(4) as one, running(one.target, *sources) as session:
        await session.in_use()
        await session.app.do(Detach("cdrom0"))
        await session.app.do(Attach((Source.disk(files / "c.raw"),)))
        before = session.places
        for count in range(1, 4):
            await lose(one)
            await session.named("back", count)
            await session.in_use()
            assert session.places == before
        assert [sorted(str(packet) for packet in one.offered).count(str(packet)) for packet in one.offered[-1:]]
        assert [event.fields["state"] for event in session.events if event.name == "lost"] == ["lost"] * 3
        attached = [event.device for event in session.events if event.name == "attached"][-3:]
        assert attached == ["a.raw", "c.raw", "b.raw"], "the order of their ports"
        assert session.guest.snapshot()["state"] == "connected"
        assert all(snapshot["error"] is None for snapshot in session.guest.snapshot()["attachments"].values())


async def test_a_device_that_is_plugged_just_when_the_vm_is_back_takes_no_port_of_another(files: Path) -> None:
    async with vm(2) as one, running(one.target) as session:
        await session.named("ready")
        await session.app.do(Attach((Source.disk(files / "a.raw"),)))  # its port is not kept for it
        before = session.places
        plugging: list[asyncio.Task[Attachment]] = []

        def happened(event: Event) -> None:
            if event.name == "back":  # its image was opened meanwhile, and the next step takes a port
                call = session.guest._plug_device(disk_device(MemoryStore(1 << 20)), None, Description("b"))
                plugging.append(asyncio.ensure_future(call))

        end = session.app.subscribe(happened)
        await lose(one)
        await session.named("back")
        (attachment,) = await asyncio.gather(*plugging)
        end()
        await session.in_use()
        assert {**before, "b": (attachment.id, 1)} == session.places


async def test_devices_that_were_lost_at_one_port_come_back_at_two(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first was lost a moment before the other, which took its port."""
    async with vm(3) as one, running(one.target) as session:
        await session.named("ready")
        for name in ("a.raw", "b.raw"):
            await session.app.do(Attach((Source.disk(files / name),)))
        first, second = session.guest.attachments

        def meet(guest: Guest) -> None:
            second.port = first.port
            is_back(guest)

        is_back = Guest.is_back
        monkeypatch.setattr(Guest, "is_back", meet)
        await lose(one)
        await session.named("back")
        await session.in_use()
        assert session.places == {"a.raw": (first.id, 0), "b.raw": (second.id, 1)}


async def test_images_stay_open_and_locked_while_the_vm_is_lost(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "DELAYS", (1000.0,))
    async with vm(2) as one, running(one.target, Source.disk(files / "a.raw")) as session:
        await session.in_use()
        await lose(one)
        attempt = (await session.named("reconnecting")).fields["attempt"]
        assert attempt["number"] == 1
        assert session.guest.snapshot()["attempt"] == attempt
        (attachment,) = session.guest.attachments
        await session.until(lambda: attachment.state == "lost")
        with pytest.raises(FarplugError, match="in use"):
            FileStore.open(files / "a.raw")
        attaching = asyncio.ensure_future(session.app.do(Attach((Source.disk(files / "b.raw"),))))
        assert await session.app.do(Detach("a.raw")) == {"detached": ["a.raw"]}
        await FileStore.open(files / "a.raw").close()
        assert not attaching.done(), "it waits for the VM"
        session.run.cancel()
        with pytest.raises(GuestGoneError, match=r"closed before .*b\.raw.* was plugged in"):
            await attaching
        with suppress(asyncio.CancelledError):
            await session.run
        await FileStore.open(files / "b.raw").close()


async def test_what_is_attached_while_the_vm_is_lost_comes_in_when_it_is_back(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "DELAYS", (0.2,))
    async with vm(2) as one, running(one.target) as session:
        await session.named("ready")
        await lose(one)
        await session.named("reconnecting")
        (attached,) = (await session.app.do(Attach((Source.disk(files / "a.raw"),))))["attachments"]
        assert attached["state"] == "in use"


async def test_a_vm_that_restarts_while_a_device_waits_for_its_hello(files: Path) -> None:
    async with vm(1, silent=True) as one, running(one.target) as session:
        await session.named("ready")
        attaching = asyncio.ensure_future(session.app.do(Attach((Source.disk(files / "a.raw"),))))
        await session.named("opened")
        one._options["silent"] = False
        await lose(one)
        (attached,) = (await attaching)["attachments"]
        assert attached["state"] == "in use"


async def test_a_vm_with_fewer_ports_when_it_is_back(files: Path) -> None:
    sources = (Source.disk(files / "a.raw"), Source.disk(files / "b.raw"))
    async with vm(2) as one, running(one.target, *sources) as session:
        await session.in_use()
        one.spice.channels = ((1, 0), (9, 0))
        await lose(one)
        skipped = await session.named("skipped")
        assert "no free port" in skipped.message
        await session.in_use()
        assert list(session.places) == ["a.raw"]
        await session.guest._holdings.settle()
        await FileStore.open(files / "b.raw").close()


async def test_a_vm_that_moved_is_followed_without_an_option(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with (
        vm(2) as one,
        vm(2) as other,
        running(one.target, Source.disk(files / "a.raw"), reconnect=None) as session,
    ):
        await session.in_use()
        port = int(other.target.rpartition(":")[2])
        body = destination(SWITCH_HOST, port).replace(b"other\0", b"\0\0\0\0\0\0")
        one.spice.main_channel.send(body)
        await session.named("back")
        await session.in_use()
        assert [type(packet).__name__ for packet in other.offered] == ["DeviceConnect"]
        lost = await session.named("lost")
        assert lost.fields["reason"] == "guest-moved"
        await lose(other)
        with pytest.raises(GuestGoneError):
            await session.run


async def test_where_the_new_host_cannot_be_reached_the_vm_is_found_at_the_old_target(files: Path) -> None:
    async with vm(2) as one, running(one.target, Source.disk(files / "a.raw"), reconnect=None) as session:
        await session.in_use()
        one.spice.main_channel.send(destination(SWITCH_HOST, free_port()).replace(b"other\0", b"\0\0\0\0\0\0"))
        await session.named("back")
        await session.in_use()


async def test_a_user_does_not_wait_for_the_next_attempt(monkeypatch: pytest.MonkeyPatch, files: Path) -> None:
    monkeypatch.setattr(retry, "DELAYS", (3600,))
    async with vm() as one, running(one.target, Source.disk(str(files / "a.raw"))) as session:
        await session.in_use()
        await session.app.do(Reconnect())
        await session.until(lambda: "the VM is not lost: it is connected" in [one.message for one in session.events])
        with pytest.raises(StateError, match="no attempt to give up"):
            await session.app.do(Reconnect(give_up=True))
        await lose(one)
        await session.named("reconnecting")
        await session.app.do(Reconnect())
        await session.named("back")
        await session.in_use()


@pytest.mark.parametrize("when", ["lost", "reconnecting", "connecting"])
async def test_a_user_gives_up(monkeypatch: pytest.MonkeyPatch, files: Path, when: str) -> None:
    """Check it before the first attempt, in the delay before an attempt, and in an attempt that hangs."""
    monkeypatch.setattr(retry, "DELAYS", (0 if when == "connecting" else 3600,))
    hanging = asyncio.Event()

    async def hang(*_: Any, **__: Any) -> None:
        hanging.set()
        await asyncio.Event().wait()

    async with vm() as one, running(one.target, Source.disk(str(files / "a.raw"))) as session:
        await session.in_use()
        monkeypatch.setattr(link, "open_session", hang)
        await lose(one)
        await session.named("lost" if when == "lost" else "reconnecting")
        if when == "connecting":
            await hanging.wait()
        await session.app.do(Reconnect(give_up=True))
        with pytest.raises(GuestGoneError, match="a user stopped the attempts to connect again"):
            await session.run
        assert [event.name for event in session.events][-2:] == ["closed", "guest-removed"]
        await FileStore.open(files / "a.raw").close()


async def test_a_loss_without_the_setting_ends_the_session(files: Path) -> None:
    async with vm(2) as one, running(one.target, Source.disk(files / "a.raw"), reconnect=None) as session:
        await session.in_use()
        await lose(one)
        with pytest.raises(GuestGoneError, match="closed the"):
            await session.run
        assert [event.name for event in session.events if event.name in ("reconnecting", "back")] == []
        await FileStore.open(files / "a.raw").close()


async def test_another_client_that_takes_the_vm_keeps_it(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FLAP_TIME", 1000.0)
    async with vm(2) as one, running(one.target, Source.disk(files / "a.raw")) as session:
        for count in range(1, 4):
            await session.named("connected", count)
            await lose(one)
        with pytest.raises(GuestGoneError, match="another client takes the VM each time"):
            await session.run
        await FileStore.open(files / "a.raw").close()


async def test_a_refused_ticket_ends_the_attempts(files: Path) -> None:
    async with vm(2) as one, running(one.target, Source.disk(files / "a.raw")) as session:
        await session.in_use()
        one.spice.password = "another ticket"
        await lose(one)
        with pytest.raises(TargetError) as caught:
            await session.run
        assert caught.value.reason is Reason.NO_PASSWORD


async def test_a_plain_socket_is_connected_again(files: Path) -> None:
    guest = FakeGuest(lambda: None)
    async with guest.listening() as target, running(target, Source.disk(files / "a.raw")) as session:
        await session.in_use()
        session.guest.session.ports[0].abort()
        await asyncio.sleep(0)
    port = free_port()
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        one = FakeGuest(lambda: None)
        with suppress(OSError):
            writer.writelines([bytes(buffer) for buffer in one.start()])
            while data := await reader.read(1 << 16):
                writer.writelines([bytes(buffer) for buffer in one.receive(data)])
        writer.close()

    async with asyncio.timeout(60), running(f"tcp://127.0.0.1:{port}", reconnect=None) as session:
        with pytest.raises(TargetError, match="refused"):
            await session.run
    async with asyncio.timeout(60):
        server = await asyncio.start_server(serve, "127.0.0.1", port)
        async with running(f"tcp://127.0.0.1:{port}", Source.disk(files / "a.raw")) as session:
            await session.in_use()
            server.close()
            writers.pop().close()
            await session.named("reconnecting", 3)
            server = await asyncio.start_server(serve, "127.0.0.1", port)
            await session.named("back")
            await session.in_use()
        server.close()


async def test_a_target_command_is_run_for_each_attempt(files: Path) -> None:
    count = files / "count"
    async with vm(2) as one, vm(2) as other:
        lines = [
            f"[virt-viewer]\\ntype=spice\\nhost=127.0.0.1\\nport={v.target.rpartition(':')[2]}\\n" for v in (one, other)
        ]
        command = (
            f"echo x >> {count}; case $(wc -l < {count}) in 1) printf '{lines[0]}';; 2) exit 5;; "
            f"3) ;; 4) echo garbage;; *) printf '{lines[1]}';; esac"
        )
        async with running(TargetSettings("", command=command), Source.disk(files / "a.raw")) as session:
            await session.in_use()
            assert session.events[0].fields["target"] == "(a target command)"
            await lose(one)
            await session.named("back")
            await session.in_use()
            assert len(count.read_text().split()) == 5
            assert len(other.offered) == 1
    async with running(TargetSettings("", command="echo no VM >&2; exit 1"), Source.disk(files / "a.raw")) as session:
        with pytest.raises(TargetError, match="ended with exit code 1: no VM"):
            await session.run


async def test_stopping_while_the_target_command_runs(monkeypatch: pytest.MonkeyPatch, files: Path) -> None:
    monkeypatch.setattr(target_command, "COMMAND_TIMEOUT", 1000)
    async with running(TargetSettings("", command=f"echo $$ > {files}/pid; sleep 1000")) as session:
        while not (files / "pid").exists() or not (files / "pid").read_text():
            await asyncio.sleep(0.01)
    assert session.run.cancelled()
    with pytest.raises(ProcessLookupError):
        os.kill(int((files / "pid").read_text()), 0)


async def test_a_used_up_file_gives_no_second_connection(files: Path) -> None:
    async with vm(2) as one:
        vv = files / "vm.vv"
        port = one.target.rpartition(":")[2]
        vv.write_text(f"[virt-viewer]\ntype=spice\nhost=127.0.0.1\nport={port}\ndelete-this-file=1\n")
        async with running(str(vv), Source.disk(files / "a.raw")) as session:
            await session.in_use()
            await lose(one)
            with pytest.raises(GuestGoneError, match="was for one connection") as caught:
                await session.run
            assert caught.value.remedy.setting == "target.command"


async def test_the_library_follows_too(files: Path) -> None:
    async with vm(2) as one:
        settings = GuestSettings(TargetSettings(one.target), reconnect=ReconnectSettings())
        async with Guest(settings) as guest:
            store = FileStore.open(files / "a.raw")
            attachment = await guest.plug(disk_device(store))
            await attachment.configured()
            await lose(one)
            while attachment.state != "lost":
                await asyncio.sleep(0.01)
            await attachment.configured()
            assert not attachment.over
        await store.close()


async def test_names_of_devices(files: Path) -> None:
    (files / "other").mkdir()
    blank(files / "other" / "a.raw")
    async with vm(3) as one, running(one.target) as session:
        await session.named("ready")

        async def attach(path: Path, **options: Any) -> Any:
            return (await session.app.do(Attach((Source.disk(path, **options),))))["attachments"]

        first, second = (await attach(files / "a.raw"))[0], (await attach(files / "other" / "a.raw"))[0]
        assert (first["label"], second["label"]) == ("a.raw", "a.raw-2")
        assert (await attach(files / "a.raw"))[0]["id"] == first["id"]
        assert "is plugged in already, as a.raw" in session.events[-1].message
        twice = (await attach(files / "b.raw", read_only=True))[0]
        with pytest.raises(PortError, match="no free port"):
            await attach(files / "b.raw", read_only=True)
        with pytest.raises(UsageError, match="fits several devices") as caught:
            await session.app.do(Detach("1d6b:0104"))
        assert caught.value.reason is Reason.AMBIGUOUS
        assert caught.value.remedy == "name one of: a.raw, a.raw-2, b.raw"
        assert await session.app.do(Detach(str(files / "other" / "a.raw"))) == {"detached": ["a.raw-2"]}
        assert await session.app.do(Detach(twice["id"])) == {"detached": ["b.raw"]}
        assert await session.app.do(Detach("all")) == {"detached": ["a.raw"]}
        assert await session.app.do(Detach("all")) == {"detached": []}
        assert session.events[-1].message == "nothing is plugged in"


async def test_several_disks_of_one_device_leave_together(files: Path) -> None:
    sources = (Source.disk(files / "a.raw"), Source.disk(files / "b.raw"))
    async with vm(1) as one, running(one.target) as session:
        await session.named("ready")
        (attached,) = (await session.app.do(Attach(sources)))["attachments"]
        assert attached["units"] == ["a.raw", "b.raw"]
        with pytest.raises(UsageError, match="one of 2 parts of a device"):
            await session.app.do(Detach("a.raw"))
        assert await session.app.do(Detach("a.raw, b.raw")) == {"detached": ["a.raw, b.raw"]}


async def test_attaching_without_waiting(files: Path) -> None:
    async with vm(1, silent=True) as one, running(one.target) as session:
        await session.named("ready")
        (attached,) = (await session.app.do(Attach((Source.disk(files / "a.raw"),), wait=False)))["attachments"]
        assert attached["state"] in ("connecting", "waiting")
        await session.named("waiting-for-guest")
        assert await session.app.do(Detach("a.raw")) == {"detached": ["a.raw"]}
        await FileStore.open(files / "a.raw").close()


async def test_a_device_that_leaves_does_not_end_a_session_that_stays(files: Path) -> None:
    async with vm(2) as one, running(one.target, Source.disk(files / "a.raw")) as session:
        await session.named("ready")
        await session.in_use()
        await one.spice.of(0).close()
        await session.named("removed")
        assert not session.run.done()
        (attached,) = (await session.app.do(Attach((Source.disk(files / "a.raw"),))))["attachments"]
        assert attached["state"] == "in use"


async def test_a_device_that_cannot_be_plugged_in_at_the_start_ends_a_session_that_stays(files: Path) -> None:
    async with vm(2, rejects=True) as one, running(one.target, Source.disk(files / "none.raw")) as session:
        with pytest.raises(FarplugError, match="no such file"):
            await session.run
        assert one.spice.linked == [], "before the VM was contacted"


async def test_a_device_that_the_vm_refuses_ends_the_start_of_a_session_that_stays(files: Path) -> None:
    async with vm(1, rejects=True) as one, running(one.target, Source.disk(files / "a.raw")) as session:
        with pytest.raises(RefusedError):
            await session.run
        assert "ready" not in [event.name for event in session.events]
