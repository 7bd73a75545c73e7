"""Firmware boots from a redirected image: SeaBIOS a boot sector, OVMF a script of its shell."""

from __future__ import annotations

import asyncio
import os
import struct
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.guest.plugging import MIB, Plugged, blank

from farplug.target import open_session, parse_target
from farplug.testing import Boot, Controller, GuestConfig, QemuGuest, SpicePort, TcpPort, UsbPort
from farplug.virtual.device import VirtualDevice
from farplug.virtual.disk import disk_device

if TYPE_CHECKING:
    from tests.guest.conftest import GuestPool

BOOTED = "farplug: read by the boot sector\r\n"
PROOF = "farplug: read by the shell"

FAR_BLOCK = 50_000
"""Where the text is: no firmware reads that by itself."""

# 16-bit code at 0000:7C00; dl is the drive. After the code: the disk address packet of INT 13h, AH=42h (EDD-3).
CODE = bytes.fromhex(
    "31 C0"  #         xor ax, ax
    "8E D8"  #         mov ds, ax
    "8E D0"  #         mov ss, ax
    "BC 00 7C"  #      mov sp, 7C00h
    "FC"  #            cld
    "BE 2F 7C"  #      mov si, packet
    "B4 42"  #         mov ah, 42h         ; extended read
    "CD 13"  #         int 13h
    "72 19"  #         jc stop
    "BE 00 7E"  #      mov si, 7E00h
    "AC"  #      next: lodsb
    "84 C0"  #         test al, al
    "74 13"  #         jz stop
    "88 C4"  #         mov ah, al
    "BA FD 03"  #      mov dx, 3FDh        ; line status of the first serial port
    "EC"  #      wait: in al, dx
    "A8 20"  #         test al, 20h        ; room for a byte
    "74 FB"  #         jz wait
    "88 E0"  #         mov al, ah
    "B2 F8"  #         mov dl, F8h         ; its data
    "EE"  #            out dx, al
    "EB EA"  #         jmp next
    "F4"  #      stop: hlt
    "EB FD"  #         jmp stop
)
READ_PACKET = struct.pack("<BxHHHQ", 16, 1, 0x7E00, 0, FAR_BLOCK)


def bootable(path: Path) -> Path:
    """An image whose boot sector reads another block and prints it on the first serial port."""
    with blank(path).open("r+b") as file:
        file.write((CODE + READ_PACKET).ljust(510, b"\0") + b"\x55\xaa")
        file.seek(FAR_BLOCK * 512)
        file.write(BOOTED.encode())
    return path


def tool(*command: str, stdin: bytes = b"") -> bytes:
    """Run a tool; what it printed."""
    return subprocess.run(command, input=stdin, check=True, capture_output=True, timeout=30).stdout


async def plug_and_run(guest: QemuGuest, device: VirtualDevice, console: str) -> None:
    """Plug the device into a guest that stands still, let it run, and wait for a text on its console."""
    hub = Plugged(await open_session(parse_target(guest.targets[0])))
    try:
        plugging = asyncio.ensure_future(hub.plug(device))
        await guest.qmp.execute("cont")
        await plugging
        await guest.wait_for_console(console)
        assert guest.alive
    finally:
        await hub.close()


@pytest.mark.parametrize(
    ("port", "controller"),
    [(SpicePort(bootindex=0), Controller.XHCI), (TcpPort(bootindex=0), Controller.EHCI)],
    ids=["spice-xhci", "tcp-ehci"],
)
async def test_seabios_boots_a_boot_sector(
    guests: GuestPool, tmp_path: Path, port: UsbPort, controller: Controller
) -> None:
    device = disk_device(bootable(tmp_path / "boot.raw"))
    config = GuestConfig(ports=(port,), controller=controller, boot=Boot.BIOS, paused=True)
    async with guests.fresh(config) as guest:
        await plug_and_run(guest, device, BOOTED.strip())
    await device.dispose()


async def test_ovmf_runs_a_script(guests: GuestPool, tmp_path: Path) -> None:
    image = blank(tmp_path / "boot.raw", 64 * MIB)
    content = os.urandom(3 * MIB)
    files = {
        "startup.nsh": b"cp fs0:\\random fs0:\\copy\r\ntype fs0:\\proof.txt\r\n",
        "proof.txt": PROOF.encode() + b"\r\n",
        "random": content,
    }
    tool("/usr/sbin/mkfs.vfat", str(image))
    for name, data in files.items():
        tool("mcopy", "-i", str(image), "-", f"::{name}", stdin=data)
    device = disk_device(image)
    config = GuestConfig(ports=(SpicePort(bootindex=0),), boot=Boot.UEFI, paused=True)
    async with guests.fresh(config) as guest:
        await plug_and_run(guest, device, PROOF)
    await device.dispose()
    assert tool("mtype", "-i", str(image), "::copy") == content
