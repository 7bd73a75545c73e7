"""Fuzz a disk and a CD-ROM drive: any transfers, cancels and resets of a guest, while media are inserted and ejected.

Each transfer is completed once, and the device still works.
"""

from __future__ import annotations

import asyncio
import random
import struct
from functools import partial

from farplug.errors import DeviceError
from farplug.scsi.cdrom import COMMANDS as CDROM_COMMANDS
from farplug.scsi.disk import COMMANDS as DISK_COMMANDS
from farplug.store import MemoryStore
from farplug.usb import Setup, Transfer, TransferType
from farplug.virtual import CdromDrive, VirtualDevice, cdrom_device, disk_device, drives_of
from harness import Listener, Transfers, run

BLOCKS = 64
KNOWN = [bytes((row.opcode, row.service_action or 0)) for row in (*DISK_COMMANDS, *CDROM_COMMANDS)]
LENGTHS = (0, 1, 8, 13, 18, 31, 36, 512, 1024, 32768, 65536, 65537, 2**31, 2**32 - 1)


def wrapper(source: random.Random) -> bytes:
    known = source.choice(KNOWN)
    cdb = bytearray(source.choice((known, b"\x28\0", b"\x2a\0", source.randbytes(1) + b"\0")) + bytes(14))
    opcode = cdb[0]
    for _ in range(source.randrange(4)):
        cdb[source.randrange(1, 16)] = source.randrange(256)
    if opcode in (0x28, 0x2A) and source.random() < 0.8:
        cdb[2:9] = struct.pack(">IxH", source.randrange(BLOCKS + 2), source.randrange(BLOCKS))
    length = source.choice((*LENGTHS, 512 * source.randrange(BLOCKS)))
    flags = source.choice((0, 0x80))
    lun = source.choice((0, 0, 0, 0, 1, 255))
    return struct.pack("<4sIIBBB16s", b"USBC", source.getrandbits(32), length, flags, lun, 16, bytes(cdb))


async def swap(drive: CdromDrive, source: random.Random) -> None:
    force = source.random() < 0.5
    try:
        if source.random() < 0.5:
            await drive.eject(force=force)
        else:
            await drive.insert(MemoryStore(2048 * BLOCKS, block_size=2048), force=force)
    except DeviceError:
        assert drive.locked


async def attack(device: VirtualDevice, source: random.Random) -> None:
    transfers = Transfers(device)
    bulk, control = partial(transfers.submit, TransferType.BULK), partial(transfers.submit, TransferType.CONTROL)

    for _ in range(source.randrange(60)):
        if drives_of(device) and source.random() < 0.1:
            await swap(drives_of(device)[0], source)
        match source.randrange(12):
            case 0 | 1 | 2 | 3:
                bulk(0x02, data=wrapper(source))
            case 4 | 5 | 6:
                bulk(0x81, length=source.choice(LENGTHS))
            case 7:
                bulk(0x02, data=bytes(source.choice((0, 1, 30, 31, 32, 512, 700, 32768))))
            case 8:
                setup = Setup(source.choice((0x02, 0x21, 0xA1, source.randrange(256))), source.choice((1, 0xFE, 0xFF)))
                control(setup.request_type & 0x80, setup=setup)
            case 9:
                transfers.cancel_one(source)
            case 10:
                await (device.reset() if source.random() < 0.3 else device.set_configuration(source.randrange(2)))
            case 11:
                control(0, setup=Setup(0x02, 1, 0, source.choice((0x81, 0x02))))
                control(0, setup=Setup(0x21, 0xFF))
    await device.close()
    transfers.check()


def one_case(source: random.Random) -> None:
    block_size = source.choice((512, 2048))
    store = MemoryStore(BLOCKS * block_size, block_size=block_size, read_only=source.random() < 0.3)
    before = bytes(store.content)
    is_disk = block_size == 512
    device: VirtualDevice = disk_device(store) if is_disk else cdrom_device(store)

    async def case() -> None:
        await device.open(Listener())
        await device.reset()
        await device.set_configuration(1)
        await attack(device, source)
        assert len(store.content) == len(before)
        assert (is_disk and not store.read_only) or store.content == before
        # the device still works for a correct guest
        await device.open(Listener())
        await device.reset()
        await device.set_configuration(1)
        done: list[Transfer] = []
        for _ in range(3):  # unit attentions: reset, other medium
            cbw = struct.pack("<4sIIBBB16s", b"USBC", 7, 0, 0, 0, 6, bytes(16))
            device.submit(Transfer(TransferType.BULK, 0x02, done.append, data=cbw))
            device.submit(Transfer(TransferType.BULK, 0x81, done.append, length=13))
        ready = b"\1" if drives_of(device) and not drives_of(device)[0].medium else b"\0"
        assert (bytes(done[1].reply)[12:], bytes(done[-1].reply)[12:]) == (b"\1", ready)
        await device.close()
        await device.dispose()

    asyncio.run(case())


if __name__ == "__main__":
    run("scsi", one_case)
