"""``farplug connect``: plug devices into a guest and keep them there."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from farplug.app.settings import (
    BlockSize,
    FolderFormat,
    Follow,
    GuestSettings,
    Source,
    StorageSettings,
    UsbSpeed,
)
from farplug.cli.device_options import (
    AutoConnectOption,
    DevicesOption,
    FilterOption,
    FollowOption,
    RedirectOption,
    WaitOption,
    device_rules,
)
from farplug.cli.options import (
    IMAGES,
    OUTPUT,
    PASSWORD_HELP,
    TUNING,
    AllowPlainOption,
    AskPasswordOption,
    BlockSizeOption,
    CaFileOption,
    DebugOption,
    HostSubjectOption,
    PasswordFileOption,
    ProxyOption,
    TargetArgument,
    given_order,
    target_settings,
)
from farplug.errors import Reason, UsageError
from farplug.exit_codes import ExitCode
from farplug.store.base import CacheMode
from farplug.virtual.storage_transport import StorageTransport

ImagesOption = Annotated[
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
ReadOnlyImagesOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--usb-disk-ro",
        metavar="PATH",
        help="The same, read-only: the image never changes.",
        show_default=False,
        rich_help_panel=IMAGES,
    ),
]
CdromsOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--usb-cdrom",
        metavar="PATH",
        help="Plug in an ISO image as a CD-ROM in a USB drive: cdrom0, cdrom1, ... May be repeated.",
        show_default=False,
        rich_help_panel=IMAGES,
    ),
]
FoldersOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--usb-folder",
        metavar="PATH",
        help="Plug in a copy of a folder as a read-only USB disk. May be repeated.",
        show_default=False,
        rich_help_panel=IMAGES,
    ),
]

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


def connect(
    context: typer.Context,
    target: TargetArgument,
    usb_disk: ImagesOption = None,
    usb_disk_ro: ReadOnlyImagesOption = None,
    usb_cdrom: CdromsOption = None,
    usb_folder: FoldersOption = None,
    snapshot: Annotated[
        bool,
        typer.Option(
            "--snapshot",
            help="Discard the VM's writes to disks without a snapshot file on exit.",
            rich_help_panel=IMAGES,
        ),
    ] = False,
    snapshot_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The snapshot file of the only --usb-disk: as --usb-disk PATH,snapshot=FILE.",
            show_default=False,
            rich_help_panel=IMAGES,
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Plug in also a disk that this machine uses (mounted), and the bytes of a file that is not a RAW "
            "image, or not an ISO image; leave at the first Ctrl-C, whatever the VM is still writing.",
            rich_help_panel=IMAGES,
        ),
    ] = False,
    usb_device: DevicesOption = None,
    wait: WaitOption = False,
    follow: FollowOption = Follow.DEVICE,
    filter: FilterOption = None,
    auto_connect: AutoConnectOption = None,
    redirect_on_connect: RedirectOption = None,
    folder_format: Annotated[
        FolderFormat,
        typer.Option(
            help="File system of folders. auto: FAT32, or exFAT for files of 4 GiB and more.", rich_help_panel=TUNING
        ),
    ] = FolderFormat.AUTO,
    usb_speed: Annotated[
        UsbSpeed,
        typer.Option(
            help="auto: SuperSpeed, and High Speed where the guest's port takes no more.", rich_help_panel=TUNING
        ),
    ] = UsbSpeed.AUTO,
    usb_storage: Annotated[
        StorageTransport,
        typer.Option(
            help="The protocol of disks: one command at a time, as firmware does (bot), many at a time (uas), or what "
            "the guest takes of both (auto). CD-ROM drives: auto is bot.",
            rich_help_panel=TUNING,
        ),
    ] = StorageTransport.AUTO,
    block_size: Annotated[
        BlockSizeOption,
        typer.Option(
            help="Bytes in a block of the disks: 4096 as in large drives, but no BIOS boots from it.",
            rich_help_panel=TUNING,
        ),
    ] = BlockSizeOption.B512,
    cache: Annotated[
        CacheMode,
        typer.Option(
            help="When written data is on the disk: when the guest flushes (writeback), at once (writethrough), or "
            "whenever the OS writes it back, for disks that can be thrown away (unsafe).",
            rich_help_panel=TUNING,
        ),
    ] = CacheMode.WRITEBACK,
    password_file: PasswordFileOption = None,
    ask_password: AskPasswordOption = False,
    ca_file: CaFileOption = None,
    host_subject: HostSubjectOption = None,
    proxy: ProxyOption = None,
    allow_plain: AllowPlainOption = False,
    commands: Annotated[
        bool,
        typer.Option(
            "--commands",
            help="Read commands from standard input: insert and eject media, list, help, quit.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print events as JSON, one object a line.", rich_help_panel=OUTPUT)
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Plug devices into the VM at TARGET, and keep them there until Ctrl-C.

    Devices get the VM's ports in the order of the command line: the first one gets port 0. Where the VM has too few \
ports, disks and CD-ROM drives are logical units of one device, in the same order.
    """
    disks = [split_snapshot(text) for text in usb_disk or []]
    for path in usb_disk_ro or []:
        if SNAPSHOT_KEY in str(path) and not os.path.lexists(path):
            raise UsageError(
                f"--usb-disk-ro {path}: the VM writes nothing to a read-only disk that a snapshot could keep",
                reason=Reason.BAD_OPTION,
                remedy=f"to let it write to the snapshot: --usb-disk {path}",
            )
    rules = device_rules(
        usb_device or [],
        wait=wait,
        follow=follow,
        allowed=filter,
        auto_connect=auto_connect,
        redirect_on_connect=redirect_on_connect,
        force=force,
    )
    paths = {
        "usb_disk": [Source.disk(path, snapshot=file or snapshot_file) for path, file in disks],
        "usb_disk_ro": [Source.disk(path, read_only=True) for path in usb_disk_ro or []],
        "usb_cdrom": [Source.cdrom(path) for path in usb_cdrom or []],
        "usb_folder": [Source.folder(path) for path in usb_folder or []],
        "usb_device": [Source.usb_device(device) for device in usb_device or []],
    }
    automatic = auto_connect is not None or redirect_on_connect is not None
    if not any(paths.values()) and not automatic:
        raise UsageError(
            "nothing to plug in",
            reason=Reason.BAD_OPTION,
            remedy="name an image or a device, for example: --usb-disk PATH, --usb-device VID:PID ('farplug devices' "
            "lists what can be plugged in)",
        )
    real = automatic or bool(usb_device)
    _check_snapshots(disks, snapshot, snapshot_file, read_only=bool(usb_disk_ro), real=real)
    named = {option: iter(sources) for option, sources in paths.items()}
    settings = GuestSettings(
        target_settings(target, password_file, ask_password, ca_file, host_subject, proxy, allow_plain),
        tuple(next(named[option]) for option in given_order(context) if option in named),
        StorageSettings(
            speed=usb_speed,
            transport=usb_storage,
            block_size=BlockSize(int(block_size)),
            cache=cache,
            force=force,
            snapshot=snapshot,
            folder_format=folder_format,
        ),
        rules,
    )

    import asyncio

    from farplug.cli import output, session, writer

    writer.install()
    shown = output.choose(as_json=json, commands=commands)
    code = asyncio.run(session.run(settings, shown, commands=commands))
    if code is ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    raise typer.Exit(code)


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


connect.__doc__ = f"""{inspect.cleandoc(connect.__doc__ or "")}

Ctrl-C (SIGTERM, or closing the terminal) pulls the devices out of the VM, as one pulls a USB stick: first unmount a \
disk in the VM, or "safely remove" it there. What the VM has written is kept; what it still holds in memory is lost. \
If it may have more to write, the first Ctrl-C on a terminal only says so, and the next one leaves. A further Ctrl-C \
leaves at once, without waiting for the VM.

{PASSWORD_HELP}
"""
