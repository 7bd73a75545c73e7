"""What virtual devices report: media that come and go, and functions that raise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from farplug.usb.device import DeviceEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class MediumEvent(DeviceEvent):
    """Something that happens to the medium of a drive.

    Attributes:
        lun: the number of the drive, which is a logical unit of its device.
    """

    lun: int = 0


@dataclass(frozen=True, slots=True)
class MediumInserted(MediumEvent):
    """A medium was put into a drive of the device."""

    name: ClassVar[str] = "medium-inserted"
    medium: str

    def __str__(self) -> str:
        return f"{self.medium} inserted"


@dataclass(frozen=True, slots=True)
class MediumEjected(MediumEvent):
    """The medium was taken out of a drive of the device, by the guest or from here."""

    name: ClassVar[str] = "medium-ejected"
    medium: str
    by_guest: bool

    def __str__(self) -> str:
        return f"{self.medium} ejected{' by the guest' if self.by_guest else ''}"


@dataclass(frozen=True, slots=True)
class MediumLocked(MediumEvent):
    """The guest prevents, or allows again, that the medium is taken out of a drive of the device."""

    name: ClassVar[str] = "medium-locked"
    locked: bool

    def __str__(self) -> str:
        return "locked by the guest" if self.locked else "unlocked by the guest"


@dataclass(frozen=True, slots=True)
class FunctionRaised(DeviceEvent):
    """A function of the device raised an exception: the transfer stalled, the device works on.

    Attributes:
        function: the name of its class.
        error: the exception; the log has its traceback.
    """

    name: ClassVar[str] = "function-raised"
    function: str
    error: Exception

    def __str__(self) -> str:
        return f"{self.function} raised {type(self.error).__name__}: {self.error}"
