"""``farplug connect``: plug devices into a guest and keep them there."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from farplug.cli.options import (
    PASSWORD_HELP,
    AskPasswordOption,
    BlockSize,
    CaFileOption,
    DebugOption,
    HostSubjectOption,
    PasswordFileOption,
    ProxyOption,
    TargetArgument,
    has_terminal,
    prompt_for_password,
    target_options,
)
from farplug.cli.wishes import (
    AutoConnectOption,
    DevicesOption,
    FilterOption,
    FollowBy,
    FollowOption,
    RedirectOption,
    WaitOption,
    device_wishes,
)
from farplug.errors import Reason, TargetError, UsageError

PASSWORD_ATTEMPTS = 3
"""How often a password is asked for, when the server does not take it."""


class FolderFormat(StrEnum):
    """Values of ``--folder-format``."""

    AUTO = "auto"
    FAT32 = "fat32"
    EXFAT = "exfat"
    NTFS = "ntfs"
    EXT4 = "ext4"


class UsbSpeed(StrEnum):
    """Values of ``--usb-speed``."""

    AUTO = "auto"
    HIGH = "high"
    SUPER = "super"


class UsbStorage(StrEnum):
    """Values of ``--usb-storage``: those of :class:`~farplug.virtual.storage.StorageTransport`."""

    AUTO = "auto"
    BOT = "bot"
    UAS = "uas"


class Cache(StrEnum):
    """Values of ``--cache``: those of :class:`~farplug.store.CacheMode`."""

    WRITEBACK = "writeback"
    WRITETHROUGH = "writethrough"
    UNSAFE = "unsafe"


ImagesOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--usb-disk", metavar="PATH", help="Plug a RAW image in as a USB disk. May be repeated.", show_default=False
    ),
]
ReadOnlyImagesOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--usb-disk-ro", metavar="PATH", help="The same, read-only: the image never changes.", show_default=False
    ),
]
CdromsOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--usb-cdrom",
        metavar="PATH",
        help="Plug an ISO image in as a CD-ROM in a USB drive. May be repeated.",
        show_default=False,
    ),
]
FoldersOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--usb-folder",
        metavar="PATH",
        help="Plug a copy of a folder in as a read-only USB disk. May be repeated.",
        show_default=False,
    ),
]


def connect(
    target: TargetArgument,
    usb_disk: ImagesOption = None,
    usb_disk_ro: ReadOnlyImagesOption = None,
    usb_cdrom: CdromsOption = None,
    usb_folder: FoldersOption = None,
    usb_device: DevicesOption = None,
    wait: WaitOption = False,
    follow: FollowOption = FollowBy.DEVICE,
    filter: FilterOption = None,
    auto_connect: AutoConnectOption = None,
    redirect_on_connect: RedirectOption = None,
    folder_format: Annotated[
        FolderFormat, typer.Option(help="File system of folders. auto: FAT32, or exFAT for files of 4 GiB and more.")
    ] = FolderFormat.AUTO,
    usb_speed: Annotated[
        UsbSpeed, typer.Option(help="auto: SuperSpeed, and High Speed where the guest's port takes no more.")
    ] = UsbSpeed.AUTO,
    usb_storage: Annotated[
        UsbStorage,
        typer.Option(
            help="How disks talk: one command at a time, as firmware does (bot), many at a time (uas), or what the "
            "guest takes of both (auto). CD-ROM drives: auto is bot."
        ),
    ] = UsbStorage.AUTO,
    block_size: Annotated[
        BlockSize,
        typer.Option(help="Bytes in a block of the disks: 4096 as in large drives, but no BIOS boots from it."),
    ] = BlockSize.B512,
    cache: Annotated[
        Cache,
        typer.Option(
            help="When written data is on the disk: when the guest flushes (writeback), at once (writethrough), or "
            "whenever this machine pleases, for disks that can be thrown away (unsafe)."
        ),
    ] = Cache.WRITEBACK,
    snapshot: Annotated[
        bool,
        typer.Option(
            "--snapshot", help="Keep the images of disks as they are: what the guest writes is gone in the end."
        ),
    ] = False,
    snapshot_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The same for one disk, but keep what the guest writes in FILE, to go on with it, or to apply it: "
            "'farplug image commit FILE'.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Plug also a disk that this machine uses (mounted), and the bytes of a file that is not a RAW image, "
            "or not an ISO image; leave at the first Ctrl-C, whatever the VM is still writing.",
        ),
    ] = False,
    password_file: PasswordFileOption = None,
    ask_password: AskPasswordOption = False,
    ca_file: CaFileOption = None,
    host_subject: HostSubjectOption = None,
    proxy: ProxyOption = None,
    commands: Annotated[
        bool, typer.Option("--commands", help="Read commands from standard input: insert [DRIVE] PATH, eject [DRIVE].")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print events as JSON, one object a line.")] = False,
    debug: DebugOption = False,
) -> None:
    """Plug devices into the VM at TARGET, and keep them there until Ctrl-C."""
    named = (usb_disk or [], usb_disk_ro or [], usb_cdrom or [], usb_folder or [])
    real = device_wishes(
        usb_device or [],
        wait=wait,
        follow=follow,
        allowed=filter,
        auto_connect=auto_connect,
        redirect_on_connect=redirect_on_connect,
        force=force,
    )
    if not any(named) and real is None:
        raise UsageError(
            "nothing to plug in",
            reason=Reason.BAD_OPTION,
            remedy="name an image or a device, for example: --usb-disk PATH, --usb-device VID:PID ('farplug devices' "
            "lists what can be plugged)",
        )
    if snapshot and not usb_disk:
        raise UsageError(
            "--snapshot says nothing without --usb-disk: a device of this machine keeps what the VM writes to it",
            reason=Reason.BAD_OPTION,
        )
    if snapshot_file is not None and len(usb_disk or []) != 1:
        raise UsageError(
            f"--snapshot-file is for one --usb-disk, not {len(usb_disk or [])}",
            reason=Reason.BAD_OPTION,
            remedy="run farplug once for each disk, or use --snapshot",
        )
    options = target_options(password_file, ask_password, ca_file, host_subject, proxy)

    import asyncio
    from dataclasses import replace

    from farplug.cli import output, session
    from farplug.cli.media import Kind, Manner, Media, Wish
    from farplug.store import CacheMode
    from farplug.usb.types import Speed
    from farplug.virtual.storage import StorageTransport

    wishes = [
        Wish(kind, path)
        for kind, paths in zip((Kind.DISK, Kind.READ_ONLY_DISK, Kind.CDROM, Kind.FOLDER), named, strict=True)
        for path in paths
    ]

    speeds = {
        UsbSpeed.AUTO: (Speed.SUPER, Speed.HIGH),
        UsbSpeed.HIGH: (Speed.HIGH,),
        UsbSpeed.SUPER: (Speed.SUPER,),
    }[usb_speed]
    manner = Manner(
        speeds=speeds,
        transport=StorageTransport(usb_storage),
        block_size=int(block_size),
        cache=CacheMode(cache),
        force=force,
        snapshot=snapshot or snapshot_file is not None,
        snapshot_file=snapshot_file,
        folder_format=None if folder_format is FolderFormat.AUTO else folder_format.value,
    )
    attempts = PASSWORD_ATTEMPTS if target.startswith("spice") and has_terminal() else 0
    while True:
        plan = session.Plan(target, options, Media(wishes, manner), real, commands, force)
        try:
            raise typer.Exit(asyncio.run(session.run(plan, output.choose(as_json=json, commands=commands))))
        except TargetError as error:
            if error.reason not in (Reason.NO_PASSWORD, Reason.WRONG_PASSWORD) or not attempts:
                raise
            typer.echo(f"farplug: {error.message}", err=True)
        attempts -= 1
        options = replace(options, password=prompt_for_password())


connect.__doc__ = f"""{connect.__doc__}

Ctrl-C (SIGTERM, or closing the terminal) pulls the devices out of the VM, as one pulls a USB stick: first unmount a \
disk in the VM, or "safely remove" it there. What the VM has written is kept; what it still holds in memory is lost. \
If it may have more to write, the first Ctrl-C on a terminal only says so, and the next one leaves. A further Ctrl-C \
leaves at once, without waiting for the VM.

{PASSWORD_HELP}

'farplug --help' lists the exit codes.
"""
