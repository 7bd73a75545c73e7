"""Captures of real guests, as Wireshark decodes them."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.capture import blocks, wireshark
from tests.capture.wireshark import Frame, having
from tests.guest.plugging import LABORATORY, MIB, STORAGE, disk_of
from tests.long import every_value

import farplug
from farplug.app.settings import CaptureSettings
from farplug.store import MemoryStore
from farplug.testing import QemuGuest, Spice, SpicePort, SpiceTransport
from farplug.virtual.disk import disk_device

if TYPE_CHECKING:
    from tests.guest.conftest import Guests

TICKET = "only Alice knows it"
TLS = replace(LABORATORY, ports=(SpicePort(),), spice=Spice(transport=SpiceTransport.TLS, ticket=TICKET))
PORTS = {"spice": 0, "tcp": 2, "unix": 3}
SPICE = ("spice", "spice+tls")

USB_FIELDS = (
    "frame.number", "frame.protocols", "_ws.malformed", "usb.urb_len", "usb.data_len", "usb.bDescriptorType",
    "usb.idVendor", "usb.idProduct", "usb.setup.bRequest", "usbms", "uasp", "scsi.inquiry.vendor_id",
    "scsi.inquiry.product_id", "scsi_sbc.opcode", "scsi_sbc.rdwr10.lba", "scsi_sbc.rdwr10.xferlen",
)  # fmt: skip
WIRE_FIELDS = (
    "_ws.expert.severity", "_ws.expert.message", "_ws.col.Info", "tcp.stream", "spice", "spice.ticket_client",
    "usbredir", "usbredir.type", "usbredir.vendor", "usbredir.product", "usbredir.version", "usbredir.request",
    "usbredir.request_type", "usbredir.endpoint", "usbredir.value", "usbredir.wlength",
)  # fmt: skip
TIMES = "scsi,srt,0"
"""The table of the response times of SCSI block commands."""
ERROR, WARNING = 0x800000, 0x600000
"""Severities of Wireshark's expert information."""
OVER = {"bot": "usbms", "uas": "uasp"}
READ, WRITE = 0x28, 0x2A


async def captured(guest: QemuGuest, target: str, storage: str, path: Path) -> tuple[bytes, bytes]:
    """Capture a session in which the guest reads and writes a disk; return what it has read and written."""
    size = 64 * 1024
    before, written = os.urandom(4 * MIB), os.urandom(size)
    store = MemoryStore(before)
    device = disk_device(store, transport=STORAGE[storage].transport)
    ca_file = None if guest.spice is None else guest.spice.ca_file
    async with (
        farplug.connect(target, ca_file=ca_file if target.startswith("spice+tls") else None, capture=path) as hub,
        hub.plug(device) as attachment,
    ):
        await attachment.configured()
        disk = await disk_of(guest, device)
        assert (await guest.check(f"basename $(readlink /sys/block/{disk[5:]}/device/../../../driver)")).strip() == (
            STORAGE[storage].driver
        )
        digest = await guest.check(f"dd if={disk} bs=64k count=4 skip=8 iflag=direct 2>/dev/null | sha256sum")
        assert digest.split()[0] == hashlib.sha256(before[8 * size : 12 * size]).hexdigest()
        await guest.check(f"dd of={disk} bs=64k seek=16 oflag=direct conv=fsync 2>/dev/null", stdin=written)
    return before[8 * size : 12 * size], written


@every_value(transport=["spice", "spice+tls", "tcp", "unix"], storage=STORAGE)
async def test_wireshark_decodes_a_session(
    guests: Guests, guest: QemuGuest, transport: str, storage: str, tmp_path: Path
) -> None:
    path = tmp_path / "trace.pcapng"
    if transport == "spice+tls":
        guest = await guests.get(TLS)
    read, written = await captured(guest, guest.targets[PORTS.get(transport, 0)], storage, path)
    frames, table = wireshark.frames(path, *USB_FIELDS, *WIRE_FIELDS, statistics=TIMES)
    check_usb(path, frames, storage, read, written)
    assert "Read(10)" in table
    assert "Write(10)" in table
    check_wire(frames, transport)
    assert TICKET.encode() not in path.read_bytes()


@pytest.mark.parametrize("storage", STORAGE)
async def test_wireshark_decodes_what_follows_the_beginning_on_a_running_session(
    guest: QemuGuest, storage: str, tmp_path: Path
) -> None:
    path = tmp_path / "trace.pcapng"
    content = os.urandom(MIB)
    device = disk_device(MemoryStore(content), transport=STORAGE[storage].transport)
    async with farplug.connect(guest.targets[PORTS["tcp"]]) as hub, hub.plug(device) as attachment:
        await attachment.configured()
        disk = await disk_of(guest, device)
        await hub.start_capture(CaptureSettings(str(path)))
        digest = await guest.check(f"dd if={disk} bs=64k count=1 skip=3 iflag=direct 2>/dev/null | sha256sum")
        await hub.stop_capture()
    expected = content[3 * 65536 : 4 * 65536]
    assert digest.split()[0] == hashlib.sha256(expected).hexdigest()
    frames, _ = wireshark.frames(path, *USB_FIELDS, "tcp", statistics=TIMES)
    assert expected in payloads(path, frames, READ)
    assert having(frames, OVER[storage])
    assert not having(frames, "_ws.malformed")
    assert not having(frames, "tcp"), "a connection that exists already cannot be decoded"


def check_usb(path: Path, frames: list[Frame], storage: str, read: bytes, written: bytes) -> None:
    # Linux reads the first 4 bytes of VPD pages, and Wireshark's dissector of VPD pages reads beyond them.
    assert {frame["usb.urb_len"] for frame in having(frames, "_ws.malformed")} <= {"4"}
    identity, *_ = having(having(frames, "usb.bDescriptorType", 1), "usb.idVendor")
    assert (identity["usb.idVendor"], identity["usb.idProduct"]) == ("0x1d6b", "0x0104")
    assert having(frames, "usb.bDescriptorType", 5)
    assert having(frames, "usb.setup.bRequest", 9)  # SET_CONFIGURATION
    inquiry, *_ = having(frames, "scsi.inquiry.vendor_id")
    assert inquiry["scsi.inquiry.vendor_id"].strip() == "farplug"
    assert inquiry["scsi.inquiry.product_id"].strip() == "Virtual Disk"
    assert having(frames, OVER[storage])
    assert not having(frames, OVER["uas" if storage == "bot" else "bot"])
    first = 8 * 64 * 1024 // 512
    assert sum(length for lba, length in transfers(frames, READ) if first <= lba < first + 512) == len(read) // 512
    assert sum(length for lba, length in transfers(frames, WRITE) if lba >= 2048) == len(written) // 512
    assert read in payloads(path, frames, READ)
    assert written in payloads(path, frames, WRITE)


def on_the_bus(frames: list[Frame], opcode: int) -> list[Frame]:
    """Return the USB transfers that belong to commands with an operation code."""
    return [frame for frame in having(frames, "scsi_sbc.opcode", opcode) if frame["frame.protocols"].startswith("usb")]


def transfers(frames: list[Frame], opcode: int) -> list[tuple[int, int]]:
    """Return the first block and the number of blocks of each command."""
    commands = having(on_the_bus(frames, opcode), "scsi_sbc.rdwr10.lba")
    return [(int(frame["scsi_sbc.rdwr10.lba"]), int(frame["scsi_sbc.rdwr10.xferlen"])) for frame in commands]


def payloads(path: Path, frames: list[Frame], opcode: int) -> bytes:
    """Return the data of the transfers of commands, one after the other."""
    captured = blocks.frames(path)
    large = [frame for frame in on_the_bus(frames, opcode) if int(frame["usb.data_len"]) >= 4096]
    return b"".join(captured[int(frame["frame.number"])].data[64:] for frame in large)


def check_wire(frames: list[Frame], transport: str) -> None:
    assert not [frame for frame in having(frames, "_ws.expert.severity", ERROR) if not frame["_ws.malformed"]]
    seen = {int(number) for frame in having(frames, "usbredir.type") for number in frame["usbredir.type"].split(",")}
    assert {0, 1, 4, 5, 6, 8, 100, 101} <= seen  # 0 hello, 1 device_connect, ... 100 control, 101 bulk
    connects = having(frames, "usbredir.type", 1)
    assert [(frame["usbredir.vendor"], frame["usbredir.product"]) for frame in connects] == [("0x1d6b", "0x0104")]
    hellos = [frame["usbredir.version"] for frame in having(frames, "usbredir.version")]
    ports = 2 if transport == "spice" else 1  # those of the guest: SPICE channels are all linked
    assert sorted(text.split()[0] for text in hellos) == ["farplug"] * ports + ["qemu"] * ports
    reads = having(having(having(frames, "usbredir.type", 100), "usbredir.request", 6), "usbredir.value", 0x100)
    descriptor, *_ = having(reads, "usbredir.wlength", 18)
    assert (descriptor["usbredir.request_type"], descriptor["usbredir.endpoint"]) == ("0x80", "0x80")
    warnings = [frame["_ws.expert.message"] for frame in having(frames, "_ws.expert.severity", WARNING)]
    if transport not in SPICE:
        assert not warnings
        return
    # The dissector knows no capabilities of a usbredir channel.
    assert warnings == ["Unknown channel - cannot dissect"] * ports
    said: dict[str, list[str]] = {}
    for frame in having(frames, "spice"):
        if not frame["usbredir"]:
            said.setdefault(frame["tcp.stream"], []).append(frame["_ws.col.Info"])
    assert len(said) == 1 + ports
    for texts in said.values():
        assert texts[:5] == [
            "Client link message",
            "Server link message",
            "Client authentication method selection",
            "Client ticket",
            "Server ticket",
        ]
    main = ", ".join(said["0"])
    assert "Server INIT" in main
    assert "Server CHANNELS_LIST" in main
    assert {frame["spice.ticket_client"] for frame in having(frames, "spice.ticket_client")} == {"00" * 128}
