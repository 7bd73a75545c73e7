"""A virtual device: functions that look like one USB device.

It answers the standard requests (USB 2.0 and USB 3.2, chapters 9.4), keeps configuration, alternate settings and halts,
and passes all other requests and transfers to their function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, replace

from farplug.errors import StateError
from farplug.rate_limit import limited_logger
from farplug.usb.descriptors import Capability
from farplug.usb.device import Device, DeviceEvent, DeviceListener, Identity, Offer, Reception
from farplug.usb.figures import Figures
from farplug.usb.transfer import Status, Transfer
from farplug.usb.types import (
    Buffer,
    Feature,
    Interface,
    Recipient,
    RequestType,
    Setup,
    Speed,
    StandardRequest,
    TransferType,
)
from farplug.virtual.events import FunctionRaised
from farplug.virtual.function import Function, FunctionHost, Numbers
from farplug.virtual.layout import CONFIGURATION, SPEEDS, Layout, Placement

_VENDOR_IN = 0xC0
"""bmRequestType of vendor requests to the device with an IN data stage."""

log = limited_logger(__name__)


class _Slot(FunctionHost):
    """A function of the device, and its place."""

    def __init__(self, function: Function, device: VirtualDevice) -> None:
        self.function = function
        self.placement = Placement(Numbers(), 0, {})
        self._device = device

    @property
    def numbers(self) -> Numbers:
        return self.placement.numbers

    def send(self, endpoint: int, data: Buffer, status: Status = Status.SUCCESS) -> bool:
        return self._device._send(self.numbers.endpoint(endpoint), data, status)

    def halt(self, endpoint: int) -> None:
        self._device._halt(self.numbers.endpoint(endpoint))

    def is_halted(self, endpoint: int) -> bool:
        return self.numbers.endpoint(endpoint) in self._device._halted

    def report(self, event: DeviceEvent) -> None:
        self._device._report(event)

    def raised(self, error: Exception) -> None:
        self._device._function_raised(self.function, error, None)


@dataclass(frozen=True, slots=True)
class _Route:
    """The function of an endpoint of a current alternate setting."""

    slot: _Slot
    own: int
    type: TransferType
    max_streams: int
    renumbered: bool


class _RenumberedTransfer(Transfer):
    """A transfer as a function sees it. Its memory is that of the guest's transfer."""

    __slots__ = ("_original",)

    def __init__(
        self, original: Transfer, endpoint: int, on_complete: Callable[[Transfer], None], setup: Setup | None
    ) -> None:
        super().__init__(
            original.type,
            endpoint,
            on_complete,
            length=original.length,
            data=original.data,
            setup=setup,
            stream_id=original.stream_id,
        )
        self._original = original

    def hold(self) -> None:
        self._original.hold()

    def release(self) -> None:
        self._original.release()


class VirtualDevice(Device):
    """A device made of functions.

    A device can be plugged, unplugged and plugged again. Its functions keep what their constructors acquired (a disk
    its image) until :meth:`dispose`.

    When a function raises an exception, its transfer stalls, the traceback is logged, and the listener receives a
    :class:`~farplug.virtual.events.FunctionRaised`; the device stays usable.

    Args:
        functions: one or more. Several make a composite device. Each function of several interfaces has an
            interface association.
        vendor_id: 1d6b:0104 by default, the Linux Foundation's multifunction composite gadget.
        product_id: see ``vendor_id``.
        device_version: bcdDevice.
        manufacturer: iManufacturer.
        product: iProduct.
        serial_number: iSerialNumber; for a disk 12 or more upper-case hex digits.
        speeds: the speeds that the device can run at, the best first: SUPER, HIGH, FULL.
        remote_wakeup: whether the device may wake a sleeping guest.
        capabilities: further device capabilities.
        landing_page: the http or https URL that a browser with WebUSB offers when the device is plugged in.

    Raises:
        ValueError: there is no function, a speed is not supported, there are more endpoints than a device can have, or
            the landing page is not valid.
    """

    def __init__(
        self,
        *functions: Function,
        vendor_id: int = 0x1D6B,
        product_id: int = 0x0104,
        device_version: int = 0x0100,
        manufacturer: str = "farplug",
        product: str = "",
        serial_number: str = "",
        speeds: Sequence[Speed] = (Speed.SUPER, Speed.HIGH),
        remote_wakeup: bool = False,
        capabilities: Sequence[Capability] = (),
        landing_page: str = "",
    ) -> None:
        if not functions:
            raise ValueError("a device has at least one function")
        if not speeds or not set(speeds) <= set(SPEEDS):
            raise ValueError(f"a virtual device cannot run at {', '.join(map(str, speeds)) or 'no'} speed")
        self.functions = functions
        self._speeds = tuple(speeds)
        self._remote_wakeup = remote_wakeup
        self._capabilities = tuple(capabilities)
        self._landing_page = landing_page
        self._identity = Identity(
            speeds[0],
            vendor_id,
            product_id,
            device_version,
            manufacturer=manufacturer,
            product=product,
            serial_number=serial_number,
        )
        self._halted: set[int] = set()
        self._receiving: set[int] = set()
        self._slots = tuple(_Slot(function, self) for function in functions)
        self._listener: DeviceListener | None = None
        self._renumbered: dict[Transfer, tuple[_Slot, Transfer]] = {}
        """Pending transfers that the function sees with other numbers: the slot, and the function's transfer."""
        self._apply_offer(self.offers[0])
        for slot in self._slots:
            slot.function.bind(slot)

    # Identity

    @property
    def identity(self) -> Identity:
        return self._layout.identity

    @property
    def configuration(self) -> int:
        return self._configuration

    @property
    def interfaces(self) -> Sequence[Interface]:
        return self._layout.configuration.select(self._alternates)

    @property
    def has_streams(self) -> bool:
        return self._layout.configuration.has_streams

    @property
    def offers(self) -> Sequence[Offer]:
        """Return an offer for each speed, each followed by one without the optional part of a single function."""
        offers = []
        for speed in self._speeds:
            offers.append(Offer(speed))
            if len(self.functions) == 1 and (optional := self.functions[0].optional(speed)):
                offers.append(Offer(speed, without=optional))
        return tuple(offers)

    @property
    def offer(self) -> Offer:
        return self._offer

    @property
    def used_at_once(self) -> bool:
        """Return the function's value; False for several functions: a guest may have a driver for only one of them."""
        return len(self.functions) == 1 and self.functions[0].used_at_once

    def select(self, offer: Offer) -> None:
        super().select(offer)
        if self._listener is not None:
            raise StateError(f"{self.identity} is plugged: its offer cannot be changed")
        self._apply_offer(offer)

    @property
    def figures(self) -> Figures | None:
        """Return the sum of the functions' counters."""
        counted = [figures for function in self.functions if (figures := function.figures) is not None]
        return sum(counted, Figures()) if counted else None

    def _apply_offer(self, offer: Offer) -> None:
        self._offer = offer
        self._speed = offer.speed
        for function in self.functions:
            function.leave_out(bool(offer.without))
        identity = replace(self._identity, speed=offer.speed)
        self._layout = Layout(
            identity,
            self.functions,
            self._speeds,
            remote_wakeup=self._remote_wakeup,
            capabilities=self._capabilities,
            landing_page=self._landing_page,
        )
        for slot, placement in zip(self._slots, self._layout.placements, strict=True):
            slot.placement = placement
        self._unconfigure()

    # Opening and closing

    async def open(self, listener: DeviceListener) -> None:
        if self._listener is not None:
            raise StateError(f"{self.identity} is already plugged")
        self._listener = listener
        opened: list[Function] = []
        try:
            for function in self.functions:
                function.share = self.share
                await function.open()
                opened.append(function)
        except BaseException:
            self._listener = None
            for function in opened:
                await function.close()
            raise

    async def close(self) -> None:
        self._reset_functions(port_reset=False)
        self._unconfigure()
        errors: list[Exception] = []
        try:
            for function in self.functions:
                try:
                    await function.close()
                except Exception as error:  # the other functions must be closed too
                    errors.append(error)
        finally:
            self._listener = None
        if errors:
            raise errors[0]

    async def dispose(self) -> None:
        """Release what the functions acquired in their constructors. The device cannot be plugged again."""
        async with AsyncExitStack() as steps:  # each in any case
            for function in reversed(self.functions):
                steps.push_async_callback(function.dispose)

    async def reset(self) -> Status:
        self._reset_functions(port_reset=True)
        self._unconfigure()
        return Status.SUCCESS

    async def set_configuration(self, value: int) -> Status:
        return self._choose_configuration(value)

    async def set_interface(self, number: int, alternate: int) -> Status:
        return self._choose_alternate(number, alternate)

    async def allocate_streams(self, endpoints: Sequence[int], count: int) -> Status:
        routes = [self._routes.get(endpoint) for endpoint in endpoints]
        enough = all(route is not None and 0 < count <= route.max_streams for route in routes)
        return Status.SUCCESS if enough else Status.INVALID

    async def free_streams(self, endpoints: Sequence[int]) -> Status:
        return Status.SUCCESS if all(endpoint in self._routes for endpoint in endpoints) else Status.INVALID

    def _reset_functions(self, *, port_reset: bool) -> None:
        for slot in self._slots:
            with self._catch(slot.function):
                slot.function.reset(port_reset=port_reset)

    def _unconfigure(self) -> None:
        self._configuration = 0
        self._alternates: dict[int, int] = {}
        self._routes: dict[int, _Route] = {}
        self._enabled: set[int] = set()
        self._halted.clear()
        self._receiving.clear()

    def _choose_configuration(self, value: int) -> Status:
        if value not in (0, CONFIGURATION):
            return Status.STALL
        self._reset_functions(port_reset=False)
        kept = self._enabled & {Feature.DEVICE_REMOTE_WAKEUP}
        self._unconfigure()
        self._enabled = kept
        if value:
            self._configuration = value
            self._find_routes()
            for slot in self._slots:
                with self._catch(slot.function):
                    slot.function.configured(self._speed)
        return Status.SUCCESS

    def _choose_alternate(self, number: int, alternate: int) -> Status:
        slot = self._slot_of_interface(number)
        if slot is None:
            return Status.INVALID
        settings = self._layout.configuration.settings(number)
        if alternate not in settings:
            return Status.STALL
        for setting in settings.values():
            addresses = {endpoint.address for endpoint in setting.endpoints}
            self._halted -= addresses
            self._receiving -= addresses
        with self._catch(slot.function):
            slot.function.set_alternate(number - slot.numbers.first_interface, alternate)
        self._alternates[number] = alternate
        self._find_routes()
        return Status.SUCCESS

    def _find_routes(self) -> None:
        self._routes = {}
        for interface in self.interfaces:
            slot = self._slot_of_interface(interface.number)
            assert slot is not None
            for endpoint in interface.endpoints:
                own = slot.placement.own[endpoint.address]
                self._routes[endpoint.address] = _Route(
                    slot, own, endpoint.type, endpoint.max_streams, own != endpoint.address
                )

    def _slot_of_interface(self, number: int) -> _Slot | None:
        """Return the slot of an interface; None if there is no such interface, or the device is not configured."""
        if self._configuration:
            for slot in self._slots:
                if 0 <= number - slot.numbers.first_interface < slot.placement.interface_count:
                    return slot
        return None

    # Events

    def _report(self, event: DeviceEvent) -> None:
        if self._listener is not None:
            self._listener.happened(event)

    @contextmanager
    def _catch(self, function: Function, transfer: Transfer | None = None) -> Iterator[None]:
        """Report an exception that a function raises, and stall the transfer."""
        try:
            yield
        except Exception as error:
            self._function_raised(function, error, transfer)

    def _function_raised(self, function: Function, error: Exception, transfer: Transfer | None) -> None:
        name = type(function).__name__
        log.error("%s raised", name, exc_info=error)
        if transfer is not None and transfer.status is None:
            transfer.complete(Status.STALL)
        self._report(FunctionRaised(name, error))

    # Transfers

    def submit(self, transfer: Transfer) -> None:
        if transfer.type is TransferType.CONTROL:
            self._control(transfer)
            return
        route = self._routes.get(transfer.endpoint)
        if route is None or route.type is not transfer.type or transfer.stream_id > route.max_streams:
            transfer.complete(Status.INVALID)
        elif transfer.endpoint in self._halted:
            transfer.complete(Status.STALL)
        else:
            inner = self._renumber(transfer, route.slot, route.own, None) if route.renumbered else transfer
            try:
                route.slot.function.submit(inner)
            except Exception as error:
                self._function_raised(route.slot.function, error, inner)

    def cancel(self, transfer: Transfer) -> None:
        if transfer.status is not None:
            return
        if transfer in self._renumbered:
            slot, transfer = self._renumbered[transfer]
        elif transfer.endpoint in self._routes:
            slot = self._routes[transfer.endpoint].slot
        else:
            return
        try:
            slot.function.cancel(transfer)
        except Exception as error:
            self._function_raised(slot.function, error, None)

    # Receptions

    def start_receiving(self, reception: Reception) -> Status:
        endpoint = reception.endpoint
        route = self._routes.get(endpoint)
        if endpoint in self._receiving:
            return Status.INVALID
        if route is None or route.type is not reception.type or route.type is TransferType.BULK:
            return Status.STALL
        if endpoint in self._halted:
            return Status.STALL
        self._receiving.add(endpoint)
        status = Status.STALL
        with self._catch(route.slot.function):
            status = route.slot.function.receiving(route.own, reception)
        if status is not Status.SUCCESS:
            self._receiving.discard(endpoint)
        return status

    def stop_receiving(self, endpoint: int) -> Status:
        if endpoint in self._receiving:
            self._receiving.discard(endpoint)
            route = self._routes[endpoint]
            with self._catch(route.slot.function):
                route.slot.function.stopped(route.own)
        return Status.SUCCESS

    def _send(self, endpoint: int, data: Buffer, status: Status) -> bool:
        if self._listener is None or endpoint not in self._receiving:
            return False
        return self._listener.received(endpoint, status, data)

    def _halt(self, endpoint: int) -> None:
        """Halt an endpoint. A reception ends, so that the guest learns of the halt, and starts it again afterwards."""
        self._halted.add(endpoint)
        if endpoint in self._receiving:
            self.stop_receiving(endpoint)
            if self._listener is not None:
                self._listener.reception_ended(endpoint, Status.STALL)

    def _renumber(self, transfer: Transfer, slot: _Slot, endpoint: int, setup: Setup | None) -> Transfer:
        """Make the transfer that the function sees; its completion completes the guest's transfer."""

        def complete(inner: Transfer) -> None:
            del self._renumbered[transfer]
            assert inner.status is not None
            transfer.complete(inner.status, inner.reply, actual=inner.actual)

        inner = _RenumberedTransfer(transfer, endpoint, complete, setup)
        self._renumbered[transfer] = slot, inner
        return inner

    # Control transfers

    def _control(self, transfer: Transfer) -> None:
        setup = transfer.setup
        if setup is None or transfer.endpoint & 0x0F or setup.direction != transfer.direction:
            transfer.complete(Status.INVALID)
            return
        answer = _STANDARD_REQUESTS.get((setup.request_type, setup.request))
        if answer is not None:
            reply = answer(self, setup, transfer.data)
            if reply is None:
                transfer.complete(Status.STALL)
            else:
                transfer.complete(Status.SUCCESS, reply[: min(setup.length, transfer.length)])
            return
        if setup.request_type == _VENDOR_IN and (known := self._layout.vendor_reply(setup)) is not None:
            transfer.complete(Status.SUCCESS, known[: min(setup.length, transfer.length)])
            return
        for slot, own in self._recipients(setup):
            inner = self._renumber(transfer, slot, transfer.endpoint, own)
            with self._catch(slot.function, inner):
                if slot.function.control(inner):
                    return
            if inner.status is not None:  # it raised
                return
            del self._renumbered[transfer]
        transfer.complete(Status.STALL)

    def _recipients(self, setup: Setup) -> list[tuple[_Slot, Setup]]:
        """Return the functions to try in turn, with the request as each sees it.

        Functions receive only one standard request, GET_DESCRIPTOR to an interface: hosts read HID report descriptors
        with it.
        """
        key = setup.request_type, setup.request
        if setup.type is RequestType.STANDARD and key != (0x81, StandardRequest.GET_DESCRIPTOR):
            return []
        if setup.recipient is Recipient.INTERFACE:
            slot = self._slot_of_interface(setup.index & 0xFF)
            if slot is None:
                return []
            return [(slot, replace(setup, index=setup.index - slot.numbers.first_interface))]
        if setup.recipient is Recipient.ENDPOINT:
            route = self._routes.get(setup.index & 0xFF)
            return [] if route is None else [(route.slot, replace(setup, index=setup.index & 0xFF00 | route.own))]
        return [(slot, setup) for slot in self._slots]

    # Standard requests: each returns the data stage (b"" for none), or None to stall.

    def _get_device_status(self, setup: Setup, data: Buffer) -> bytes | None:
        if setup.value or setup.index:
            return None
        bits = 1  # self-powered
        for bit, feature in enumerate((Feature.DEVICE_REMOTE_WAKEUP, Feature.U1_ENABLE, Feature.U2_ENABLE), 1):
            bits |= (feature in self._enabled) << bit
        return bytes((bits, 0))

    def _get_interface_status(self, setup: Setup, data: Buffer) -> bytes | None:
        if setup.value or self._slot_of_interface(setup.index) is None:
            return None
        return bytes(2)

    def _get_endpoint_status(self, setup: Setup, data: Buffer) -> bytes | None:
        if setup.value or (setup.index not in self._routes and setup.index not in (0x00, 0x80)):
            return None
        return bytes((setup.index in self._halted, 0))

    def _device_feature(self, enable: bool, setup: Setup, data: Buffer) -> bytes | None:
        if setup.index or setup.length:
            return None
        if setup.value == Feature.DEVICE_REMOTE_WAKEUP:
            supported = self._remote_wakeup and self._speed < Speed.SUPER
        else:
            link = setup.value in (Feature.U1_ENABLE, Feature.U2_ENABLE)
            supported = link and self._speed >= Speed.SUPER and self._configuration != 0
        if not supported:
            return None
        (self._enabled.add if enable else self._enabled.discard)(setup.value)
        return b""

    def _interface_feature(self, setup: Setup, data: Buffer) -> bytes | None:
        """Accept FUNCTION_SUSPEND (USB 3.2, chapter 9.4.9); a virtual function does not suspend."""
        interface = setup.index & 0xFF  # the high byte holds the suspend options
        if self._speed < Speed.SUPER or setup.length or setup.value != Feature.FUNCTION_SUSPEND:
            return None
        return None if self._slot_of_interface(interface) is None else b""

    def _endpoint_feature(self, enable: bool, setup: Setup, data: Buffer) -> bytes | None:
        if setup.value != Feature.ENDPOINT_HALT or setup.length:
            return None
        route = self._routes.get(setup.index)
        if route is None:
            return b"" if setup.index in (0x00, 0x80) and not enable else None
        if enable:
            self._halt(setup.index)
        else:
            self._halted.discard(setup.index)
            with self._catch(route.slot.function):
                route.slot.function.halt_cleared(route.own)
        return b""

    def _get_descriptor(self, setup: Setup, data: Buffer) -> bytes | None:
        return self._layout.descriptor(setup.value >> 8, setup.value & 0xFF)

    def _get_configuration(self, setup: Setup, data: Buffer) -> bytes | None:
        return None if setup.value or setup.index else bytes((self._configuration,))

    def _set_configuration(self, setup: Setup, data: Buffer) -> bytes | None:
        if setup.index or setup.length or self._choose_configuration(setup.value) is not Status.SUCCESS:
            return None
        return b""

    def _get_interface(self, setup: Setup, data: Buffer) -> bytes | None:
        if setup.value or self._slot_of_interface(setup.index) is None:
            return None
        return bytes((self._alternates.get(setup.index, 0),))

    def _set_interface(self, setup: Setup, data: Buffer) -> bytes | None:
        if setup.length or self._choose_alternate(setup.index, setup.value) is not Status.SUCCESS:
            return None
        return b""

    def _set_sel(self, setup: Setup, data: Buffer) -> bytes | None:
        """Accept system exit latencies (USB 3.2, chapter 9.4.12), six bytes, and ignore them."""
        good = self._speed >= Speed.SUPER and not setup.value and not setup.index and len(data) == 6
        return b"" if good else None

    def _set_isoch_delay(self, setup: Setup, data: Buffer) -> bytes | None:
        """Accept the isochronous delay (USB 3.2, chapter 9.4.11), and ignore it."""
        return b"" if self._speed >= Speed.SUPER and not setup.index and not setup.length else None


_STANDARD_REQUESTS: dict[tuple[int, int], Callable[[VirtualDevice, Setup, Buffer], bytes | None]] = {
    (0x80, StandardRequest.GET_STATUS): VirtualDevice._get_device_status,
    (0x81, StandardRequest.GET_STATUS): VirtualDevice._get_interface_status,
    (0x82, StandardRequest.GET_STATUS): VirtualDevice._get_endpoint_status,
    (0x00, StandardRequest.CLEAR_FEATURE): lambda device, setup, data: device._device_feature(False, setup, data),
    (0x00, StandardRequest.SET_FEATURE): lambda device, setup, data: device._device_feature(True, setup, data),
    (0x01, StandardRequest.CLEAR_FEATURE): VirtualDevice._interface_feature,
    (0x01, StandardRequest.SET_FEATURE): VirtualDevice._interface_feature,
    (0x02, StandardRequest.CLEAR_FEATURE): lambda device, setup, data: device._endpoint_feature(False, setup, data),
    (0x02, StandardRequest.SET_FEATURE): lambda device, setup, data: device._endpoint_feature(True, setup, data),
    (0x80, StandardRequest.GET_DESCRIPTOR): VirtualDevice._get_descriptor,
    (0x80, StandardRequest.GET_CONFIGURATION): VirtualDevice._get_configuration,
    (0x00, StandardRequest.SET_CONFIGURATION): VirtualDevice._set_configuration,
    (0x81, StandardRequest.GET_INTERFACE): VirtualDevice._get_interface,
    (0x01, StandardRequest.SET_INTERFACE): VirtualDevice._set_interface,
    (0x00, StandardRequest.SET_SEL): VirtualDevice._set_sel,
    (0x00, StandardRequest.SET_ISOCH_DELAY): VirtualDevice._set_isoch_delay,
}
"""By bmRequestType and bRequest. Others that no function supports stall: SYNCH_FRAME, SET_DESCRIPTOR …"""
