"""A serial line in Linux: what moves, how it is set, who has it open, a login."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import pty
import random
import signal
import termios
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests import starter
from tests.guest.command import farplug
from tests.guest.plugging import FUNCTIONS, GUEST_TIMEOUT, plugged
from tests.long import LONG

from farplug.ends import parse_serial_end
from farplug.testing import QemuGuest
from farplug.usb import Speed
from farplug.virtual import LineState, SerialLine, VirtualDevice

if TYPE_CHECKING:
    from tests.guest.conftest import Guests


TTY = "/dev/ttyACM0"


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(GUEST_TIMEOUT):
        while not condition():
            await asyncio.sleep(0.05)


def read_until(terminal: int, text: bytes) -> None:
    """Read a terminal until a text comes."""
    seen = b""
    while text not in seen:
        seen += os.read(terminal, 4096)


async def has(guest: QemuGuest, command: str, text: str) -> None:
    """Wait until the output of a command has a text."""
    async with asyncio.timeout(GUEST_TIMEOUT):
        while text not in (await guest.check(f"{command}; :")):
            await asyncio.sleep(0.1)


@asynccontextmanager
async def line_in(guest: QemuGuest, line: SerialLine, port: int = 0) -> AsyncIterator[None]:
    """Plug a serial line in, until the guest has a terminal for it."""
    device = VirtualDevice(line, product="Serial Line", speeds=(Speed.HIGH,))
    try:
        async with plugged(guest.targets[port], device):
            await has(guest, f"ls {TTY}", TTY)
            yield
        async with asyncio.timeout(GUEST_TIMEOUT):
            while (await guest.run(f"test -e {TTY}")).exit_code == 0:
                await asyncio.sleep(0.1)
    finally:
        await device.dispose()


@pytest.mark.parametrize("port", [0, 1], ids=["tcp", "spice"])
async def test_many_bytes_come_back(guests: Guests, port: int) -> None:
    """A program of the guest sends back what comes from a socket."""
    guest = await guests.get(FUNCTIONS)
    data = random.Random(port).randbytes(1_000_000 if LONG else 250_000)
    end = parse_serial_end("tcp-listen://127.0.0.1:0")
    async with line_in(guest, SerialLine(end), port):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(end.address.rpartition(":")[2]))
        await echo_in(guest, len(data))
        writer.write(data)
        async with asyncio.timeout(GUEST_TIMEOUT):
            back = await reader.readexactly(len(data))
        assert back == data
        await has(guest, "cat /tmp/echo", hashlib.sha256(data).hexdigest())
        writer.close()


async def test_line_coding_signals_and_breaks(guests: Guests) -> None:
    guest = await guests.get(FUNCTIONS)
    async with line_in(guest, line := SerialLine()):
        assert str(line.coding) == "9600 8N1"
        assert not line.dtr
        await guest.check(f"rm -f /tmp/held; python3 /scripts/serial_line.py hold {TTY} >/tmp/held 2>&1 &")
        await until(lambda: line.dtr and line.rts)
        await guest.check(f"stty -F {TTY} 115200 cs7 parenb -parodd cstopb")
        await until(lambda: str(line.coding) == "115200 7E2")
        await has(guest, "cat /tmp/held", "held")
        for signals in (LineState.DCD, LineState.DCD | LineState.DSR, LineState.DSR):
            await line.set_state(signals)
            names = " ".join(signal.name or "" for signal in signals)
            await has(guest, "tail -n1 /tmp/held", f"state {names}")
        await line.send_break()
        await has(guest, "cat /tmp/held", "break")
        await guest.check("kill -USR1 $(pidof python3)")
        await until(lambda: line.breaks == 1 and not line.in_break)
        await guest.check("kill -USR2 $(pidof python3)")
        await until(lambda: not line.rts)
        assert line.dtr
        await guest.check("kill $(pidof python3)")
        await until(lambda: not line.dtr)


async def test_a_login_that_ends_with_its_peer(guests: Guests) -> None:
    """A getty asks for a name on the line; when the peer leaves, carrier is lost, and the shell gets a hangup."""
    guest = await guests.get(FUNCTIONS)
    end = parse_serial_end("pty")
    async with line_in(guest, SerialLine(end)):
        await guest.check(
            "mkdir -p /etc; echo 'root::0:0:root:/:/bin/sh' >/etc/passwd; echo 'root:x:0:' >/etc/group; "
            "echo 'root::1:0:99999:7:::' >/etc/shadow; "
            f"stty -F {TTY} -clocal; setsid busybox getty 115200 {TTY[5:]} vt100 >/tmp/getty 2>&1 &"
        )
        program = os.open(end.address, os.O_RDWR | os.O_NOCTTY)
        try:
            for typed, shown in (
                ("", "login: "),
                ("root", "# "),
                ("echo $((6*7)) at $(tty)", f"42 at {TTY}"),
                ("trap 'echo >/tmp/hangup; exit' HUP; echo $((1+1))nd", "2nd"),
            ):
                os.write(program, typed.encode() + b"\r")
                await asyncio.wait_for(asyncio.to_thread(read_until, program, shown.encode()), GUEST_TIMEOUT)
        finally:
            os.close(program)
        await has(guest, "ls /tmp/hangup", "hangup")


# The command line


class Terminal:
    """A command with a terminal of its own, on which a test types."""

    def __init__(self, process: asyncio.subprocess.Process, master: int) -> None:
        self.process = process
        self._master = master
        self._seen = b""

    def type(self, data: bytes) -> None:
        """Type bytes."""
        os.write(self._master, data)

    async def until(self, text: bytes) -> None:
        """Wait until the terminal shows a text."""
        async with asyncio.timeout(GUEST_TIMEOUT):
            while text not in self._seen:
                self._seen += await asyncio.to_thread(os.read, self._master, 4096)
        self._seen = self._seen.partition(text)[2]

    async def exit_code(self) -> int:
        """Wait for the end of the command."""
        return await asyncio.wait_for(self.process.wait(), GUEST_TIMEOUT)

    @property
    def is_raw(self) -> bool:
        """Return whether the terminal is raw."""
        return not termios.tcgetattr(self._master)[3] & termios.ICANON


@asynccontextmanager
async def on_terminal(*arguments: object, **environment: str) -> AsyncIterator[Terminal]:
    """Run a ``farplug`` command whose controlling terminal a test has; kill it at the end if it still runs."""

    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    master, slave = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *starter.COMMAND,
        *map(str, arguments),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**os.environ, **environment},
        preexec_fn=take_terminal,
    )
    try:
        yield Terminal(process, master)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        os.close(slave)
        os.close(master)


async def echo_in(guest: QemuGuest, size: int) -> None:
    """Begin to send bytes back, in the guest."""
    await has(guest, f"ls {TTY}", TTY)
    # The shell may return before the program behind it has opened the file: an earlier one must not be there.
    await guest.check(f"rm -f /tmp/echo; python3 /scripts/serial_line.py echo {TTY} {size} >/tmp/echo 2>&1 &")
    await has(guest, "cat /tmp/echo", "ready")


async def no_line_in(guest: QemuGuest) -> None:
    """Wait until the guest has no serial line."""
    async with asyncio.timeout(GUEST_TIMEOUT):
        while (await guest.run(f"test -e {TTY}")).exit_code == 0:
            await asyncio.sleep(0.1)


async def test_the_path_of_a_terminal_is_printed(guests: Guests, tmp_path: Path) -> None:
    guest = await guests.get(FUNCTIONS)
    link = tmp_path / "line"
    ends = ("--usb-serial", f"pty:{link}", "--usb-serial", "pty")
    async with farplug("connect", guest.targets[0], *ends, "--json") as running:
        line = await running.until('"attaching"')
        details = json.loads(line)["details"]
        assert details[0] == str(link)
        assert details[1].startswith("/dev/pts/")
        await running.until('"configured"')
        await echo_in(guest, 5)
        program = os.open(link, os.O_RDWR | os.O_NOCTTY)
        await running.until('"end-changed"')
        os.write(program, b"hello")
        await asyncio.wait_for(asyncio.to_thread(read_until, program, b"hello"), GUEST_TIMEOUT)
        os.close(program)
        running.process.send_signal(signal.SIGINT)
        assert await running.exit_code() == 0
    assert not link.is_symlink()
    await no_line_in(guest)


async def test_this_terminal(guests: Guests) -> None:
    guest = await guests.get(FUNCTIONS)
    async with on_terminal("connect", guest.targets[0], "--usb-serial", "-") as command:
        await command.until(b"serial0 (this terminal; Ctrl-] leaves)")
        await command.until(b"configured by the guest")
        await echo_in(guest, 5)
        assert command.is_raw
        command.type(b"\x03\x1a\x1cok")
        await command.until(b"\x03\x1a\x1cok")
        command.type(b"\x1d")
        assert await command.exit_code() == 0
        assert not command.is_raw
    await no_line_in(guest)


async def test_the_terminal_of_attach(guests: Guests, tmp_path: Path) -> None:
    guest = await guests.get(FUNCTIONS)
    here = {"XDG_RUNTIME_DIR": str(tmp_path)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        async with farplug("connect", guest.targets[1], "--name", "web1", "--json") as session:
            await session.until('"ready"')
            async with on_terminal("attach", "--usb-serial", "-", **here) as command:
                await command.until(b"Ctrl-] leaves")
                await echo_in(guest, 9)
                assert command.is_raw
                command.type(b"as typed\x03")
                await command.until(b"as typed\x03")
                command.type(b"\x1d")
                assert await command.exit_code() == 0
                assert not command.is_raw
            await session.until('"removed"')
            async with farplug("status", "--json") as status:
                assert json.loads((await status.end())[1])["devices"] == []
            async with farplug("attach", "--usb-serial", "-", "--usb-serial", "-") as refused:
                assert await refused.exit_code() == 2
            async with farplug("attach", "--usb-serial", f"unix:{tmp_path}/missing") as refused:
                assert await refused.exit_code() == 12
                assert "missing cannot be reached: no such file or directory" in refused.stderr
            session.process.send_signal(signal.SIGINT)
            assert await session.exit_code() == 0
    await no_line_in(guest)
