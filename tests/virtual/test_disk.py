from __future__ import annotations

import asyncio
import errno
import os
import random
import struct
from pathlib import Path

import pytest
from tests.leaks import descriptors
from tests.virtual.bulk_only import Guest, Pattern, make, read10, settle, write10

from farplug.errors import DeviceError, ImageError, Reason
from farplug.store import FileStore
from farplug.usb import Interface, Offer, Speed, TransferType
from farplug.usb.figures import Figures
from farplug.virtual import Disk, Numbers, StorageTransport, VirtualDevice, disk_device


def content(path: Path) -> bytes:
    return path.read_bytes()


def size(path: Path) -> int:
    return path.stat().st_size


def modified(path: Path) -> int:
    return path.stat().st_mtime_ns


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(random.Random(1).randbytes(64 * 512))
    return path


@pytest.mark.parametrize(("speed", "size"), [(Speed.FULL, 64), (Speed.HIGH, 512), (Speed.SUPER, 1024)])
def test_interface(speed: Speed, size: int) -> None:
    device = make(Pattern(), speed)
    (interface,) = device.interfaces
    assert isinstance(interface, Interface)
    assert (interface.interface_class, interface.interface_subclass, interface.interface_protocol) == (8, 6, 0x50)
    assert [(one.address, one.type, one.max_packet_size) for one in interface.endpoints] == [
        (0x81, TransferType.BULK, size),
        (0x02, TransferType.BULK, size),
    ]
    descriptor = Disk(Pattern()).interfaces(speed, Numbers())[0]
    bursts = [one.companion and one.companion.max_burst for one in descriptor.endpoints]
    assert bursts == ([15, 15] if speed is Speed.SUPER else [None, None])


def test_identity() -> None:
    device = make(Pattern())
    assert str(device.identity) == "1d6b:0104 farplug Virtual Disk"
    assert device.identity.serial_number == "0123456789ABCDEF"
    assert device.offers == (Offer(Speed.SUPER), Offer(Speed.SUPER, "USB Attached SCSI"))


async def test_figures() -> None:
    guest = await Guest.plug(make(Pattern()))
    guest.command(read10(0, 3), receive=1536)
    guest.command(read10(0, 1), receive=1024)
    guest.command(write10(0, 1), send=bytes(512))
    assert guest.device.figures == Figures(read=2048, written=512, commands=4)


async def test_plug_again_and_again(image: Path) -> None:
    device = disk_device(image)
    expected = bytearray(content(image))
    for turn in range(3):
        guest = await Guest.plug(device)
        data = bytes((turn,)) * 512
        transfers = [guest.send(guest.cbw(write10(turn, 1), 512, False)), guest.send(data)]
        assert guest.csw(await settle(guest.receive(13))) == (0, 0)
        assert all(one.actual for one in transfers)
        expected[turn * 512 : turn * 512 + 512] = data
        await device.close()
    assert content(image) == expected
    await device.dispose()
    again = disk_device(image)
    await again.dispose()


async def test_read_only_image(image: Path) -> None:
    before = content(image), modified(image)
    device = disk_device(image, read_only=True)
    guest = await Guest.plug(device)
    assert guest.command("1a 00 3f 00 04 00", receive=4).data[2] == 0x90
    assert guest.command(write10(0, 1), send=bytes(512)).status == 1
    assert guest.sense() == (7, 0x27, 0)
    reading = [guest.send(guest.cbw(read10(0, 64), 32768, True)), guest.receive(32768)]
    assert bytes((await settle(reading[1])).reply) == before[0]
    assert guest.csw(await settle(guest.receive(13))) == (0, 0)
    await device.close()
    await device.dispose()
    assert (content(image), modified(image)) == before


async def test_an_image_that_shrinks_while_plugged(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farplug.virtual.storage.REFRESH_INTERVAL", 0.01)
    device = disk_device(image)
    guest = await Guest.plug(device)
    with image.open("r+b") as file:
        file.truncate(10 * 512)

    await asyncio.sleep(0.05)  # the size was checked again

    async def run(cdb: bytes, *, receive: int = 0, send: bytes = b"") -> int:
        guest.send(guest.cbw(cdb, receive or len(send), bool(receive)))
        await settle(guest.receive(receive) if receive else guest.send(send))
        return guest.csw(await settle(guest.receive(13)))[0]

    assert await run(read10(9, 1), receive=512) == 0
    assert await run(read10(9, 2), receive=1024) == 1
    assert guest.sense() == (3, 0x11, 0)
    assert await run(write10(10, 1), send=bytes(512)) == 1
    assert guest.sense() == (3, 0x0C, 0)
    assert size(image) == 10 * 512
    await device.close()
    await device.dispose()


@pytest.mark.parametrize(("size", "count"), [(128 * 512, 128), (96 * 512 + 100, 96)])
async def test_a_new_size_is_noticed(image: Path, monkeypatch: pytest.MonkeyPatch, size: int, count: int) -> None:
    monkeypatch.setattr("farplug.virtual.storage.REFRESH_INTERVAL", 0.01)
    store = FileStore.open(image)
    device = disk_device(store)
    guest = await Guest.plug(device)
    os.truncate(image, size)
    async with asyncio.timeout(100):
        while guest.command("00 00 00 00 00 00").status == 0:
            await asyncio.sleep(0.01)
    assert guest.sense() == (6, 0x2A, 9)
    capacity = guest.command("25 00 00 00 00 00 00 00 00 00", receive=8)
    assert capacity.data == struct.pack(">II", count - 1, 512)
    await device.close()
    os.truncate(image, 64 * 512)
    await asyncio.sleep(0.05)
    assert store.block_count == count  # the size is not checked while the disk is not plugged
    await device.dispose()


async def test_large_blocks(image: Path) -> None:
    device = disk_device(image, block_size=4096)
    guest = await Guest.plug(device)
    assert guest.command("25 00 00 00 00 00 00 00 00 00", receive=8).data == struct.pack(">II", 7, 4096)
    guest.send(guest.cbw(write10(7, 1), 4096, False))
    assert [guest.send(b"\xaa" * 1000).actual for _ in range(4)] == [1000] * 4
    guest.send(b"\xaa" * 96)
    assert guest.csw(await settle(guest.receive(13))) == (0, 0)
    guest.send(guest.cbw(read10(6, 2), 8192, True))
    data = await settle(guest.receive(8192))
    assert data.reply == content(image)[6 * 4096 : 7 * 4096] + b"\xaa" * 4096
    assert guest.csw(await settle(guest.receive(13))) == (0, 0)
    assert guest.command(read10(8, 1), receive=4096).status == 1
    await device.close()
    await device.dispose()


def test_an_image_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ImageError) as caught:
        disk_device(tmp_path / "missing.raw")
    assert caught.value.reason is Reason.NOT_FOUND


async def test_closing_reports_that_data_may_be_lost() -> None:
    store = Pattern()
    guest = await Guest.plug(make(store))
    store.error = OSError(errno.EIO, "broken")
    with pytest.raises(DeviceError, match="memory: what was written may be lost: broken") as caught:
        await guest.device.close()
    assert caught.value.reason is Reason.IO_ERROR
    store.error = None
    await Guest.plug(guest.device)


async def test_closing_may_be_cancelled() -> None:
    store = Pattern()
    guest = await Guest.plug(make(store))
    store.holding = True
    closing = asyncio.create_task(guest.device.close())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    store.release()
    store.holding = False
    await Guest.plug(guest.device)


@pytest.mark.parametrize("seed", range(3))
async def test_random_work_on_a_file_matches_a_shadow(image: Path, seed: int) -> None:
    """Two disks in one device, both over files, with resets while writes are in flight."""
    source = random.Random(seed)
    other = image.with_name("other.raw")
    other.write_bytes(bytes(64 * 512))
    device = VirtualDevice(Disk(FileStore.open(image)), Disk(FileStore.open(other)))
    guest = await Guest.plug(device)
    shadow = bytearray(content(image))
    for _ in range(200):
        lba = source.randrange(64)
        count = source.randrange(1, 65 - lba)
        begin, end = lba * 512, (lba + count) * 512
        if source.random() < 0.5:
            data = source.randbytes(end - begin)
            guest.send(guest.cbw(write10(lba, count), end - begin, False))
            assert guest.send(data).actual == end - begin
            shadow[begin:end] = data
            if source.random() < 0.2:
                await guest.enumerate()
                guest.command("00 00 00 00 00 00")
                continue
        else:
            guest.send(guest.cbw(read10(lba, count), end - begin, True))
            assert (await settle(guest.receive(end - begin))).reply == shadow[begin:end]
        assert guest.csw(await settle(guest.receive(13))) == (0, 0)
    await device.close()
    assert content(image) == shadow
    assert content(other) == bytes(64 * 512)
    await device.dispose()


def test_images_are_closed_when_another_cannot_be_used(image: Path, tmp_path: Path) -> None:
    before = len(descriptors())
    with pytest.raises(ImageError, match="no such file"):
        disk_device(image, tmp_path / "missing.raw")
    with pytest.raises(ValueError, match="not 17"):
        disk_device(*(Pattern() for _ in range(16)), image)
    assert len(descriptors()) <= before
    FileStore.open(image).abandon()  # it is not locked


async def test_the_units_of_a_device_list_each_other(tmp_path: Path) -> None:
    guest = await Guest.plug(disk_device(Pattern(), Pattern(), Pattern(), transport=StorageTransport.BOT))
    assert guest.control(bytes.fromhex("a1 fe 0000 0000 0100")).reply == b"\2"
    for lun in (0, 2, 3):  # there is no 3
        listed = guest.command("a0 00 00 00 00 00 00 00 00 40 00 00", receive=64, lun=lun)
        assert listed.data[:32] == bytes.fromhex("00000018 00000000") + b"".join(
            bytes((0, n, *bytes(6))) for n in range(3)
        )
