"""What happens to a device in a port, as values: the engine makes them, the hub passes them on, people read them.

``str(event)`` is a line for a person; :func:`as_dict` is the same for a program (``--json``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, TypeAlias

from farplug.errors import FarplugError
from farplug.usb.device import Identity
from farplug.usb.types import Speed

_SPEED_NAMES = {
    Speed.LOW: "Low Speed (1.5 Mb/s)",
    Speed.FULL: "Full Speed (12 Mb/s)",
    Speed.HIGH: "High Speed (480 Mb/s)",
    Speed.SUPER: "SuperSpeed (5 Gb/s)",
    Speed.SUPER_PLUS: "SuperSpeed Plus (10 Gb/s)",
}


def speed_name(speed: Speed) -> str:
    """A speed as the USB specifications call it, with its bit rate."""
    return _SPEED_NAMES[speed]


@dataclass(frozen=True, slots=True)
class EndpointFigures:
    """What moved through one endpoint since the device was attached.

    Attributes:
        endpoint: bEndpointAddress; both directions of endpoint 0 are counted under 0.
        transfers: how many were answered.
        bytes: how many bytes moved, in the endpoint's direction.
        errors: how many were answered with an error other than a stall or a cancellation.
        stalls: how many were answered with a stall.
        cancelled: how many the guest took back.
        dropped: packets of a reception that nobody took in time.
    """

    endpoint: int
    transfers: int = 0
    bytes: int = 0
    errors: int = 0
    stalls: int = 0
    cancelled: int = 0
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class _PortEvent:
    port: str


@dataclass(frozen=True, slots=True)
class Opened(_PortEvent):
    """The port is open: its connection stands."""

    def __str__(self) -> str:
        return f"connected to the guest's port ({self.port})"


@dataclass(frozen=True, slots=True)
class WaitingForGuest(_PortEvent):
    """The port is open, but the guest has not said hello: its VM is paused, or still starting."""

    def __str__(self) -> str:
        return "the guest has not answered yet: its VM may be paused; waiting for it to run"


@dataclass(frozen=True, slots=True)
class GuestReady(_PortEvent):
    """The guest's side of the port said hello."""

    version: str
    capabilities: tuple[str, ...]

    def __str__(self) -> str:
        return f"the guest is ready ({self.version or 'no version given'})"


@dataclass(frozen=True, slots=True)
class Attached(_PortEvent):
    """The device was offered to the guest."""

    identity: Identity
    speed: Speed

    def __str__(self) -> str:
        return f"attached as {self.identity} at {speed_name(self.speed)}"


@dataclass(frozen=True, slots=True)
class Configured(_PortEvent):
    """The guest chose a configuration: its driver is about to work with the device (0: it gave it up)."""

    configuration: int

    def __str__(self) -> str:
        if not self.configuration:
            return "given up by the guest (configuration 0)"
        return f"configured by the guest (configuration {self.configuration})"


@dataclass(frozen=True, slots=True)
class WasReset(_PortEvent):
    """The guest reset the port."""

    def __str__(self) -> str:
        return "reset by the guest"


@dataclass(frozen=True, slots=True)
class FellBack(_PortEvent):
    """The guest cannot take the device at one speed: it is offered at a lower one.

    Attributes:
        before: the speed that it cannot take.
        speed: the lower one.
        needs_streams: the device has bulk streams at the higher speed, and the guest's side has none. Else its USB
            port is too slow.
    """

    before: Speed
    speed: Speed
    needs_streams: bool = False

    def __str__(self) -> str:
        lacks = "has no bulk streams for" if self.needs_streams else "cannot take"
        return f"the guest's port {lacks} {speed_name(self.before)}: trying {speed_name(self.speed)}"


@dataclass(frozen=True, slots=True)
class PeerViolation(_PortEvent):
    """The guest's side broke the protocol; what it said was dropped."""

    error: FarplugError

    def __str__(self) -> str:
        return f"the guest broke the protocol: {self.error}"


@dataclass(frozen=True, slots=True)
class DeviceFault(_PortEvent):
    """The device broke its contract; the guest got an error for this transfer."""

    error: Exception

    def __str__(self) -> str:
        return f"the device misbehaved: {type(self.error).__name__}: {self.error}"


@dataclass(frozen=True, slots=True)
class Refused(_PortEvent):
    """The guest refused the device."""

    error: FarplugError

    def __str__(self) -> str:
        return str(self.error)


@dataclass(frozen=True, slots=True)
class MediumInserted(_PortEvent):
    """A medium was put into the device's drive."""

    medium: str

    def __str__(self) -> str:
        return f"{self.medium} inserted"


@dataclass(frozen=True, slots=True)
class MediumEjected(_PortEvent):
    """The medium was taken out of the device's drive, by the guest or from here."""

    medium: str
    by_guest: bool

    def __str__(self) -> str:
        return f"{self.medium} ejected{' by the guest' if self.by_guest else ''}"


@dataclass(frozen=True, slots=True)
class MediumLocked(_PortEvent):
    """The guest prevents, or allows again, that the medium is taken out of the device's drive: it is mounted there."""

    locked: bool

    def __str__(self) -> str:
        return "locked by the guest" if self.locked else "unlocked by the guest"


@dataclass(frozen=True, slots=True)
class Detached(_PortEvent):
    """The device left the port. ``error`` is None if we or the device's owner wanted it."""

    error: FarplugError | None
    figures: tuple[EndpointFigures, ...] = ()

    def __str__(self) -> str:
        return "detached" if self.error is None else f"detached: {self.error}"


PortEvent: TypeAlias = (
    Opened
    | WaitingForGuest
    | GuestReady
    | Attached
    | Configured
    | WasReset
    | FellBack
    | PeerViolation
    | DeviceFault
    | Refused
    | MediumInserted
    | MediumEjected
    | MediumLocked
    | Detached
)


def event_name(event: object) -> str:
    """The stable name of an event type in ``--json`` output: ``waiting-for-guest``."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", type(event).__name__).lower()


def as_dict(event: object) -> dict[str, Any]:
    """An event as JSON's types: its name under ``event``, its fields, and the line for people under ``message``."""
    assert hasattr(event, "__dataclass_fields__")
    values = {field.name: _plain(getattr(event, field.name)) for field in fields(event)}  # type: ignore[arg-type]
    return {"event": event_name(event), **values, "message": str(event)}


def _plain(value: object) -> Any:
    match value:
        case FarplugError():
            return {"reason": str(value.reason), "message": value.message, "remedy": value.remedy}
        case Exception():
            return {"message": f"{type(value).__name__}: {value}"}
        case Enum():
            return str(value)
        case tuple():
            return [_plain(item) for item in value]
        case _ if hasattr(value, "__dataclass_fields__"):
            return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}  # type: ignore[arg-type]
    return value
