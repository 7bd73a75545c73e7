"""Endpoints that a coroutine awaits: the attributes of an :class:`~farplug.virtual.async_function.AsyncFunction`.

An endpoint works while the guest has the function configured. Otherwise its methods raise :class:`Detached`; so do
those that wait when the guest resets or unplugs the device.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Self

from farplug.usb.descriptors import EndpointDescriptor
from farplug.usb.endpoints import bulk_endpoint, interval, interval_microseconds, max_packet_size, periodic_endpoint
from farplug.usb.transfer import Status, Transfer
from farplug.usb.types import Buffer, Speed, TransferType
from farplug.virtual.function import FunctionHost

MAX_LATE = 0.01
"""Seconds that the pace of a periodic IN endpoint catches up after a delay of the event loop, or after a pause."""

MAX_SAMPLES = 1000
"""Packets of an isochronous OUT endpoint that wait for :meth:`IsochronousOut.read`; then the oldest is dropped."""


class Detached(Exception):
    """The guest has reset or unplugged the device, or has not configured it yet."""


class EndpointOwner(ABC):
    """The function, as one of its endpoints sees it."""

    @property
    @abstractmethod
    def host(self) -> FunctionHost:
        """Return the device."""

    @abstractmethod
    def check(self) -> None:
        """Raise :class:`Detached` if the caller may not use endpoints now.

        That is so while the function is not configured; and for a ``run()`` that was cancelled, and is about to end.
        """


@dataclass(frozen=True, slots=True)
class Declaration:
    """What a function declares about an endpoint.

    Attributes:
        interface: the function's interface, from 0.
        alternate: the alternate setting that has the endpoint.
        packet_size: periodic endpoints: wMaxPacketSize in bytes.
        microseconds: periodic endpoints: the interval.
        attributes: isochronous endpoints: synchronization and usage bits of bmAttributes.
        keep: interrupt IN endpoints: see :class:`InterruptIn`.
    """

    interface: int = 0
    alternate: int = 0
    packet_size: int = 0
    microseconds: int = 0
    attributes: int = 0
    keep: bool = False


class AwaitedEndpoint(ABC):
    """An endpoint of an :class:`~farplug.virtual.async_function.AsyncFunction`.

    Attributes:
        address: the function's own bEndpointAddress; see :attr:`address_in_device`.
        declaration: what the function declares about the endpoint.
    """

    type: ClassVar[TransferType]
    direction: ClassVar[int]

    def __init__(self, owner: EndpointOwner, address: int, declaration: Declaration) -> None:
        self.address = address
        self.declaration = declaration
        self._owner = owner
        self._speed = Speed.HIGH
        self._session = 0
        self._changed = asyncio.Event()

    @property
    def packet_size(self) -> int:
        """Return wMaxPacketSize at the current speed, in bytes."""
        return self.descriptor(self._speed).max_packet_size

    @property
    def address_in_device(self) -> int:
        """Return the bEndpointAddress that the guest sees."""
        return self._owner.host.numbers.endpoint(self.address)

    def descriptor(self, speed: Speed) -> EndpointDescriptor:
        """Return the descriptor at a speed, with the function's own address."""
        declared = self.declaration
        if self.type is TransferType.BULK:
            return bulk_endpoint(self.address, speed)
        return periodic_endpoint(
            self.address,
            self.type,
            speed,
            packet_size=min(declared.packet_size, max_packet_size(self.type, speed)),
            microseconds=declared.microseconds,
            attributes=declared.attributes,
        )

    def halt(self) -> None:
        """Halt the endpoint: pending and later transfers stall until the guest clears the halt."""
        self._owner.check()
        self._owner.host.halt(self.address)
        self._end_pending(Status.STALL)

    # Called by the function

    def enable(self, speed: Speed) -> None:
        """Begin to work: the guest set a configuration or an alternate setting that has the endpoint."""
        self._speed = speed

    def disable(self) -> None:
        """Stop to work until :meth:`enable`: pending transfers are cancelled, methods wait."""
        self._end_pending(Status.CANCELLED)

    def detach(self) -> None:
        """Stop to work, and make methods that wait raise :class:`Detached`."""
        self.disable()
        self._session += 1
        self._wake()

    def submit(self, transfer: Transfer) -> None:
        """Take a transfer of the guest."""
        transfer.complete(Status.STALL)

    def cancel(self, transfer: Transfer) -> None:
        """Complete a pending transfer as ``CANCELLED``."""

    def start(self) -> Status:
        """Begin a reception of the guest."""
        return Status.STALL

    def stop(self) -> None:
        """Stop the reception."""

    def _end_pending(self, status: Status) -> None:
        """Complete all pending transfers, the newest first."""

    def _wake(self) -> None:
        self._changed.set()

    async def _until(self, condition: Callable[[], bool], session: int) -> None:
        """Wait for a condition that depends on what the guest does, while a session of :meth:`_begin` lasts."""
        self._check(session)
        while not condition():
            self._changed.clear()
            await self._changed.wait()
            self._check(session)

    def _begin(self) -> int:
        """Return the current session, which ends with :meth:`detach`. A method call belongs to one session."""
        self._check(self._session)
        return self._session

    def _check(self, session: int) -> None:
        self._owner.check()
        if session != self._session:
            raise Detached(f"the guest has reset or unplugged the device while endpoint {self.address:02x} was in use")


class _Queued(AwaitedEndpoint):
    """An endpoint on which the guest's transfers wait for the function."""

    def __init__(self, owner: EndpointOwner, address: int, declaration: Declaration) -> None:
        super().__init__(owner, address, declaration)
        self._transfers: OrderedDict[Transfer, None] = OrderedDict()

    def submit(self, transfer: Transfer) -> None:
        self._transfers[transfer] = None
        self._wake()

    def cancel(self, transfer: Transfer) -> None:
        if transfer in self._transfers:
            del self._transfers[transfer]
            transfer.complete(Status.CANCELLED)

    async def _next(self, session: int) -> Transfer:
        """Wait for the guest's next transfer, and remove it from the queue."""
        await self._until(lambda: bool(self._transfers), session)
        return self._transfers.popitem(last=False)[0]

    def _end_pending(self, status: Status) -> None:
        while self._transfers:
            self._transfers.popitem()[0].complete(status)


class _Out(_Queued):
    direction = 0x00

    async def read(self) -> bytes:
        """Return the data of the guest's next transfer, which completes now.

        Until then the guest waits: a function that does not read slows the guest down.

        Raises:
            Detached: the guest has reset or unplugged the device.
        """
        transfer = await self._next(self._begin())
        data = bytes(transfer.data)
        transfer.complete()
        return data

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        return await self.read()


class BulkOut(_Out):
    """A bulk OUT endpoint: one item for each transfer of the guest."""

    type = TransferType.BULK


class InterruptOut(_Out):
    """An interrupt OUT endpoint: one item for each transfer of the guest."""

    type = TransferType.INTERRUPT


class BulkIn(_Queued):
    """A bulk IN endpoint."""

    type = TransferType.BULK
    direction = 0x80

    def __init__(self, owner: EndpointOwner, address: int, declaration: Declaration) -> None:
        super().__init__(owner, address, declaration)
        self._lock = asyncio.Lock()

    async def write(self, data: Buffer, *, end: bool = False) -> None:
        """Answer the guest's requests with ``data``. Return when the guest has taken all of it.

        Each request takes at most its length; several requests may take one write. An answer that is shorter than its
        request ends the guest's transfer.

        Args:
            data: the bytes; no bytes are one empty answer.
            end: end the guest's transfer also if the data fills a request exactly: an empty answer follows.

        Raises:
            Detached: the guest has reset or unplugged the device. A part of the data may have been taken.
        """
        session = self._begin()
        rest = memoryview(data).cast("B")
        async with self._lock:
            while True:
                transfer = await self._next(session)
                part, rest = rest[: transfer.length], rest[transfer.length :]
                full = len(part) == transfer.length > 0
                transfer.complete(Status.SUCCESS, bytes(part))
                if not rest and not (end and full):
                    return


class _Paced(AwaitedEndpoint):
    """A periodic IN endpoint, whose packets are sent without a request, one in each interval."""

    direction = 0x80

    def __init__(self, owner: EndpointOwner, address: int, declaration: Declaration) -> None:
        super().__init__(owner, address, declaration)
        self._lock = asyncio.Lock()
        self._receiving = False
        self._due = 0.0
        self.read_since = 0.0
        """When the guest started to receive, in the time of the event loop."""

    @property
    def is_read(self) -> bool:
        """Return whether the guest receives from the endpoint now."""
        return self._receiving

    async def read_by_guest(self) -> None:
        """Wait until the guest receives from the endpoint: its driver is ready. Raises :class:`Detached`."""
        await self._until(lambda: self._receiving, self._begin())

    def disable(self) -> None:
        self._receiving = False
        super().disable()

    def start(self) -> Status:
        self._receiving = True
        self._due = 0.0
        self.read_since = asyncio.get_running_loop().time()
        self._wake()
        return Status.SUCCESS

    def stop(self) -> None:
        self._receiving = False

    @property
    def seconds(self) -> float:
        """Return the interval at the current speed."""
        value = interval(self.declaration.microseconds, self.type, self._speed)
        return interval_microseconds(value, self.type, self._speed) / 1e6

    async def _turn(self, session: int) -> None:
        """Wait until the guest receives, and the next interval begins."""
        await self._until(lambda: self._receiving, session)
        loop = asyncio.get_running_loop()
        self._due = max(self._due, loop.time() - MAX_LATE)
        if (delay := self._due - loop.time()) > 0:
            await asyncio.sleep(delay)
            await self._until(lambda: self._receiving, session)

    def _fits(self, data: Buffer) -> bytes:
        if len(data) > self.packet_size:
            where = f"endpoint {self.address:02x}"
            raise ValueError(f"a packet of {len(data)} bytes does not fit {where}, which has {self.packet_size}")
        return bytes(data)

    def _sent(self, count: int) -> None:
        self._due += count * self.seconds


class InterruptIn(_Paced):
    """An interrupt IN endpoint: reports, notifications.

    usbredir has no acknowledgement for these packets: a write is complete when the packet was sent. Packets are sent
    only while the guest receives, at the pace of the interval.

    If the endpoint is declared with ``keep=True``, its last packet is a state: whenever the guest starts to receive
    again, the packet is sent again, because the guest may have lost it.
    """

    type = TransferType.INTERRUPT

    def __init__(self, owner: EndpointOwner, address: int, declaration: Declaration) -> None:
        super().__init__(owner, address, declaration)
        self._last: bytes | None = None
        self._starts = 0
        self._ending: asyncio.Task[None] | None = None
        """Sends the rest of a cancelled call, and has the lock."""

    @property
    def restarts(self) -> int:
        """Return how often the guest has started to receive again, since it set the configuration.

        Packets that were sent shortly before the guest stopped may be lost: QEMU drops them.
        """
        return max(0, self._starts - 1)

    async def write(self, data: Buffer) -> None:
        """Send one packet in the next interval.

        Raises:
            Detached: the guest has reset or unplugged the device.
        """
        await self.write_together(data)

    async def write_together(self, *packets: Buffer) -> None:
        """Send packets at once, so that nothing can delay one of them: a key that is pressed and released.

        The guest takes one in each interval; as many intervals pass before the next packet is sent. If the call is
        cancelled when the first packet was sent, the others are sent nevertheless, before anything else.

        Raises:
            Detached: the guest has reset or unplugged the device.
            ValueError: a packet is larger than wMaxPacketSize.
        """
        session = self._begin()
        rest = deque(map(self._fits, packets))
        await self._lock.acquire()
        try:
            await self._send_all(session, rest)
        except asyncio.CancelledError:
            if 0 < len(rest) < len(packets):
                self._ending = asyncio.ensure_future(self._send_all(session, rest))
                self._ending.add_done_callback(self._ended)
            raise
        finally:
            if self._ending is None:
                self._lock.release()

    async def _send_all(self, session: int, rest: deque[bytes]) -> None:
        """Send packets, and remove them from ``rest``."""
        while rest:
            await self._turn(session)
            sent = 0
            while rest and self._owner.host.send(self.address, rest[0]):
                self._last = rest.popleft()
                sent += 1
            self._sent(max(1, sent))  # after a refusal the rest is sent in the next interval

    def _ended(self, ending: asyncio.Task[None]) -> None:
        """Let others send: the rest of a cancelled call was sent, or the device is detached."""
        self._ending = None
        self._lock.release()
        if not ending.cancelled():
            ending.exception()  # mark it as retrieved: no caller waits for it

    def enable(self, speed: Speed) -> None:
        super().enable(speed)
        self._last = None
        self._starts = 0

    def start(self) -> Status:
        self._starts += 1
        status = super().start()
        if self.declaration.keep and self._last is not None:
            self._owner.host.send(self.address, self._last)
        return status


class IsochronousIn(_Paced):
    """An isochronous IN endpoint: samples, in packets of a constant rate. As on a cable, packets can be lost."""

    type = TransferType.ISOCHRONOUS

    async def write(self, data: Buffer) -> bool:
        """Send one packet in the next interval; return False if it was lost.

        Raises:
            Detached: the guest has reset or unplugged the device.
            ValueError: the packet is larger than wMaxPacketSize.
        """
        session = self._begin()
        packet = self._fits(data)
        async with self._lock:
            await self._turn(session)
            self._sent(1)
            return self._owner.host.send(self.address, packet)


class IsochronousOut(AwaitedEndpoint):
    """An isochronous OUT endpoint: one item for each packet of the guest. Packets that are read too late are dropped.

    Attributes:
        dropped: the number of packets that were dropped.
    """

    type = TransferType.ISOCHRONOUS
    direction = 0x00

    def __init__(self, owner: EndpointOwner, address: int, declaration: Declaration) -> None:
        super().__init__(owner, address, declaration)
        self._packets: deque[bytes] = deque(maxlen=MAX_SAMPLES)
        self.dropped = 0

    def start(self) -> Status:
        return Status.SUCCESS

    def submit(self, transfer: Transfer) -> None:
        self.dropped += len(self._packets) == MAX_SAMPLES
        self._packets.append(bytes(transfer.data))
        transfer.complete()
        self._wake()

    def _end_pending(self, status: Status) -> None:
        self._packets.clear()

    async def read(self) -> bytes:
        """Return the next packet.

        Raises:
            Detached: the guest has reset or unplugged the device.
        """
        await self._until(lambda: bool(self._packets), self._begin())
        return self._packets.popleft()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        return await self.read()
