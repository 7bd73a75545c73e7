"""Captures of real guests, as Wireshark decodes them."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.capture import blocks, wireshark
from tests.guest.plugging import LABORATORY, MIB, STORAGE, disk_of

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


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("transport", ["spice", "spice+tls", "tcp", "unix"])
async def test_wireshark_decodes_a_session(
    guests: Guests, guest: QemuGuest, transport: str, storage: str, tmp_path: Path
) -> None:
    path = tmp_path / "trace.pcapng"
    if transport == "spice+tls":
        guest = await guests.get(TLS)
    read, written = await captured(guest, guest.targets[PORTS.get(transport, 0)], storage, path)
    check_usb(path, storage, read, written)
    check_wire(path, transport)
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
    assert expected in payloads(path, "scsi_sbc.opcode == 0x28")
    assert wireshark.count(path, {"bot": "usbms", "uas": "uasp"}[storage])
    assert not wireshark.count(path, "_ws.malformed")
    assert not wireshark.count(path, "tcp"), "a connection that exists already cannot be decoded"


def check_usb(path: Path, storage: str, read: bytes, written: bytes) -> None:
    malformed = wireshark.count(path, f"_ws.malformed && !({wireshark.VPD_PEEK})")
    assert malformed == 0
    (identity, *_) = wireshark.rows(path, "usb.bDescriptorType == 1 && usb.idVendor", "usb.idVendor", "usb.idProduct")
    assert identity == ["0x1d6b", "0x0104"]
    assert wireshark.count(path, "usb.bDescriptorType == 5")
    assert wireshark.count(path, "usb.setup.bRequest == 9")  # SET_CONFIGURATION
    (vendor, *_) = wireshark.rows(path, "scsi.inquiry.vendor_id", "scsi.inquiry.vendor_id", "scsi.inquiry.product_id")
    assert [text.strip() for text in vendor] == ["farplug", "Virtual Disk"]
    over = {"bot": "usbms", "uas": "uasp"}
    assert wireshark.count(path, over[storage])
    assert not wireshark.count(path, over["uas" if storage == "bot" else "bot"])
    first = 8 * 64 * 1024 // 512
    commands = "usb && scsi_sbc.opcode == 0x28 && scsi_sbc.rdwr10.lba >= %d && scsi_sbc.rdwr10.lba < %d"
    reads = wireshark.rows(path, commands % (first, first + 512), "scsi_sbc.rdwr10.lba", "scsi_sbc.rdwr10.xferlen")
    assert sum(int(length) for _, length in reads) == len(read) // 512
    writes = wireshark.rows(
        path, "usb && scsi_sbc.opcode == 0x2a && scsi_sbc.rdwr10.lba", "scsi_sbc.rdwr10.lba", "scsi_sbc.rdwr10.xferlen"
    )
    assert sum(int(length) for lba, length in writes if int(lba) >= 2048) == len(written) // 512
    assert read in payloads(path, "scsi_sbc.opcode == 0x28")
    assert written in payloads(path, "scsi_sbc.opcode == 0x2a")
    table = wireshark.run("-q", "-r", str(path), "-z", "scsi,srt,0")
    assert "Read(10)" in table
    assert "Write(10)" in table


def payloads(path: Path, filter: str) -> bytes:
    """Return the data of the transfers of commands, one after the other."""
    frames = blocks.frames(path)
    numbers = wireshark.rows(path, f"usb && usb.data_len >= 4096 && {filter}", "frame.number")
    return b"".join(frames[int(number)].data[64:] for (number,) in numbers)


def check_wire(path: Path, transport: str) -> None:
    assert not wireshark.count(path, "_ws.expert.severity == 0x800000 && !_ws.malformed")
    types = {row[0] for row in wireshark.rows(path, "usbredir.type", "usbredir.type")}
    seen = {int(number) for values in types for number in values.split(",")}
    assert {0, 1, 4, 5, 6, 8, 100, 101} <= seen  # 0 hello, 1 device_connect, ... 100 control, 101 bulk
    products = wireshark.rows(path, "usbredir.type == 1", "usbredir.vendor", "usbredir.product")
    assert products == [["0x1d6b", "0x0104"]]
    hellos = [row[0] for row in wireshark.rows(path, "usbredir.version", "usbredir.version")]
    ports = 2 if transport == "spice" else 1  # those of the guest: SPICE channels are all linked
    assert sorted(text.split()[0] for text in hellos) == ["farplug"] * ports + ["qemu"] * ports
    (descriptor, *_) = wireshark.rows(
        path,
        "usbredir.type == 100 && usbredir.request == 6 && usbredir.value == 0x100 && usbredir.wlength == 18",
        "usbredir.request_type",
        "usbredir.endpoint",
    )
    assert descriptor == ["0x80", "0x80"]
    warnings = [row[0] for row in wireshark.rows(path, "_ws.expert.severity == 0x600000", "_ws.expert.message")]
    if transport not in SPICE:
        assert not warnings
        return
    # The dissector knows no capabilities of a usbredir channel.
    assert warnings == ["Unknown channel - cannot dissect"] * ports
    said: dict[str, list[str]] = {}
    for stream, text in wireshark.rows(path, "spice && !usbredir", "tcp.stream", "_ws.col.Info"):
        said.setdefault(stream, []).append(text)
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
    tickets = {row[0] for row in wireshark.rows(path, "spice.ticket_client", "spice.ticket_client")}
    assert tickets == {"00" * 128}
