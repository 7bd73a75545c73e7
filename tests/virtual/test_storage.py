"""Mass storage: the two transports, their alternate settings, and several logical units."""

from __future__ import annotations

import asyncio
import errno
import struct

import pytest
from tests.virtual.attached_scsi import TUR, Initiator
from tests.virtual.bulk_only import IN, OUT, Guest, Pattern, make, read10, write10

from farplug.errors import DeviceError
from farplug.scsi.disk import COMMANDS, DiskUnit
from farplug.testing.memory import MemoryGuest
from farplug.usb import Offer, Setup, Speed, Status, Transfer, TransferType
from farplug.usb.descriptors import ConfigurationDescriptor
from farplug.usb.types import DescriptorType
from farplug.virtual import CdromDrive, Disk, Numbers, VirtualDevice, cdrom_device, disk_device
from farplug.virtual.storage import MassStorage
from farplug.virtual.storage_transport import StorageTransport
from farplug.virtual.uas import STREAMS_EXPONENT
from farplug.virtual.unit import LogicalUnit

SELECT = bytes(4) + bytes.fromhex("0812 00") + bytes(17)
UNMAP = struct.pack(">HH4xQI4x", 22, 16, 8, 8)

EVERY_COMMAND: list[tuple[str, int | bytes]] = [
    ("00 00 00 00 00 00", 0),
    ("03 00 00 00 12 00", 18),
    ("03 01 00 00 08 00", 8),
    ("08 00 00 05 02 00", 1024),
    ("0a 00 00 05 02 00", b"\x0a" * 1024),
    ("12 00 00 00 60 00", 96),
    ("12 01 00 00 ff 00", 255),
    ("12 01 80 00 ff 00", 255),
    ("12 01 83 00 ff 00", 255),
    ("12 01 b0 00 ff 00", 255),
    ("12 01 b2 00 ff 00", 255),
    ("12 01 77 00 ff 00", 255),
    ("15 10 00 00 18 00", SELECT),
    ("15 10 00 00 18 00", b"\xff" * 24),
    ("1a 00 3f 00 c0 00", 192),
    ("1b 00 00 00 00 00", 0),
    ("1e 00 00 00 01 00", 0),
    ("23 00 00 00 00 00 00 00 fc 00", 252),
    ("25 00 00 00 00 00 00 00 00 00", 8),
    ("28 00 00 00 00 05 00 00 10 00", 8192),
    ("28 08 00 00 00 05 00 00 10 00", 8192),
    ("28 00 00 00 00 3f 00 00 02 00", 1024),
    ("2a 00 00 00 00 09 00 00 02 00", b"\x2a" * 1024),
    ("2a 08 00 00 00 09 00 00 02 00", b"\x2b" * 1024),
    ("2a 20 00 00 00 09 00 00 02 00", b"\x2c" * 1024),
    ("2e 00 00 00 00 0c 00 00 01 00", b"\x2e" * 512),
    ("2f 00 00 00 00 00 00 00 40 00", 0),
    ("2f 02 00 00 00 09 00 00 01 00", b"\x2b" * 512),
    ("2f 02 00 00 00 09 00 00 01 00", b"\x2c" * 512),
    ("35 00 00 00 00 00 00 00 00 00", 0),
    ("41 00 00 00 00 10 00 00 04 00", b"\x41" * 512),
    ("42 00 00 00 00 00 00 00 18 00", UNMAP),
    ("55 10 00 00 00 00 00 00 1c 00", bytes(4) + SELECT),
    ("5a 00 08 00 00 00 00 00 ff 00", 255),
    ("88 00 00 00 00 00 00 00 00 05 00 00 00 02 00 00", 1024),
    ("8a 00 00 00 00 00 00 00 00 05 00 00 00 02 00 00", b"\x8a" * 1024),
    ("8e 00 00 00 00 00 00 00 00 07 00 00 00 01 00 00", b"\x8e" * 512),
    ("8f 00 00 00 00 00 00 00 00 05 00 00 00 02 00 00", 0),
    ("91 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00", 0),
    ("93 01 00 00 00 00 00 00 00 14 00 00 00 02 00 00", 0),
    ("93 08 00 00 00 00 00 00 00 16 00 00 00 02 00 00", bytes(512)),
    ("9e 10 00 00 00 00 00 00 00 00 00 00 00 20 00 00", 32),
    ("a0 00 00 00 00 00 00 00 10 00 00 00", 4096),
    ("a3 0c 00 00 00 00 00 00 10 00 00 00", 4096),
    ("a3 0c 01 12 00 00 00 00 00 0a 00 00", 10),
    ("a8 00 00 00 00 05 00 00 00 02 00 00", 1024),
    ("aa 00 00 00 00 18 00 00 00 02 00 00", b"\xaa" * 1024),
    ("ae 00 00 00 00 1a 00 00 00 01 00 00", b"\xae" * 512),
    ("af 00 00 00 00 05 00 00 00 02 00 00", 0),
    ("85 08 0e 00 00 00 01 00 00 00 00 00 00 00 ec 00", 512),
]
"""Commands with their length of data-in, or with their data-out."""


def test_every_command_is_in_the_table() -> None:
    known = {(row.opcode, row.service_action or 0) for row in COMMANDS}
    here = {bytes.fromhex(cdb)[:2] for cdb, _ in EVERY_COMMAND}
    assert {(cdb[0], cdb[1] & 0x1F if cdb[0] in (0x9E, 0xA3) else 0) for cdb in here} >= known


@pytest.mark.parametrize("speed", [Speed.SUPER, Speed.HIGH])
async def test_every_command_is_the_same_over_both_transports(speed: Speed) -> None:
    stores = Pattern(unmaps=True), Pattern(unmaps=True)
    bulk_only = await Guest.plug(make(stores[0]))
    attached = await Initiator.plug_in(stores[1], speed=speed)
    for cdb, data in EVERY_COMMAND:
        receive, send = (data, b"") if isinstance(data, int) else (0, data)
        expected = bulk_only.command(cdb, receive=receive, send=send)
        sense = bulk_only.sense() if expected.status else (0, 0, 0)
        got = attached.run(cdb, receive=receive, send=send)
        assert (cdb, got.sense) == (cdb, sense)
        assert got.data == expected.data[: receive - expected.residue]
        assert stores[0].content == stores[1].content
        assert stores[0].log == stores[1].log
    one, other = attached.device.figures, bulk_only.device.figures
    assert one is not None
    assert other is not None
    assert (one.read, one.written) == (other.read, other.written)
    assert 15 + len(EVERY_COMMAND) >= one.commands > len(EVERY_COMMAND)
    await attached.leave()


@pytest.mark.parametrize(
    ("transport", "speed", "protocols"),
    [
        (StorageTransport.AUTO, Speed.SUPER, [0x50, 0x62]),
        (StorageTransport.AUTO, Speed.HIGH, [0x50, 0x62]),
        (StorageTransport.AUTO, Speed.FULL, [0x50]),
        (StorageTransport.BOT, Speed.SUPER, [0x50]),
        (StorageTransport.UAS, Speed.SUPER, [0x62]),
        (StorageTransport.UAS, Speed.HIGH, [0x62]),
        (StorageTransport.UAS, Speed.FULL, [0x50]),
    ],
)
def test_alternate_settings(transport: StorageTransport, speed: Speed, protocols: list[int]) -> None:
    interfaces = Disk(Pattern(), transport=transport).interfaces(speed, Numbers())
    assert [(one.number, one.alternate) for one in interfaces] == [(0, number) for number in range(len(protocols))]
    assert [one.interface_protocol for one in interfaces] == protocols
    for one in interfaces:
        if one.interface_protocol == 0x62:
            usages = {endpoint.address: endpoint.extra.hex() for endpoint in one.endpoints}
            assert usages == {0x04: "04240100", 0x83: "04240200", 0x81: "04240300", 0x02: "04240400"}
            streams = [endpoint.companion and endpoint.companion.attributes for endpoint in one.endpoints]
            assert streams == ([0, *[STREAMS_EXPONENT] * 3] if speed is Speed.SUPER else [None] * 4)


def test_offers() -> None:
    uas = "USB Attached SCSI"
    device = disk_device(Pattern())
    assert device.used_at_once
    everything = [Offer(Speed.SUPER), Offer(Speed.SUPER, uas), Offer(Speed.HIGH), Offer(Speed.HIGH, uas)]
    assert list(device.offers) == everything
    for offer in (*everything, *everything):
        device.select(offer)
        assert device.offer == offer
        assert device.identity.speed is offer.speed
        assert _protocols(device) == ([0x50] if offer.without else [0x50, 0x62])
        assert device.has_streams == (offer == everything[0])
    speeds = [Offer(Speed.SUPER), Offer(Speed.HIGH)]
    for transport in (StorageTransport.BOT, StorageTransport.UAS):
        assert list(disk_device(Pattern(), transport=transport).offers) == speeds
    full = [Offer(Speed.HIGH), Offer(Speed.HIGH, uas), Offer(Speed.FULL)]
    assert list(disk_device(Pattern(), speeds=(Speed.HIGH, Speed.FULL)).offers) == full
    several = VirtualDevice(Disk(Pattern()), Disk(Pattern()))
    assert list(several.offers) == speeds
    assert not several.used_at_once


@pytest.mark.parametrize(
    ("transport", "protocols"),
    [(StorageTransport.AUTO, [0x50]), (StorageTransport.BOT, [0x50]), (StorageTransport.UAS, [0x62])],
)
def test_a_cdrom_drive_has_one_protocol(transport: StorageTransport, protocols: list[int]) -> None:
    device = cdrom_device(transport=transport)
    assert list(device.offers) == [Offer(Speed.SUPER), Offer(Speed.HIGH)]
    assert _protocols(device) == protocols


def test_a_disk_beside_a_cdrom_drive_has_both_protocols() -> None:
    disk = LogicalUnit(DiskUnit(store := Pattern(), luns=2), store)
    assert _protocols(VirtualDevice(MassStorage(CdromDrive(luns=2), disk))) == [0x50, 0x62]


def _protocols(device: VirtualDevice) -> list[int]:
    """Return the protocols of the alternate settings in the configuration descriptor."""
    descriptor = device._layout.descriptor(DescriptorType.CONFIGURATION, 0)
    assert descriptor is not None
    return [one.interface_protocol for one in ConfigurationDescriptor.parse(descriptor).interfaces]


@pytest.mark.parametrize("count", [0, 17])
def test_too_few_or_too_many_units(count: int) -> None:
    with pytest.raises(ValueError, match=f"1 to 16 logical units, not {count}"):
        MassStorage(*Disk(*[Pattern()] * 1).units * count)


@pytest.mark.parametrize("speed", [Speed.SUPER, Speed.HIGH])
async def test_changing_between_the_transports(speed: Speed) -> None:
    """Change with transfers pending and a write in flight: neither transport sees commands of the other."""
    store = Pattern()
    initiator = await Initiator.plug_in(store, speed=speed)
    store.holding = True
    initiator.start(write10(0, 2), send=b"\xaa" * 1024)
    initiator.start(read10(0, 2), receive=1024)
    await initiator.choose(0)
    assert all(one.status is not None for one in initiator.submitted)
    store.holding = False
    store.release()
    bulk_only = Guest(initiator.device)
    assert bulk_only.command(read10(1, 2), receive=1024).data == b"\xaa" * 512 + store.original[1024:1536]
    assert bulk_only.command("ff", receive=0).status == 1
    pending = [bulk_only.send(bulk_only.cbw(write10(4, 2), 1024, False)), bulk_only.receive(13)]
    await initiator.choose(1)
    assert [one.status for one in pending] == [Status.SUCCESS, Status.CANCELLED]
    assert initiator.run(read10(4, 2), receive=1024).data == store.original[2048:3072]
    for setup in ("a1fe000000000100", "21ff000000000000"):  # of Bulk-Only Transport
        assert initiator.control(bytes.fromhex(setup)).status is Status.STALL
    assert await initiator.device.set_interface(0, 2) is Status.STALL
    assert initiator.run(TUR).status == 0
    await initiator.device.set_configuration(1)
    assert Guest(initiator.device).command(TUR.hex()).status == 0  # the first setting again
    await initiator.leave()


@pytest.mark.parametrize("speed", [Speed.SUPER, Speed.HIGH])
async def test_several_units(speed: Speed) -> None:
    stores = [Pattern(16 + number) for number in range(16)]
    for number, store in enumerate(stores):
        store.serial_number = f"{number:016X}"
    initiator = await Initiator.plug_in(*stores, speed=speed)
    for lun, store in enumerate(stores):
        capacity = initiator.run("25 00 00 00 00 00 00 00 00 00", receive=8, lun=lun).data
        assert capacity == struct.pack(">II", 15 + lun, 512)
        assert initiator.run("12 01 80 00 ff 00", receive=255, lun=lun).data[4:] == f"{lun:016X}".encode()
        assert initiator.run(write10(1, 1), send=bytes((lun,)) * 512, lun=lun).status == 0
        assert bytes(store.content) == store.original[:512] + bytes((lun,)) * 512 + store.original[1024:]
    names = {bytes(initiator.run("12 01 83 00 ff 00", receive=255, lun=lun).data) for lun in range(16)}
    assert len(names) == 16
    assert initiator.device.figures is not None
    assert initiator.device.figures.written == 16 * 512
    stores[3].block_count = 8
    assert [lun for lun in range(16) if initiator.run(TUR, lun=lun).sense == (6, 0x2A, 9)] == [3]
    await initiator.choose(0)
    bulk_only = Guest(initiator.device)
    assert bulk_only.control(bytes.fromhex("a1fe000000000100")).reply == b"\x0f"
    assert bulk_only.command(read10(1, 1), receive=512, lun=15).data == b"\x0f" * 512
    await initiator.leave()


async def test_each_unit_reports_its_own_unit_attention_to_the_first_command() -> None:
    initiator = await Initiator.plug_in(Pattern(), Pattern(), attention=True)
    assert initiator.run("03 00 00 00 12 00", receive=18, lun=1).data[2] == 6
    side_by_side = [initiator.start(TUR, lun=number % 2) for number in range(6)]
    assert [one.sense[0] for one in side_by_side] == [6, 0, 0, 0, 0, 0]
    await initiator.leave()


async def test_closing_ends_unfinished_writes() -> None:
    device = disk_device(Pattern())
    guest = await Guest.plug(device)
    (function,) = device.functions
    assert isinstance(function, MassStorage)
    (unit,) = function.units
    guest.command(write10(0, 1), send=bytes(512))
    assert unit.unfinished
    await device.close()
    assert not unit.unfinished


async def test_closing_reports_which_unit_may_have_lost_data() -> None:
    stores = Pattern(), Pattern()
    initiator = await Initiator.plug_in(*stores)
    stores[1].error = OSError(errno.EIO, "broken")
    with pytest.raises(DeviceError, match="what was written may be lost: broken"):
        await initiator.device.close()
    assert [store.log for store in stores] == [["flush"], ["flush"]]
    await initiator.device.dispose()


@pytest.mark.parametrize("speed", [Speed.SUPER, Speed.HIGH])
async def test_through_the_engine(speed: Speed) -> None:
    """Reset, cancel and unplug through usbredir while commands are running."""
    store = Pattern()
    device = disk_device(store, speeds=(speed,))
    async with MemoryGuest(device) as memory:
        for turn in range(3):
            await memory.set_configuration(1)
            await memory.set_interface(0, 1)
            streams = speed is Speed.SUPER

            def stream(tag: int, streams: bool = streams) -> int:
                return tag if streams else 0

            async def command(cdb: bytes, tag: int) -> None:
                await memory.bulk_out(0x04, struct.pack(">BxHxxxx8s16s", 1, tag, bytes(8), cdb))

            statuses = [memory.submit_in(0x83, 96, stream_id=stream(tag)) for tag in (1, 2, 3, 4, 5, 6)]
            await command(TUR, 6)  # clears the unit attention
            store.holding = True
            await command(write10(8, 2), 1)
            await command(read10(0, 2), 2)
            writing = memory.submit_out(OUT, bytes((turn,)) * 1024, stream_id=stream(1))
            reading = [memory.submit_in(IN, 512, stream_id=stream(2)) for _ in range(2)]
            for _ in range(20):
                await asyncio.sleep(0)
            assert not writing.done
            if turn == 1:
                reading[0].cancel()
                writing.cancel()
                await reading[0]
            if turn < 2:
                memory.reset()
            else:
                store.holding = False
                store.release()
                await memory.redirection.detach()
            store.holding = False
            store.release()
            answers = await asyncio.gather(writing, *reading, *statuses)
            assert all(one is not None for one in answers)
            assert bytes(store.content[8 * 512 : 10 * 512]) == bytes((turn,)) * 1024


async def test_unsupported_control_requests_stall() -> None:
    initiator = await Initiator.plug_in(Pattern())
    completed: list[Transfer] = []
    initiator.device.submit(
        Transfer(TransferType.CONTROL, 0x80, completed.append, length=4, setup=Setup(0xC1, 0x33, 0, 0, 4))
    )
    assert [one.status for one in completed] == [Status.STALL]
    await initiator.leave()
