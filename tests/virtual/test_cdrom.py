from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.store.test_iso import ISO, image
from tests.virtual.bulk_only import Guest, read10, settle

from farplug.errors import DeviceError, ImageError, Reason
from farplug.store import MemoryStore, ReadDone
from farplug.usb import DeviceEvent, Speed, Status
from farplug.virtual import CdromDrive, MassStorage, VirtualDevice, cdrom_device, drives_of, events
from farplug.virtual.disk import Disk

TUR = "00 00 00 00 00 00"
EJECT = "1b 00 00 00 02 00"
PREVENT, ALLOW = "1e 00 00 00 01 00", "1e 00 00 00 00 00"
EVENT = "4a 01 00 00 10 00 00 00 08 00"
SIZE = "25 00 00 00 00 00 00 00 00 00"


class Disc(MemoryStore):
    """A disc that records whether it was closed, and that can delay reads."""

    def __init__(self, name: str, blocks: int = 32) -> None:
        super().__init__(name.encode().ljust(4) * (512 * blocks), block_size=2048, read_only=True)
        self.name = name
        self.closed = False
        self.holding = False
        self.held: list[tuple[ReadDone, bytes]] = []

    def read(self, offset: int, length: int, done: ReadDone) -> None:
        if self.holding:
            self.held.append((done, bytes(self.content[offset : offset + length])))
        else:
            super().read(offset, length, done)

    async def close(self) -> None:
        self.closed = True


async def plug(device: VirtualDevice) -> tuple[Guest, list[DeviceEvent]]:
    guest = await Guest.plug(device)
    return guest, guest.listener.events


async def test_identity() -> None:
    device = cdrom_device(disc := Disc("one"))
    assert device.identity.product == "Virtual CD-ROM"
    assert device.identity.serial_number == disc.serial_number
    guest, _ = await plug(device)
    assert guest.command("12 00 00 00 24 00", receive=36).data[:2] == b"\x05\x80"
    assert guest.command(SIZE, receive=8).data == bytes.fromhex("0000001f 00000800")
    assert guest.command(read10(31, 1), receive=2048).data == b"one " * 512
    assert guest.command(read10(31, 2), receive=4096).status == 1
    assert guest.sense() == (5, 0x21, 0)
    assert guest.command("2a 00 00 00 00 00 00 00 01 00", send=bytes(2048)).status == 1
    assert guest.sense() == (5, 0x20, 0)
    await device.close()
    await device.dispose()
    assert disc.closed


async def test_the_guest_ejects_and_another_is_inserted() -> None:
    device = cdrom_device(first := Disc("one"))
    guest, seen = await plug(device)
    assert drives_of(device)[0].medium == "one"
    assert guest.command(EJECT).status == 0
    assert drives_of(device)[0].medium is None
    assert seen == [events.MediumEjected("one", by_guest=True)]
    await asyncio.sleep(0)
    assert first.closed
    assert guest.command(TUR).status == 1
    assert guest.sense() == (2, 0x3A, 2)
    await drives_of(device)[0].insert(Disc("two", 64))
    assert seen[1:] == [events.MediumInserted("two")]
    assert guest.command(EVENT, receive=8).data == bytes.fromhex("0006041002020000")
    assert guest.command(TUR).status == 1
    assert guest.sense() == (6, 0x28, 0)
    assert guest.command(SIZE, receive=8).data == bytes.fromhex("0000003f 00000800")
    assert guest.command(read10(63, 1), receive=2048).data == b"two " * 512
    await device.close()
    await device.dispose()


async def test_an_empty_drive() -> None:
    device = cdrom_device(serial_number="0123456789ABCDEF")
    assert device.identity.serial_number == "0123456789ABCDEF"
    assert len(cdrom_device().identity.serial_number) == 16
    guest, seen = await plug(device)
    await drives_of(device)[0].eject()
    assert guest.command(TUR).status == 1
    assert guest.sense() == (2, 0x3A, 1)
    assert guest.command(EJECT).status == 0
    assert seen == []
    await device.close()  # flushes nothing
    await device.dispose()


async def test_a_locked_medium_stays_unless_it_is_forced() -> None:
    device = cdrom_device(first := Disc("one"))
    guest, seen = await plug(device)
    assert guest.command(PREVENT).status == 0
    assert drives_of(device)[0].locked
    second = Disc("two")
    for attempt in (drives_of(device)[0].eject(), drives_of(device)[0].insert(second)):
        with pytest.raises(DeviceError, match="one is locked by the guest") as caught:
            await attempt
        assert caught.value.reason is Reason.MEDIUM_LOCKED
        assert "unmount it in the guest" in caught.value.remedy
    assert guest.command(EVENT, receive=8).data == bytes.fromhex("0006041001020000")  # EjectRequest
    assert guest.command(read10(0, 1), receive=2048).data == b"one " * 512
    assert not first.closed
    assert not second.closed
    await drives_of(device)[0].eject(force=True)
    assert first.closed
    assert guest.command(read10(0, 1), receive=2048).status == 1
    assert guest.sense() == (6, 0x28, 0)
    assert guest.command(read10(0, 1), receive=2048).status == 1
    assert guest.sense() == (2, 0x3A, 2)
    assert seen == [
        events.MediumLocked(locked=True),
        events.MediumLocked(locked=False),
        events.MediumEjected("one", by_guest=False),
    ]
    await device.dispose()


async def test_inserting_by_force_replaces_a_locked_medium() -> None:
    device = cdrom_device(Disc("one"))
    guest, _ = await plug(device)
    guest.command(PREVENT)
    await drives_of(device)[0].insert(Disc("two"), force=True)
    assert guest.command(TUR).status == 1
    assert guest.sense() == (6, 0x28, 0)
    assert guest.command(read10(0, 1), receive=2048).data == b"two " * 512
    await device.dispose()


async def test_two_insertions_at_the_same_time() -> None:
    class Slow(Disc):
        async def close(self) -> None:
            await asyncio.sleep(0)
            await super().close()

    discs = [Slow(name) for name in ("one", "two", "tri")]
    device = cdrom_device(discs[0])
    guest, seen = await plug(device)
    (drive,) = drives_of(device)
    await asyncio.gather(*(drive.insert(disc) for disc in discs[1:]))
    assert (drive.medium, [disc.closed for disc in discs]) == ("tri", [True, True, False])
    assert guest.command(TUR).status == 1
    assert guest.command(read10(0, 1), receive=2048).data == b"tri " * 512
    assert [str(event) for event in seen] == ["one ejected", "two inserted", "two ejected", "tri inserted"]
    await device.dispose()


async def test_a_read_never_continues_on_the_next_medium() -> None:
    device = cdrom_device(Disc("one"))
    guest, _ = await plug(device)
    guest.send(guest.cbw(read10(0, 2), 4096, to_host=True))
    assert guest.receive(2048).reply == b"one " * 512
    await drives_of(device)[0].insert(Disc("two"))
    rest = guest.receive(2048)
    assert b"two" not in bytes(rest.reply)
    assert guest.csw(guest.receive(13))[0] == 1
    await device.dispose()


async def test_a_read_in_flight_ends_with_what_it_read() -> None:
    device = cdrom_device(disc := Disc("one"))
    guest, _ = await plug(device)
    disc.holding = True
    guest.send(guest.cbw(read10(0, 1), 2048, to_host=True))
    transfer = guest.receive(2048)
    await drives_of(device)[0].eject()
    assert transfer.status is None
    done, data = disc.held.pop()
    done(data, None)
    assert (await settle(transfer)).reply == b"one " * 512
    assert guest.csw(guest.receive(13)) == (0, 0)
    await device.dispose()


async def test_images(tmp_path: Path) -> None:
    first, second = tmp_path / "first.iso", tmp_path / "second.iso"
    first.write_bytes(ISO)
    second.write_bytes(image((16, b"CD001"), blocks=50))
    broken = tmp_path / "broken.iso"
    broken.write_bytes(bytes(100_000))
    device = cdrom_device(first, speeds=(Speed.HIGH,))
    guest, seen = await plug(device)
    await drives_of(device)[0].insert(first)  # the same again
    with pytest.raises(ImageError, match="is not an ISO image"):
        await drives_of(device)[0].insert(broken)
    assert drives_of(device)[0].medium == str(first), "nothing has changed"
    await drives_of(device)[0].insert(broken, force=True)
    assert drives_of(device)[0].medium == str(broken)
    await drives_of(device)[0].insert(second)
    guest.command(TUR)
    assert guest.command(SIZE, receive=8).data == bytes.fromhex("00000031 00000800")
    guest.command(PREVENT)
    with pytest.raises(DeviceError, match="is locked by the guest"):
        await drives_of(device)[0].insert(first)
    assert [type(event) for event in seen][-3:] == [events.MediumEjected, events.MediumInserted, events.MediumLocked]
    await device.dispose()
    with pytest.raises(ImageError, match="is not an ISO image"):
        cdrom_device(broken)


async def test_other_blocks_are_refused_before_anything_changes() -> None:
    with pytest.raises(ValueError, match="2048 bytes, not 512"):
        cdrom_device(MemoryStore(4096))
    device = cdrom_device(Disc("one"))
    with pytest.raises(ValueError, match="2048 bytes, not 512"):
        await drives_of(device)[0].insert(MemoryStore(4096))
    assert drives_of(device)[0].medium == "one"


async def test_closing_unlocks_the_medium() -> None:
    device = cdrom_device(Disc("one"))
    guest, _ = await plug(device)
    guest.command(PREVENT)
    await device.close()
    assert not drives_of(device)[0].locked
    await drives_of(device)[0].eject()
    guest, _ = await plug(device)
    assert guest.command(TUR).status == 1
    assert guest.sense() == (6, 0x28, 0)
    await device.dispose()


async def test_a_drive_that_is_not_plugged_reports_nothing() -> None:
    device = cdrom_device(Disc("one"))
    await drives_of(device)[0].eject()
    _, seen = await plug(device)
    assert seen == []
    await drives_of(device)[0].insert(Disc("two"))
    await device.close()
    await drives_of(device)[0].eject()
    assert [str(event) for event in seen] == ["two inserted"]


async def test_a_drive_and_a_disk_in_one_device() -> None:
    """A drive can be one of several logical units."""
    drive = CdromDrive(Disc("one"), luns=2)
    disk = Disk(MemoryStore(4096))
    device = VirtualDevice(MassStorage(disk.units[0], drive))
    guest = await Guest.plug(device)
    assert guest.command(TUR, lun=1).status == 1
    assert guest.command(read10(0, 1), receive=512).data == bytes(512)
    assert guest.command(read10(0, 1), receive=2048, lun=1).data == b"one " * 512
    assert guest.command("12 00 00 00 24 00", receive=36, lun=2).data[0] == 0x7F
    assert await device.reset() is Status.SUCCESS
    await device.dispose()
