"""A client of a security key, as a program in the guest: Yubico's library over the guest in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fido2.client import UserInteraction
from fido2.hid import CtapHidDevice
from fido2.hid.base import CtapHidConnection, HidDescriptor

from farplug.redirection.events import DeviceReport
from farplug.testing.memory import MemoryGuest
from farplug.usb import DeviceEvent, Speed
from farplug.virtual import VirtualDevice
from farplug.virtual.fido import SecurityKey

IN, OUT = 0x81, 0x01
PIN = "1234"

T = TypeVar("T")


class MemoryConnection(CtapHidConnection):  # type: ignore[misc]
    """The reports of a key in a guest in memory, for a client in another thread."""

    def __init__(self, guest: MemoryGuest) -> None:
        self._guest = guest
        self._loop = asyncio.get_running_loop()

    def read_packet(self) -> bytes:
        return asyncio.run_coroutine_threadsafe(self._guest.interrupt_in(IN), self._loop).result(100)

    def write_packet(self, data: bytes) -> None:
        asyncio.run_coroutine_threadsafe(self._guest.interrupt_out(OUT, data), self._loop).result(100)

    def close(self) -> None:
        pass


class Typist(UserInteraction):  # type: ignore[misc]
    """A user who types a PIN."""

    def __init__(self, pin: str = PIN) -> None:
        self.pin = pin
        self.prompts = 0

    def prompt_up(self) -> None:
        self.prompts += 1

    def request_pin(self, permissions: Any, rp_id: str | None) -> str:
        return self.pin

    def request_uv(self, permissions: Any, rp_id: str | None) -> bool:
        return True


@asynccontextmanager
async def plugged(key: SecurityKey) -> AsyncIterator[MemoryGuest]:
    """Plug a key into a guest in memory, whose driver receives."""
    async with MemoryGuest(VirtualDevice(key, speeds=(Speed.HIGH,))) as guest:
        await guest.enumerate()
        await guest.start_receiving(IN)
        yield guest


async def client(guest: MemoryGuest, call: Callable[[CtapHidDevice], T]) -> T:
    """Return what a function returns that uses the key as a program in the guest, in a thread."""
    connection = MemoryConnection(guest)
    descriptor = HidDescriptor("memory", 0x1D6B, 0x0104, 64, 64, "Security key", None)
    return await asyncio.to_thread(lambda: call(CtapHidDevice(descriptor, connection)))


def events_of(guest: MemoryGuest) -> list[DeviceEvent]:
    """Return the events of the key so far."""
    return [event.event for event in guest.events if isinstance(event, DeviceReport)]
