"""An open device with its interfaces claimed, to be released in its original state.

Every call may block, for seconds if the device hangs: a :class:`~farplug.physical.device_thread.DeviceThread` makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path
from time import monotonic, sleep
from typing import Final

from farplug.errors import DeviceError, Reason, Remedy
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
from farplug.machine.obstacles import REPLUG, busy, device_lost, no_permission
from farplug.machine.sysfs import on_windows
from farplug.machine.windows import refusal
from farplug.physical.transfers import cancel
from farplug.rate_limit import limited_logger
from farplug.usb.descriptors import ConfigurationDescriptor
from farplug.usb.device import Identity
from farplug.usb.types import Endpoint, Interface

DRAIN_TIMEOUT = 2.0
"""Seconds after which cancelled transfers that are still pending are logged."""

NEVER_RESET: Final = frozenset({(0x1210, 0x001C), (0x2798, 0x0001)})
"""idVendor and idProduct of devices that do not survive a port reset, as in usbredirhost."""

MAX_INTERFACES: Final = 32
"""Interface numbers that libusb and Linux can claim: 0 to 31."""

log = limited_logger(__name__)

NODES = Path("/dev/bus/usb")
"""The folder of the devices' files on Linux."""


@dataclass(frozen=True, slots=True)
class BusAddress:
    """Bus and address of a device. They hold until it is unplugged or enumerated again.

    Attributes:
        bus: bus number.
        address: address on the bus.
    """

    bus: int
    address: int

    @classmethod
    def of(cls, device: UsbDevice) -> BusAddress:
        """Return bus and address of ``device``."""
        return cls(device.getBusNumber(), device.getDeviceAddress())

    @property
    def node(self) -> Path:
        """Return the device's file on Linux."""
        return NODES / f"{self.bus:03}/{self.address:03}"

    def __str__(self) -> str:
        return f"{self.bus}-{self.address}"


@contextmanager
def _device_errors(name: str, bus_address: BusAddress, identity: Identity) -> Iterator[None]:
    """Raise libusb's errors as a :class:`~farplug.errors.DeviceError` about the device with this name."""
    try:
        yield
    except UsbError as error:
        raise _device_error(error, name, bus_address, identity) from error


def _device_error(error: Exception, name: str, bus_address: BusAddress, identity: Identity) -> DeviceError:
    if on_windows() and (obstacle := refusal(error)) is not None:
        return obstacle.error(name)
    if isinstance(error, AccessDenied):
        return no_permission(identity.vendor_id, identity.product_id).error(name)
    if isinstance(error, Busy):
        return busy(bus_address.node).error(name)
    if isinstance(error, (NoDevice, NotFound)):
        return device_lost(name)
    return DeviceError(f"{name} cannot be used: {error}", reason=Reason.DEVICE_FAULT, remedy=REPLUG)


def unconfigured(configurations: Mapping[int, ConfigurationDescriptor]) -> tuple[Interface, ...]:
    """Return the interfaces to show for a device without a configuration: those of its first configuration."""
    return next((configuration.select() for configuration in configurations.values()), ())


class OpenDevice:
    """An open device: all interfaces of its configuration are claimed, and no kernel driver is bound to them.

    The constructor opens the device, unbinds its drivers, claims its interfaces and resets its port.

    Args:
        library: libusb.
        bus_address: of the device.
        identity: idVendor and idProduct that the device must have.
        configurations: by bConfigurationValue: they contain the interfaces to claim.

    Attributes:
        context: libusb's context, for this device alone, so that a device that hangs blocks no other one.
        configuration: the current bConfigurationValue; 0 for none.
        interfaces: those of the current configuration in their current settings; without a configuration those of the
            first one.
        endpoints: those of the current settings, by address.

    Raises:
        DeviceError: the device was unplugged (``DEVICE_LOST``), is in use (``BUSY``), there is no permission
            (``NO_PERMISSION``), a driver cannot be unbound (``KERNEL_DRIVER``), or it fails (``DEVICE_FAULT``).
            The device was released.
        SetupError: libusb cannot work on this machine.
    """

    def __init__(
        self,
        library: Library,
        bus_address: BusAddress,
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
        self._name = f"{identity} ({bus_address})"
        self._can_reset = (identity.vendor_id, identity.product_id) not in NEVER_RESET
        self._claimed: list[int] = []
        self._detached: set[int] = set()
        """The interfaces of the current configuration that had kernel drivers."""
        self._needs_reset = self._released = False
        self.context: UsbContext = library.open_context()
        self._handle: UsbHandle | None = None
        try:
            with _device_errors(self._name, bus_address, identity):
                self._handle = self._find(bus_address, identity).open()
                self.configuration = self._original = self._handle.getConfiguration()
                self._claim_interfaces()
                self._needs_reset = True
                self.reset()
                self._update_settings()
        except BaseException:
            self.release()
            raise

    @property
    def handle(self) -> UsbHandle:
        """Return libusb's handle. It exists until :meth:`release`."""
        assert self._handle is not None
        return self._handle

    def _find(self, bus_address: BusAddress, identity: Identity) -> UsbDevice:
        for device in self.context.getDeviceIterator(skip_on_error=True):
            if BusAddress.of(device) == bus_address:
                if (device.getVendorID(), device.getProductID()) == (identity.vendor_id, identity.product_id):
                    return device
                break
        raise NoDevice

    # Requests of the guest

    def reset(self) -> None:
        """Reset the port; the kernel restores the configuration. Does nothing for a device in :data:`NEVER_RESET`.

        On Linux a port reset selects alternate setting 0 of every interface. The guest sets a configuration after a
        reset (USB 2.0, section 9.1.1.5), and :meth:`set_configuration` selects alternate setting 0 on every system.

        Raises:
            NotFound, NoDevice: the device was enumerated as another device, or not at all.
            UsbError: the reset failed.
        """
        if self._can_reset:
            self.handle.resetDevice()

    def set_configuration(self, value: int) -> None:
        """Set a configuration; 0 for none. Updates :attr:`configuration`, also if it raises.

        For the current configuration, only alternate setting 0 of its interfaces is selected: some devices fail when
        the configuration is set again, and the port reset has already restored everything else.

        Raises:
            UsbError: the configuration cannot be set, or its interfaces cannot be claimed.
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
            self.configuration = self.handle.getConfiguration()  # the former one, or none
            raise
        finally:
            if self.configuration != before:
                self._detached = set()
            self._update_settings()
            self._claim_interfaces()  # from kernel drivers too, which may be bound already

    def set_interface(self, number: int, alternate: int) -> None:
        """Select an alternate setting. Raises ``UsbError`` if that fails."""
        self.handle.setInterfaceAltSetting(number, alternate)
        self._alternates[number] = alternate
        self._update_settings()

    def clear_halt(self, endpoint: int) -> None:
        """Clear the halt of an endpoint, and its data toggle. Raises ``UsbError`` if that fails."""
        self.handle.clearHalt(endpoint)

    def allocate_streams(self, endpoints: Sequence[int], count: int) -> None:
        """Allocate ``count`` bulk streams on each of the endpoints, all or none.

        Raises:
            UsbError: there are fewer.
        """
        streams = self._library.bulk_streams
        if streams.allocate(self.handle, count, endpoints) != count:
            streams.free(self.handle, endpoints)
            raise NoMemory

    def free_streams(self, endpoints: Sequence[int]) -> None:
        """Free the bulk streams of the endpoints. Raises ``UsbError`` if there are none."""
        self._library.bulk_streams.free(self.handle, endpoints)

    def _update_settings(self) -> None:
        configuration = self._configurations.get(self.configuration)
        if configuration is None:
            self.interfaces, self.endpoints = unconfigured(self._configurations), {}
            return
        self.interfaces = configuration.select(self._alternates)
        self.endpoints = {
            endpoint.address: endpoint for interface in self.interfaces for endpoint in interface.endpoints
        }

    # Claiming and releasing

    def _interface_numbers(self) -> list[int]:
        configuration = self._configurations.get(self.configuration)
        if configuration is None:
            return []
        return sorted({interface.number for interface in configuration.interfaces if interface.number < MAX_INTERFACES})

    def _claim_interfaces(self) -> None:
        """Unbind all drivers, then claim: a driver of two interfaces is bound again while one of them is free."""
        undetached: dict[int, Exception] = {}
        for number in self._interface_numbers():
            try:
                self.handle.detachKernelDriver(number)
                self._detached.add(number)
            except (NotFound, NotSupported):
                pass  # no driver is bound, or the system cannot unbind drivers
            except NoDevice:
                raise
            except UsbError as error:
                undetached[number] = error
        for number in self._interface_numbers():
            try:
                self.handle.claimInterface(number)
                self._claimed.append(number)
            except NotFound:
                log.warning("%s: the kernel has no interface %d", self._name, number)
            except Busy as error:
                if number not in undetached:
                    raise
                raise DeviceError(
                    f"{self._name}: cannot unbind the kernel driver of interface {number}: {undetached[number]}",
                    reason=Reason.KERNEL_DRIVER,
                    remedy=Remedy(
                        "end the program that uses the device, or unload the driver, which lsusb shows",
                        command="lsusb -t",
                    ),
                ) from error

    def _release_interfaces(self) -> None:
        while self._claimed:
            number = self._claimed.pop()
            try:
                self.handle.releaseInterface(number)
            except UsbError as error:
                log.debug("%s: cannot release interface %d: %s", self._name, number, error)

    def release(self, transfers: Collection[UsbTransfer] = ()) -> None:
        """Cancel transfers, restore the device (port reset, original configuration, kernel drivers), and close it.

        No other thread may handle the context's events any more. Never raises: what cannot be restored is logged.
        Does nothing the second time.

        Args:
            transfers: libusb's transfers that may be in flight.
        """
        if self._released:
            return
        self._released = True
        try:
            if self._handle is not None:
                self._drain(transfers)
                try:
                    self._restore()
                finally:
                    self._handle.close()
                    self._handle = None
        except Exception:
            log.exception("%s: releasing failed", self._name)
        finally:
            self.context.close()

    def _drain(self, transfers: Collection[UsbTransfer]) -> None:
        """Cancel transfers, and handle events until all are complete: libusb cannot close a device before."""
        for transfer in transfers:
            cancel(transfer)
        deadline = monotonic() + DRAIN_TIMEOUT
        while any(transfer.isSubmitted() for transfer in transfers):
            if monotonic() > deadline:
                deadline = inf
                log.warning("%s: transfers still pending %g s after cancellation", self._name, DRAIN_TIMEOUT)
            try:
                self.context.handleEventsTimeout(0.1)
            except Interrupted:
                pass
            except UsbError as error:
                log.debug("%s: libusb cannot handle events: %s", self._name, error)
                sleep(0.1)

    def _restore(self) -> None:
        self._release_interfaces()
        try:
            if self._needs_reset:
                self._try("reset", self.reset)  # the next driver must not meet a state that the guest left behind
            if self.configuration != self._original:  # the kernel binds the drivers of a new configuration itself
                self._try("restore the configuration", lambda: self.handle.setConfiguration(self._original or -1))
                return
            for number in sorted(self._detached):
                try:
                    self.handle.attachKernelDriver(number)
                except (Busy, NotFound):
                    pass  # a driver of two interfaces was bound to this one with the first
                except NoDevice:
                    raise
                except UsbError as error:
                    log.warning("%s: cannot re-attach the kernel driver of interface %d: %s", self._name, number, error)
        except NoDevice:
            log.debug("%s was unplugged: nothing to restore", self._name)

    def _try(self, what: str, call: Callable[[], None]) -> None:
        """Make a call that restores something; log its failure.

        Raises:
            NoDevice: the device was unplugged, or was enumerated as another device.
        """
        try:
            call()
        except (NotFound, NoDevice) as error:
            raise NoDevice from error
        except UsbError as error:
            log.warning("%s: cannot %s: %s", self._name, what, error)
