"""What a user asks for, as plain data: strings, numbers, enums. It goes to JSON and comes back unchanged.

Nothing here opens a file or knows a command line. Enums come from the leaf modules of the library.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, IntEnum, StrEnum, auto
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from farplug.app.codec import decode, encode
from farplug.store.base import CacheMode
from farplug.text import without_credentials
from farplug.usb.types import Speed
from farplug.virtual.fido.presence import Presence
from farplug.virtual.storage_transport import StorageTransport

if TYPE_CHECKING:
    from farplug.target import Target, TargetOptions


class _Settings:
    """Settings that go to JSON and come back."""

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON's types, without secrets."""
        data: dict[str, Any] = encode(self)
        return data

    @classmethod
    def from_json(cls, data: object) -> Self:
        """Return the settings that an object of JSON's types describes.

        Raises:
            UsageError: ``bad-setting``: a field is unknown or missing, or has no valid value.
        """
        return decode(cls, data)


class SourceKind(StrEnum):
    """What a source becomes in the guest."""

    DISK = "disk"
    READ_ONLY_DISK = "read-only-disk"
    CDROM = "cdrom"
    FOLDER = "folder"
    USB_DEVICE = "usb-device"
    REMOTE_DEVICE = "remote-device"
    """A USB device of another machine, over USB/IP."""
    KEYBOARD = "keyboard"
    TABLET = "tablet"
    MOUSE = "mouse"
    TOUCHSCREEN = "touchscreen"
    GAMEPAD = "gamepad"
    SERIAL = "serial"
    NETWORK = "network"
    FIDO = "fido"
    CAMERA = "camera"

    @property
    def names(self) -> Names:
        """Return what the path of a source of this kind names."""
        return _NAMES[self]


PATTERN: Final = "pattern"
"""The path of a camera that shows a test picture; a file of this name is ``./pattern``."""


class Names(Enum):
    """What the path of a source names."""

    NOTHING = auto()
    """There is no path: the kind is all."""
    FILE = auto()
    """A file, a block device or a folder of this machine."""
    OTHER = auto()
    """Something else; relative paths have no meaning in it."""


_NAMES = {
    SourceKind.DISK: Names.FILE,
    SourceKind.READ_ONLY_DISK: Names.FILE,
    SourceKind.CDROM: Names.FILE,
    SourceKind.FOLDER: Names.FILE,
    SourceKind.USB_DEVICE: Names.OTHER,
    SourceKind.REMOTE_DEVICE: Names.OTHER,
    SourceKind.KEYBOARD: Names.NOTHING,
    SourceKind.TABLET: Names.NOTHING,
    SourceKind.MOUSE: Names.NOTHING,
    SourceKind.TOUCHSCREEN: Names.NOTHING,
    SourceKind.GAMEPAD: Names.NOTHING,
    SourceKind.SERIAL: Names.OTHER,
    SourceKind.NETWORK: Names.OTHER,
    SourceKind.FIDO: Names.FILE,
    SourceKind.CAMERA: Names.FILE,
}


@dataclass(frozen=True, slots=True)
class Source(_Settings):
    """Something that can be plugged.

    Attributes:
        kind: what it becomes in the guest.
        path: of the image, the folder, the file of a security key or the clip of a camera; for a USB device how it is
            chosen (``1050:0407``, ``1-5``, ``serial:…``), for one of another machine ``usbip://HOST/BUSID``; for a
            serial line or a network adapter its end (``pty``, ``passt``, ``tcp-listen://:4000``); empty for kinds that
            need none, such as a keyboard.
        snapshot: a disk only: the file that takes what the guest writes, so that the image stays as it is.
        presence: a security key only: who touches it; None: each request is allowed.
        mac: a network adapter only: its MAC address; None: one that is the same each time.

    Raises:
        ValueError: the path of a file is missing, or the kind has no path, no MAC address or no presence.
    """

    kind: SourceKind
    path: str = ""
    snapshot: str | None = None
    mac: str | None = None
    presence: Presence | None = None

    def __post_init__(self) -> None:
        if self.presence is not None and self.kind is not SourceKind.FIDO:
            raise ValueError(f"presence has no meaning for a {self.kind}")
        if self.mac is not None and self.kind is not SourceKind.NETWORK:
            raise ValueError(f"mac has no meaning for a {self.kind}")
        if self.kind.names is Names.FILE and not self.path:
            raise ValueError("path is missing")
        if self.kind.names is Names.NOTHING and self.path:
            raise ValueError(f"path has no meaning for a {self.kind}")

    @property
    def uses_stdio(self) -> bool:
        """Return whether the source uses the standard input and output of the process that opens it."""
        return self.kind is SourceKind.SERIAL and self.path == "-"

    @property
    def name(self) -> str:
        """Return how users name the source: its path; without one its kind."""
        return self.path or str(self.kind)

    def absolute(self) -> Self:
        """Return the same source with absolute paths, for a process with another working directory."""
        if self.kind in (SourceKind.SERIAL, SourceKind.NETWORK):
            from farplug.ends.address import absolute

            return replace(self, path=absolute(self.path))
        if self.kind.names is not Names.FILE or (self.kind is SourceKind.CAMERA and self.path == PATTERN):
            return self
        snapshot = None if self.snapshot is None else os.path.abspath(self.snapshot)
        return replace(self, path=os.path.abspath(self.path), snapshot=snapshot)

    @classmethod
    def disk(cls, path: str | Path, *, read_only: bool = False, snapshot: str | Path | None = None) -> Self:
        """Return a RAW image or a block device, as a USB disk."""
        kind = SourceKind.READ_ONLY_DISK if read_only else SourceKind.DISK
        return cls(kind, str(path), None if snapshot is None else str(snapshot))

    @classmethod
    def cdrom(cls, path: str | Path) -> Self:
        """Return an ISO image, in a USB CD-ROM drive."""
        return cls(SourceKind.CDROM, str(path))

    @classmethod
    def folder(cls, path: str | Path) -> Self:
        """Return a copy of a folder, as a read-only USB disk."""
        return cls(SourceKind.FOLDER, str(path))

    @classmethod
    def usb_device(cls, device: str) -> Self:
        """Return a USB device of this machine, by ids, port, serial number or name."""
        return cls(SourceKind.USB_DEVICE, device)

    @classmethod
    def remote_device(cls, address: str) -> Self:
        """Return a USB device of another machine, by ``usbip://HOST[:PORT]/BUSID``."""
        return cls(SourceKind.REMOTE_DEVICE, address)

    @classmethod
    def keyboard(cls) -> Self:
        """Return a USB keyboard, on which programs type."""
        return cls(SourceKind.KEYBOARD)

    @classmethod
    def tablet(cls) -> Self:
        """Return a USB tablet: a pointer with absolute positions."""
        return cls(SourceKind.TABLET)

    @classmethod
    def serial(cls, end: str) -> Self:
        """Return a USB serial line with its end on this machine: :data:`farplug.ends.SERIAL_ENDS`."""
        return cls(SourceKind.SERIAL, end)

    @classmethod
    def network(cls, end: str, *, mac: str | None = None) -> Self:
        """Return a USB network adapter with its end on this machine: :data:`farplug.ends.NETWORK_ENDS`."""
        return cls(SourceKind.NETWORK, end, mac=mac)

    @classmethod
    def camera(cls, path: str | Path = PATTERN) -> Self:
        """Return a camera that shows a clip, the images of a folder, or a test picture."""
        return cls(SourceKind.CAMERA, str(path))

    @classmethod
    def fido(cls, path: str | Path, presence: Presence = Presence.AUTO) -> Self:
        """Return a security key for tests, in a file that is made if it does not exist."""
        return cls(SourceKind.FIDO, str(path), presence=presence)


class UsbSpeed(StrEnum):
    """What speed virtual devices are offered at."""

    AUTO = "auto"
    """SuperSpeed first, High Speed where the guest's port is slower."""
    HIGH = "high"
    SUPER = "super"

    @property
    def speeds(self) -> Sequence[Speed]:
        """Return the speeds that a device may run at, the best first."""
        if self is UsbSpeed.AUTO:
            return (Speed.SUPER, Speed.HIGH)
        return (Speed.HIGH,) if self is UsbSpeed.HIGH else (Speed.SUPER,)


class FolderFormat(StrEnum):
    """The file system of a folder's disk."""

    AUTO = "auto"
    """FAT32, or exFAT for files of 4 GiB and more."""
    FAT32 = "fat32"
    EXFAT = "exfat"
    NTFS = "ntfs"
    EXT4 = "ext4"


class BlockSize(IntEnum):
    """Bytes of a disk's block."""

    B512 = 512
    B4096 = 4096


@dataclass(frozen=True, slots=True)
class StorageSettings(_Settings):
    """How images and folders are plugged.

    Attributes:
        speed: what the devices run at.
        transport: the protocols that disks offer.
        block_size: bytes of a disk's block.
        cache: when written data is durable.
        force: also an image that this machine uses, or that is not a RAW image.
        snapshot: discard what the guest writes to disks without a snapshot file.
        folder_format: the file system of folders.
    """

    speed: UsbSpeed = UsbSpeed.AUTO
    transport: StorageTransport = StorageTransport.AUTO
    block_size: BlockSize = BlockSize.B512
    cache: CacheMode = CacheMode.WRITEBACK
    force: bool = False
    snapshot: bool = False
    folder_format: FolderFormat = FolderFormat.AUTO


class Follow(StrEnum):
    """By what a device that comes back is recognised."""

    DEVICE = "device"
    """Its ids and its serial number, in any port; or that it is what a user named, unless the user named a place."""
    PORT = "port"
    """The port, whatever is in it: a device may come back under another id (a firmware update)."""


@dataclass(frozen=True, slots=True)
class DeviceRules(_Settings):
    """Which USB devices of this machine are plugged besides those that are sources.

    Attributes:
        wait: wait for the named devices that are not there yet.
        follow: by what a device that comes back is recognised.
        filter: rules: what may be plugged at all; None: everything.
        auto_connect: rules: which devices that come later are plugged; None: none.
        redirect_on_connect: rules: which devices that are there at the start are plugged; None: none.
        force: also disks that this machine uses.
    """

    wait: bool = False
    follow: Follow = Follow.DEVICE
    filter: str | None = None
    auto_connect: str | None = None
    redirect_on_connect: str | None = None
    force: bool = False


def _proxy_without_credentials(proxy: str | None) -> str | None:
    return None if proxy is None else re.sub("^(http://)?.*@", r"\1", proxy, flags=re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class TargetSettings(_Settings):
    """Where the VM is, and what is needed to get in.

    Attributes:
        target: as a user writes it, see :func:`farplug.target.parse_target`. JSON has it without a password. Empty if
            there is a command.
        command: a command of the shell that prints a ``.vv`` file, run for each attempt to connect; None: the target
            says where the VM is. Not part of JSON.
        password: the SPICE password; wins over that of the target. Not part of JSON.
        fallback_password: the SPICE password if neither ``password`` nor the target gives one; not used for a
            ``.vv`` file, which may name any server. Not part of JSON.
        ca_file: certificates to trust, PEM.
        host_subject: the certificate's subject, checked instead of the host name.
        proxy: URL of an HTTP proxy. JSON has it without user and password.
        allow_plain: use the plain port where the server has no TLS, although there are certificates to trust, a host
            subject, or channels that must use TLS.
    """

    target: str = field(repr=False, metadata={"public": without_credentials})
    password: str | None = field(default=None, repr=False, metadata={"secret": True})
    fallback_password: str = field(default="", repr=False, metadata={"secret": True})
    ca_file: str | None = None
    host_subject: str | None = None
    proxy: str | None = field(default=None, repr=False, metadata={"public": _proxy_without_credentials})
    command: str | None = field(default=None, repr=False, metadata={"secret": True})
    allow_plain: bool = False

    @property
    def public_target(self) -> str:
        """Return the target without a password, for people and logs."""
        return without_credentials(self.target) if self.command is None else "(a target command)"

    def parse(self, *, keep_file: bool = False) -> Target:
        """Return the target. A ``.vv`` file is read, and deleted if it asks for that, unless ``keep_file``.

        Raises:
            UsageError: the target or a setting is not valid.
        """
        from farplug.target import parse_target  # what connects is a large import

        return parse_target(self.target, self.options(), keep_file=keep_file)

    def options(self) -> TargetOptions:
        """Return what is given beside the target."""
        from farplug.target import TargetOptions

        return TargetOptions(
            password=self.password,
            fallback_password=self.fallback_password,
            ca_file=None if self.ca_file is None else Path(self.ca_file),
            host_subject=self.host_subject,
            proxy=self.proxy,
            allow_plain=self.allow_plain,
        )


@dataclass(frozen=True, slots=True)
class ReconnectSettings(_Settings):
    """Connecting again to a VM that was lost.

    Attributes:
        limit: seconds after a loss for which the VM is contacted again, more than 0; None: forever.

    Raises:
        ValueError: ``limit`` is not valid.
    """

    limit: float | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and not 0 < self.limit < math.inf:
            raise ValueError(f"the limit of reconnecting is {self.limit}, not a number of seconds above 0")


@dataclass(frozen=True, slots=True)
class CaptureSettings(_Settings):
    """A capture of what moves between the guest and the devices, as a pcapng file.

    Attributes:
        path: of the file, or of a named pipe; ``-``: standard output. An existing capture is replaced.
        bytes: how much of each transfer is kept, without what the connections carry; None: everything.
    """

    path: str
    bytes: int | None = None


@dataclass(frozen=True, slots=True)
class GuestSettings(_Settings):
    """A VM and what is plugged into it: all that ``farplug connect`` does.

    Attributes:
        target: where the VM is.
        sources: what to plug, in this order.
        storage: how images and folders are plugged.
        rules: which USB devices of this machine are plugged besides the sources.
        separate: each source has a port of its own; otherwise they share one if there are too few.
        stay: stay connected when no device is plugged in; a device that leaves does not end the session.
        reconnect: connect again to a VM that was lost; None: only to one that moved to another host.
        capture: where what moves is captured; None: it is not.
    """

    target: TargetSettings
    sources: tuple[Source, ...] = ()
    storage: StorageSettings = StorageSettings()
    rules: DeviceRules = DeviceRules()
    separate: bool = False
    stay: bool = False
    reconnect: ReconnectSettings | None = None
    capture: CaptureSettings | None = None
