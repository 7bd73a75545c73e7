"""Events of virtual devices: media, ends on this machine, serial lines, and functions that raise an exception."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

from farplug.usb.device import DeviceEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class MediumEvent(DeviceEvent):
    """An event of the medium of a drive.

    Attributes:
        lun: the logical unit number of the drive.
    """

    lun: int = 0

    @property
    def kind(self) -> Hashable:
        return self.name, self.lun


@dataclass(frozen=True, slots=True)
class MediumInserted(MediumEvent):
    """A medium was inserted into a drive of the device."""

    name: ClassVar[str] = "medium-inserted"
    bounded: ClassVar[bool] = True
    medium: str

    def __str__(self) -> str:
        return f"{self.medium} inserted"


@dataclass(frozen=True, slots=True)
class MediumEjected(MediumEvent):
    """The medium was ejected from a drive of the device, by the guest or by farplug. Only a user inserts the next.

    Attributes:
        medium: its name.
        by_guest: the guest ejected it.
        why: why farplug ejected it by itself; empty: a user asked for that, or the guest did.
    """

    name: ClassVar[str] = "medium-ejected"
    bounded: ClassVar[bool] = True
    medium: str
    by_guest: bool
    why: str = ""

    def __str__(self) -> str:
        why = f": {self.why}" if self.why else ""
        return f"{self.medium} ejected{' by the guest' if self.by_guest else ''}{why}"


@dataclass(frozen=True, slots=True)
class MediumLocked(MediumEvent):
    """The guest locked or unlocked the medium of a drive of the device (PREVENT ALLOW MEDIUM REMOVAL)."""

    name: ClassVar[str] = "medium-locked"
    locked: bool

    def __str__(self) -> str:
        return "locked by the guest" if self.locked else "unlocked by the guest"


@dataclass(frozen=True, slots=True)
class EndChanged(DeviceEvent):
    """A peer came to an end, or left it.

    Attributes:
        function: what is connected to the end.
        end: what a user needs to reach the end, such as the path of a terminal.
        connected: whether a peer is there now.
        text: what happened.
    """

    name: ClassVar[str] = "end-changed"
    function: str
    end: str
    connected: bool
    text: str

    @property
    def kind(self) -> Hashable:
        return self.name, self.end

    def __str__(self) -> str:
        return f"{self.function}: {self.text}"


@dataclass(frozen=True, slots=True)
class LineChanged(DeviceEvent):
    """The guest changed a serial line.

    Attributes:
        coding: rate, data bits, parity and stop bits: ``115200 8N1``.
        dtr: whether Data Terminal Ready is on: a program of the guest has the line open.
        rts: whether Request To Send is on.
    """

    name: ClassVar[str] = "line-changed"
    coding: str
    dtr: bool
    rts: bool

    def __str__(self) -> str:
        signals = [name for name, on in (("DTR", self.dtr), ("RTS", self.rts)) if on]
        return f"line set to {self.coding}, {' and '.join(signals) or 'neither DTR nor RTS'} on"


@dataclass(frozen=True, slots=True)
class LineBreak(DeviceEvent):
    """The guest sent a break on a serial line."""

    name: ClassVar[str] = "line-break"

    def __str__(self) -> str:
        return "break sent by the guest"


@dataclass(frozen=True, slots=True)
class FunctionRaised(DeviceEvent):
    """A function of the device raised an exception: its transfer stalled, and the device stays usable.

    Attributes:
        function: the name of its class.
        error: the exception; the log has its traceback.
    """

    name: ClassVar[str] = "function-raised"
    function: str
    error: Exception

    def __str__(self) -> str:
        return f"{self.function} raised {type(self.error).__name__}: {self.error}"
