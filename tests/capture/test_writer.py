"""Where a capture may go, and what ends it."""

from __future__ import annotations

import asyncio
import errno
import os
import pty
import stat
import threading
from pathlib import Path

import pytest

from farplug.capture import pcapng, writer
from farplug.capture.recording import Recording
from farplug.capture.writer import HEADERS_LIMIT, QUEUE_LIMIT, Writer, open_capture
from farplug.errors import FarplugError, Reason, UsageError

HEAD = pcapng.section_header("farplug", "test")


async def refused(path: str | Path) -> UsageError:
    with pytest.raises(UsageError) as raised:
        await open_capture(str(path))
    assert raised.value.remedy
    return raised.value


async def test_a_new_file_is_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "trace.pcapng"
    before = os.umask(0)
    try:
        os.close(await open_capture(str(path)))
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("content", [b"", HEAD, HEAD + b"the rest"])
async def test_an_earlier_capture_is_replaced_and_becomes_private(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "trace.pcapng"
    path.write_bytes(content)
    path.chmod(0o644)
    os.close(await open_capture(str(path)))
    assert path.read_bytes() == b""
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("content", [b"My diary", HEAD[:11], b"\n\r\r\n" + bytes(20), bytes(4096)])
async def test_any_other_file_stays_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "diary.txt"
    path.write_bytes(content)
    assert (await refused(path)).reason is Reason.WRONG_FORMAT
    assert path.read_bytes() == content


async def test_a_link_a_folder_and_a_device_are_refused(tmp_path: Path) -> None:
    target = tmp_path / "target"
    link = tmp_path / "link"
    link.symlink_to(target)
    assert (await refused(link)).message == f"{link} is a symbolic link: a capture is written to a file or a named pipe"
    assert not target.exists()
    assert "is a folder" in (await refused(tmp_path)).message
    assert (await refused("/dev/full")).reason is Reason.NOT_A_FILE


async def test_paths_that_cannot_be_opened(tmp_path: Path) -> None:
    assert (await refused(tmp_path / "no folder" / "trace")).reason is Reason.NOT_FOUND
    assert (await refused("nul\0")).reason is Reason.NOT_FOUND
    assert (await refused(tmp_path / ("x" * 300))).reason is Reason.NOT_FOUND
    assert (await refused("/proc/version")).reason in (Reason.NO_PERMISSION, Reason.IO_ERROR, Reason.WRONG_FORMAT)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
async def test_a_folder_of_another_user(tmp_path: Path) -> None:
    path = tmp_path / "trace.pcapng"
    tmp_path.chmod(0o755)
    os.seteuid(65534)
    try:
        error = await refused(path)
    finally:
        os.seteuid(0)
    assert error.reason in (Reason.NO_PERMISSION, Reason.NOT_FOUND)


async def test_two_captures_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "trace.pcapng"
    async with Recording(str(path)) as first:
        first.event("hello", {})
        assert (await refused(path)).reason is Reason.IN_USE
    assert b"MESSAGE=hello\n" in path.read_bytes()
    os.close(await open_capture(str(path)))


async def test_a_terminal_as_standard_output(monkeypatch: pytest.MonkeyPatch) -> None:
    controller, terminal = pty.openpty()
    saved = os.dup(1)
    os.dup2(terminal, 1)
    try:
        error = await refused("-")
    finally:
        os.dup2(saved, 1)
        for descriptor in (controller, terminal, saved):
            os.close(descriptor)
    assert (error.reason, error.message) == (
        Reason.BAD_OPTION,
        "standard output is a terminal: a capture is binary data",
    )


# Named pipes ----------------------------------------------------------------------------------------------------------


async def test_a_pipe_waits_for_its_reader(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()))
    recording = Recording(str(pipe))
    await recording.open(reader.start)  # which is called once no reader was found
    recording.event("hello", {})
    await recording.close()
    await asyncio.to_thread(reader.join)
    assert received[0].startswith(pcapng.MAGIC.to_bytes(4, "little") if False else b"\n\r\r\n")
    assert b"MESSAGE=hello\n" in received[0]


async def test_a_pipe_without_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "READER_TIMEOUT", 0.05)
    monkeypatch.setattr(writer, "READER_INTERVAL", 0.01)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    error = await refused(pipe)
    assert (error.reason, error.message) == (Reason.TIMED_OUT, f"no program reads from the pipe {pipe}")


async def test_a_reader_that_leaves_ends_the_capture(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    failed: asyncio.Future[FarplugError] = asyncio.get_running_loop().create_future()
    recording = Recording(str(pipe), on_failed=failed.set_result)
    await recording.open()
    os.close(reader)
    recording.event("hello", {})
    error = await failed
    assert (error.reason, error.message) == (Reason.IO_ERROR, f"the reader of {pipe} has left")
    recording.event("more", {})
    await recording.close()


async def test_a_reader_that_stops_reading_does_not_stop_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "CLOSE_TIMEOUT", 0.05)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    recording = Recording(str(pipe))
    await recording.open()
    tap = recording.tap("x")
    for _ in range(1000):
        tap.sent([bytes(60_000)])
    assert recording.dropped[1] == 1  # then the connection has ended
    await recording.close()
    os.close(reader)  # lets the thread end


# Errors ---------------------------------------------------------------------------------------------------------------


async def test_a_full_disk() -> None:
    failed: asyncio.Future[OSError] = asyncio.get_running_loop().create_future()
    full = Writer(os.open("/dev/full", os.O_WRONLY), failed.set_result)
    full.write([HEAD])
    error = await failed
    assert error.errno == errno.ENOSPC
    assert not full.has_room(0)
    full.write([HEAD])
    await full.close()
    assert full.blocks == 1


async def test_a_full_disk_at_the_very_end() -> None:
    failed: list[OSError] = []
    full = Writer(os.open("/dev/full", os.O_WRONLY), failed.append)
    full.write([HEAD])
    await full.close()
    assert [error.errno for error in failed] == [errno.ENOSPC]


async def test_blocks_stay_in_order_and_whole_through_a_slow_pipe() -> None:
    source, sink = os.pipe()
    out = Writer(sink, lambda error: None)
    expected = b""
    for number in range(2000):
        block = [number.to_bytes(4, "little") * (number % 7), bytes([number & 0xFF]) * (number % 3000)]
        out.write(block)
        expected += b"".join(block)
    received = bytearray()

    def read() -> None:
        while data := os.read(source, 777):
            received.extend(data)

    thread = threading.Thread(target=read)
    thread.start()
    await out.close()
    await asyncio.to_thread(thread.join)
    os.close(source)
    assert received == expected


async def test_the_queue_has_a_limit() -> None:
    source, sink = os.pipe()
    out = Writer(sink, lambda error: None)
    block = bytes(1 << 20)
    while out.has_room(len(block)):
        out.write([block])
    assert QUEUE_LIMIT >> 20 <= out.blocks <= (QUEUE_LIMIT >> 20) + 1
    assert out.has_room(1000, HEADERS_LIMIT)
    thread = threading.Thread(target=lambda: [None for _ in iter(lambda: os.read(source, 1 << 20), b"")])
    thread.start()
    await out.close()
    await asyncio.to_thread(thread.join)
    os.close(source)
    assert out.has_room(QUEUE_LIMIT)
