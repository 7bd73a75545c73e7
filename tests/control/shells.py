"""A shell of this machine in the place of the guest's, behind three pseudoterminals in the place of serial lines."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

from farplug.control import shell_script
from farplug.control.shell import LINES, Line, Shell
from farplug.control.shell_script import CHUNK

TIMEOUT = 100
SERIAL_NUMBER = "abc123"
SHELLS = {"dash": ["dash"], "bash": ["bash", "--posix"], "busybox": ["busybox", "ash"]}
TOOLS = ("stty", "dd", "grep", "ls", "sleep", "cat", "sha256sum", "chmod", "mv", "rm", "setsid")
"""What busybox's shell gets of busybox."""


def programs(folder: Path, name: str) -> Path:
    """Return a folder with ``sh``, a shell of this name; and for busybox with its tools."""
    folder.mkdir()
    program = shutil.which(SHELLS[name][0])
    assert program is not None
    (folder / "sh").symlink_to(program)
    if name == "busybox":
        for tool in TOOLS:
            (folder / tool).symlink_to(program)
    return folder


def fake_sysfs(root: Path, terminals: list[str]) -> tuple[str, str]:
    """Make what the typed line looks for; return the paths of sysfs and of the device nodes."""
    other = root / "sys/bus/usb/devices/1-1"
    other.mkdir(parents=True)
    (other / "serial").write_text("another\n")
    device = root / "sys/bus/usb/devices/1-2"
    device.mkdir()
    (device / "serial").write_text(f"{SERIAL_NUMBER}\n")
    (root / "dev").mkdir()
    for interface, terminal in zip((0, 2, 4), terminals, strict=True):
        (root / f"sys/bus/usb/devices/1-2:1.{interface}/tty/ttyACM{interface}").mkdir(parents=True)
        (root / f"dev/ttyACM{interface}").symlink_to(terminal)
    return str(root / "sys"), str(root / "dev")


async def _line(master: int, stack: ExitStack) -> Line:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=CHUNK)
    receiving, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(os.dup(master), "rb", 0)
    )
    transport, protocol = await loop.connect_write_pipe(
        lambda: asyncio.StreamReaderProtocol(asyncio.StreamReader()), os.fdopen(os.dup(master), "wb", 0)
    )
    stack.callback(receiving.close)
    stack.callback(transport.abort)
    return Line(reader, asyncio.StreamWriter(transport, protocol, None, loop))


@asynccontextmanager
async def local_shell(root: Path, name: str, *, hang_up: bool = False) -> AsyncIterator[Shell]:
    """Return a context manager that runs the bootstrap in a shell of this machine.

    Args:
        root: a folder, which gets ``home``, the working directory of the shell.
        name: one of :data:`SHELLS`.
        hang_up: end the lines at the end, as if the device was taken out; otherwise the shell ends before.
    """
    masters, slaves = zip(*(os.openpty() for _ in range(LINES)), strict=True)
    stack = ExitStack()
    lines = [await _line(master, stack) for master in masters]
    sys, dev = fake_sysfs(root, [os.ttyname(slave) for slave in slaves])
    path = programs(root / "bin", name)
    (root / "home").mkdir()
    process = await asyncio.create_subprocess_exec(
        path / "sh",
        cwd=root / "home",
        env={"PATH": f"{path}:{os.environ['PATH']}", "SHELL": str(path / "sh"), "HOME": str(root / "home")},
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None
    process.stdin.write(shell_script.bootstrap(SERIAL_NUMBER, sys=sys, dev=dev).encode() + b"\n")
    process.stdin.close()
    shell = Shell(*lines)
    try:
        async with asyncio.timeout(TIMEOUT):
            await shell.begin()
        for slave in slaves:
            os.close(slave)  # the shell has them open now
        yield shell
        if not hang_up:
            shell.end()
    finally:
        stack.close()
        await asyncio.sleep(0)  # the transports close their descriptors
        for master in masters:
            os.close(master)
        async with asyncio.timeout(TIMEOUT):
            await process.wait()  # the prompt comes back
