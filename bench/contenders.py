"""The disks to measure: farplug's, QEMU's own, and the emulated CD of spice-gtk."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from farplug.vm.qemu import QemuGuest

SYSTEM_PYTHON = "/usr/bin/python3"
SPICE_CD = Path(__file__).with_name("spice_cd.py")
TIMEOUT = 30.0
"""Seconds until a disk must appear in the guest, or disappear."""


@dataclass(frozen=True, slots=True)
class Plugged:
    """A disk of the guest.

    Attributes:
        disk: its block device in the guest.
        pid: process id of the program that emulates the disk; None: QEMU.
    """

    disk: str
    pid: int | None = None

    def cpu_seconds(self) -> float:
        """Return the processor time of all threads of the process, in seconds."""
        if self.pid is None:
            return 0.0
        tasks = Path(f"/proc/{self.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9

    def peak_memory(self) -> float:
        """Return the peak resident memory of the process, in bytes."""
        if self.pid is None:
            return 0.0
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())
        assert found
        return int(found[1]) * 1024.0


@dataclass(frozen=True, slots=True)
class Contender:
    """A program that plugs in a disk.

    Attributes:
        name: the name in the table.
        command: the program and its arguments.
        source: another source tree of farplug to run; None: the installed one.
    """

    name: str
    command: tuple[str, ...]
    source: Path | None = None

    @asynccontextmanager
    async def plug(self, guest: QemuGuest) -> AsyncIterator[Plugged]:
        """Start the program and wait for its disk; at the end, stop the program and wait until the disk is gone."""
        before = await _disks(guest)
        with tempfile.TemporaryDirectory(prefix="farplug-bench-") as runtime:  # no other program sees the session
            environment = {**environment_of(self.source), "XDG_RUNTIME_DIR": runtime}
            process = await asyncio.create_subprocess_exec(
                *self.command, stdout=asyncio.subprocess.DEVNULL, env=environment
            )
            try:
                yield Plugged(await self._new_disk(guest, before, process), process.pid)
            finally:
                if process.returncode is None:
                    process.terminate()
                await process.wait()
                async with asyncio.timeout(TIMEOUT):
                    while await _disks(guest) - before:
                        await asyncio.sleep(0.05)

    async def _new_disk(self, guest: QemuGuest, before: set[str], process: asyncio.subprocess.Process) -> str:
        async with asyncio.timeout(TIMEOUT):
            while process.returncode is None:
                for name in await _disks(guest) - before:
                    if (await guest.run(f"dd if=/dev/{name} of=/dev/null bs=4k count=1 2>/dev/null")).exit_code == 0:
                        return f"/dev/{name}"
                await asyncio.sleep(0.05)
        raise RuntimeError(f"{self.name} ended with exit code {process.returncode}: {' '.join(self.command)}")


async def _disks(guest: QemuGuest) -> set[str]:
    return set((await guest.check("ls /sys/block")).split())


def farplug(name: str, target: str, *options: str | Path, source: Path | None = None) -> Contender:
    """Return ``farplug connect``. The function that it starts has the same name in all source trees."""
    program = (sys.executable, "-c", "from farplug.cli.main import main; main()")
    return Contender(name, (*program, "connect", target, *map(str, options)), source)


def spice_cd(target: str, image: Path) -> Contender:
    """Return the emulated CD of spice-gtk, the C client."""
    return Contender("spice-gtk CD", (SYSTEM_PYTHON, str(SPICE_CD), target, str(image)))


async def qemu_disk(guest: QemuGuest, model: str) -> Plugged:
    """Return a disk of QEMU, by its model."""
    script = f"for s in /sys/block/sd*; do grep -q '^{model}' $s/device/model 2>/dev/null && basename $s; done; :"
    async with asyncio.timeout(TIMEOUT):
        while not (name := (await guest.check(script)).strip()):
            await asyncio.sleep(0.05)
    return Plugged(f"/dev/{name}")


def environment_of(source: Path | None) -> dict[str, str]:
    """Return the environment of a process that runs farplug of another tree; None: of this one."""
    # Before all else: the path also leads to packages.
    path = os.pathsep.join(filter(None, (str(source or ""), os.environ.get("PYTHONPATH", ""))))
    return {**os.environ, "PYTHONPATH": path}
