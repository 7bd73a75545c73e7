"""``farplug connect``: plug devices into a guest and keep them there."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from farplug.cli.options import (
    PASSWORD_HELP,
    AskPasswordOption,
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
from farplug.errors import Reason, TargetError, UsageError

PASSWORD_ATTEMPTS = 3
"""How often a password is asked for, when the server does not take it."""


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


class BlockSize(StrEnum):
    """Values of ``--block-size``."""

    B512 = "512"
    B4096 = "4096"


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


def connect(
    target: TargetArgument,
    usb_disk: ImagesOption = None,
    usb_disk_ro: ReadOnlyImagesOption = None,
    usb_speed: Annotated[
        UsbSpeed, typer.Option(help="auto: SuperSpeed, and High Speed where the guest's port takes no more.")
    ] = UsbSpeed.AUTO,
    usb_storage: Annotated[
        UsbStorage,
        typer.Option(
            help="How disks talk: one command at a time, as firmware does (bot), many at a time (uas), or both (auto): "
            "the guest chooses."
        ),
    ] = UsbStorage.AUTO,
    block_size: Annotated[
        BlockSize,
        typer.Option(help="Bytes in a block of the disks: 4096 as in large drives, but no BIOS boots from it."),
    ] = BlockSize.B512,
    password_file: PasswordFileOption = None,
    ask_password: AskPasswordOption = False,
    ca_file: CaFileOption = None,
    host_subject: HostSubjectOption = None,
    proxy: ProxyOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print events as JSON, one object a line.")] = False,
    debug: DebugOption = False,
) -> None:
    """Plug devices into the VM at TARGET, and keep them there until Ctrl-C."""
    images = [(path, False) for path in usb_disk or []] + [(path, True) for path in usb_disk_ro or []]
    if not images:
        raise UsageError(
            "nothing to plug in",
            reason=Reason.BAD_OPTION,
            remedy="name an image: --usb-disk PATH or --usb-disk-ro PATH ('farplug devices' lists what can be plugged)",
        )
    options = target_options(password_file, ask_password, ca_file, host_subject, proxy)

    import asyncio
    from dataclasses import replace

    from farplug.cli import output, session
    from farplug.usb.types import Speed
    from farplug.virtual.storage import StorageTransport

    speeds = {
        UsbSpeed.AUTO: (Speed.SUPER, Speed.HIGH),
        UsbSpeed.HIGH: (Speed.HIGH,),
        UsbSpeed.SUPER: (Speed.SUPER,),
    }[usb_speed]
    attempts = PASSWORD_ATTEMPTS if target.startswith("spice") and has_terminal() else 0
    while True:
        plan = session.Plan(target, options, images, speeds, StorageTransport(usb_storage), int(block_size))
        try:
            raise typer.Exit(asyncio.run(session.run(plan, output.choose(as_json=json))))
        except TargetError as error:
            if error.reason is not Reason.WRONG_PASSWORD or not attempts:
                raise
            typer.echo(f"farplug: {error.message}", err=True)
        attempts -= 1
        options = replace(options, password=prompt_for_password())


connect.__doc__ = f"""{connect.__doc__}

Ctrl-C (SIGTERM, or closing the terminal) detaches cleanly: the VM sees the device leave, and what it wrote is kept. \
A second Ctrl-C leaves at once.

{PASSWORD_HELP}

'farplug --help' lists the exit codes.
"""
