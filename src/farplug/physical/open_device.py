"""A device taken from this machine, to be given back as it was found.

Everything here may block, for seconds if the device hangs: a :class:`~farplug.physical.device_thread.Worker` calls it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path
from time import monotonic, sleep
from typing import Final

from farplug.errors import DeviceError, Reason
from farplug.libusb.binding import UsbContext, UsbDevice, UsbHandle, UsbTransfer
from farplug.libusb.library import (
    AccessDenied,
    Busy,
    Interrupted,
    Library,
    NoDevice,
    NoMemory,
    NotFound,
    NotSupported,
    UsbError,
)
from farplug.machine.obstacles import busy, gone, no_permission
from farplug.machine.sysfs import on_windows
from farplug.machine.windows import refusal
from farplug.physical.transfers import cancel
from farplug.usb.descriptors import ConfigurationDescriptor
from farplug.usb.device import Identity
from farplug.usb.types import Endpoint, Interface

DRAIN_PATIENCE = 2.0
"""Seconds after which cancelled transfers that have not come back are reported."""

NEVER_RESET: Final = frozenset({(0x1210, 0x001C), (0x2798, 0x0001)})
"""idVendor and idProduct of devices that do not survive a port reset, as usbredirhost knows them."""

MAX_INTERFACES: Final = 32
"""libusb, and Linux, claim none with a higher number."""

log = logging.getLogger(__name__)

NODES = Path("/dev/bus/usb")
"""Where Linux has the devices, by bus and address."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a device is plugged in; it holds until it leaves, or is enumerated anew.

    Attributes:
        bus: the number of its bus.
        address: its address on the bus.
    """

    bus: int
    address: int

    @classmethod
    def of(cls, device: UsbDevice) -> Place:
        """Where ``device`` is."""
        return cls(device.getBusNumber(), device.getDeviceAddress())

    @property
    def node(self) -> Path:
        """What is opened to use it, on Linux."""
        return NODES / f"{self.bus:03}/{self.address:03}"

    def __str__(self) -> str:
        return f"{self.bus}-{self.address}"


@contextmanager
def _device_errors(name: str, place: Place, identity: Identity) -> Iterator[None]:
    """Turn what libusb refuses into a :class:`~farplug.errors.DeviceError` about the device with this name."""
    try:
        yield
    except UsbError as error:
        raise _device_error(error, name, place, identity) from error


def _device_error(error: Exception, name: str, place: Place, identity: Identity) -> DeviceError:
    if on_windows() and (obstacle := refusal(error)) is not None:
        return obstacle.error(name)
    if isinstance(error, AccessDenied):
        return no_permission(identity.vendor_id, identity.product_id).error(name)
    if isinstance(error, Busy):
        return busy(place.node).error(name)
    if isinstance(error, (NoDevice, NotFound)):
        return gone(name)
    return DeviceError(
        f"{name} cannot be used: {error}", reason=Reason.DEVICE_FAULT, remedy="unplug it and plug it in again"
    )


def unconfigured(configurations: Mapping[int, ConfigurationDescriptor]) -> tuple[Interface, ...]:
    """The interfaces of a device that has no configuration yet: those of the first one."""
    return next((configuration.select() for configuration in configurations.values()), ())


class Claim:
    """A device that is open, all interfaces of its configuration claimed, no driver of the kernel bound to them.

    Args:
        library: libusb.
        place: where the device is.
        identity: what it must still be.
        configurations: by bConfigurationValue: they name the interfaces to claim.

    Attributes:
        context: the session with libusb, for this device alone: its events reach nobody else, and if closing it
            takes long, nobody else waits.
        configuration: the current bConfigurationValue; 0 for none.
        interfaces: those of the current configuration in their current settings; without a configuration those of the
            first one.
        endpoints: those of the current settings, by address.

    Raises:
        DeviceError: it is gone (``DEVICE_LOST``), in use (``BUSY``), there is no permission (``NO_PERMISSION``),
            its driver cannot be unbound (``KERNEL_DRIVER``), or it does not work (``DEVICE_FAULT``). It was given back.
        SetupError: libusb cannot work on this machine.
    """

    def __init__(
        self,
        library: Library,
        place: Place,
        identity: Identity,
        configurations: Mapping[int, ConfigurationDescriptor],
    ) -> None:
        self.configuration = 0
        self.interfaces: tuple[Interface, ...] = ()
        self.endpoints: dict[int, Endpoint] = {}
        self._alternates: dict[int, int] = {}
        self._original = 0
        self._library = library
        self._configurations = configurations
        self._name = f"{identity} ({place})"
        self._resets = (identity.vendor_id, identity.product_id) not in NEVER_RESET
        self._claimed: list[int] = []
        self._detached: set[int] = set()
        """The interfaces of this configuration that had drivers."""
        self._taken = self._closing = False
        self.context: UsbContext = library.open_context()
        self._handle: UsbHandle | None = None
        try:
            with _device_errors(self._name, place, identity):
                self._handle = self._find(place, identity).open()
                self.configuration = self._original = self._handle.getConfiguration()
                self._take_interfaces()
                self._taken = True
                self.reset()
                self._describe()
        except BaseException:
            self.give_back()
            raise

    @property
    def handle(self) -> UsbHandle:
        """libusb's handle, until the device is given back."""
        assert self._handle is not None
        return self._handle

    def _find(self, place: Place, identity: Identity) -> UsbDevice:
        for device in self.context.getDeviceIterator(skip_on_error=True):
            if Place.of(device) == place:
                if (device.getVendorID(), device.getProductID()) == (identity.vendor_id, identity.product_id):
                    return device
                break
        raise NoDevice

    # What a guest asks for

    def reset(self) -> None:
        """Reset the port; the configuration is restored. Does nothing if the device does not survive it.

        On Linux the interfaces are in their first settings then. A host chooses a configuration after a reset (USB 2.0,
        section 9.1.1.5), and :meth:`set_configuration` chooses them for all.

        Raises:
            NotFound, NoDevice: it came back as another device, or not at all.
            UsbError: it could not be reset.
        """
        if self._resets:
            self.handle.resetDevice()

    def set_configuration(self, value: int) -> None:
        """Choose a configuration; 0 for none. :attr:`configuration` is right afterwards, also after an error.

        To choose the current one again only puts its interfaces back to their first settings: devices are known that do
        not take it well, and after a port reset they have everything else behind them.

        Raises:
            UsbError: it could not be chosen, or its interfaces not be claimed.
        """
        if value == self.configuration:
            for number in [number for number, alternate in self._alternates.items() if alternate]:
                self.set_interface(number, 0)
            return
        self._release_interfaces()
        before, self._alternates = self.configuration, {}
        try:
            self.handle.setConfiguration(value or -1)
            self.configuration = value
        except UsbError:
            self.configuration = self.handle.getConfiguration()  # the old one, or none
            raise
        finally:
            if self.configuration != before:
                self._detached = set()
            self._describe()
            self._take_interfaces()  # the kernel's drivers may have been quicker

    def set_interface(self, number: int, alternate: int) -> None:
        """Choose an alternate setting. Raises ``UsbError`` if it cannot be chosen."""
        self.handle.setInterfaceAltSetting(number, alternate)
        self._alternates[number] = alternate
        self._describe()

    def clear_halt(self, endpoint: int) -> None:
        """Clear the halt of an endpoint, and its data toggle. Raises ``UsbError`` if that fails."""
        self.handle.clearHalt(endpoint)

    def allocate_streams(self, endpoints: Sequence[int], count: int) -> None:
        """Allocate ``count`` bulk streams on each of the endpoints, all or none.

        Raises:
            UsbError: there are not so many.
        """
        streams = self._library.streams
        if streams.allocate(self.handle, count, endpoints) != count:
            streams.free(self.handle, endpoints)
            raise NoMemory

    def free_streams(self, endpoints: Sequence[int]) -> None:
        """Give bulk streams back. Raises ``UsbError`` if there are none."""
        self._library.streams.free(self.handle, endpoints)

    def _describe(self) -> None:
        configuration = self._configurations.get(self.configuration)
        if configuration is None:
            self.interfaces, self.endpoints = unconfigured(self._configurations), {}
            return
        self.interfaces = configuration.select(self._alternates)
        self.endpoints = {one.address: one for interface in self.interfaces for one in interface.endpoints}

    # Taking and giving back

    def _numbers(self) -> list[int]:
        configuration = self._configurations.get(self.configuration)
        if configuration is None:
            return []
        return sorted({one.number for one in configuration.interfaces if one.number < MAX_INTERFACES})

    def _take_interfaces(self) -> None:
        """Unbind all drivers, then claim: a driver that has two interfaces binds again while one is still free."""
        stuck: dict[int, Exception] = {}
        for number in self._numbers():
            try:
                self.handle.detachKernelDriver(number)
                self._detached.add(number)
            except (NotFound, NotSupported):
                pass  # no driver is bound, or the system has no such thing
            except NoDevice:
                raise
            except UsbError as error:
                stuck[number] = error
        for number in self._numbers():
            try:
                self.handle.claimInterface(number)
                self._claimed.append(number)
            except NotFound:
                log.warning("%s: this machine does not know its interface %d", self._name, number)
            except Busy as error:
                if number not in stuck:
                    raise
                raise DeviceError(
                    f"{self._name}: the kernel's driver of interface {number} cannot be unbound: {stuck[number]}",
                    reason=Reason.KERNEL_DRIVER,
                    remedy="end what uses it, or unload the driver: lsusb -t names it",
                ) from error

    def _release_interfaces(self) -> None:
        while self._claimed:
            number = self._claimed.pop()
            try:
                self.handle.releaseInterface(number)
            except UsbError as error:
                log.debug("%s: interface %d could not be released: %s", self._name, number, error)

    def give_back(self, transfers: Collection[UsbTransfer] = ()) -> None:
        """Give the device back: transfers cancelled, port reset, first configuration, drivers bound again; close it.

        Nobody else handles the events of the session any more. Never raises: what cannot be restored is logged. Only
        the first call does anything.

        Args:
            transfers: those that may be in flight.
        """
        if self._closing:
            return
        self._closing = True
        try:
            if self._handle is not None:
                self._drain(transfers)
                try:
                    self._restore()
                finally:
                    self._handle.close()
                    self._handle = None
        except Exception:
            log.exception("%s could not be given back", self._name)
        finally:
            self.context.close()

    def _drain(self, transfers: Collection[UsbTransfer]) -> None:
        """Cancel transfers, and handle events until all are back: libusb cannot close a device before."""
        for transfer in transfers:
            cancel(transfer)
        late = monotonic() + DRAIN_PATIENCE
        while any(transfer.isSubmitted() for transfer in transfers):
            if monotonic() > late:
                late = inf
                log.warning("%s has not given its transfers back after %g s", self._name, DRAIN_PATIENCE)
            try:
                self.context.handleEventsTimeout(0.1)
            except Interrupted:
                pass
            except UsbError as error:
                log.debug("%s: its events could not be handled: %s", self._name, error)
                sleep(0.1)

    def _restore(self) -> None:
        self._release_interfaces()
        try:
            if self._taken:
                self._try("reset", self.reset)  # whatever the guest left behind, the next driver finds it clean
            if self.configuration != self._original:  # the kernel binds the drivers of a new one by itself
                self._try("put back to its configuration", lambda: self.handle.setConfiguration(self._original or -1))
                return
            for number in sorted(self._detached):
                try:
                    self.handle.attachKernelDriver(number)
                except (Busy, NotFound):
                    pass  # a driver that has two interfaces took this one with the first
                except NoDevice:
                    raise
                except UsbError as error:
                    log.warning("%s: interface %d has no driver again: %s", self._name, number, error)
        except NoDevice:
            log.debug("%s is gone: nothing is to be restored", self._name)

    def _try(self, what: str, call: Callable[[], None]) -> None:
        """Make a call that restores something. Raises ``NoDevice`` if the device is gone, or came back as another."""
        try:
            call()
        except (NotFound, NoDevice) as error:
            raise NoDevice from error
        except UsbError as error:
            log.warning("%s could not be %s: %s", self._name, what, error)
