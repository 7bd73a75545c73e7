"""farplug or QEMU killed at any moment while the guest writes: everything that an fsync confirmed is in the image.

How many times is chosen by FARPLUG_POWER_CUTS (make powercut: hundreds).
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.guest.command import Running, farplug
from tests.guest.plugging import GUEST_TIMEOUT, LABORATORY, MIB, STORAGE, blank, disk_with, gone
from tests.guest.recovery import recovered
from tests.guest.scripts import writer
from tests.long import every_pair

from farplug.exit_codes import ExitCode
from farplug.programs import find_program
from farplug.store import OverlayStore
from farplug.store.image import serial_number
from farplug.testing import QemuGuest, SpicePort, TcpPort
from farplug.usb import Buffer

if TYPE_CHECKING:
    from tests.guest.conftest import Guests

CUTS = int(os.environ.get("FARPLUG_POWER_CUTS", "2"))
"""How often farplug is killed in each test, over each transport in turn."""
QEMU_CUTS = max(1, CUTS // 6)
"""How often QEMU is: each time a guest has to boot."""

MOST = 30
"""Records that the guest writes at most before the kill."""

pytestmark = pytest.mark.timeout(400 + 20 * CUTS)


class Raw:
    """A RAW image of which is known what must be in it.

    Attributes:
        confirmed: the records whose fsync has returned.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder
        self.image = blank(folder / "disk.raw", 32 * MIB)
        self.serial_number = serial_number(self.image)
        self.confirmed: set[int] = set()
        self._check = {"blocks": self._check_blocks, "files": self._check_files}[kind]
        self._copies = 0
        if kind == "files":
            subprocess.run(
                [find_program("mke2fs"), "-q", "-F", "-t", "ext4", self.image], check=True, timeout=GUEST_TIMEOUT
            )

    @property
    def options(self) -> tuple[str | Path, ...]:
        """Return options of ``farplug connect``."""
        return "--usb-disk", self.image

    async def content(self, path: Path) -> None:
        """Write the content of the disk to a file, while it is not plugged in."""
        shutil.copyfile(self.image, path)

    async def check(self, console: str) -> None:
        """Everything that the guest said it has confirmed is there."""
        self.confirmed.update(map(int, re.findall(r"^<(\d+)>$", console, re.MULTILINE)))
        self._copies += 1
        copy = self.folder / f"copy{self._copies}"
        await self.content(copy)
        self._check(copy)
        copy.unlink()

    def _check_blocks(self, path: Path) -> None:
        newest: dict[int, int] = {}
        for number in sorted(self.confirmed):
            first, count = writer.place(number)
            newest.update(dict.fromkeys(range(first, first + count), number))
        content = path.read_bytes()
        for lba, number in newest.items():
            found = writer.writer_of(content[lba * 512 : lba * 512 + 512], lba)
            assert found is not None, f"sector {lba} is torn"
            assert found >= number, f"sector {lba} has record {found}, but {number} was confirmed"

    def _check_files(self, path: Path) -> None:
        files = recovered(path, folder := path.with_suffix(".files"))
        newest = max(self.confirmed, default=0)
        for number in self.confirmed:
            if number > newest - writer.KEPT:
                message = f"{number} is lost: {newest} is the newest, the image has {sorted(files)}"
                assert files.get(writer.file_name(number)) == writer.file_content(number), message
        shutil.rmtree(folder)


class Snapshot(Raw):
    """A snapshot of a RAW image, in a file that is kept; the image stays as it is."""

    def __init__(self, folder: Path, kind: str) -> None:
        super().__init__(folder, kind)
        self._file = folder / "snapshot"
        self._first = hashlib.md5(self.image.read_bytes()).digest()

    @property
    def options(self) -> tuple[str | Path, ...]:
        return *super().options, "--snapshot-file", self._file

    async def content(self, path: Path) -> None:
        assert hashlib.md5(self.image.read_bytes()).digest() == self._first
        read: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        def done(data: Buffer, error: OSError | None) -> None:
            assert error is None, error
            read.set_result(bytes(data))

        store = OverlayStore.open(self.image, self._file)
        try:
            store.read(0, self.image.stat().st_size, done)
            path.write_bytes(await read)
        finally:
            await store.close()


@asynccontextmanager
async def writing(guest: QemuGuest, kind: str, disk: Raw) -> AsyncIterator[Callable[[], str]]:
    """The guest writes whenever the disk is there. Yields a function: what it has said since."""
    start = len(guest.console)
    first = max(disk.confirmed, default=0) + 1000
    await guest.check("dmesg -n 1")  # the console is for the writer
    command = f"echo $$ >/run/writer; exec python3 /scripts/writer.py {kind} {disk.serial_number} {first}"
    program = asyncio.create_task(guest.run(command, timeout=600 + 20 * CUTS))
    try:
        yield lambda: guest.console[start:]
    finally:
        if guest.alive:
            await guest.check("kill $(cat /run/writer); dmesg -n 7")
        await asyncio.gather(program, return_exceptions=True)


async def wait_for_count(guest: QemuGuest, console: Callable[[], str], text: str, count: int) -> None:
    """Wait until the guest's writer has printed a text ``count`` times."""
    try:
        async with asyncio.timeout(GUEST_TIMEOUT):
            while console().count(text) < count:
                await asyncio.sleep(0.002)
    except TimeoutError:
        log = await guest.check("dmesg | tail -60")
        raise AssertionError(f"{text} was not printed {count} times:\n{console()[-500:]}\n{log}") from None


async def cut(guest: QemuGuest, console: Callable[[], str], running: Running, pid: int, number: int) -> int:
    """Kill a process in the middle of the guest's writing, for the ``number``-th time; return the number of records."""
    await wait_for_count(guest, console, "<up>", number)
    records = random.randint(0, MOST)
    await wait_for_count(guest, console, ">", console().count(">") + records)
    await asyncio.sleep(random.uniform(0, 0.02))
    assert running.process.returncode is None
    os.kill(pid, signal.SIGKILL)
    return records


@every_pair(storage=STORAGE, kind=writer.KINDS, image=[Raw, Snapshot])
async def test_farplug_is_killed(guests: Guests, tmp_path: Path, storage: str, kind: str, image: type[Raw]) -> None:
    guest = await guests.get(LABORATORY)
    disk = image(tmp_path, kind)
    options = ("--usb-storage", STORAGE[storage].transport, *disk.options)
    records = 0
    async with writing(guest, kind, disk) as console:
        for number in range(1, CUTS + 1):
            async with farplug("connect", guest.targets[number % 2], *options) as running:
                records += await cut(guest, console, running, running.process.pid, number)
            await wait_for_count(guest, console, "<down>", number)
            await disk.check(console())
    assert len(disk.confirmed) >= records
    async with farplug("connect", guest.targets[0], *options) as running:
        name = await disk_with(guest, disk.serial_number)
        if kind == "files":  # the guest recovers by itself too
            await guest.check(f"mount -t ext4 {name} /mnt && umount /mnt && e2fsck -fn {name}")
        running.process.send_signal(signal.SIGINT)
        assert await running.exit_code() == ExitCode.OK, running.stderr
    await gone(guest, name)


@pytest.mark.parametrize(
    ("storage", "kind", "image"), [("bot", "files", Raw), ("uas", "blocks", Raw), ("uas", "files", Snapshot)]
)
async def test_qemu_is_killed(guests: Guests, tmp_path: Path, storage: str, kind: str, image: type[Raw]) -> None:
    disk = image(tmp_path, kind)
    options = ("--usb-storage", STORAGE[storage].transport, *disk.options)
    config = replace(LABORATORY, ports=(TcpPort(), SpicePort()))
    records = 0
    for number in range(QEMU_CUTS):
        async with guests.fresh(config) as guest, writing(guest, kind, disk) as console:
            async with farplug("connect", guest.targets[number % 2], *options) as running:
                records += await cut(guest, console, running, guest.pid, 1)
                assert await running.exit_code() == ExitCode.GUEST_GONE, running.stderr
            await disk.check(console())
    assert len(disk.confirmed) >= records
