"""Choose how a device is offered: the best offer that the guest can take, found by trying.

What a guest cannot take shows only by what it does:

* A port that cannot take SuperSpeed. QEMU offers a SuperSpeed device to a USB 2.0 port as well, and calls it a
  high-speed device there. Linux reads the device descriptor, does not believe it (bMaxPacketSize0 is 9), resets the
  port and retries; it never reads the configuration descriptor. A guest that understands goes on after one or two
  resets.
* Descriptors that the guest's USB stack does not understand. GRUB takes the SuperSpeed companion of an endpoint for the
  next endpoint: it reads the configuration descriptor, and chooses no configuration.
* Settings that the guest has no driver for. Linux without its module uas, and SLOF, choose the configuration of a disk
  that has a setting for USB Attached SCSI, and then leave the disk alone.

The last two are silence, so they count only for devices that a guest uses at once, and never take a device away from a
driver: a device without a configuration has none, and one that was used is left alone until another system begins with
it. Such a system reads the language IDs of the string descriptors (USB 2.0, chapter 9.6.7) between a reset and its
SET_CONFIGURATION. A driver that recovers from an error resets the port as well, but knows the strings already.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

from farplug.errors import DeviceError, Reason
from farplug.redirection.acceptance import no_streams
from farplug.redirection.events import OfferChanged, OfferProblem
from farplug.usb.device import Device, Offer
from farplug.usb.types import DescriptorType, Request, RequestType, Setup

FAILED_ENUMERATIONS = 2
"""Port resets, each after a look at the device descriptor and at nothing else, after which the guest is suspected not
to understand. If it does, it goes on at once after its next look."""
ENUMERATION_TIMEOUT = 0.05
"""Seconds that a suspected guest has to go on. The device leaves between two tries then: to take it away in the middle
of one makes Linux wait 10 s for an answer to its SET_ADDRESS."""
IDLE_TIMEOUT = 10.0
"""Seconds without a request after which a guest is taken to leave the device alone. A Linux whose drivers are not in
its initramfs loads them seconds after it has found the device, and a new device makes Windows look for a driver."""


class Timer(Protocol):
    """A call that was put off."""

    def cancel(self) -> None:
        """Do not call."""


class OfferWatch:
    """Watches what the guest does with an offer, and reports signs that it cannot take the offer.

    Args:
        report: called with each sign. There may be further ones until the device is offered again, or has left.
        call_later: as the event loop's, which is the default.
    """

    def __init__(
        self,
        report: Callable[[OfferProblem], None],
        call_later: Callable[[float, Callable[[OfferProblem], None], OfferProblem], Timer] | None = None,
    ) -> None:
        self._report = report
        self._call_later = call_later
        self._timer: Timer | None = None
        self.stop()

    def start(self, device: Device) -> None:
        """Begin: the device was offered."""
        self.stop()
        self._expects_use = device.used_at_once

    def stop(self) -> None:
        """End: the guest has no device."""
        self._cancel_timer()
        self._expects_use = False
        self._failed_enumerations = 0
        self._read_device_only = False
        """Whether the guest read the device descriptor since the last reset, and nothing else."""
        self._read_configuration = False
        """Whether the guest read the configuration descriptor since the last reset."""
        self._configured = False
        self._used = False
        """Whether a driver of the system that runs in the guest used the device."""

    def requested(self, setup: Setup) -> None:
        """Note a control request."""
        if setup.type is not RequestType.STANDARD:
            if self._configured:
                self.used()
            return
        if setup.request == Request.GET_DESCRIPTOR:
            kind = setup.value >> 8
            if kind == DescriptorType.DEVICE:
                self._read_device_only = True
                if self._failed_enumerations >= FAILED_ENUMERATIONS:
                    self._wait(OfferProblem.SPEED, ENUMERATION_TIMEOUT)
                    return
            else:
                self._read_device_only = False
                self._failed_enumerations = 0
            self._read_configuration = self._read_configuration or kind == DescriptorType.CONFIGURATION
            if setup.value == DescriptorType.STRING << 8 and not self._configured:
                self._used = False  # another system begins
        self._wait_for_use()

    def configured(self, configuration: int) -> None:
        """Note a SET_CONFIGURATION; 0: the guest gave the device up."""
        self._read_device_only = self._read_configuration = False
        self._failed_enumerations = 0
        self._configured = configuration != 0
        self._wait_for_use()

    def used(self) -> None:
        """Note what only a driver does."""
        if not self._used:
            self._used = True
            self._cancel_timer()

    def port_reset(self) -> None:
        """Note a reset of the port."""
        self._cancel_timer()
        if self._read_device_only:
            self._failed_enumerations += 1
        self._read_device_only = self._read_configuration = self._configured = False

    def _wait_for_use(self) -> None:
        self._cancel_timer()
        if not self._expects_use:
            return
        if self._configured and not self._used:
            self._wait(OfferProblem.NOT_USED, IDLE_TIMEOUT)
        elif self._read_configuration and not self._configured:
            self._wait(OfferProblem.NOT_CONFIGURED, IDLE_TIMEOUT)

    def _wait(self, problem: OfferProblem, seconds: float) -> None:
        self._cancel_timer()
        call_later = self._call_later or asyncio.get_running_loop().call_later
        self._timer = call_later(seconds, self._report, problem)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class OfferChoice:
    """Chooses each offer.

    Args:
        port: its name, for events.
        emit: called with an event for each other offer.
        offer_again: takes a device from the guest, and offers it again in another way.
        failed: called when that cannot be done, with the error, and with what the error means.
    """

    def __init__(
        self,
        port: str,
        emit: Callable[[OfferChanged], None],
        offer_again: Callable[[Device, Offer], Awaitable[None]],
        failed: Callable[[Exception, DeviceError], None],
    ) -> None:
        self._port = port
        self._emit = emit
        self._offer_again = offer_again
        self._failed = failed
        self._task: asyncio.Task[None] | None = None
        self._best: Offer | None = None
        """What the guest's port can take, whether or not the guest has a driver for it."""
        self._tried_all = False

    def select_first(self, device: Device, *, streams: bool) -> None:
        """Select the best offer that a guest with or without bulk ``streams`` can take; a port before this one may have
        taken less.

        Raises:
            RefusedError: every offer of the device has streams (``CAPABILITY``).
        """
        device.select(device.offers[0])
        while not streams and device.has_streams:
            # A guest's driver would find them in the descriptors, and give up on the device when it gets none.
            offer = _slower(device) or _lesser(device)
            if offer is None:
                raise no_streams(device.identity)
            self._emit(OfferChanged(self._port, OfferProblem.STREAMS, device.offer, offer))
            device.select(offer)
        self._best = device.offer
        self._tried_all = False

    def offer_next(self, device: Device, problem: OfferProblem) -> bool:
        """Have a device offered in the next way that the guest may take. False: there is none.

        A guest that leaves the device alone in every way has no driver at all, or not yet: it gets the best offer back,
        and keeps that.
        """
        if self._task is not None:
            return True
        if problem is OfferProblem.SPEED:
            offer = _slower(device)
            self._best = offer or self._best
        elif self._tried_all:
            return False
        else:
            offer = _lesser(device) if problem is OfferProblem.NOT_USED else _slower(device) or _lesser(device)
            if offer is None:
                self._tried_all = True
                problem, offer = OfferProblem.ALL, self._best
        if offer is None or offer == device.offer:
            return False
        self._emit(OfferChanged(self._port, problem, device.offer, offer))
        self._task = asyncio.get_running_loop().create_task(self._offer(device, offer))
        return True

    async def finished(self) -> None:
        """Wait until no device is being offered again."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _offer(self, device: Device, offer: Offer) -> None:
        try:
            await self._offer_again(device, offer)
        except Exception as error:
            message = f"the device cannot be offered again at {offer}: {error}"
            self._failed(error, DeviceError(message, reason=Reason.DEVICE_FAULT))
        finally:
            self._task = None


def _slower(device: Device) -> Offer | None:
    """Return the best offer at a lower speed."""
    return next((offer for offer in device.offers if offer.speed < device.offer.speed), None)


def _lesser(device: Device) -> Offer | None:
    """Return the next offer that needs less of the guest."""
    return next((offer for offer in device.offers if offer.is_less_than(device.offer)), None)
