"""Devices made of fake libusb objects, for the tests of this folder."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tests.libusb.fake_libusb import FakeDevice, FakeHandle, FakeLibrary, FakeTransfer

from farplug.physical import PhysicalDevice, physical_device
from farplug.usb import DeviceEvent, Setup, Status, Transfer, TransferType
from farplug.usb.descriptors import (
    ConfigurationDescriptor,
    EndpointDescriptor,
    InterfaceDescriptor,
    SuperSpeedCompanion,
)
from farplug.usb.types import Buffer

CONTROL, ISO, BULK, INTERRUPT = (
    TransferType.CONTROL,
    TransferType.ISOCHRONOUS,
    TransferType.BULK,
    TransferType.INTERRUPT,
)

BULK_IN, BULK_OUT, KEYS, LIGHTS, SOUND, CAMERA = 0x81, 0x02, 0x83, 0x03, 0x04, 0x85

EVERYTHING = ConfigurationDescriptor(
    1,
    (
        InterfaceDescriptor(
            0,
            0,
            8,
            6,
            80,
            (
                EndpointDescriptor(BULK_IN, BULK, 512),
                EndpointDescriptor(BULK_OUT, BULK, 512),
                EndpointDescriptor(KEYS, INTERRUPT, 8, 4),
                EndpointDescriptor(LIGHTS, INTERRUPT, 8, 4),
            ),
        ),
        InterfaceDescriptor(2, 0, 1, 2, 0),
        InterfaceDescriptor(
            2, 1, 1, 2, 0, (EndpointDescriptor(SOUND, ISO, 100, 1), EndpointDescriptor(CAMERA, ISO, 0x0800 | 50, 1))
        ),
    ),
)
"""All types of transfer; the numbers of its interfaces have a gap. The camera sends two packets of 50 bytes at once."""

OTHER = ConfigurationDescriptor(3, (InterfaceDescriptor(1, 0, 255, 0, 0, (EndpointDescriptor(0x88, BULK, 64),)),))

STREAMING = ConfigurationDescriptor(
    1,
    (
        InterfaceDescriptor(
            0,
            0,
            8,
            6,
            98,
            (
                EndpointDescriptor(BULK_IN, BULK, 1024, companion=SuperSpeedCompanion(15, 4)),
                EndpointDescriptor(BULK_OUT, BULK, 1024, companion=SuperSpeedCompanion(15, 4)),
            ),
        ),
    ),
)


@dataclass
class Listener:
    """Records what a device reports."""

    packets: list[tuple[int, Status, bytes]] = field(default_factory=list)
    ended: list[tuple[int, Status]] = field(default_factory=list)
    losses: list[Exception | None] = field(default_factory=list)

    def happened(self, event: DeviceEvent) -> None:
        raise AssertionError

    def received(self, endpoint: int, status: Status, data: Buffer) -> bool:
        self.packets.append((endpoint, status, bytes(data)))
        return True

    def reception_ended(self, endpoint: int, status: Status) -> None:
        self.ended.append((endpoint, status))

    def lost(self, error: Exception | None) -> None:
        self.losses.append(error)


@dataclass
class Bench:
    """A fake device of libusb, the farplug device made of it, and its listener."""

    fake: FakeDevice
    library: FakeLibrary
    device: PhysicalDevice
    listener: Listener
    done: list[Transfer] = field(default_factory=list)

    @property
    def handle(self) -> FakeHandle:
        return self.fake.handle

    @property
    def in_flight(self) -> list[FakeTransfer]:
        return self.fake.handle.in_flight

    def submit(
        self,
        type: TransferType,
        endpoint: int,
        *,
        length: int = 0,
        data: Buffer = b"",
        setup: Setup | None = None,
        stream_id: int = 0,
    ) -> Transfer:
        transfer = Transfer(
            type, endpoint, self.done.append, length=length, data=data, setup=setup, stream_id=stream_id
        )
        self.device.submit(transfer)
        return transfer

    def read(self, length: int, endpoint: int = BULK_IN) -> Transfer:
        return self.submit(BULK, endpoint, length=length)

    def write(self, data: Buffer, endpoint: int = BULK_OUT) -> Transfer:
        return self.submit(BULK, endpoint, data=data)

    def control(self, setup: Setup, data: bytes = b"") -> Transfer:
        return self.submit(CONTROL, setup.request_type & 0x80, length=setup.length, data=data, setup=setup)

    def results(self) -> list[tuple[Status | None, int]]:
        return [(transfer.status, transfer.actual) for transfer in self.done]


async def settle(turns: int = 6) -> None:
    """Let the loop handle what is ready."""
    for _ in range(turns):
        await asyncio.sleep(0.001)


async def until(condition: Callable[[], object]) -> None:
    """Wait until a condition is true."""
    async with asyncio.timeout(100):
        while not condition():
            await asyncio.sleep(0.002)


def on_bench(fake: FakeDevice, *, library: FakeLibrary | None = None) -> Bench:
    library = library or FakeLibrary(fake)
    device = physical_device(fake, library=library, product="Thing")
    return Bench(fake, library, device, Listener())


@asynccontextmanager
async def opened(fake: FakeDevice | None = None, *, library: FakeLibrary | None = None) -> AsyncIterator[Bench]:
    """An open device. At the end it is closed, and so is everything of libusb's."""
    bench = on_bench(fake or FakeDevice(EVERYTHING, OTHER), library=library)
    await bench.device.open(bench.listener)
    try:
        yield bench
    finally:
        await bench.device.close()
        assert all(context.closed for context in bench.library.contexts)
        assert bench.handle.closed
        assert not bench.fake.waits, "the event loop would have blocked"
        assert bench.fake.unplugged or not bench.handle.claimed
