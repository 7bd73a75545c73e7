"""The options of what is plugged in: images, folders, USB devices of this machine. Several commands have them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from farplug.app.settings import (
    BlockSize,
    DeviceRules,
    FolderFormat,
    Follow,
    Source,
    SourceKind,
    StorageSettings,
    UsbSpeed,
)
from farplug.cli.options import DEVICES, IMAGES, SOFTWARE, TUNING, BlockSizeOption, given_order, with_fields
from farplug.errors import Reason, UsageError
from farplug.store.base import CacheMode
from farplug.virtual.fido.presence import Presence
from farplug.virtual.storage_transport import StorageTransport

RULES_HELP = "Rules such as 'deny class=hid; allow': the first match decides."


ImagesOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--usb-disk",
        metavar="PATH[,snapshot=FILE]",
        help="Plug in a RAW image as a USB disk. With snapshot=FILE the image stays as it is, and FILE keeps what the "
        "VM writes ('farplug image commit FILE --image PATH' applies it). May be repeated.",
        show_default=False,
        rich_help_panel=IMAGES,
    ),
]
ReadOnlyImagesOption: TypeAlias = Annotated[
    list[Path] | None,
    typer.Option(
        "--usb-disk-ro",
        metavar="PATH",
        help="The same, read-only: the image never changes.",
        show_default=False,
        rich_help_panel=IMAGES,
    ),
]
CdromsOption: TypeAlias = Annotated[
    list[Path] | None,
    typer.Option(
        "--usb-cdrom",
        metavar="PATH",
        help="Plug in an ISO image as a CD-ROM in a USB drive: cdrom0, cdrom1, ... May be repeated.",
        show_default=False,
        rich_help_panel=IMAGES,
    ),
]
FoldersOption: TypeAlias = Annotated[
    list[Path] | None,
    typer.Option(
        "--usb-folder",
        metavar="PATH",
        help="Plug in a copy of a folder as a read-only USB disk. May be repeated.",
        show_default=False,
        rich_help_panel=IMAGES,
    ),
]

SnapshotOption: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--snapshot",
        help="Discard the VM's writes to disks without a snapshot file on exit.",
        rich_help_panel=IMAGES,
    ),
]
SnapshotFileOption: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--snapshot-file",
        metavar="FILE",
        help="The snapshot file of the only --usb-disk: as --usb-disk PATH,snapshot=FILE.",
        show_default=False,
        rich_help_panel=IMAGES,
    ),
]
ForceOption: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Plug in also a disk that this machine uses (mounted), and the bytes of a file that is not a RAW "
        "image, or not an ISO image; leave at the first Ctrl-C, whatever the VM is still writing.",
        rich_help_panel=IMAGES,
    ),
]
DevicesOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--usb-device",
        metavar="DEVICE",
        help="Plug in a USB device of this machine: VID:PID, BUS-ADDRESS, BUS-PORT.PORT, serial:NUMBER, or part of "
        "its name; or usbip://HOST/BUSID, a device of another machine. May be repeated.",
        show_default=False,
        rich_help_panel=DEVICES,
    ),
]
WaitOption: TypeAlias = Annotated[
    bool, typer.Option("--wait", help="Wait until every named --usb-device is present.", rich_help_panel=DEVICES)
]
FollowOption: TypeAlias = Annotated[
    Follow,
    typer.Option(
        "--follow",
        help="What to plug in again after an unplug: that device in any port, or any device in that port (a firmware "
        "update changes a device's id).",
        rich_help_panel=DEVICES,
    ),
]
FilterOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--filter",
        metavar="RULES",
        help=f"Never plug in devices that these rules do not allow. {RULES_HELP}",
        show_default=False,
        rich_help_panel=DEVICES,
    ),
]
AutoConnectOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--auto-connect",
        metavar="RULES",
        help="Plug in devices that appear later, if these rules allow them. This machine's keyboard, mouse and network "
        "only if a rule has their vendor= and product=.",
        show_default=False,
        rich_help_panel=DEVICES,
    ),
]
RedirectOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--redirect-on-connect",
        metavar="RULES",
        help="The same for devices that are present at the start.",
        show_default=False,
        rich_help_panel=DEVICES,
    ),
]
KeyboardOption: TypeAlias = Annotated[
    int,
    typer.Option(
        "--usb-keyboard",
        count=True,
        help="Plug in a USB keyboard, on which 'farplug type' and 'farplug press' type. May be repeated.",
        show_default=False,
        rich_help_panel=SOFTWARE,
    ),
]
TabletOption: TypeAlias = Annotated[
    int,
    typer.Option(
        "--usb-tablet",
        count=True,
        help="Plug in a USB tablet, a pointer with absolute positions for 'farplug click'. May be repeated.",
        show_default=False,
        rich_help_panel=SOFTWARE,
    ),
]
MouseOption: TypeAlias = Annotated[
    int,
    typer.Option(
        "--usb-mouse",
        count=True,
        help="Plug in a USB mouse, for 'farplug click --relative'. May be repeated.",
        show_default=False,
        rich_help_panel=SOFTWARE,
    ),
]
TouchscreenOption: TypeAlias = Annotated[
    int,
    typer.Option(
        "--usb-touchscreen",
        count=True,
        help="Plug in a USB touchscreen, which programs touch (see the documentation). May be repeated.",
        show_default=False,
        rich_help_panel=SOFTWARE,
    ),
]
GamepadOption: TypeAlias = Annotated[
    int,
    typer.Option(
        "--usb-gamepad",
        count=True,
        help="Plug in a USB gamepad, which programs use (see the documentation). May be repeated.",
        show_default=False,
        rich_help_panel=SOFTWARE,
    ),
]
SerialOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--usb-serial",
        metavar="END",
        help="Plug in a USB serial line, whose other end is END on this machine: a new terminal whose path is printed "
        "(pty, pty:LINK), this terminal (-, Ctrl-] leaves), the page and other clients (client), a socket "
        "(tcp-listen://, tcp://, unix-listen:, unix:) or a file:PATH. May be repeated.",
        show_default=False,
        rich_help_panel=SOFTWARE,
    ),
]
NetworkOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--usb-network",
        metavar="END",
        help="Plug in a USB network adapter, whose cable leads to END: this user's network (passt), a socket that "
        "carries frames as QEMU, gvproxy and socket_vmnet do (unix:, unix-listen:, tcp://, tcp-listen://), or an "
        "interface of this machine (tap:NAME). May be repeated.",
        show_default=False,
        rich_help_panel=SOFTWARE,
    ),
]
MacOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--network-mac",
        metavar="MAC",
        help="The MAC address of the --usb-network in the same place. By default it follows from the target.",
        show_default=False,
        rich_help_panel=SOFTWARE,
    ),
]
FidoOption: TypeAlias = Annotated[
    list[Path] | None,
    typer.Option(
        "--usb-fido",
        metavar="FILE",
        help="Plug in a security key for tests (FIDO2, U2F), which keeps its keys in FILE; a new FILE is a new key. "
        "May be repeated.",
        show_default=False,
        rich_help_panel=SOFTWARE,
    ),
]
FidoPresenceOption: TypeAlias = Annotated[
    Presence,
    typer.Option(
        "--fido-presence",
        help="Who touches the security key: each request is allowed (auto), you are asked (ask: 'farplug touch' "
        "answers), or each request is refused (deny).",
        rich_help_panel=SOFTWARE,
    ),
]
CameraOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--usb-camera",
        metavar="CLIP",
        help="Plug in a camera that shows CLIP again and again: a file of JPEG images one after the other (.mjpeg), a "
        "folder of JPEG images, or 'pattern', a test picture with a counter. May be repeated.",
        show_default=False,
        rich_help_panel=SOFTWARE,
    ),
]
SeparateOption: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--separate",
        help="Give each device a port of the VM. By default images and devices made of software share one where the VM "
        "has too few.",
        rich_help_panel=SOFTWARE,
    ),
]
FolderFormatOption: TypeAlias = Annotated[
    FolderFormat,
    typer.Option(
        "--folder-format",
        help="File system of folders. auto: FAT32, or exFAT for files of 4 GiB and more.",
        rich_help_panel=TUNING,
    ),
]
UsbSpeedOption: TypeAlias = Annotated[
    UsbSpeed,
    typer.Option(
        "--usb-speed",
        help="auto: SuperSpeed, and High Speed where the guest's port takes no more.",
        rich_help_panel=TUNING,
    ),
]
UsbStorageOption: TypeAlias = Annotated[
    StorageTransport,
    typer.Option(
        "--usb-storage",
        help="The protocol of disks: one command at a time, as firmware does (bot), many at a time (uas), or what "
        "the guest takes of both (auto). CD-ROM drives: auto is bot.",
        rich_help_panel=TUNING,
    ),
]
BlockSizeOfDisksOption: TypeAlias = Annotated[
    BlockSizeOption,
    typer.Option(
        "--block-size",
        help="Bytes in a block of the disks: 4096 as in large drives, but no BIOS boots from it.",
        rich_help_panel=TUNING,
    ),
]
CacheOption: TypeAlias = Annotated[
    CacheMode,
    typer.Option(
        "--cache",
        help="When written data is on the disk: when the guest flushes (writeback), at once (writethrough), or "
        "whenever the OS writes it back, for disks that can be thrown away (unsafe).",
        rich_help_panel=TUNING,
    ),
]


@dataclass(frozen=True, slots=True)
class Devices:
    """What a command line plugs in, as settings.

    Attributes:
        sources: what is plugged in, in the order of the command line.
        storage: how images and folders are plugged in.
        rules: which USB devices of this machine are plugged in besides the sources.
        separate: each source has a port of its own.
    """

    sources: tuple[Source, ...]
    storage: StorageSettings
    rules: DeviceRules
    separate: bool = False

    def __bool__(self) -> bool:
        rules = self.rules
        return bool(self.sources) or rules.auto_connect is not None or rules.redirect_on_connect is not None

    def absolute(self) -> Devices:
        """Return the same with absolute paths, for a process with another working directory."""
        return replace(self, sources=tuple(source.absolute() for source in self.sources))

    @property
    def uses_stdio(self) -> bool:
        """Return whether standard input and output are the end of a serial line."""
        return any(source.uses_stdio for source in self.sources)

    def check_any(self) -> None:
        """Check that there is something to plug in.

        Raises:
            UsageError: there is nothing.
        """
        if not self:
            raise UsageError(
                "nothing to plug in",
                reason=Reason.BAD_OPTION,
                remedy="name an image or a device, for example: --usb-disk PATH, --usb-device VID:PID ('farplug "
                "devices' lists what can be plugged in)",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceOptions:
    """The values of the options; :func:`with_device_options` gives the options to a command.

    Each field is an option, in the order of the help.
    """

    usb_disk: ImagesOption = None
    usb_disk_ro: ReadOnlyImagesOption = None
    usb_cdrom: CdromsOption = None
    usb_folder: FoldersOption = None
    snapshot: SnapshotOption = False
    snapshot_file: SnapshotFileOption = None
    force: ForceOption = False
    usb_keyboard: KeyboardOption = 0
    usb_tablet: TabletOption = 0
    usb_mouse: MouseOption = 0
    usb_touchscreen: TouchscreenOption = 0
    usb_gamepad: GamepadOption = 0
    usb_serial: SerialOption = None
    usb_network: NetworkOption = None
    network_mac: MacOption = None
    usb_fido: FidoOption = None
    fido_presence: FidoPresenceOption = Presence.AUTO
    usb_camera: CameraOption = None
    separate: SeparateOption = False
    usb_device: DevicesOption = None
    wait: WaitOption = False
    follow: FollowOption = Follow.DEVICE
    filter: FilterOption = None
    auto_connect: AutoConnectOption = None
    redirect_on_connect: RedirectOption = None
    folder_format: FolderFormatOption = FolderFormat.AUTO
    usb_speed: UsbSpeedOption = UsbSpeed.AUTO
    usb_storage: UsbStorageOption = StorageTransport.AUTO
    block_size: BlockSizeOfDisksOption = BlockSizeOption.B512
    cache: CacheOption = CacheMode.WRITEBACK

    def devices(self, context: typer.Context) -> Devices:
        """Return the options as settings.

        Args:
            context: of the command, which has the order of the options.

        Raises:
            UsageError: an option is not valid, contradicts another one, or has no effect.
        """
        disks = [split_snapshot(text) for text in self.usb_disk or []]
        for path in self.usb_disk_ro or []:
            if SNAPSHOT_KEY in str(path) and not os.path.lexists(path):
                raise UsageError(
                    f"--usb-disk-ro {path}: the VM writes nothing to a read-only disk that a snapshot could keep",
                    reason=Reason.BAD_OPTION,
                    remedy=f"to let it write to the snapshot: --usb-disk {path}",
                )
        if len(self.network_mac or []) > len(self.usb_network or []):
            raise UsageError("--network-mac has no effect without a --usb-network of its own", reason=Reason.BAD_OPTION)
        if (self.usb_serial or []).count("-") > 1:
            raise UsageError("two serial lines cannot have the same standard input", reason=Reason.BAD_OPTION)
        if self.fido_presence is not Presence.AUTO and not self.usb_fido:
            raise _alone("--fido-presence", "--usb-fido")
        rules = self._rules()
        sources = {
            "usb_disk": [Source.disk(path, snapshot=file or self.snapshot_file) for path, file in disks],
            "usb_disk_ro": [Source.disk(path, read_only=True) for path in self.usb_disk_ro or []],
            "usb_cdrom": [Source.cdrom(path) for path in self.usb_cdrom or []],
            "usb_folder": [Source.folder(path) for path in self.usb_folder or []],
            "usb_device": [
                Source.remote_device(device) if _is_remote(device) else Source.usb_device(device)
                for device in self.usb_device or []
            ],
            "usb_keyboard": [Source.keyboard()] * self.usb_keyboard,
            "usb_tablet": [Source.tablet()] * self.usb_tablet,
            "usb_mouse": [Source(SourceKind.MOUSE)] * self.usb_mouse,
            "usb_touchscreen": [Source(SourceKind.TOUCHSCREEN)] * self.usb_touchscreen,
            "usb_gamepad": [Source(SourceKind.GAMEPAD)] * self.usb_gamepad,
            "usb_fido": [Source.fido(path, self.fido_presence) for path in self.usb_fido or []],
            "usb_serial": [Source.serial(end) for end in self.usb_serial or []],
            "usb_network": [
                Source.network(end, mac=mac) for end, mac in zip_longest(self.usb_network or [], self.network_mac or [])
            ],
            "usb_camera": [Source.camera(path) for path in self.usb_camera or []],
        }
        real = bool(self.usb_device) or self.auto_connect is not None or self.redirect_on_connect is not None
        _check_snapshots(disks, self.snapshot, self.snapshot_file, read_only=bool(self.usb_disk_ro), real=real)
        named = {option: iter(values) for option, values in sources.items()}
        return Devices(
            tuple(next(named[option]) for option in given_order(context) if option in named),
            StorageSettings(
                speed=self.usb_speed,
                transport=self.usb_storage,
                block_size=BlockSize(int(self.block_size)),
                cache=self.cache,
                force=self.force,
                snapshot=self.snapshot,
                folder_format=self.folder_format,
            ),
            rules,
            self.separate,
        )

    def _rules(self) -> DeviceRules:
        """Return the rules for USB devices; raise ``UsageError`` if an option of them has no effect."""
        devices = [device for device in self.usb_device or [] if not _is_remote(device)]
        if self.wait and not devices:
            raise _alone("--wait", "--usb-device")
        if not devices and self.auto_connect is None and self.redirect_on_connect is None:
            for option, given in (
                ("--filter", self.filter is not None),
                ("--follow", self.follow is not Follow.DEVICE),
            ):
                if given:
                    raise _alone(option, "--usb-device, --auto-connect or --redirect-on-connect")
        return DeviceRules(
            wait=self.wait,
            follow=self.follow,
            filter=self.filter,
            auto_connect=self.auto_connect,
            redirect_on_connect=self.redirect_on_connect,
            force=self.force,
        )


def _is_remote(device: str) -> bool:
    return device.startswith("usbip://")


def with_device_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's parameter ``options`` by the fields of :class:`DeviceOptions`."""
    return with_fields(command, "options", DeviceOptions)


SNAPSHOT_KEY = ",snapshot="


def split_snapshot(text: str) -> tuple[Path, Path | None]:
    """Split a value of ``--usb-disk``: return the path of the image, and that of its snapshot if one is named.

    Only the last ``,snapshot=`` counts, and not where a file has the whole text as its name.

    Raises:
        UsageError: one of the two paths is empty.
    """
    image, separator, file = text.rpartition(SNAPSHOT_KEY)
    if not separator or os.path.lexists(text):
        return Path(text), None
    if not image or not file:
        raise UsageError(
            f"--usb-disk {text}: the path of the {'snapshot' if image else 'image'} is missing",
            reason=Reason.BAD_OPTION,
            remedy="write it as --usb-disk PATH,snapshot=FILE",
        )
    return Path(image), Path(file)


def _check_snapshots(
    disks: Sequence[tuple[Path, Path | None]],
    snapshot: bool,
    snapshot_file: Path | None,
    *,
    read_only: bool,
    real: bool,
) -> None:
    """Raise ``UsageError`` if the options about snapshots contradict each other, or one has no effect."""

    def refused(message: str, remedy: str = "") -> UsageError:
        return UsageError(message, reason=Reason.BAD_OPTION, remedy=remedy)

    option = "--snapshot" if snapshot else "--snapshot-file"
    if not snapshot and snapshot_file is None:
        pass
    elif snapshot and snapshot_file is not None:
        raise refused(
            "--snapshot and --snapshot-file contradict each other: one discards what the VM writes, the other keeps it",
            "leave one of them out",
        )
    elif not disks:
        why = ": a --usb-disk-ro never changes" if read_only else ""
        if real:
            why = ": a USB device of this machine keeps what the VM writes to it"
        raise refused(f"{option} has no effect without --usb-disk{why}")
    elif snapshot_file is not None and len(disks) > 1:
        raise refused(
            f"--snapshot-file is for one --usb-disk, not {len(disks)}",
            "name a file for each disk: "
            + " ".join(f"--usb-disk {path},snapshot={file or path.name + '.snap'}" for path, file in disks),
        )
    elif snapshot_file is not None and disks[0][1] is not None:
        raise refused(
            f"{disks[0][0]} has two snapshot files: --snapshot-file {snapshot_file} and snapshot={disks[0][1]}",
            "leave one of them out",
        )
    elif all(file is not None for _, file in disks):
        raise refused("--snapshot has no effect: each --usb-disk has a snapshot file", "leave it out")
    files = [os.path.realpath(file) for _, file in disks if file is not None]
    if twice := next((file for file in files if files.count(file) > 1), None):
        raise refused(f"{twice} is the snapshot file of two disks", "name a file for each disk")


def _alone(option: str, needed: str) -> UsageError:
    return UsageError(f"{option} has no effect without {needed}", reason=Reason.BAD_OPTION)
