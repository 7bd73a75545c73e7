"""Fuzz real devices: a libusb made of Python, which completes, refuses and fails anything, behind the whole engine.

Transfers end in any order and with any status, late after they were cancelled, or as soon as they are submitted; calls
of libusb fail; events come without a cause; the device is unplugged at any moment, and detached and attached again.

Every request of the guest is answered once, in order on its endpoint; no blocking call of libusb runs while the event
loop uses the device; transfers, handles and contexts are closed, and nothing is in flight, at the end.

The device has a thread of its own, so a seed repeats a failure often, but not always.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random

import usb1
from tests.libusb.fake_libusb import FakeDevice, FakeHandle, FakeLibrary, FakeTransfer
from tests.physical.support import BULK_IN, BULK_OUT, CAMERA, EVERYTHING, KEYS, LIGHTS, OTHER, SOUND, STREAMING

from farplug.errors import FarplugError
from farplug.physical import PhysicalDevice, physical_device
from farplug.testing.memory import MemoryGuest, Pending
from farplug.usb import Setup, Status
from farplug.usbredir import packets as p
from harness import counts, raise_logged, run

STATUSES = (
    *(usb1.TRANSFER_COMPLETED,) * 4,
    usb1.TRANSFER_ERROR,
    usb1.TRANSFER_TIMED_OUT,
    usb1.TRANSFER_STALL,
    usb1.TRANSFER_CANCELLED,
    usb1.TRANSFER_OVERFLOW,
    99,
)
ERRORS = (
    usb1.USBErrorIO,
    usb1.USBErrorBusy,
    usb1.USBErrorNotFound,
    usb1.USBErrorPipe,
    usb1.USBErrorTimeout,
    usb1.USBErrorOther,
    usb1.USBErrorNoMem,
    usb1.USBErrorAccess,
    usb1.USBErrorInvalidParam,
    usb1.USBErrorNotSupported,
)
CALLS = (
    "open",
    "get_configuration",
    "set_configuration",
    "set_interface",
    "claim",
    "detach",
    "attach",
    "clear_halt",
    "reset",
)
TURN = 0.0005
"""Seconds of a turn of the hardware."""


class Hardware:
    """What the device does."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._streams = rng.random() < 0.3
        configurations = (STREAMING,) if self._streams else (EVERYTHING, OTHER)
        speed = usb1.SPEED_SUPER if self._streams else usb1.SPEED_HIGH
        drivers = rng.choice((None, None, {0: "storage"}, {0: "storage"}, {0: "program"}))
        self.fake = FakeDevice(*configurations, speed=speed, drivers=drivers)
        self.library = FakeLibrary(self.fake)
        self.library.polls_nothing = rng.random() < 0.1
        self.device: PhysicalDevice = physical_device(self.fake, library=self.library, product="Thing")
        self.failing = rng.random() < 0.5
        self._at_once = rng.random() < 0.2
        self._events_fail = 2
        """How many times handling events will fail: farplug waits 0.1 s after each."""

    @property
    def handle(self) -> FakeHandle | None:
        return self.fake.handles[-1] if self.fake.handles else None

    async def live(self) -> None:
        """Do something in each turn, until cancelled."""
        while True:
            self.act()
            await asyncio.sleep(TURN)

    def act(self) -> None:
        rng, handle = self._rng, self.handle
        if handle is None or handle.closed:
            return
        handle.rule = self._end if self._at_once and rng.random() < 0.5 else None
        for transfer in rng.sample(handle.in_flight, rng.randint(0, len(handle.in_flight))):
            self._end(transfer)
        if not self.failing:
            return
        match rng.randrange(12):
            case 0:
                handle.keeps_cancelled = rng.random() < 0.5
            case 1:
                handle.no_more_transfers = rng.random() < 0.1
            case 2:
                handle.refusals = [rng.choice((None, *(error() for error in ERRORS))) for _ in range(3)]
            case 3:
                self.fake.failures = {rng.choice(CALLS): rng.choice(ERRORS)()} if rng.random() < 0.3 else {}
            case 4 if self._events_fail:
                self._events_fail -= 1
                self.library.event_errors += [rng.choice((usb1.USBErrorInterrupted, *ERRORS))()]
            case 5 if not handle.context.closed:
                os.write(handle.context.write, b"!")  # an event without a cause

    def _end(self, transfer: FakeTransfer) -> None:
        rng = self._rng
        if transfer not in transfer.handle.in_flight:
            return
        status = rng.choice(STATUSES)
        if transfer.kind == "isochronous":
            results = [(rng.choice(STATUSES), rng.choice((0, length))) for length in transfer.lengths]
            transfer.finish(status=status, packets=results)
        else:
            transfer.finish(status=status, actual=rng.randint(0, len(transfer.buffer)))
        counts["completions"] += 1

    def recover(self) -> None:
        """Let everything succeed from now on."""
        self.failing = False
        self.fake.failures = {}
        self.library.event_errors.clear()
        if self.handle is not None:
            self.handle.no_more_transfers = self.handle.keeps_cancelled = False
            self.handle.refusals = []

    def check_closed(self) -> None:
        assert all(context.closed for context in self.library.contexts)
        assert all(handle.closed and not handle.in_flight for handle in self.fake.handles)
        assert not self.fake.waits, f"the event loop would have blocked: {self.fake.waits}"


class User:
    """What the guest does."""

    def __init__(self, rng: random.Random, guest: MemoryGuest) -> None:
        self._rng = rng
        self._guest = guest
        self.pending: list[Pending] = []

    def act(self) -> None:
        rng, guest = self._rng, self._guest
        stream = rng.choice((0, 0, 1, 4, 20))
        match rng.randrange(14):
            case 0 | 1 | 2:
                length = rng.choice((0, 8, 512, 1 << 20, (3 << 20) + 1))
                self.pending.append(guest.submit_in(rng.choice((BULK_IN, 0x88)), length, stream_id=stream))
            case 3 | 4:
                data = bytes(rng.choice((0, 8, 512, (1 << 20) + 1)))
                self.pending.append(guest.submit_out(BULK_OUT, data, stream_id=stream))
            case 5 | 6:
                for one in rng.sample(self.pending, len(self.pending) // 2):
                    one.cancel()
            case 7 | 8:
                self._receive()
            case 9 if rng.random() < 0.5:
                guest.reset()
            case 10 | 11:
                self._operate()
            case 12:
                request_type = rng.choice((0xC0, 0x40, 0x80, 0x02, 0x00))
                setup = Setup(request_type, rng.choice((0, 1, 6, 9, 11)), rng.choice((0, 1, 0x100)), BULK_IN, 18)
                data = b"" if request_type & 0x80 else bytes(18)
                self.pending.append(guest.request(p.ControlPacket.of(guest.new_id(), setup, data)))
            case _:
                packet = p.InterruptPacket(
                    id=guest.new_id(), endpoint=LIGHTS, status=Status.SUCCESS, length=3, data=b"abc"
                )
                self.pending.append(guest.request(packet))
        counts["requests"] += 1

    def _receive(self) -> None:
        rng, id = self._rng, self._guest.new_id()
        size = rng.choice((0, 512, 4096, 1 << 20))
        packets: tuple[p.Packet, ...] = (
            p.StartInterruptReceiving(id=id, endpoint=KEYS),
            p.StopInterruptReceiving(id=id, endpoint=KEYS),
            p.StartIsoStream(id=id, endpoint=rng.choice((SOUND, CAMERA)), packets_per_urb=rng.randrange(9), urbs=3),
            p.StopIsoStream(id=id, endpoint=rng.choice((SOUND, CAMERA))),
            p.IsoPacket(id=id, endpoint=SOUND, status=Status.SUCCESS, length=3, data=b"abc"),
            p.StartBulkReceiving(id=id, stream_id=0, bytes_per_transfer=size, endpoint=BULK_IN, transfers=4),
            p.StopBulkReceiving(id=id, stream_id=0, endpoint=BULK_IN),
        )
        self._guest.send(rng.choice(packets))

    def _operate(self) -> None:
        rng, guest = self._rng, self._guest
        id = guest.new_id()
        endpoints = 1 << 17 | 1 << 2
        packets: tuple[p.Packet, ...] = (
            p.SetConfiguration(id=id, configuration=rng.choice((0, 1, 1, 1, 3, 9))),
            p.SetAltSetting(id=id, interface=rng.choice((0, 2, 2)), alt=rng.choice((0, 1, 1, 7))),
            p.GetAltSetting(id=id, interface=rng.choice((0, 1, 2))),
            p.AllocBulkStreams(id=id, endpoints=endpoints, streams=rng.choice((0, 4, 16, 17))),
            p.FreeBulkStreams(id=id, endpoints=endpoints),
        )
        packet = rng.choice(packets)
        if isinstance(packet, (p.AllocBulkStreams, p.FreeBulkStreams)):
            guest.send(packet)
        else:
            self.pending.append(guest.request(packet))


async def use(rng: random.Random, guest: MemoryGuest, hardware: Hardware) -> None:
    """Attach the device and use it, until it is detached or unplugged."""
    if rng.random() < 0.8:
        hardware.fake.failures = {}
    try:
        await guest.redirection.attach(hardware.device)
    except FarplugError:
        counts["not opened"] += 1
        return
    await guest.wait(lambda: guest.connected is not None or guest.redirection.device is None)
    user = User(rng, guest)
    user.pending.append(guest.request(p.SetConfiguration(id=guest.new_id(), configuration=1)))
    if rng.random() < 0.5:
        user.pending.append(guest.request(p.SetAltSetting(id=guest.new_id(), interface=2, alt=1)))
    for _ in range(rng.randrange(80)):
        if guest.connected is None:
            break
        user.act()
        hardware.act()
        if rng.random() < 0.3:
            await asyncio.sleep(rng.choice((0, TURN, 8 * TURN)))
        if rng.random() < 0.003:
            hardware.fake.unplug()
            counts["unplugged"] += 1
    with contextlib.suppress(FarplugError):
        await guest.redirection.detach()
    await guest.wait(lambda: guest.redirection.device is None)
    assert all(one.done for one in user.pending), "each request has its answer"
    counts["devices"] += 1


async def case(rng: random.Random) -> None:
    hardware = Hardware(rng)
    async with MemoryGuest(timeout=30) as guest:
        living = asyncio.create_task(hardware.live())
        try:
            for _ in range(rng.choice((1, 1, 2, 3))):
                if not hardware.fake.unplugged:
                    await use(rng, guest, hardware)
            hardware.recover()
            if not hardware.fake.unplugged:
                await use(rng, guest, hardware)
            await guest.redirection.close()
        finally:
            living.cancel()
    hardware.check_closed()


def one_case(rng: random.Random) -> None:
    asyncio.run(case(rng))


if __name__ == "__main__":
    raise_logged()
    run("libusb", one_case)
