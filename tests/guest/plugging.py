"""Helpers of the guest tests: images, and plugging devices into a guest."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from tests import leaks

from farplug.app.attachment import Attachment
from farplug.app.console_fonts import VGA_FOLDERS, load_glyphs
from farplug.app.guest import Guest
from farplug.redirection.events import DeviceReport, PortEvent
from farplug.target import TargetOptions, open_session, parse_target
from farplug.testing import Controller, GuestConfig, QemuGuest, SpicePort, TcpPort, UnixPort
from farplug.transport.session import Session
from farplug.usb import Device, DeviceEvent
from farplug.virtual.storage_transport import StorageTransport

MIB = 2**20
CELL_HEIGHT = 16
GUEST_TIMEOUT = 120
"""Seconds for an operation in a guest: more than a slow operation on a busy machine needs."""


Operation: TypeAlias = tuple[str | int | bytes, ...]
Result: TypeAlias = bytes | str
T = TypeVar("T")

NO_SCAN_DELAY = ("usb_storage.delay_use=0",)
"""Words for the kernel's command line: disks are scanned at once, not after a second."""


SCRIPTS = Path(__file__).parent / "scripts"

SG_TOOLS = (
    "sg_get_config", "sg_inq", "sg_luns", "sg_modes", "sg_opcodes", "sg_raw", "sg_readcap", "sg_requests", "sg_start",
    "sg_sync", "sg_turs", "sg_unmap", "sg_verify", "sg_vpd", "sg_write_same",
)  # fmt: skip
DISK_TOOLS = (
    "badblocks", "blkdiscard", "f3probe", "fallocate", "fio", "fsck.exfat", "lowntfs-3g", "mkfs.exfat", "ntfs-3g",
    "usbreset",
)  # fmt: skip

LABORATORY = GuestConfig(
    ports=(TcpPort(), SpicePort(), TcpPort(nodelay=False)),
    kernel_arguments=NO_SCAN_DELAY,
    memory=1024,
    modules=("fuse", "sg"),
    programs=(*DISK_TOOLS, *SG_TOOLS),
    python=True,
    files=tuple((f"/scripts/{path.name}", path) for path in sorted(SCRIPTS.glob("*.py"))),
)
"""The guest of tests of disks: programs that test disks, Python, and the scripts of this folder.

Guests that differ in ports and SPICE server only start from one snapshot: a boot takes ten times as long.
"""


FUNCTIONS = GuestConfig(
    ports=(TcpPort(), SpicePort(), SpicePort(), UnixPort()),
    kernel_arguments=NO_SCAN_DELAY,
    modules=("cdc_acm", "cdc_ncm", "evdev", "hid_generic", "hid_multitouch", "usbhid", "uvcvideo"),
    programs=("fido2-token", "fido2-cred", "fido2-assert", "usbreset", "v4l2-ctl"),
    memory=1024,
    python=True,
    files=LABORATORY.files,
    extra_arguments=("-device", "VGA"),
)
"""The guest of tests of other devices: their drivers, programs, Python, the scripts. A TCP port, two SPICE ports, a
UNIX socket."""

SCREEN = replace(
    FUNCTIONS,
    ports=(SpicePort(), SpicePort()),
    kernel_arguments=(*NO_SCAN_DELAY, "console=tty0"),
    extra_arguments=("-device", "VGA,id=screen", "-device", "usb-tablet,bus=usb.0"),
)
"""The guest of tests of the screen: a text console on it, a tablet, and two SPICE ports."""


def with_controller(controller: Controller) -> GuestConfig:
    """Return the guest of tests of other USB controllers: a TCP port."""
    return replace(FUNCTIONS, ports=(TcpPort(),), controller=controller, extra_arguments=())


@dataclass(frozen=True)
class Storage:
    """A transport of a disk.

    Attributes:
        transport: the transport that the disk offers.
        driver: the driver of the guest's kernel for this transport.
    """

    transport: StorageTransport
    driver: str


class Port(IntEnum):
    """The place of a port in LABORATORY and FUNCTIONS; the last one is in LABORATORY only."""

    TCP = 0
    SPICE = 1
    SLOW_TCP = 2

    def __str__(self) -> str:
        return self.name.lower().replace("_", "-")


TCP, SPICE, SLOW_TCP = Port
assert [type(port) for port in LABORATORY.ports] == [TcpPort, SpicePort, TcpPort]

STORAGE = {"bot": Storage(StorageTransport.BOT, "usb-storage"), "uas": Storage(StorageTransport.AUTO, "uas")}
"""Values of the parameter ``storage``."""


class Plugged(Guest):
    """A guest that remembers what the engine reported."""

    def __init__(self, session: Session) -> None:
        super().__init__(session=session)
        self.seen: list[PortEvent] = []
        self.stream.subscribe(lambda event: None if event.source is None else self.seen.append(event.source))

    def kinds(self) -> list[type]:
        return [type(event) for event in self.seen]

    def reports(self) -> list[DeviceEvent]:
        """Return the events that the devices reported."""
        return [event.event for event in self.seen if isinstance(event, DeviceReport)]


@asynccontextmanager
async def plugged(
    target: str, *devices: Device, options: TargetOptions | None = None, configured: bool = True
) -> AsyncIterator[Plugged]:
    """Plug devices into a guest, wait until its driver has configured them, and unplug them at the end."""
    hub = Plugged(await open_session(parse_target(target, options or TargetOptions())))
    try:
        async with asyncio.timeout(GUEST_TIMEOUT):
            attachments: list[Attachment] = await asyncio.gather(*(hub.plug(device) for device in devices))
            if configured:
                await asyncio.gather(*(attachment.configured() for attachment in attachments))
        yield hub
    finally:
        await hub.close()


async def beside(task: asyncio.Future[Any], waiting: Coroutine[Any, Any, T]) -> T:
    """Wait for what a task causes, and return the result of ``waiting``; if the task fails before, raise its error.

    Without this a test waits for the guest until a timeout, whose message has nothing of the cause.
    """
    waiter = asyncio.ensure_future(waiting)
    try:
        await asyncio.wait((waiter, task), return_when=asyncio.FIRST_COMPLETED)
        if not waiter.done():
            task.result()
        return await waiter
    finally:
        waiter.cancel()
        await asyncio.gather(waiter, return_exceptions=True)


async def comes(condition: Callable[[], bool]) -> None:
    """Wait until something is true of this process, as long as for an operation in a guest."""
    await leaks.comes(condition, GUEST_TIMEOUT)


async def read_line(guest: QemuGuest, action: Callable[[], Awaitable[object]]) -> str:
    """Return the line that a program on the guest's console, which has no shell, reads while something is typed."""
    program = "/tmp/reader"
    script = f"echo $$ >{program}.new; mv {program}.new {program}; exec head -n 1 </dev/tty1"
    reading = asyncio.ensure_future(guest.check(script))
    try:
        await beside(reading, until(guest, f"ls -l /proc/$(cat {program})/fd 2>/dev/null | grep -q tty1"))
        await action()
        return (await reading).strip()
    finally:
        reading.cancel()


async def until(guest: QemuGuest, condition: str, *, setup: str = ":") -> str:
    """Wait in a guest until a shell command succeeds; return the output of its last execution.

    ``setup`` is executed once, before.

    This is a loop in the guest, because an emulated guest needs 50 ms of processor time to begin a command. The first
    half second is looked at closely: later each look takes time from the program that is waited for.

    Raises:
        CommandFailed: the command did not succeed in time.
    """
    script = f"""
        {setup}
        tries=0
        until {condition}; do
            tries=$((tries + 1))
            [ $tries -lt {10 + GUEST_TIMEOUT * 5} ] || exit 1
            if [ $tries -lt 10 ]; then busybox sleep 0.05; else busybox sleep 0.2; fi
        done"""
    return await guest.check(script, timeout=2 * GUEST_TIMEOUT)


async def disk_of(guest: QemuGuest, device: Device) -> str:
    """Return the guest's block device for a disk, once it is readable."""
    return await disk_with(guest, device.identity.serial_number)


async def disk_with(guest: QemuGuest, serial: str) -> str:
    """Return the guest's block device with a USB serial number, once it is readable."""
    # /sys/block/sdX -> …/usbN/N-P/N-P:1.0/hostN/targetN/N:0:0:0/block/sdX
    condition = f"""
        (
            for block in /sys/block/sd*; do
                read -r serial <$block/device/../../../../serial && [ "$serial" = {serial} ] || continue
                # Its node comes a moment after its folder, and can be opened a moment later still.
                read -r size <$block/size && [ "$size" != 0 ] && true </dev/${{block##*/}} || continue
                echo /dev/${{block##*/}}
                exit 0
            done 2>/dev/null
            exit 1
        )"""
    return (await until(guest, condition)).strip()


async def enable_unmap(guest: QemuGuest, disk: str, storage: str) -> None:
    """Let the guest use UNMAP or WRITE SAME: over Bulk-Only Transport Linux needs a setting (docs/disk.md)."""
    if storage == "bot":
        await guest.check(f"echo writesame_16 >$(echo /sys/block/{disk[5:]}/device/scsi_disk/*/provisioning_mode)")


async def usb_folder(guest: QemuGuest, device: Device) -> str:
    """Return the guest's folder in /sys for a device, by its ids, once it exists."""
    return await usb_folder_by_name(guest, f"{device.identity.vendor_id:04x}:{device.identity.product_id:04x} *")


async def usb_folder_by_name(guest: QemuGuest, name: str) -> str:
    """Return the guest's folder in /sys for a USB device, once it exists.

    ``name`` is a pattern for its ids and product name, such as ``0627:0001 *Keyboard``.
    """
    pattern = name.replace(" ", "\\ ")
    condition = f"""
        (
            for usb in /sys/bus/usb/devices/*; do
                read -r vendor <$usb/idVendor && read -r id <$usb/idProduct || continue
                product=
                read -r product <$usb/product
                case "$vendor:$id $product" in {pattern}) echo $usb; exit 0 ;; esac
            done 2>/dev/null
            exit 1
        )"""
    return (await until(guest, condition)).strip()


async def usb_node(guest: QemuGuest, folder: str) -> str:
    """Return the guest's device node for raw access to a USB device."""
    bus, number = map(int, (await guest.check(f"cat {folder}/busnum {folder}/devnum")).split())
    return f"/dev/bus/usb/{bus:03d}/{number:03d}"


async def raw(guest: QemuGuest, node: str, *operations: Operation, timeout: float = GUEST_TIMEOUT) -> list[Result]:
    """Run operations of ``scripts/usbfs.py`` on a device without a driver, one after the other; return their results.

    Each result is the data that arrived, or the name of the error.
    """
    request = json.dumps([[part.hex() if isinstance(part, bytes) else part for part in one] for one in operations])
    answer = await guest.check(f"python3 /scripts/usbfs.py {node}", stdin=request.encode(), timeout=timeout)
    return [one if one.startswith("E") else bytes.fromhex(one) for one in json.loads(answer)]


async def gone(guest: QemuGuest, disk: str) -> None:
    """Wait until a disk has disappeared in the guest."""
    await until(guest, f"[ ! -e {disk} ]")


def blank(path: Path, size: int = 32 * MIB) -> Path:
    """Make an image of zeros, and return its path."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


def descriptors() -> int:
    """Return the number of open file descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


def console_font() -> bytes:
    """Return the font of the VGA BIOS as a PSF file, for loadfont: that of Linux has other forms of some letters."""
    glyphs = {name: glyph for glyph, name in load_glyphs(VGA_FOLDERS, ()).items() if len(glyph) == CELL_HEIGHT}
    rows = [glyphs.get(bytes([code]).decode("cp437"), bytes(CELL_HEIGHT)) for code in range(256)]
    return bytes([0x36, 0x04, 0, CELL_HEIGHT]) + b"".join(rows)
