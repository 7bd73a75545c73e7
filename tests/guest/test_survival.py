"""The VM survives everything: farplug killed, ports reset, commands given up, devices that misbehave, lost images."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.guest.command import farplug
from tests.guest.plugging import (
    GUEST_TIMEOUT,
    LABORATORY,
    MIB,
    beside,
    blank,
    comes,
    disk_of,
    disk_with,
    gone,
    plugged,
    with_controller,
)

from farplug.errors import Reason
from farplug.exit_codes import ExitCode
from farplug.redirection import events
from farplug.store import MemoryStore, ReadDone, WriteDone
from farplug.store.image import serial_number
from farplug.testing import Controller, QemuGuest, SpicePort, TcpPort
from farplug.usb import (
    Buffer,
    Device,
    DeviceListener,
    Identity,
    Interface,
    Offer,
    Speed,
    Status,
    Transfer,
    TransferType,
)
from farplug.virtual.disk import disk_device

if TYPE_CHECKING:
    from tests.guest.conftest import Guests

MAX_MEMORY = 80 * 1024
"""KiB that ``farplug connect`` may occupy at its peak."""

USABLE = """
head -c 1000000 /dev/urandom >/tmp/usable
dd if=/tmp/usable of={disk} bs=1M oflag=direct conv=fsync,sync 2>/dev/null || exit 1
dd if={disk} bs=1M count=1 iflag=direct 2>/dev/null | head -c 1000000 | cmp - /tmp/usable
"""


async def still_works(guest: QemuGuest, disk: str) -> None:
    """The VM runs, and so does the disk: what is written comes back."""
    assert guest.alive
    await guest.check(USABLE.format(disk=disk))


# farplug ends, or QEMU does


@pytest.mark.parametrize("port", [0, 2, 3], ids=["spice", "tcp", "unix"])
async def test_farplug_killed_in_the_middle_of_a_write(guest: QemuGuest, tmp_path: Path, port: int) -> None:
    image = blank(tmp_path / "disk.raw", 512 * MIB)
    command = ("connect", guest.targets[port], "--usb-disk", image)
    async with farplug(*command) as first:
        disk = await disk_with(guest, serial_number(image))
        writing = asyncio.ensure_future(guest.run(f"dd if=/dev/zero of={disk} bs=1M oflag=direct"))
        await beside(writing, comes(lambda: image.stat().st_blocks * 512 >= 8 * MIB))
        assert not writing.done()
        first.process.kill()
        result = await writing
    assert result.exit_code != 0
    assert image.stat().st_blocks * 512 < 512 * MIB, "it was not in the middle"
    await gone(guest, disk)
    assert guest.alive
    async with farplug(*command) as second:
        await still_works(guest, await disk_with(guest, serial_number(image)))
        second.process.send_signal(signal.SIGINT)
        assert await second.exit_code() == ExitCode.OK, second.stderr


async def test_qemu_that_vanishes(guests: Guests, tmp_path: Path) -> None:
    images = [blank(tmp_path / name) for name in ("one", "two")]
    async with guests.fresh(replace(LABORATORY, ports=(SpicePort(), TcpPort()))) as guest:
        commands = [
            ("connect", target, "--usb-disk", image) for target, image in zip(guest.targets, images, strict=True)
        ]
        async with farplug(*commands[0]) as spice, farplug(*commands[1]) as tcp:
            disks = [await disk_with(guest, serial_number(image)) for image in images]
            reading = [asyncio.ensure_future(guest.run(f"dd if={disk} of=/dev/null bs=64k")) for disk in disks]
            os.kill(guest.pid, signal.SIGKILL)
            for running in (spice, tcp):
                assert await running.exit_code() == ExitCode.GUEST_GONE, running.stderr
                assert re.fullmatch(r"farplug: [^\n]+\n(  [^\n]+\n)*", running.stderr), running.stderr
            await asyncio.gather(*reading, return_exceptions=True)


async def test_memory_stays_bounded_while_the_guest_does_what_it_can(guest: QemuGuest, tmp_path: Path) -> None:
    image = blank(tmp_path / "disk.raw", 256 * MIB)
    async with farplug("connect", guest.targets[0], "--usb-disk", image) as running:
        disk = await disk_with(guest, serial_number(image))
        for work in (
            f"timeout 2 dd if=/dev/zero of={disk} bs=1M",
            f"timeout 2 dd if={disk} of=/dev/null bs=1M",
            f"timeout 2 dd if=/dev/zero of={disk} bs=1M oflag=direct &"
            f" timeout 2 dd if={disk} of=/dev/null bs=1M iflag=direct; wait",
        ):
            await guest.run(work)
        assert running.peak_memory < MAX_MEMORY
        await still_works(guest, disk)


# The image


async def test_an_image_is_plugged_for_writing_only_once(guest: QemuGuest, tmp_path: Path) -> None:
    image = blank(tmp_path / "disk.raw")
    device = disk_device(image)
    async with plugged(guest.targets[0], device):
        disk = await disk_of(guest, device)
        for option in ("--usb-disk", "--usb-disk-ro"):
            async with farplug("connect", guest.targets[2], option, image) as running:
                assert await running.exit_code() == ExitCode.IMAGE
                assert running.stderr.startswith(f"farplug: {image} is in use")
        await still_works(guest, disk)
    await device.dispose()


async def test_an_image_that_shrinks_while_it_is_plugged(guest: QemuGuest, tmp_path: Path) -> None:
    image = blank(tmp_path / "disk.raw", 32 * MIB)
    device = disk_device(image)
    async with plugged(guest.targets[0], device):
        disk = await disk_of(guest, device)
        await guest.check(f"dmesg -c >/dev/null; dd if={disk} of=/dev/null bs=4k count=1 skip=5000 iflag=direct")
        os.truncate(image, 16 * MIB)
        await asyncio.sleep(1.5)  # the disk looked at its size again, and keeps it
        assert (await guest.run(f"dd if={disk} of=/dev/null bs=4k count=1 skip=5000 iflag=direct")).exit_code != 0
        assert (await guest.run(f"dd if=/dev/zero of={disk} bs=4k count=1 seek=5000 oflag=direct")).exit_code != 0
        log = await guest.check("dmesg")
        assert "Sense Key : Medium Error" in log
        assert "Unrecovered read error" in log
        assert "Write error" in log
        await still_works(guest, disk)
    await device.dispose()
    assert image.stat().st_size == 16 * MIB


# Resets


RESET_STORM = """
usb=$(readlink -f /sys/block/{name}/device/../../../..)
device=$(printf %03d/%03d $(cat $usb/busnum) $(cat $usb/devnum))
( while dd if={disk} of=/dev/null bs=256k count=40 iflag=direct 2>/dev/null; do :; done; echo reading failed ) &
for i in $(seq 30); do
    usbreset $device >/dev/null || exit 1
done
kill $!
"""


async def test_a_storm_of_resets_while_it_reads(guest: QemuGuest, tmp_path: Path) -> None:
    device = disk_device(blank(tmp_path / "disk.raw"))
    async with plugged(guest.targets[0], device) as hub:
        disk = await disk_of(guest, device)
        output = await guest.check(RESET_STORM.format(disk=disk, name=disk.removeprefix("/dev/")))
        assert "reading failed" not in output
        async with asyncio.timeout(GUEST_TIMEOUT):  # those above the rate limit are counted later
            while (
                hub.kinds().count(events.PortReset)
                + sum(event.count for event in hub.seen if isinstance(event, events.Repeated))
                < 30
            ):
                await asyncio.sleep(0.1)
        await still_works(guest, disk)
    await device.dispose()


# Stores and devices that misbehave


class SlowStore(MemoryStore):
    """Answers ``delay`` seconds late, and not at all while ``holds`` is set."""

    def __init__(self, size: int, delay: float = 0) -> None:
        super().__init__(size)
        self.delay = delay
        self.holds = False
        self.held: list[Callable[[], None]] = []

    def release(self) -> None:
        """Answer all that was asked for meanwhile, the last one first: long after the guest gave up."""
        self.holds = False
        while self.held:
            self.held.pop()()

    def read(self, offset: int, length: int, done: ReadDone) -> None:
        super().read(offset, length, lambda data, error: self._later(lambda: done(data, error)))

    def write(self, offset: int, data: Buffer, done: WriteDone) -> None:
        super().write(offset, data, lambda error: self._later(lambda: done(error)))

    def _later(self, answer: Callable[[], None]) -> None:
        if self.holds:
            self.held.append(answer)
        else:
            asyncio.get_running_loop().call_later(self.delay, answer)


@pytest.mark.parametrize("port", [0, 2], ids=["spice", "tcp"])
async def test_an_answer_given_while_the_vm_is_paused_arrives(guest: QemuGuest, port: int) -> None:
    """QEMU's SPICE server does not read the reply by itself before the guest's driver times out."""
    store = SlowStore(64 * MIB)
    device = disk_device(store)
    async with plugged(guest.targets[port], device):
        disk = await disk_of(guest, device)
        # The driver does not ask again: a reply that did not arrive would leave the command without an end.
        await guest.check(f"echo 3600 >/sys/block/{disk.removeprefix('/dev/')}/device/timeout")
        store.holds = True
        command = f"dd if={disk} bs=4k count=1 skip=999 iflag=direct 2>/dev/null | wc -c"
        reading = asyncio.ensure_future(guest.check(command))
        await beside(reading, comes(lambda: bool(store.held)))
        await guest.qmp.execute("stop")
        store.release()
        await asyncio.sleep(0.2)  # it is on its way
        await guest.qmp.execute("cont")
        assert await reading == "4096\n"
    await device.dispose()


@pytest.mark.parametrize(
    ("work", "attempts"),
    [
        # Linux takes a command back and resets the port; then it tries Bulk-Only Reset as well, and waits 6 s for that.
        ("if={disk} of=/dev/null iflag=direct", 2),
        ("if=/dev/zero of={disk} oflag=direct", 3),
    ],
    ids=["read", "write"],
)
async def test_a_guest_that_gives_up_and_a_store_that_answers_late(guest: QemuGuest, work: str, attempts: int) -> None:
    store = SlowStore(16 * MIB)
    device = disk_device(store)
    async with plugged(guest.targets[0], device) as hub:
        disk = await disk_of(guest, device)
        settings = f"/sys/block/{disk.removeprefix('/dev/')}/device"
        await guest.check(f"echo 1 >{settings}/timeout; echo 1 >{settings}/eh_timeout")
        store.holds = True
        resets = hub.kinds().count(events.PortReset)
        working = asyncio.ensure_future(guest.run(f"dd bs=64k count=4 {work.format(disk=disk)}"))
        await beside(working, comes(lambda: len(store.held) >= attempts))
        assert hub.kinds().count(events.PortReset) >= resets + attempts - 1
        assert any(figures.cancelled for figures in hub.attachments[0].endpoints)
        store.release()
        assert (await working).exit_code == 0, "the retry went through"
        await guest.check(f"echo 30 >{settings}/timeout; echo 10 >{settings}/eh_timeout")
        await still_works(guest, disk)
    await device.dispose()


PULLED = """
usb=$(readlink -f /sys/block/{name}/device/../../../..)
interface=$(basename $usb/*:1.0)
hub=$(cat $usb/busnum)-0:1.0
# Opened before it goes: a dd that came too late would make a plain file where the disk's node belongs.
exec 3<>{disk}
dd if=/proc/self/fd/3 of=/dev/null bs=1M iflag=direct 2>/dev/null &
dd if=/dev/zero of=/proc/self/fd/3 bs=1M oflag=direct 2>/dev/null &
usleep {delay}
case {how} in
    authorized) echo 0 >$usb/authorized; echo 1 >$usb/authorized ;;
    driver) echo $interface >/sys/bus/usb/drivers/usb-storage/unbind
            echo $interface >/sys/bus/usb/drivers/usb-storage/bind ;;
    configuration) echo 0 >$usb/bConfigurationValue; echo 1 >$usb/bConfigurationValue ;;
    hub) echo $hub >/sys/bus/usb/drivers/hub/unbind; echo $hub >/sys/bus/usb/drivers/hub/bind ;;
esac
wait
:
"""


async def test_driver_and_hub_taken_away_while_the_disk_is_busy(guest: QemuGuest) -> None:
    device = disk_device(SlowStore(64 * MIB, delay=0.02))
    async with plugged(guest.targets[0], device) as hub:
        for number, how in enumerate(("authorized", "hub", "driver", "hub", "configuration") * 2):
            disk = await disk_of(guest, device)
            script = PULLED.format(disk=disk, name=disk.removeprefix("/dev/"), how=how, delay=20_000 + 7000 * number)
            await guest.check(script)
        await still_works(guest, await disk_of(guest, device))
        # Only the hub's going cuts transfers off; usb-storage finishes what it began.
        assert any(figures.cancelled for figures in hub.attachments[0].endpoints)
        assert events.PeerViolation not in hub.kinds()
    await device.dispose()


BUSY = """
for i in $(seq 20); do
    dd if={disk} of=/dev/null bs=64k count=1 skip=$i iflag=direct
    dd if=/dev/zero of={disk} bs=64k count=1 seek=$i oflag=direct
done
:
"""


class Misbehaving(Device):
    """Stands in front of a good device, and spoils some of its bulk transfers.

    Attributes:
        spoils: how, in turn; empty: it behaves.
        every: which of n transfers: the first, second, …
        spoilt: number of spoilt transfers.
        seen: number of bulk transfers that came.
        overtaken: how often it answered a transfer before an earlier one on the same endpoint.
        listener: who has it open.
    """

    def __init__(self, inner: Device, *spoils: str, every: int = 1) -> None:
        self.spoils = spoils
        self.every = every
        self.spoilt = 0
        self.overtaken = 0
        self.listener: DeviceListener | None = None
        self._inner = inner
        self.seen = 0
        self._pairs: dict[Transfer, Transfer] = {}
        self._late: list[tuple[int, Callable[[], None]]] = []

    @property
    def identity(self) -> Identity:
        return self._inner.identity

    @property
    def configuration(self) -> int:
        return self._inner.configuration

    @property
    def interfaces(self) -> Sequence[Interface]:
        return self._inner.interfaces

    @property
    def offers(self) -> Sequence[Offer]:
        return self._inner.offers

    @property
    def offer(self) -> Offer:
        return self._inner.offer

    @property
    def used_at_once(self) -> bool:
        return self._inner.used_at_once

    def select(self, offer: Offer) -> None:
        self._inner.select(offer)

    async def open(self, listener: DeviceListener) -> None:
        self.listener = listener
        await self._inner.open(listener)

    async def close(self) -> None:
        await self._inner.close()

    async def reset(self) -> Status:
        return await self._inner.reset()

    async def set_configuration(self, value: int) -> Status:
        return await self._inner.set_configuration(value)

    async def set_interface(self, number: int, alternate: int) -> Status:
        return await self._inner.set_interface(number, alternate)

    def submit(self, transfer: Transfer) -> None:
        how = self._choose() if transfer.type is TransferType.BULK else ""
        if how == "raise":
            raise RuntimeError("a device with a defect")
        if how == "never":
            return

        def completed(inner: Transfer) -> None:
            self._pairs.pop(transfer, None)
            if how == "late":
                if not self._late:
                    asyncio.get_running_loop().call_later(0.03, self._answer_late)
                self._late.append((transfer.endpoint, finish))
            elif how == "fail":
                transfer.complete(Status.IO_ERROR)
            elif how == "babble":
                transfer.complete(Status.SUCCESS, bytes(transfer.length + 1000), actual=transfer.length + 1000)
            elif how == "too late":
                asyncio.get_running_loop().call_later(1.5, finish)
            else:
                finish()

        def finish() -> None:
            assert inner.status is not None
            transfer.complete(inner.status, inner.reply, actual=inner.actual)

        inner = Transfer(
            transfer.type,
            transfer.endpoint,
            completed,
            length=transfer.length,
            data=transfer.data,
            setup=transfer.setup,
            stream_id=transfer.stream_id,
        )
        self._pairs[transfer] = inner
        self._inner.submit(inner)
        if how == "twice" and inner.status is not None:
            finish()

    def cancel(self, transfer: Transfer) -> None:
        """Ignore cancellation while misbehaving: a cancelled transfer is answered later."""
        inner = self._pairs.get(transfer)
        if inner is not None and not self.spoils:
            self._inner.cancel(inner)

    def _choose(self) -> str:
        self.seen += 1
        if not self.spoils or self.seen % self.every:
            return ""
        self.spoilt += 1
        return self.spoils[self.spoilt % len(self.spoils)]

    def _answer_late(self) -> None:
        """The last one first."""
        late, self._late = self._late, []
        endpoints = [endpoint for endpoint, _ in late]
        self.overtaken += len(endpoints) - len(set(endpoints))
        for _, finish in reversed(late):
            finish()


async def test_a_device_that_answers_late_and_out_of_order(guests: Guests) -> None:
    # EHCI cuts what it writes into many transfers, and queues them all.
    guest = await guests.get(with_controller(Controller.EHCI))
    good = disk_device(MemoryStore(16 * MIB), speeds=(Speed.HIGH,))
    device = Misbehaving(good, "late")
    async with plugged(guest.targets[0], device):
        disk = await disk_of(guest, device)
        await still_works(guest, disk)
        assert device.overtaken > 20
    await good.dispose()


async def test_a_device_that_breaks_every_rule(guest: QemuGuest) -> None:
    good = disk_device(MemoryStore(16 * MIB))
    device = Misbehaving(good, every=7)
    async with plugged(guest.targets[0], device) as hub:
        disk = await disk_of(guest, device)
        settings = f"/sys/block/{disk.removeprefix('/dev/')}/device"
        await guest.check(f"echo 1 >{settings}/timeout; echo 1 >{settings}/eh_timeout")
        device.spoils = ("twice", "raise", "babble", "late", "fail", "too late", "twice", "never")
        await guest.run(BUSY.format(disk=disk))
        assert guest.alive
        assert device.spoilt >= len(device.spoils)
        faults = {str(event.error) for event in hub.seen if isinstance(event, events.DeviceFault)}
        device.spoils = ()
    await gone(guest, disk)
    async with plugged(guest.targets[0], device):
        await still_works(guest, await disk_of(guest, device))
    await good.dispose()
    assert any("a device with a defect" in fault for fault in faults), faults
    assert any("was completed twice" in fault for fault in faults), faults


async def test_a_device_that_is_lost_in_the_middle_of_a_read(guest: QemuGuest) -> None:
    good = disk_device(MemoryStore(16 * MIB))
    device = Misbehaving(good)
    async with plugged(guest.targets[0], device) as hub:
        disk = await disk_of(guest, device)
        reading = asyncio.ensure_future(guest.run(f"while dd if={disk} of=/dev/null bs=64k iflag=direct; do :; done"))
        seen = device.seen
        await beside(reading, comes(lambda: device.seen > seen + 20))
        assert device.listener is not None
        device.listener.lost(OSError("pulled out"))
        error = await hub.attachments[0].ended()
        assert error is not None
        assert error.reason is Reason.DEVICE_LOST
        assert (await reading).output
        await gone(guest, disk)
    async with plugged(guest.targets[0], device):
        await still_works(guest, await disk_of(guest, device))
    await good.dispose()
