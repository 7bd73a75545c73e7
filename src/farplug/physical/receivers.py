"""Receptions that run: interrupt IN, buffered bulk IN, isochronous IN and OUT.

Over a network, a request for each packet would come too late. So several transfers are always in flight at the device.

Source: usb-redirection-protocol.md, start/stop iso stream, interrupt receiving and bulk receiving; usbredirhost.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import ClassVar, Protocol

from farplug.libusb.binding import UsbHandle, UsbTransfer
from farplug.libusb.library import TRANSFER_NO_DEVICE, NoDevice, NoMemory, UsbError, transfer_status
from farplug.physical.gate import Gate
from farplug.physical.transfers import cancel
from farplug.rate_limit import limited_logger
from farplug.usb.device import Reception
from farplug.usb.transfer import Status, Transfer
from farplug.usb.types import Buffer, Endpoint, TransferType

ERROR_PAUSE = 0.01
"""Seconds until a failed or stalled transfer is submitted again: a broken device may fail each one at once."""

log = limited_logger(__name__)


class ReceiverHost(Protocol):
    """The open device that a receiver belongs to."""

    def completed(self, usb: UsbTransfer) -> None:
        """Call ``handle_completion`` on the event loop: the callback of libusb's transfers."""

    def received(self, endpoint: int, status: Status, data: Buffer) -> None:
        """Pass a packet to the guest."""

    def reception_ended(self, endpoint: int, status: Status) -> None:
        """Report that the reception ended (``STALL``), or an error of a reception that goes on."""

    @property
    def gate(self) -> Gate:
        """Return the gate of the device."""

    async def clear_halt(self, endpoint: int) -> None:
        """Clear an endpoint's halt. Raises ``UsbError`` if that fails."""

    def lost(self) -> None:
        """Report that the device was unplugged."""


class Receiver(ABC):
    """A running reception of one endpoint.

    Args:
        reception: the guest's parameters.
        endpoint: of the device.
        handle: libusb's handle.
        host: the open device.
    """

    iso: ClassVar[bool] = False

    def __init__(self, reception: Reception, endpoint: Endpoint, handle: UsbHandle, host: ReceiverHost) -> None:
        self.address = endpoint.address
        self._reception = reception
        self._endpoint = endpoint
        self._host = host
        self._stopped = False
        self._stalled = False
        self._recovery: asyncio.Task[None] | None = None
        self._in_flight: set[UsbTransfer] = set()
        packets = reception.packets_per_transfer if self.iso else 0
        self._transfers = [handle.getTransfer(packets) for _ in range(reception.transfers)]

    @abstractmethod
    def start(self) -> None:
        """Submit the first transfers. Raises ``UsbError`` if that fails; then the caller stops the receiver."""

    def start_deferred(self) -> None:
        """Start as an action of the gate: an error ends the reception."""
        if self._stopped:
            return
        self._stalled = False
        try:
            self.start()
        except NoDevice:
            self._host.lost()
        except UsbError as error:
            log.warning("endpoint %02x: cannot start receiving: %s", self.address, error)
            self._end()

    @abstractmethod
    def _process(self, usb: UsbTransfer) -> None:
        """Process a completed transfer, and submit it again."""

    @property
    def in_flight(self) -> list[UsbTransfer]:
        """Return libusb's transfers that are not complete."""
        return list(self._in_flight)

    def stop(self) -> None:
        """Stop the reception. Transfers that are complete later are closed."""
        self._stopped = True
        self._host.gate.discard(self)
        if self._recovery is not None:
            self._recovery.cancel()
        self._cancel_in_flight()
        for usb in self._transfers:
            if usb not in self._in_flight:
                usb.close()

    def handle_completion(self, usb: UsbTransfer) -> None:
        """Handle the completion of a transfer."""
        self._in_flight.discard(usb)
        if self._stopped:
            usb.close()
            return
        code = usb.getStatus()
        if code == TRANSFER_NO_DEVICE:
            self._host.lost()
        elif self._stalled or self._has_stalled(usb):
            self._recover()
        else:
            self._process(usb)

    def _has_stalled(self, usb: UsbTransfer) -> bool:
        return transfer_status(usb.getStatus()) is Status.STALL

    def _submit(self, usb: UsbTransfer) -> None:
        usb.submit()
        self._in_flight.add(usb)

    def _submit_all(self, fill: Callable[[UsbTransfer], None]) -> None:
        """Fill and submit all transfers, or as many as there is memory for, at least one: Linux has 16 MiB in all."""
        for usb in self._transfers:
            fill(usb)
            try:
                self._submit(usb)
            except NoMemory:
                if not self._in_flight:
                    raise
                count = len(self._in_flight), len(self._transfers)
                log.warning("endpoint %02x: memory for only %d of %d transfers", self.address, *count)
                return

    def _resubmit(self, usb: UsbTransfer, deferred: bool = False) -> None:
        """Submit a transfer again; if that fails, the reception ends. ``deferred``: called by the gate."""
        if self._host.gate.shut and not deferred:
            self._host.gate.run_or_defer(usb, partial(self._resubmit, usb, True))
            return
        if self._stopped or self._stalled or usb in self._in_flight:
            return
        try:
            self._submit(usb)
        except NoDevice:
            self._host.lost()
        except NoMemory:  # other devices use all of it for now
            self._resubmit_later(usb)
        except UsbError as error:
            log.warning("endpoint %02x: receiving ended: %s", self.address, error)
            self._end()

    def _resubmit_later(self, usb: UsbTransfer) -> None:
        asyncio.get_running_loop().call_later(ERROR_PAUSE, self._resubmit, usb)

    def _end(self) -> None:
        if not self._stopped:
            self.stop()
            self._host.reception_ended(self.address, Status.STALL)

    def _cancel_in_flight(self) -> None:
        for usb in self.in_flight:
            self._host.gate.run_or_defer(usb, partial(cancel, usb))

    # After a stall: cancel all transfers, clear the halt, start again. Only a failure is reported to the guest.

    def _recover(self) -> None:
        if not self._stalled:
            self._stalled = True
            self._cancel_in_flight()
        if not self._in_flight and self._recovery is None:
            self._recovery = asyncio.get_running_loop().create_task(self._clear_and_restart())

    async def _clear_and_restart(self) -> None:
        try:
            log.info("endpoint %02x stalled: clearing its halt", self.address)
            await asyncio.sleep(ERROR_PAUSE)
            await self._host.clear_halt(self.address)
        except NoDevice:
            self._host.lost()
        except UsbError as error:
            log.warning("endpoint %02x stalled, and clearing its halt failed: %s", self.address, error)
            self._end()
        else:
            self._host.gate.run_or_defer(self, self.start_deferred)
        finally:
            self._recovery = None


class PacketReceiver(Receiver):
    """Interrupt IN, and buffered bulk IN: each completed transfer is a packet for the guest."""

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

    def _process(self, usb: UsbTransfer) -> None:
        status = transfer_status(usb.getStatus())
        data = bytes(memoryview(usb.getBuffer())[: usb.getActualLength()])
        self._host.received(self.address, status, data)
        if status is Status.SUCCESS:
            self._resubmit(usb)
        else:
            self._resubmit_later(usb)


class IsoReceiver(Receiver):
    """Isochronous IN: each packet of a completed transfer is a packet for the guest."""

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

    def _process(self, usb: UsbTransfer) -> None:
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


class IsoPlayer(Receiver):
    """Isochronous OUT: plays packets of the guest from a buffer, because they arrive at irregular intervals.

    Playing starts when the buffer is half full, and restarts so after the buffer was empty. When the buffer is full, as
    many new packets as half the buffer holds are dropped. So the delay stays near half the buffer.
    """

    iso = True

    def __init__(self, reception: Reception, endpoint: Endpoint, handle: UsbHandle, host: ReceiverHost) -> None:
        super().__init__(reception, endpoint, handle, host)
        self._collected: deque[Transfer] = deque()
        self._capacity = reception.packets_per_transfer * reception.transfers
        self._to_drop = 0
        self._idle: list[UsbTransfer] = []
        self._playing: dict[UsbTransfer, list[Transfer]] = {}
        self._collecting = True

    def start(self) -> None:
        self._idle = list(self._transfers)
        self._collecting = not self._is_half_full
        self._play()

    @property
    def _is_half_full(self) -> bool:
        return len(self._collected) >= max(1, self._capacity // 2)

    def submit(self, transfer: Transfer) -> None:
        """Queue a packet of the guest. It is completed when it was played, or at once if it is dropped."""
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
            transfer.complete()  # python-libusb1 cannot send packets without bytes
            return
        self._collected.append(transfer)
        if self._is_half_full:
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

    def handle_completion(self, usb: UsbTransfer) -> None:
        packets = self._playing.pop(usb, [])
        if not self._stopped:
            self._idle.append(usb)
            for packet, result in zip(packets, usb.getISOSetupList(), strict=True):
                packet.complete(transfer_status(result["status"]), actual=result["actual_length"])
        super().handle_completion(usb)

    def _has_stalled(self, usb: UsbTransfer) -> bool:
        packets = usb.getISOSetupList()
        return super()._has_stalled(usb) or any(transfer_status(one["status"]) is Status.STALL for one in packets)

    def _process(self, usb: UsbTransfer) -> None:
        status = transfer_status(usb.getStatus())
        if status is not Status.SUCCESS:
            self._host.reception_ended(self.address, status)
        if not self._playing and len(self._collected) < self._reception.packets_per_transfer:
            self._collecting = True
        self._play()


def receiver_type(endpoint: Endpoint) -> type[Receiver]:
    """Return the class of receivers for an endpoint."""
    if endpoint.type is not TransferType.ISOCHRONOUS:
        return PacketReceiver
    return IsoReceiver if endpoint.address & 0x80 else IsoPlayer
