"""Machines with a firmware or a boot loader that has USB drivers of its own, driven through the console."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import NoReturn

import pytest
from tests.guest.plugging import GUEST_TIMEOUT

from farplug.errors import SetupError
from farplug.programs import find_program


def program(name: str) -> str:
    """Return the path of a program; skip the test where the program is missing."""
    try:
        return str(find_program(name))
    except SetupError as error:
        lacking(f"{error.message} ({error.remedy})")


def lacking(message: str) -> NoReturn:
    """Skip the test because a program is missing. With FARPLUG_REQUIRE_ALL=1, fail."""
    if os.environ.get("FARPLUG_REQUIRE_ALL") == "1":
        pytest.fail(message)
    pytest.skip(message)


class Machine:
    """A running QEMU.

    Attributes:
        targets: the targets of the usb-redir ports.
        console: the output of the serial port so far.
    """

    def __init__(self, process: asyncio.subprocess.Process, folder: Path, targets: Sequence[str]) -> None:
        self.targets = targets
        self.console = ""
        self._process = process
        self._folder = folder
        self._printed = asyncio.Condition()
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Connect to the console. QEMU starts the machine then."""
        async with asyncio.timeout(GUEST_TIMEOUT):
            while True:
                try:
                    reader, self._writer = await asyncio.open_unix_connection(self._folder / "console")
                    break
                except OSError as error:
                    if self._process.returncode is not None:
                        raise AssertionError("QEMU ended") from error
                    await asyncio.sleep(0.05)
        self._reading = asyncio.create_task(self._read(reader))

    async def close(self) -> None:
        """End the machine."""
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()
        if self._reading is not None:
            await self._reading
        if self._writer is not None:
            self._writer.close()

    async def wait_for(self, *texts: str, since: int = 0) -> str:
        """Wait until one of ``texts`` is on the console after position ``since``, and return it."""
        found: list[str] = []

        def look() -> bool:
            found[:] = [text for text in texts if text in self.console[since:]]
            return bool(found) or self._process.returncode is not None

        try:
            async with asyncio.timeout(GUEST_TIMEOUT), self._printed:
                await self._printed.wait_for(look)
        except TimeoutError:
            pass
        assert found, f"none of {texts} on the console"
        return found[0]

    async def run(self, command: str, prompt: str) -> str:
        """Type a command, and return the output until the next prompt."""
        assert self._writer is not None
        start = len(self.console)
        self._writer.write(command.encode() + b"\r")
        await self.wait_for(f"\n{prompt}", since=start)
        return self.console[start:]

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop QEMU for the block: a firmware that waits for a key keeps a processor busy."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(4096):
            self.console += data.decode(errors="replace").replace("\r", "")
            async with self._printed:
                self._printed.notify_all()
        async with self._printed:
            self._printed.notify_all()


@asynccontextmanager
async def machine(qemu: str, folder: Path, *arguments: str, ports: int = 1) -> AsyncIterator[Machine]:
    """Run a machine.

    Args:
        qemu: the program.
        folder: for its sockets.
        arguments: arguments of QEMU, including a USB controller ``usb``.
        ports: number of usb-redir ports.
    """
    sockets = [folder / f"port{index}" for index in range(ports)]
    redirections: list[str] = []
    for index, path in enumerate(sockets):
        redirections += ["-chardev", f"socket,id=port{index},path={path},server=on,wait=off"]
        redirections += ["-device", f"usb-redir,chardev=port{index},bus=usb.0"]
    with (folder / "stderr").open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *(program("setpriv"), "--pdeathsig", "KILL", "--", program(qemu)),
            *("-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg", *arguments, *redirections),
            *("-serial", f"unix:{folder / 'console'},server=on,wait=on"),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    one = Machine(process, folder, [f"unix:{path}" for path in sockets])
    try:
        await one.open()
        yield one
    except BaseException as error:
        error.add_note(f"console:\n{one.console}\nstandard error of QEMU:\n{(folder / 'stderr').read_text()}")
        raise
    finally:
        await one.close()
