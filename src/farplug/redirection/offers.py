"""Choose how a device is offered: find the best offer that the guest accepts and uses, by trying.

Whether a guest accepts an offer shows only in what it does:

* A port that does not support SuperSpeed. QEMU offers a SuperSpeed device to a USB 2.0 port as well, as a high-speed
  device. Linux reads the device descriptor, rejects it (bMaxPacketSize0 is 9), resets the port and retries; it never
  reads the configuration descriptor. A guest that accepts the device continues after one or two resets.
* Descriptors that the guest's USB stack does not understand. GRUB mistakes the SuperSpeed companion of an endpoint for
  the next endpoint: it reads the configuration descriptor, and sets no configuration.
* Settings for which the guest has no driver. Linux without its module uas, and SLOF, set the configuration of a disk
  that has a setting for USB Attached SCSI, and then send no request.

In the last two cases the guest is silent. So they count only for devices that a guest uses at once, and never remove a
device from a driver: a device without a configuration has no driver, and a device that was used keeps its offer until
another system starts in the VM. Such a system reads the language IDs of the string descriptors (USB 2.0, chapter 9.6.7)
between a reset and its SET_CONFIGURATION. A driver that recovers from an error resets the port as well, but does not
read them again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

from farplug.errors import DeviceError, Reason
from farplug.redirection.acceptance import no_streams
from farplug.redirection.events import OfferChanged, OfferProblem
from farplug.usb.device import Device, Offer
from farplug.usb.types import DescriptorType, RequestType, Setup, StandardRequest

FAILED_ENUMERATIONS = 2
"""Port resets, each after a read of the device descriptor and of nothing else, after which the guest probably rejects
the speed. A guest that accepts it continues at once after its next read."""
ENUMERATION_TIMEOUT = 0.05
"""Seconds that such a guest has to continue. At their end the guest is between two tries: if the device is disconnected
during a try, Linux waits 10 s for the completion of its SET_ADDRESS."""
IDLE_TIMEOUT = 10.0
"""Seconds without a request after which the device counts as not used. A Linux whose drivers are not in its
initramfs loads them seconds after it has found the device, and Windows searches for a driver of a new device."""


class Timer(Protocol):
    """A scheduled call."""

    def cancel(self) -> None:
        """Cancel the call."""


class OfferWatch:
    """Detects from the guest's requests that it does not accept or use the offer of a device.

    Args:
        report: called with each problem; possibly several times until the device is offered again, or detached.
        call_later: schedules a call, as the event loop's method, which is the default.
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
        """Begin to watch a device that was offered."""
        self.stop()
        self._expects_use = device.used_at_once

    def stop(self) -> None:
        """Stop: the guest has no device."""
        self._cancel_timer()
        self._expects_use = False
        self._failed_enumerations = 0
        self._read_device_only = False
        """Whether the guest has read the device descriptor since the last reset, and nothing else."""
        self._read_configuration = False
        """Whether the guest has read the configuration descriptor since the last reset."""
        self._configured = False
        self._used = False
        """Whether a driver of the system that runs in the guest has used the device."""

    def requested(self, setup: Setup) -> None:
        """Note a control request."""
        if setup.type is not RequestType.STANDARD:
            if self._configured:
                self.used()
            return
        if setup.request == StandardRequest.GET_DESCRIPTOR:
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
                self._used = False  # another system has started
        self._wait_for_use()

    def configured(self, configuration: int) -> None:
        """Note a SET_CONFIGURATION; 0: the guest no longer uses the device."""
        self._read_device_only = self._read_configuration = False
        self._failed_enumerations = 0
        self._configured = configuration != 0
        self._wait_for_use()

    def used(self) -> None:
        """Note a request that only a driver sends."""
        if not self._used:
            self._used = True
            self._cancel_timer()

    def port_reset(self) -> None:
        """Note a port reset."""
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
    """Selects the offers of a device, one after the other.

    Args:
        port: the port's name, for events.
        emit: called with an event for each change of the offer.
        offer_again: disconnects a device from the guest, and offers it again with another offer.
        failed: called when ``offer_again`` raises, with its exception, and with the error to detach the device with.
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
        """The best offer that the guest's port supports, whether or not the guest has a driver for it."""
        self._tried_all = False

    def select_first(self, device: Device, *, streams: bool) -> None:
        """Select the best offer for a guest with or without bulk ``streams``, whatever was selected for another port.

        Raises:
            RefusedError: every offer of the device uses streams (``CAPABILITY``).
        """
        device.select(device.offers[0])
        while not streams and device.has_streams:
            # The guest's driver would find streams in the descriptors, and fail when it cannot allocate them.
            offer = _slower(device) or _lesser(device)
            if offer is None:
                raise no_streams(device.identity)
            self._emit(OfferChanged(self._port, OfferProblem.STREAMS, device.offer, offer))
            device.select(offer)
        self._best = device.offer
        self._tried_all = False

    def offer_next(self, device: Device, problem: OfferProblem) -> bool:
        """Begin to offer a device in the next way that may solve the problem. Return False if there is none.

        A guest that uses none of the offers has no driver, or not yet: it gets the best offer again, and keeps that.
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
    """Return the next offer that requires less of the guest."""
    return next((offer for offer in device.offers if offer.is_less_than(device.offer)), None)
