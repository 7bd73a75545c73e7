"""Keeps real devices plugged into a guest, as a :class:`~farplug.app.policy.Policy` decides.

It watches the devices of this machine, locks those that the policy selects against other farplug processes, and plugs
them into the guest. A device that is unplugged here is detached from the guest, and attached again when it is back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn, Protocol

from farplug.app.attachment import Attachment, Place
from farplug.app.policy import Plug, Policy, Skip, Slot
from farplug.app.settings import Follow
from farplug.errors import DeviceError, FarplugError, PortError, Reason, RefusedError, TargetError
from farplug.libusb.library import Library
from farplug.machine.choose import Choice
from farplug.machine.device_info import DeviceInfo
from farplug.machine.hotplug import Departed, Watch
from farplug.machine.listing import list_devices
from farplug.machine.lock import DeviceLock
from farplug.machine.obstacles import device_lost
from farplug.physical.device import find_device
from farplug.threads import run_in_daemon_thread
from farplug.usb.device import Device

REMOVAL_TIMEOUT = 1.0
"""Seconds that an unplugged device has to report its end itself; then it is detached from the guest."""
LOSS_TIMEOUT = 3.0
"""Seconds in which a lost device is expected to disappear from this machine, which is checked every second."""


class Plugger(Protocol):
    """What plugs devices in: :class:`~farplug.app.guest.Guest`."""

    async def plug_usb(self, device: Device, label: str, place: Place | None) -> Attachment:
        """Plug a USB device of this machine."""

    def forget(self, attachment: Attachment) -> None:
        """Drop an attachment that is over."""


class AutoListener(Protocol):
    """Takes what the auto-plugger reports: :class:`~farplug.app.guest.Guest`. Its methods must not raise."""

    def note(self, text: str) -> None:
        """Take something that a user may want to know."""

    def skipped(self, error: FarplugError) -> None:
        """Take why a device is not plugged in; nothing else changes."""


async def find(found: DeviceInfo) -> Device:
    """The device that was found, to be plugged in.

    Raises:
        DeviceError: it is not there any more, or libusb cannot read what it says about itself.
        SetupError: there is no libusb.
    """

    def look() -> Device:
        return find_device(
            found.bus,
            found.address,
            manufacturer=found.manufacturer,
            product=found.product,
            serial_number=found.serial_number,
        )

    try:
        return await run_in_daemon_thread(look)
    except DeviceError as error:
        if error.reason is Reason.DEVICE_LOST:
            raise device_lost(found) from error
        raise DeviceError(
            f"{found} cannot be plugged in: libusb cannot read its descriptors",
            reason=Reason.DEVICE_FAULT,
            remedy="\n".join(found.warnings) or "unplug it and plug it in again",
        ) from error


async def choose_device(text: str, *, force: bool = False) -> tuple[Device, DeviceLock]:
    """Return the USB device of this machine that a user names, and the lock that keeps other farplugs off.

    Args:
        text: ``VID:PID``, ``BUS-ADDRESS``, ``BUS-PORT``, ``serial:NUMBER`` or a part of the name.
        force: also a disk that this machine uses.

    Raises:
        UsageError: the text is not valid, or names several devices.
        DeviceError: there is no such device, it cannot be plugged, or another farplug has it.
        SetupError: this machine has no USB, or no libusb.
    """
    choice = Choice.parse(text)
    found = choice.choose(await run_in_daemon_thread(list_devices))
    found.check(force=force)
    lock = await run_in_daemon_thread(partial(DeviceLock, found), DeviceLock.release)
    try:
        return await find(found), lock
    except BaseException:
        await run_in_daemon_thread(lock.release)
        raise


class AutoPlugger:
    """Plugs devices, and keeps them plugged. :meth:`prepare` first, then :meth:`run`, :meth:`close` in any case.

    Args:
        policy: decides which devices are plugged in.
        listener: receives notes and skipped devices.
        watch: reports arrivals and departures of devices.
        find: opens a device that was found.

    Attributes:
        lenient: returns whether an error of a device that was named is only reported: it does not end :meth:`run`.
        initial: after :meth:`prepare`, the attachments of the devices that were named and are present, when they exist.
    """

    def __init__(
        self,
        policy: Policy,
        listener: AutoListener,
        watch: Watch | None = None,
        find: Callable[[DeviceInfo], Awaitable[Device]] = find,
    ) -> None:
        self.lenient: Callable[[], bool] = lambda: False
        self.initial: list[asyncio.Future[Attachment]] = []
        self._first: dict[Slot, asyncio.Future[Attachment]] = {}
        self._policy = policy
        self._listener = listener
        self._watch = Watch() if watch is None else watch
        self._find = find
        self._plugs: list[Plug] = []
        self._locks: dict[Slot, DeviceLock] = {}
        self._keeping: dict[Slot, asyncio.Task[None]] = {}
        self._attachments: dict[Slot, Attachment] = {}
        self._places: dict[Slot, Place] = {}
        self._beside: set[asyncio.Task[None]] = set()
        self._failed: asyncio.Future[NoReturn] | None = None
        self._watching = False

    @property
    def named(self) -> int:
        """Return how many devices were named, also absent ones."""
        return sum(slot.named for slot in self._policy.slots)

    @property
    def present(self) -> int:
        """Return how many of the devices that were named were present at the start."""
        return len(self.initial)

    async def prepare(self) -> None:
        """List the devices, decide, and lock the named ones.

        This may be called before the guest is reached, so that a device that cannot be plugged in is reported first.

        Raises:
            UsageError: a choice is ambiguous.
            DeviceError: a device that was named is not there, cannot be plugged, or another farplug has it.
            SetupError: this machine has no USB, or no libusb.
        """
        Library()
        await self._watch.__aenter__()
        self._watching = True
        for decision in self._policy.begin(self._watch.present):
            if isinstance(decision, Skip):
                self._listener.skipped(decision.error)
                continue
            if decision.slot.named:
                self._locks[decision.slot] = await run_in_daemon_thread(
                    partial(DeviceLock, decision.found), DeviceLock.release
                )
                self._first[decision.slot] = asyncio.get_running_loop().create_future()
                self.initial.append(self._first[decision.slot])
                if decision.found.in_use_as is not None:
                    self._listener.note(f"{decision.found}: {decision.found.in_use_as}")
            self._plugs.append(decision)
        for slot in self._policy.slots:
            if slot.found is None:
                self._listener.note(f"waiting for {slot} to be plugged in")
        if self._policy.rules.later is not None:
            self._listener.note("what is plugged in from now on goes into the VM if the rules allow it")

    async def run(self, hub: Plugger, places: Sequence[Place] = ()) -> NoReturn:
        """Plug, and go on until cancelled. Closing the hub, which comes next, unplugs what is plugged then.

        Args:
            hub: what plugs devices in.
            places: one for each device that was named, in the order of ``Rules.choices``; or none at all. A device
                that comes back has its place again.

        Raises:
            FarplugError: a device that was named cannot be plugged, or the guest is gone.
        """
        self._failed = asyncio.get_running_loop().create_future()
        watching = asyncio.ensure_future(self._follow(hub))
        if places:
            self._places = dict(zip((slot for slot in self._policy.slots if slot.named), places, strict=True))
        for slot, place in self._places.items():
            if slot.found is None:
                place.give_way()
        for plug in self._plugs:
            self._start(hub, plug)
        try:
            await asyncio.wait((self._failed, watching), return_when=asyncio.FIRST_COMPLETED)
            (self._failed if self._failed.done() else watching).result()
            raise AssertionError
        finally:
            tasks = [watching, *self._beside, *self._keeping.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if not self._failed.cancel() and not self._failed.cancelled():
                self._failed.exception()  # retrieved: run() has raised it, or has ended

    async def close(self) -> None:
        """Let others have the devices. Nothing is plugged any more."""
        locks = list(self._locks.values())
        self._locks.clear()
        for lock in locks:
            await run_in_daemon_thread(lock.release)
        if self._watching:
            self._watching = False
            await self._watch.__aexit__()

    async def _follow(self, hub: Plugger) -> None:
        async for change in self._watch:
            if isinstance(change, Departed):
                self._departed(change.device)
                continue
            match self._policy.arrived(change.device):
                case Plug() as plug:
                    came = "is back" if plug.again else "was plugged in"
                    self._listener.note(f"{change.device} {came}: it goes into the VM")
                    self._start(hub, plug)
                case Skip(error=error):
                    self._listener.skipped(error)

    def _departed(self, found: DeviceInfo) -> None:
        slot = self._policy.departed(found)
        if slot is None:
            return
        self._listener.note(f"{found} was pulled out; when it comes back it goes into the VM again")
        attachment = self._attachments.get(slot)
        if attachment is not None:
            self._soon(_unplug(attachment))

    def _soon(self, work: Coroutine[Any, Any, None]) -> None:
        """Have something done beside everything else, until :meth:`run` ends."""
        task = asyncio.ensure_future(work)
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)

    async def _lost(self, plug: Plug) -> None:
        """Handle a device that was lost: it was unplugged, and may come back. If it is still there, report it."""
        await asyncio.sleep(LOSS_TIMEOUT)
        if plug.slot.found is plug.found:
            self._policy.given_up(plug.slot)
            self._listener.skipped(
                DeviceError(
                    f"{plug.found} has left the VM, but it is still plugged in here: it does not answer",
                    reason=Reason.DEVICE_LOST,
                    remedy="unplug it and plug it in again",
                )
            )

    def _start(self, hub: Plugger, plug: Plug) -> None:
        before = self._keeping.get(plug.slot)
        task = self._keeping[plug.slot] = asyncio.ensure_future(self._keep(hub, plug, before))
        task.add_done_callback(lambda task: self._kept(plug.slot, task))

    def _kept(self, slot: Slot, task: asyncio.Task[None]) -> None:
        if self._keeping.get(slot) is task:
            del self._keeping[slot]
        error = None if task.cancelled() else task.exception()
        if error is not None and self._failed is not None and not self._failed.done():
            self._failed.set_exception(error)

    async def _keep(self, hub: Plugger, plug: Plug, before: asyncio.Task[None] | None) -> None:
        """Plug a device in and stay until it has left the guest. When cancelled, it stays plugged, and locked."""
        if before is not None:
            await asyncio.wait([before])  # its port is free then
        slot, attached, device = plug.slot, False, None
        place = self._places.get(slot)
        try:
            if slot not in self._locks:
                self._locks[slot] = await run_in_daemon_thread(partial(DeviceLock, plug.found), DeviceLock.release)
            device = await self._find(plug.found)
            label = plug.found.name or plug.found.id
            self._attachments[slot] = await hub.plug_usb(device, label, place)
            attached = True
            if slot in self._first and not self._first[slot].done():
                self._first[slot].set_result(self._attachments[slot])
            if slot.found is not plug.found:  # it was pulled out while it was being plugged in
                self._soon(_unplug(self._attachments[slot]))
            error = await self._attachments[slot].ended()
        except FarplugError as raised:
            error = raised
        if place is not None:
            place.give_way()
        if attached:
            hub.forget(self._attachments.pop(slot))
        if slot in self._locks:
            await run_in_daemon_thread(self._locks.pop(slot).release)
        if error is not None:
            self._ended(plug, error, attached=attached)
        elif slot.found is plug.found:  # a user detached it: it does not come back
            self._policy.forget(slot)

    def _ended(self, plug: Plug, error: FarplugError, *, attached: bool) -> None:
        """Handle a device that was detached, or was never attached, without a request of this side."""
        assert self._failed is not None
        named, initial, rules = plug.slot.named, plug in self._plugs, self._policy.rules
        first = self._first.get(plug.slot)
        if first is not None and not first.done():
            first.set_exception(error)
            first.exception()  # retrieved: perhaps no task waits
        patient = rules.wait or rules.follow is Follow.PORT  # a reset may have made it another device
        match error:
            case DeviceError() if plug.slot.found is not plug.found:
                return  # it was pulled out before it was plugged in: it may be back already
            case DeviceError(reason=Reason.DEVICE_LOST) if attached or not initial or patient:
                self._soon(self._lost(plug))
                return
            case DeviceError():
                bearable = not (named and initial)
            case RefusedError() | PortError() | TargetError():  # a ticket may be over when a device comes late
                bearable = not named or plug.again or not initial
            case _:
                bearable = False
        if bearable or self.lenient():
            if plug.slot.found is plug.found:
                self._policy.given_up(plug.slot)
            self._listener.skipped(error)
        elif not self._failed.done():
            self._failed.set_exception(error)


async def _unplug(attachment: Attachment) -> None:
    """Detach an unplugged device from the guest, unless it reports its end itself."""
    with suppress(TimeoutError):
        async with asyncio.timeout(REMOVAL_TIMEOUT):
            await attachment.ended()
            return
    with suppress(FarplugError):  # of a device that is gone
        await attachment.unplug()
