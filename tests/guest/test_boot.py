"""Firmware boots from a redirected image: SeaBIOS a boot sector, OVMF a script of its shell."""

from __future__ import annotations

import os
import re
import struct
import subprocess
from pathlib import Path

import pytest
from tests.guest.plugging import GUEST_TIMEOUT, MIB, blank

from farplug.testing import Boot, Controller, GuestConfig, GuestFactory, GuestFixture, SpicePort, TcpPort, UsbPort
from farplug.virtual.device import VirtualDevice

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
    return subprocess.run(command, input=stdin, check=True, capture_output=True, timeout=GUEST_TIMEOUT).stdout


def plug_and_run(guest: GuestFixture, device: VirtualDevice | Path, console: str) -> None:
    """Plug a device or an image into a guest that is paused, start it, and wait for a text on its console."""
    guest.plug(device)
    guest.start()
    guest.wait_for_text(re.escape(console))
    assert guest.vm.alive


@pytest.mark.parametrize(
    ("port", "controller"),
    [(SpicePort(bootindex=0), Controller.XHCI), (TcpPort(bootindex=0), Controller.EHCI)],
    ids=["spice-xhci", "tcp-ehci"],
)
def test_seabios_boots_a_boot_sector(
    farplug_guest_factory: GuestFactory, tmp_path: Path, port: UsbPort, controller: Controller
) -> None:
    config = GuestConfig(ports=(port,), controller=controller, boot=Boot.BIOS, paused=True)
    plug_and_run(farplug_guest_factory(config), bootable(tmp_path / "boot.raw"), BOOTED.strip())


def test_ovmf_runs_a_script(farplug_guest_factory: GuestFactory, tmp_path: Path) -> None:
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
    with farplug_guest_factory(GuestConfig(ports=(SpicePort(bootindex=0),), boot=Boot.UEFI, paused=True)) as guest:
        plug_and_run(guest, image, PROOF)
    assert tool("mtype", "-i", str(image), "::copy") == content
