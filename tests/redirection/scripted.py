"""A device that the test controls: it keeps transfers until the test completes them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from farplug.testing.memory import MemoryGuest
from farplug.usb import Device, DeviceListener, Endpoint, Identity, Interface, Offer, Reception, Speed, Status, Transfer
from farplug.usb.types import TransferType

BULK_IN, BULK_OUT = 0x81, 0x02
INTERRUPT_IN, INTERRUPT_OUT = 0x83, 0x04
ISO_IN, ISO_OUT = 0x85, 0x06
STREAM_IN = 0x87


class ScriptedDevice(Device):
    """Interface 0 has every kind of endpoint; its alternate setting 1 has two, with bulk streams."""

    def __init__(self, speeds: Sequence[Speed] = (Speed.HIGH,)) -> None:
        self._speeds = tuple(speeds)
        self._speed = speeds[0]
        self._configuration = 0
        self.alternate = 0
        self.submitted: list[Transfer] = []
        self.cancelled: list[Transfer] = []
        self.calls: list[object] = []
        self.listener: DeviceListener | None = None
        self.cancels = True
        self.raises: Exception | None = None
        self.operation_status = Status.SUCCESS
        self.receiving_status = Status.SUCCESS
        self.close_error: Exception | None = None
        self.interval = 4

    @property
    def identity(self) -> Identity:
        return Identity(self._speed, 0x1209, 0x0001, 0x0100, product="Scripted")

    @property
    def configuration(self) -> int:
        return self._configuration

    @property
    def interfaces(self) -> Sequence[Interface]:
        bulk, interrupt, iso = TransferType.BULK, TransferType.INTERRUPT, TransferType.ISOCHRONOUS
        endpoints: tuple[Endpoint, ...]
        if self.alternate == 0:
            endpoints = (
                Endpoint(BULK_IN, bulk, 512),
                Endpoint(BULK_OUT, bulk, 512),
                Endpoint(INTERRUPT_IN, interrupt, 8, self.interval),
                Endpoint(INTERRUPT_OUT, interrupt, 8, self.interval),
                Endpoint(ISO_IN, iso, 1024, 1),
                Endpoint(ISO_OUT, iso, 1024, 1),
            )
        else:
            endpoints = (Endpoint(STREAM_IN, bulk, 1024, 0, 16), Endpoint(BULK_OUT, bulk, 1024, 0, 16))
        return (Interface(0, self.alternate, 255, 1, 2, endpoints),)

    @property
    def offers(self) -> Sequence[Offer]:
        return [Offer(speed) for speed in self._speeds]

    def select(self, offer: Offer) -> None:
        super().select(offer)
        self._speed = offer.speed

    async def open(self, listener: DeviceListener) -> None:
        self.calls.append("open")
        self.listener = listener

    def submit(self, transfer: Transfer) -> None:
        self.submitted.append(transfer)
        if self.raises is not None:
            raise self.raises

    def cancel(self, transfer: Transfer) -> None:
        self.cancelled.append(transfer)
        if self.raises is not None:
            raise self.raises
        if self.cancels:
            transfer.complete(Status.CANCELLED)

    async def reset(self) -> Status:
        self.calls.append("reset")
        if self.raises is not None:
            raise self.raises
        self._configuration = self.alternate = 0
        return self.operation_status

    async def set_configuration(self, value: int) -> Status:
        self.calls.append(("set_configuration", value))
        if self.operation_status is Status.SUCCESS:
            self._configuration = value
        return self.operation_status

    async def set_interface(self, number: int, alternate: int) -> Status:
        self.calls.append(("set_interface", number, alternate))
        if self.operation_status is Status.SUCCESS:
            self.alternate = alternate
        return self.operation_status

    def start_receiving(self, reception: Reception) -> Status:
        self.calls.append(reception)
        if self.raises is not None:
            raise self.raises
        return self.receiving_status

    def stop_receiving(self, endpoint: int) -> Status:
        self.calls.append(("stop_receiving", endpoint))
        if self.raises is not None:
            raise self.raises
        return Status.SUCCESS

    async def allocate_streams(self, endpoints: Sequence[int], count: int) -> Status:
        self.calls.append(("allocate_streams", tuple(endpoints), count))
        return self.operation_status

    async def free_streams(self, endpoints: Sequence[int]) -> Status:
        self.calls.append(("free_streams", tuple(endpoints)))
        return self.operation_status

    async def close(self) -> None:
        self.calls.append("close")
        self.listener = None
        if self.close_error is not None:
            raise self.close_error


def kinds(guest: MemoryGuest) -> list[type]:
    """Return the types of the events that the engine emitted."""
    return [type(event) for event in guest.events]


async def settle(turns: int = 20) -> None:
    """Let the event loop run what is ready."""
    for _ in range(turns):
        await asyncio.sleep(0)
