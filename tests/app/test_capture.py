"""A capture of a guest: when it begins and ends, what it holds, and that it disturbs nothing."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.app.test_guest import FakePort, FakeSession, Peer, disk
from tests.capture import blocks, wireshark
from tests.cli.support import FakeGuest
from tests.transport.fake_spice import FakeSpice, running

import farplug
from farplug.app.app import App
from farplug.app.commands import Capture, StopCapture, from_json, from_words
from farplug.app.events import Event, Level
from farplug.app.guest import Guest
from farplug.app.settings import CaptureSettings, GuestSettings, ReconnectSettings, TargetSettings
from farplug.capture import writer
from farplug.errors import GuestGoneError, Reason, UsageError
from farplug.spice.types import ChannelType
from farplug.usb.device import Device
from farplug.usb.types import Setup

PASSWORD = "correct horse"


@asynccontextmanager
async def plugged(count: int = 1) -> AsyncIterator[tuple[Guest, list[Peer]]]:
    """Yield a guest with devices that are in use."""
    ports = [FakePort(f"p{number}") for number in range(count + 1)]
    peers = [Peer(port) for port in ports]
    guest = Guest(session=FakeSession(ports))
    for peer in peers:
        await peer.start()
    for _ in range(count):
        await (await guest.plug(disk())).configured()
    try:
        yield guest, peers
    finally:
        await guest.close()


def watch(guest: Guest) -> list[Event]:
    seen: list[Event] = []
    guest.stream.subscribe(seen.append)
    return seen


def messages(path: Path) -> str:
    return "\n".join(row[0] for row in wireshark.rows(path, "systemd_journal", "systemd_journal.message"))


def test_settings_and_commands_as_data() -> None:
    settings = GuestSettings(TargetSettings("tcp://h:1"), capture=CaptureSettings("a.pcapng", 64))
    assert GuestSettings.from_json(settings.to_json()) == settings
    assert from_json("capture", {"path": "a b", "bytes": 7}) == Capture("a b", 7)
    assert from_words(["capture", "a b"]) == Capture("a b")
    assert from_words(["stop-capture"]) == StopCapture()
    assert from_words(["force", "capture", "a"]) is None
    assert from_words(["capture"]) is None


async def test_from_the_start_to_the_end_of_a_session(tmp_path: Path) -> None:
    path = tmp_path / "trace.pcapng"
    fake = FakeGuest(lambda: None)
    async with fake.listening() as target:
        async with farplug.connect(target, capture=path) as guest, guest.plug(disk()) as attachment:
            await attachment.configured()
            assert guest.snapshot()["capture"] == str(path)
        assert guest.snapshot()["capture"] is None
    assert wireshark.count(path, "usb.setup.bRequest == 9") == 1
    assert {"0", "1", "6", "8"} <= {row[0].split(",")[-1] for row in wireshark.rows(path, "usbredir", "usbredir.type")}
    text = messages(path)
    assert "offered at Super speed" in text
    assert "detached" in text
    assert wireshark.rows(path, "tcp.flags.syn == 1 && tcp.flags.ack == 0", "frame.comment")[0][0].startswith(
        "usbredir at 127.0.0.1:"
    )
    assert wireshark.count(path, "tcp.flags.fin == 1") == 2


async def test_over_spice_without_the_password_and_without_compression(tmp_path: Path) -> None:
    path = tmp_path / "trace.pcapng"
    fake = FakeSpice(password=PASSWORD, channels=((9, 0),))
    fake.usbredir = FakeGuest(lambda: None).behave
    async with running(fake) as port:
        target = f"spice://127.0.0.1:{port}"
        async with farplug.connect(target, password=PASSWORD, capture=path) as guest, guest.plug(disk()) as attachment:
            await attachment.configured()
        async with farplug.connect(target, password=PASSWORD) as guest, guest.plug(disk()) as attachment:
            await attachment.configured()
    captured, other = (
        channel.mess.channel_caps for channel in fake.linked if channel.mess.channel_type is ChannelType.USBREDIR
    )
    assert (captured, other) == ((), (1,)), "LZ4 is announced only where nothing is captured"
    data = path.read_bytes()
    assert PASSWORD.encode() not in data
    tickets = wireshark.rows(path, "spice.ticket_client", "spice.ticket_client")
    assert tickets == [["00" * 128]] * 2
    names = [row[0] for row in wireshark.rows(path, "tcp.flags.syn == 1 && tcp.flags.ack == 0", "frame.comment")]
    assert names == ["SPICE channel main", "SPICE channel usbredir 0"]
    assert wireshark.count(path, "usbredir.type == 8")


async def test_an_event_never_holds_the_address_which_may_be_a_ticket(tmp_path: Path) -> None:
    path = tmp_path / "trace.pcapng"
    async with running(FakeSpice()) as port, farplug.connect(f"spice://127.0.0.1:{port}", capture=path):
        pass
    assert str(port) not in messages(path)
    assert "reach: begun" in messages(path)


async def test_on_a_running_session_the_state_is_written_first(tmp_path: Path) -> None:
    path = tmp_path / "trace.pcapng"
    async with plugged(2) as (guest, peers):
        seen = watch(guest)
        await guest.start_capture(CaptureSettings(str(path)))
        peers[1].configure(1)
        await (await guest.plug(disk())).configured()
        await guest.stop_capture()
        await guest.attachments[0].unplug()
    assert [event.name for event in seen if event.name.startswith("capture")] == ["capture-started", "capture-ended"]
    (started,) = (event for event in seen if event.name == "capture-started")
    assert (started.level, started.fields) == (Level.DETAIL, {"path": str(path), "bytes": None})
    assert "keys and PINs" in started.message
    devices = wireshark.rows(path, "usb.idVendor", "usb.bus_id", "usb.idProduct", "frame.comment")
    assert [row[:2] for row in devices] == [["1", "0x0104"], ["2", "0x0104"]]
    assert all(row[2] == "not on the bus: the device was plugged in before the capture began" for row in devices)
    real = wireshark.rows(path, "usb.setup.bRequest == 9 && !frame.comment", "usb.bus_id")
    assert [row[0] for row in real] == ["2", "3"], "what the guests do afterwards, the new device too"
    assert "detached" not in messages(path)


async def test_once_at_a_time(tmp_path: Path) -> None:
    async with App() as app:
        guest = app.add(GuestSettings(TargetSettings("tcp://127.0.0.1:1")))
        with pytest.raises(UsageError) as none:
            await app.do(StopCapture())
        assert none.value.reason is Reason.NOT_FOUND
        with pytest.raises(UsageError) as output:
            await app.do(Capture("-"))
        assert output.value.reason is Reason.BAD_OPTION
        with pytest.raises(UsageError) as negative:
            await app.do(Capture(str(tmp_path / "a"), -1))
        assert negative.value.reason is Reason.BAD_SETTING
        with pytest.raises(UsageError):
            await app.do(Capture(str(tmp_path)))
        await app.do(Capture(str(tmp_path / "a")))
        with pytest.raises(UsageError) as twice:
            await app.do(Capture(str(tmp_path / "b")))
        assert twice.value.reason is Reason.IN_USE
        assert not (tmp_path / "b").exists()
        await app.do(StopCapture())
        await app.do(Capture(str(tmp_path / "a"), 100))
        assert app.snapshot()["guests"][guest.id]["capture"] == str(tmp_path / "a")
    assert [block.options[2] for block in blocks.read(tmp_path / "a") if block.kind == blocks.INTERFACE] == [b"usb"]


async def test_a_file_that_cannot_be_written_is_an_error_before_the_vm_is_reached(tmp_path: Path) -> None:
    diary = tmp_path / "diary"
    diary.write_text("Dear diary")
    vv = tmp_path / "console.vv"
    vv.write_text("[virt-viewer]\ntype=spice\nhost=127.0.0.1\nport=1\ndelete-this-file=1\n")
    with pytest.raises(UsageError) as raised:
        await farplug.connect(str(vv), capture=diary)
    assert raised.value.reason is Reason.WRONG_FORMAT
    assert vv.exists()
    assert diary.read_text() == "Dear diary"


async def test_a_full_disk_ends_the_capture_and_not_the_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farplug.capture.recording.open_capture", full_disk)
    async with plugged() as (guest, peers):
        seen = watch(guest)
        await guest.start_capture(CaptureSettings("a.pcapng"))
        while guest.captures.path is not None:
            await asyncio.sleep(0)
        ended = next(event for event in seen if event.name == "capture-ended")
        assert (ended.level, ended.fields["error"]["reason"]) == (Level.BAD, "no-space")
        assert ended.message == "the capture to a.pcapng has ended: a.pcapng cannot be written: no space left on device"
        peers[0].configure(1)
        await (await guest.plug(disk())).configured()
        monkeypatch.undo()
        await guest.start_capture(CaptureSettings(str(tmp_path / "elsewhere")))
        await guest.stop_capture()


async def full_disk(path: str, waiting: object) -> int:
    return os.open("/dev/full", os.O_WRONLY)


async def test_a_disk_that_is_full_at_the_end_is_an_error_of_the_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farplug.capture.recording.open_capture", full_disk)
    async with plugged() as (guest, _):
        await guest.start_capture(CaptureSettings("a.pcapng"))
        assert guest.captures.has_begun
        with pytest.raises(UsageError) as raised:
            await guest.stop_capture()
        assert raised.value.reason is Reason.NO_SPACE


async def test_a_reader_that_leaves_ends_the_capture_and_not_the_session(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    async with plugged() as (guest, peers):
        seen = watch(guest)
        await guest.start_capture(CaptureSettings(str(pipe)))
        os.close(reader)
        while guest.captures.path is not None:
            peers[0].configure(1)
            await asyncio.sleep(0)
        assert [event.message for event in seen if event.name == "capture-ended"] == [
            f"the capture to {pipe} has ended: the reader of {pipe} has left"
        ]
        await (await guest.plug(disk())).configured()


async def test_a_pipe_without_a_reader_delays_nothing_else(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    async with plugged() as (guest, _):
        seen = watch(guest)
        starting = asyncio.ensure_future(guest.start_capture(CaptureSettings(str(pipe))))
        while not any(event.name == "note" for event in seen):
            await asyncio.sleep(0)
        with pytest.raises(UsageError) as twice:
            await guest.start_capture(CaptureSettings(str(tmp_path / "b")))
        assert twice.value.reason is Reason.IN_USE
        await (await guest.plug(disk())).configured()
        await guest.close()
        with pytest.raises(GuestGoneError):
            await starting
    assert guest.snapshot()["capture"] is None


async def test_what_is_lost_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trace.pcapng"
    async with plugged() as (guest, peers):
        seen = watch(guest)
        await guest.start_capture(CaptureSettings(str(path)))
        monkeypatch.setattr(writer.Writer, "has_room", lambda self, size, limit=0: False)
        peers[0].configure(1)
        for _ in range(100):
            await asyncio.sleep(0)
        monkeypatch.undo()
        await guest.stop_capture()
    (ended,) = (event for event in seen if event.name == "capture-ended")
    assert ended.level is Level.BAD
    assert ended.fields["dropped"] == 2
    assert "it was written too slowly: 2 packets" in ended.message


async def test_a_device_that_leaves_while_its_descriptors_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = asyncio.Event()

    async def read(device: Device) -> list[tuple[Setup, bytes]]:
        await answered.wait()
        return [(Setup(0x80, 6, 0x100, 0, 18), bytes(18))]

    monkeypatch.setattr("farplug.app.capture.read_descriptors", read)
    for stop in (False, True):
        path = tmp_path / f"{stop}.pcapng"
        answered.clear()
        async with plugged() as (guest, _):
            starting = asyncio.ensure_future(guest.start_capture(CaptureSettings(str(path))))
            while guest.captures.path is None:
                await asyncio.sleep(0)
            if stop:
                await guest.stop_capture()
            else:
                await guest.attachments[0].unplug()
            answered.set()
            await starting
        assert wireshark.count(path, "usb") == 0


async def test_a_vm_that_comes_back_is_captured_again(tmp_path: Path) -> None:
    path = tmp_path / "trace.pcapng"
    fake = FakeSpice(channels=((9, 0),))
    fake.usbredir = FakeGuest(lambda: None).behave
    async with running(fake) as port:
        settings = GuestSettings(
            TargetSettings(f"spice://127.0.0.1:{port}"),
            capture=CaptureSettings(str(path)),
            reconnect=ReconnectSettings(30),
        )
        async with Guest(settings) as guest, guest.plug(disk()) as attachment:
            await attachment.configured()
            back = guest.events()
            for channel in list(fake.linked):
                await channel.close()
            async for event in back:
                if event.name == "configured":
                    break
    names = [row[0] for row in wireshark.rows(path, "tcp.flags.syn == 1 && tcp.flags.ack == 0", "frame.comment")]
    assert names == ["SPICE channel main", "SPICE channel usbredir 0"] * 2
    assert wireshark.count(path, "usb.setup.bRequest == 9") == 2
    assert wireshark.count(path, "usbredir.type == 8") == 2
