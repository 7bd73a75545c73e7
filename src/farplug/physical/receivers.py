"""What a device receives or plays by itself: interrupt IN, buffered bulk IN, isochronous IN and OUT.

A question for each packet would come too late over a network: some transfers are always at the device.

Source: usb-redirection-protocol.md, start/stop iso stream, interrupt receiving and bulk receiving, and what
usbredirhost makes of it.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import ClassVar, Protocol

from farplug.libusb.binding import UsbHandle, UsbTransfer
from farplug.libusb.library import TRANSFER_NO_DEVICE, NoDevice, NoMemory, UsbError, transfer_status
from farplug.physical.gate import Gate
from farplug.physical.transfers import cancel
from farplug.usb.device import Reception
from farplug.usb.transfer import Status, Transfer
from farplug.usb.types import Buffer, Endpoint, TransferType

ERROR_PAUSE = 0.01
"""Seconds until a failed or stalled transfer is submitted again: some devices fail each at once, for ever."""

log = logging.getLogger(__name__)


class StreamHost(Protocol):
    """What a stream needs of the device that it belongs to."""

    def completed(self, usb: UsbTransfer) -> None:
        """The callback of libusb's transfers: brings them to ``came_back``, on the event loop."""

    def received(self, endpoint: int, status: Status, data: Buffer) -> None:
        """One packet, for the guest."""

    def reception_ended(self, endpoint: int, status: Status) -> None:
        """The stream ended by itself (``STALL``), or has an error to report while it runs on."""

    @property
    def gate(self) -> Gate:
        """Through which the device is talked to."""

    async def clear_halt(self, endpoint: int) -> None:
        """Clear an endpoint's halt. Raises ``UsbError`` if it stays."""

    def lost(self) -> None:
        """The device turned out to be gone."""


class Stream(ABC):
    """A reception that runs.

    Args:
        reception: what the guest asked for.
        endpoint: of the device.
        handle: libusb's.
        host: the device.
    """

    iso: ClassVar[bool] = False

    def __init__(self, reception: Reception, endpoint: Endpoint, handle: UsbHandle, host: StreamHost) -> None:
        self.address = endpoint.address
        self._reception = reception
        self._endpoint = endpoint
        self._host = host
        self._stopped = False
        self._stalled = False
        self._recovery: asyncio.Task[None] | None = None
        self._flying: set[UsbTransfer] = set()
        packets = reception.packets_per_transfer if self.iso else 0
        self._transfers = [handle.getTransfer(packets) for _ in range(reception.transfers)]

    @abstractmethod
    def start(self) -> None:
        """Submit what is to be submitted at the beginning. Raises ``UsbError``: the stream is to be stopped then."""

    def begin(self) -> None:
        """The same, later: an error ends the stream."""
        if self._stopped:
            return
        self._stalled = False
        try:
            self.start()
        except NoDevice:
            self._host.lost()
        except UsbError as error:
            log.warning("endpoint %02x: receiving cannot begin: %s", self.address, error)
            self._end()

    @abstractmethod
    def _returned(self, usb: UsbTransfer) -> None:
        """A transfer came back and the stream goes on: deal with it, submit it again."""

    @property
    def in_flight(self) -> list[UsbTransfer]:
        """libusb's transfers that are not back yet."""
        return list(self._flying)

    def stop(self) -> None:
        """Receive no more; what comes back later belongs to nobody."""
        self._stopped = True
        self._host.gate.forget(self)
        if self._recovery is not None:
            self._recovery.cancel()
        self._cancel_flying()
        for usb in self._transfers:
            if usb not in self._flying:
                usb.close()

    def came_back(self, usb: UsbTransfer) -> None:
        """libusb is done with one of the transfers."""
        self._flying.discard(usb)
        if self._stopped:
            usb.close()
            return
        code = usb.getStatus()
        if code == TRANSFER_NO_DEVICE:
            self._host.lost()
        elif self._stalled or self._has_stalled(usb):
            self._recover()
        else:
            self._returned(usb)

    def _has_stalled(self, usb: UsbTransfer) -> bool:
        return transfer_status(usb.getStatus()) is Status.STALL

    def _submit(self, usb: UsbTransfer) -> None:
        usb.submit()
        self._flying.add(usb)

    def _submit_all(self, fill: Callable[[UsbTransfer], None]) -> None:
        """Fill and submit all transfers; fewer, but one at least, where there is no memory: Linux has 16 MiB in all."""
        for usb in self._transfers:
            fill(usb)
            try:
                self._submit(usb)
            except NoMemory:
                if not self._flying:
                    raise
                count = len(self._flying), len(self._transfers)
                log.warning("endpoint %02x: there is memory for %d of %d transfers", self.address, *count)
                return

    def _resubmit(self, usb: UsbTransfer, held: bool = False) -> None:
        """Submit while the stream runs; if that fails, the stream ends. ``held``: the gate opens for it."""
        if self._host.gate.shut and not held:
            self._host.gate.when_open(usb, partial(self._resubmit, usb, True))
            return
        if self._stopped or self._stalled or usb in self._flying:
            return
        try:
            self._submit(usb)
        except NoDevice:
            self._host.lost()
        except NoMemory:  # another device has it, for the moment
            self._resubmit_later(usb)
        except UsbError as error:
            log.warning("endpoint %02x: receiving ends, %s", self.address, error)
            self._end()

    def _resubmit_later(self, usb: UsbTransfer) -> None:
        asyncio.get_running_loop().call_later(ERROR_PAUSE, self._resubmit, usb)

    def _end(self) -> None:
        if not self._stopped:
            self.stop()
            self._host.reception_ended(self.address, Status.STALL)

    def _cancel_flying(self) -> None:
        for usb in self.in_flight:
            self._host.gate.when_open(usb, partial(cancel, usb))

    # A stall: take all back, clear the halt, begin again. The guest hears of it only if that fails.

    def _recover(self) -> None:
        if not self._stalled:
            self._stalled = True
            self._cancel_flying()
        if not self._flying and self._recovery is None:
            self._recovery = asyncio.get_running_loop().create_task(self._begin_again())

    async def _begin_again(self) -> None:
        try:
            log.info("endpoint %02x stalled: its halt is cleared", self.address)
            await asyncio.sleep(ERROR_PAUSE)
            await self._host.clear_halt(self.address)
        except NoDevice:
            self._host.lost()
        except UsbError as error:
            log.warning("endpoint %02x stalled, and its halt cannot be cleared: %s", self.address, error)
            self._end()
        else:
            self._host.gate.when_open(self, self.begin)
        finally:
            self._recovery = None


class PacketStream(Stream):
    """Interrupt IN, and buffered bulk IN: each transfer that comes back is a packet for the guest."""

    def start(self) -> None:
        def fill(usb: UsbTransfer) -> None:
            buffer = bytearray(self._size)
            if self._reception.type is TransferType.BULK:
                usb.setBulk(self.address, buffer, self._host.completed, self)
            else:
                usb.setInterrupt(self.address, buffer, self._host.completed, self)

        self._submit_all(fill)

    @property
    def _size(self) -> int:
        return self._reception.bytes_per_transfer or self._endpoint.max_packet_size

    def _returned(self, usb: UsbTransfer) -> None:
        status = transfer_status(usb.getStatus())
        data = bytes(memoryview(usb.getBuffer())[: usb.getActualLength()])
        self._host.received(self.address, status, data)
        if status is Status.SUCCESS:
            self._resubmit(usb)
        else:
            self._resubmit_later(usb)


class IsoInStream(Stream):
    """Isochronous IN: each packet of a transfer that comes back is one for the guest."""

    iso = True

    def start(self) -> None:
        count, size = self._reception.packets_per_transfer, self._endpoint.max_packet_size

        def fill(usb: UsbTransfer) -> None:
            usb.setIsochronous(
                self.address,
                bytearray(count * size),
                self._host.completed,
                self,
                iso_transfer_length_list=[size] * count,
            )

        self._submit_all(fill)

    def _returned(self, usb: UsbTransfer) -> None:
        status = transfer_status(usb.getStatus())
        if status is not Status.SUCCESS:
            self._host.received(self.address, status, b"")
            self._resubmit_later(usb)
            return
        buffer, position, statuses = memoryview(usb.getBuffer()), 0, set()
        for packet in usb.getISOSetupList():
            status = transfer_status(packet["status"])
            statuses.add(status)
            data = bytes(buffer[position : position + packet["actual_length"]]) if status is Status.SUCCESS else b""
            position += packet["length"]
            if status is not Status.STALL:
                self._host.received(self.address, status, data)
            if self._stopped:
                return
        if Status.STALL in statuses:
            self._recover()
        else:
            self._resubmit(usb)


class IsoOutStream(Stream):
    """Isochronous OUT: packets are collected before the first goes out, because they come unevenly.

    Half of what fits is collected first. If all of it was played, it begins again with collecting; if more comes than
    fits, half of it is dropped: so the delay stays in the middle.
    """

    iso = True

    def __init__(self, reception: Reception, endpoint: Endpoint, handle: UsbHandle, host: StreamHost) -> None:
        super().__init__(reception, endpoint, handle, host)
        self._collected: deque[Transfer] = deque()
        self._capacity = reception.packets_per_transfer * reception.transfers
        self._to_drop = 0
        self._idle: list[UsbTransfer] = []
        self._playing: dict[UsbTransfer, list[Transfer]] = {}
        self._collecting = True

    def start(self) -> None:
        self._idle = list(self._transfers)
        self._collecting = True

    def submit(self, transfer: Transfer) -> None:
        """One packet from the guest. It is completed when it was played, or at once when it is dropped."""
        per_transfer = self._reception.packets_per_transfer
        held = len(self._collected) + per_transfer * len(self._playing)
        if held >= self._capacity and not self._to_drop:
            self._to_drop = max(1, self._capacity // 2)
        if self._to_drop:
            self._to_drop -= 1
            transfer.complete(Status.CANCELLED)
            return
        if transfer.length > self._endpoint.max_packet_size:
            transfer.complete(Status.INVALID)
            return
        if not transfer.length:
            transfer.complete()  # python-libusb1 has no packets without bytes
            return
        self._collected.append(transfer)
        if self._collecting and len(self._collected) >= max(1, self._capacity // 2):
            self._collecting = False
        self._play()

    def stop(self) -> None:
        super().stop()
        waiting = [*self._collected]
        self._collected.clear()
        for transfers in self._playing.values():
            waiting += transfers
        self._playing.clear()
        for transfer in waiting:
            transfer.complete(Status.CANCELLED)

    def _play(self) -> None:
        count = self._reception.packets_per_transfer
        while self._idle and len(self._collected) >= count and not (self._collecting or self._stalled or self._stopped):
            usb = self._idle.pop()
            packets = [self._collected.popleft() for _ in range(count)]
            self._playing[usb] = packets
            usb.setIsochronous(
                self.address,
                bytearray(b"".join(packet.data for packet in packets)),
                self._host.completed,
                self,
                iso_transfer_length_list=[packet.length for packet in packets],
            )
            self._resubmit(usb)

    def came_back(self, usb: UsbTransfer) -> None:
        packets = self._playing.pop(usb, [])
        if not self._stopped:
            self._idle.append(usb)
            for packet, result in zip(packets, usb.getISOSetupList(), strict=True):
                packet.complete(transfer_status(result["status"]), actual=result["actual_length"])
        super().came_back(usb)

    def _has_stalled(self, usb: UsbTransfer) -> bool:
        packets = usb.getISOSetupList()
        return super()._has_stalled(usb) or any(transfer_status(one["status"]) is Status.STALL for one in packets)

    def _returned(self, usb: UsbTransfer) -> None:
        status = transfer_status(usb.getStatus())
        if status is not Status.SUCCESS:
            self._host.reception_ended(self.address, status)
        if not self._playing and len(self._collected) < self._reception.packets_per_transfer:
            self._collecting = True
        self._play()


def stream_kind(endpoint: Endpoint) -> type[Stream]:
    """The kind of stream that an endpoint needs."""
    if endpoint.type is not TransferType.ISOCHRONOUS:
        return PacketStream
    return IsoInStream if endpoint.address & 0x80 else IsoOutStream
