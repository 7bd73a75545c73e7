"""Events of a device in a port.

``str(event)`` is one line for people; :func:`as_dict` returns the same for programs, as JSON's types.

The guest and the device can cause events without an end, so :class:`EventLimit` limits them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum, StrEnum
from typing import TYPE_CHECKING, Any, ClassVar

from farplug.errors import FarplugError
from farplug.rate_limit import Clock, RateLimit
from farplug.usb.device import DeviceEvent, Identity, Offer
from farplug.usb.figures import EndpointFigures
from farplug.usb.types import Speed

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_SPEED_NAMES = {
    Speed.LOW: "Low Speed (1.5 Mb/s)",
    Speed.FULL: "Full Speed (12 Mb/s)",
    Speed.HIGH: "High Speed (480 Mb/s)",
    Speed.SUPER: "SuperSpeed (5 Gb/s)",
    Speed.SUPER_PLUS: "SuperSpeed Plus (10 Gb/s)",
}


def speed_name(speed: Speed) -> str:
    """Return the name of a speed in the USB specifications, with its bit rate."""
    return _SPEED_NAMES[speed]


@dataclass(frozen=True, slots=True)
class PortEvent:
    """Something that happens to a device in a port. ``str(event)`` is one line for people.

    Attributes:
        name: of this kind of event; stable, for programs.
        bounded: whether the number of these events is bounded by what a user does: one for each attach, offer or
            command. Others are limited.
        port: the name of the port.
    """

    name: ClassVar[str]
    bounded: ClassVar[bool] = False
    port: str

    @property
    def kind(self) -> Hashable:
        """Return what the limit counts the event with."""
        return self.name


@dataclass(frozen=True, slots=True)
class Opened(PortEvent):
    """The port is open: its connection is established. ``number`` is the port's index in the guest, from 0."""

    name: ClassVar[str] = "opened"
    bounded: ClassVar[bool] = True
    number: int

    def __str__(self) -> str:
        return f"connected to port {self.number} of the guest ({self.port})"


@dataclass(frozen=True, slots=True)
class WaitingForGuest(PortEvent):
    """The port is open, but the guest has not sent its hello.

    Its VM is paused or not started yet, or the chardev of a plain socket serves another client: QEMU serves one client
    at a time, and further ones wait in the backlog of its socket.
    """

    name: ClassVar[str] = "waiting-for-guest"
    bounded: ClassVar[bool] = True

    def __str__(self) -> str:
        return "the guest has not answered yet: its VM may be paused, or the port may serve another client; waiting"


@dataclass(frozen=True, slots=True)
class GuestReady(PortEvent):
    """The guest has sent its hello."""

    name: ClassVar[str] = "guest-ready"
    bounded: ClassVar[bool] = True
    version: str
    capabilities: tuple[str, ...]

    def __str__(self) -> str:
        return f"the guest is ready ({self.version or 'no version given'})"


@dataclass(frozen=True, slots=True)
class Attached(PortEvent):
    """The device was offered to the guest."""

    name: ClassVar[str] = "attached"
    bounded: ClassVar[bool] = True
    identity: Identity
    speed: Speed

    def __str__(self) -> str:
        return f"attached as {self.identity} at {speed_name(self.speed)}"


@dataclass(frozen=True, slots=True)
class Unused(PortEvent):
    """The guest has not sent the device a request for a while after the offer."""

    name: ClassVar[str] = "unused"
    bounded: ClassVar[bool] = True

    def __str__(self) -> str:
        return "the VM has not used the device yet: does an operating system run there, or is the VM paused?"


@dataclass(frozen=True, slots=True)
class Configured(PortEvent):
    """The guest set a configuration: its driver begins to use the device (0: it no longer does)."""

    name: ClassVar[str] = "configured"
    configuration: int

    def __str__(self) -> str:
        if not self.configuration:
            return "unconfigured by the guest (configuration 0)"
        return f"configured by the guest (configuration {self.configuration})"


@dataclass(frozen=True, slots=True)
class PortReset(PortEvent):
    """The guest reset the port."""

    name: ClassVar[str] = "port-reset"

    def __str__(self) -> str:
        return "reset by the guest"


class OfferProblem(StrEnum):
    """Why the offer of a device is changed."""

    SPEED = "speed"
    """The guest's USB port does not support the speed."""
    STREAMS = "streams"
    """The device uses bulk streams, and the guest's side of the port does not support them."""
    NOT_CONFIGURED = "not-configured"
    """The guest read the configuration descriptor, and set no configuration."""
    NOT_USED = "not-used"
    """The guest set the configuration, and then sent no request: it has no driver for this offer."""
    ALL = "all"
    """The guest used none of the offers: it has no driver yet, and gets the best offer again."""


@dataclass(frozen=True, slots=True)
class OfferChanged(PortEvent):
    """The guest did not accept or use the offer of the device: the device is offered in another way.

    Attributes:
        why: the problem with the offer before.
        before: the offer before.
        offer: the new offer.
    """

    name: ClassVar[str] = "offer-changed"
    bounded: ClassVar[bool] = True
    why: OfferProblem
    before: Offer
    offer: Offer

    def __str__(self) -> str:
        match self.why:
            case OfferProblem.SPEED:
                fact = f"the guest's port does not support {speed_name(self.before.speed)}"
            case OfferProblem.STREAMS:
                fact = f"the guest's port has no bulk streams for {speed_name(self.before.speed)}"
            case OfferProblem.NOT_CONFIGURED:
                fact = "the guest read the descriptors of the device, but did not configure it"
            case OfferProblem.NOT_USED:
                fact = "the guest configured the device, but does not use it"
            case OfferProblem.ALL:
                return f"the guest used none of the device's offers: back to {self._change}"
        return f"{fact}: trying {self._change}"

    @property
    def _change(self) -> str:
        parts = [] if self.offer.speed is self.before.speed else [speed_name(self.offer.speed)]
        if self.offer.without != self.before.without:
            optional = self.offer.without or self.before.without
            parts.append(f"{'without' if self.offer.without else 'with'} {optional}")
        return " ".join(parts)


@dataclass(frozen=True, slots=True)
class PeerViolation(PortEvent):
    """The guest violated the protocol; the packet was dropped."""

    name: ClassVar[str] = "peer-violation"
    error: FarplugError

    def __str__(self) -> str:
        return f"the guest violated the protocol: {self.error}"


@dataclass(frozen=True, slots=True)
class DeviceFault(PortEvent):
    """The device broke its contract, as by an exception; the guest got an error for this transfer."""

    name: ClassVar[str] = "device-fault"
    error: Exception

    def __str__(self) -> str:
        return f"device error: {type(self.error).__name__}: {self.error}"


@dataclass(frozen=True, slots=True)
class Refused(PortEvent):
    """The guest refused the device."""

    name: ClassVar[str] = "refused"
    bounded: ClassVar[bool] = True
    error: FarplugError

    def __str__(self) -> str:
        return str(self.error)


@dataclass(frozen=True, slots=True)
class DeviceReport(PortEvent):
    """The device reported an event of its own, such as an ejected medium."""

    event: DeviceEvent

    @property
    def name(self) -> str:  # type: ignore[override]
        """The name of the device's event."""
        return self.event.name

    @property
    def bounded(self) -> bool:  # type: ignore[override]
        """Return whether the number of the device's events is bounded."""
        return self.event.bounded

    @property
    def kind(self) -> Hashable:
        return self.event.kind

    def __str__(self) -> str:
        return str(self.event)


@dataclass(frozen=True, slots=True)
class Repeated(PortEvent):
    """Events of one kind were dropped: :class:`EventLimit`.

    Attributes:
        last: the last event of the kind, which was emitted just before.
        count: the number of dropped events, all before ``last``.
    """

    name: ClassVar[str] = "repeated"
    last: PortEvent
    count: int

    def __str__(self) -> str:
        return f"{self.count} more like this"


@dataclass(frozen=True, slots=True)
class Detached(PortEvent):
    """The device was detached. ``error`` is None if the caller detached it."""

    name: ClassVar[str] = "detached"
    bounded: ClassVar[bool] = True
    error: FarplugError | None
    figures: tuple[EndpointFigures, ...] = ()

    def __str__(self) -> str:
        return "detached" if self.error is None else f"detached: {self.error}"


class EventLimit:
    """Emits the events of one port: those that the guest or the device can cause without an end through a rate limit.

    The last event of each kind is always emitted, and the order is kept: a client that follows the events knows the
    state after a flood.

    Args:
        on_event: called with each event.
        clock: None: the running event loop.
    """

    def __init__(self, on_event: Callable[[PortEvent], None], clock: Clock | None = None) -> None:
        self._on_event = on_event
        self._limit = RateLimit(on_event, _repeated, lambda: clock or asyncio.get_running_loop())

    def emit(self, event: PortEvent) -> None:
        """Emit an event, now or when the limit permits it."""
        if event.bounded:
            self._limit.release()
            self._on_event(event)
        else:
            self._limit.add(event.kind, event)

    def release(self) -> None:
        """Emit all events that are held."""
        self._limit.release()

    def restart(self) -> None:
        """Emit all events that are held, and count anew: another device is attached."""
        self._limit.restart()


def _repeated(last: PortEvent, dropped: int) -> Iterable[PortEvent]:
    return last, Repeated(last.port, last, dropped)


def as_dict(event: PortEvent) -> dict[str, Any]:
    """Return an event as JSON's types: ``event`` (its name), ``port``, its fields, ``message`` (a line for people)."""
    return {"event": event.name, **fields_of(event), "message": str(event)}


def fields_of(event: PortEvent) -> dict[str, Any]:
    """Return the port and the fields of an event as JSON's types; of a report, the fields of the device's event."""
    if isinstance(event, Repeated):
        return {"port": event.port, "of": event.last.name, "count": event.count}
    inner = event.event if isinstance(event, DeviceReport) else event
    return {"port": event.port, **plain_fields(inner)}


def plain_fields(value: DataclassInstance) -> dict[str, Any]:
    """Return the fields of a dataclass as JSON's types."""
    return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}


def _plain(value: object) -> Any:
    match value:
        case FarplugError():
            return value.as_dict()
        case Exception():
            return {"message": f"{type(value).__name__}: {value}"}
        case Enum():
            return str(value)
        case tuple():
            return [_plain(item) for item in value]
        case _ if is_dataclass(value) and not isinstance(value, type):
            return plain_fields(value)
    return value
