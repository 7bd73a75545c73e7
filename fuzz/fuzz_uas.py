"""Fuzz USB Attached SCSI: any IUs, data, cancels, resets and settings of a guest, and a store that completes late.

The disk completes each transfer once, stays within its bounds, and works for the next guest.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import struct

from farplug.errors import DeviceError
from farplug.scsi.disk import COMMANDS
from farplug.usb import Speed, Transfer, TransferType
from farplug.virtual import VirtualDevice, disk_device
from harness import Listener, Transfers, raise_logged, run
from late_store import LateStore

BLOCKS = 64
COMMAND, STATUS, DATA_IN, DATA_OUT = 0x04, 0x83, 0x81, 0x02
LENGTHS = (0, 1, 16, 96, 512, 1024, 4096, 32768, 2**31, 2**32 - 1)
KNOWN = [bytes((row.opcode, row.service_action or 0)) for row in COMMANDS]


def lun(source: random.Random) -> bytes:
    return source.choice((bytes(8), bytes(8), bytes(8), b"\0\1" + bytes(6), b"\x40" + bytes(7), source.randbytes(8)))


def information_unit(source: random.Random) -> bytes:
    tag = source.choice((*range(1, 9), source.randrange(65536)))
    if source.random() < 0.2:
        function = source.choice((1, 2, 4, 8, 16, 128, 129, source.randrange(256)))
        iu = struct.pack(">BxHBxH8s", 5, tag, function, source.randrange(9), lun(source))
    else:
        cdb = bytearray(source.choice((source.choice(KNOWN), b"\x28\0", b"\x2a\0", b"\x2a\x08")) + bytes(14))
        if cdb[0] in (0x28, 0x2A):
            cdb[2:9] = struct.pack(">IxH", source.randrange(BLOCKS + 2), source.randrange(9))
        else:
            for _ in range(source.randrange(4)):
                cdb[source.randrange(1, 16)] = source.randrange(256)
        extra = source.choice((0, 0, 0, 0, 4, source.randrange(256)))
        iu = struct.pack(
            ">BxHBxBx8s16s", 1, tag, source.choice((0, 0, 0, 1, 2, 4)), extra, lun(source), bytes(cdb)
        ) + bytes(source.choice((0, 4)))
    fate = source.random()
    if fate < 0.03:
        return iu[: source.randrange(len(iu))]
    return source.randbytes(1) + iu[1:] if fate < 0.06 else iu


async def attack(device: VirtualDevice, store: LateStore, source: random.Random) -> None:
    transfers = Transfers(device)
    streams = device.identity.speed is Speed.SUPER and source.random() < 0.95

    def submit(endpoint: int, *, length: int = 0, data: bytes = b"") -> None:
        stream = source.randrange(1, 9) if streams and endpoint != COMMAND else 0
        transfers.submit(TransferType.BULK, endpoint, length=length, data=data, stream_id=stream)

    for _ in range(source.randrange(150)):
        match source.randrange(20):
            case 0 | 1 | 2 | 3 | 4 | 5:
                submit(COMMAND, data=information_unit(source))
            case 6 | 7 | 8:
                submit(STATUS, length=source.choice((96, 96, 96, 96, 0, 4)))
            case 9 | 10:
                submit(DATA_IN, length=source.choice(LENGTHS))
            case 11 | 12 | 13:
                submit(DATA_OUT, data=b"\xaa" * source.choice((0, 1, 24, 512, 700, 1024, 4096)))
            case 14 | 15 | 16:
                store.go(source.randrange(4))
            case 17 | 18:
                transfers.cancel_one(source)
            case 19 if source.random() < 0.2:
                await device.set_interface(0, source.choice((0, 1, 1, 2)))
                if source.random() < 0.3:
                    await device.set_configuration(1)
                    await device.set_interface(0, 1)
    store.go_all()
    with contextlib.suppress(DeviceError):  # a deferred error
        await device.close()
    transfers.check()


def one_case(source: random.Random) -> None:
    store = LateStore(source, BLOCKS, read_only=source.random() < 0.2, failing=0.1)
    before = bytes(store.content)
    device = disk_device(store, speeds=(source.choice((Speed.SUPER, Speed.HIGH)),))

    async def plug() -> None:
        await device.open(Listener())
        await device.reset()
        await device.set_configuration(1)
        await device.set_interface(0, 1)

    async def case() -> None:
        await plug()
        await attack(device, store, source)
        assert len(store.content) == BLOCKS * 512
        assert not store.read_only or store.content == before
        # the disk still works for a correct guest
        await plug()
        for expected in (2, 0):
            done: list[Transfer] = []
            stream = 9 if device.identity.speed is Speed.SUPER else 0
            device.submit(Transfer(TransferType.BULK, STATUS, done.append, length=96, stream_id=stream))
            iu = struct.pack(">BxH28x", 1, 9)
            device.submit(Transfer(TransferType.BULK, COMMAND, done.append, data=iu))
            assert [one.reply[6] for one in done if one.endpoint == STATUS] == [expected]
        await device.close()
        await device.dispose()

    asyncio.run(case())


if __name__ == "__main__":
    raise_logged()
    run("uas", one_case)
