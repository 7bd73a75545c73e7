"""``farplug usbredirect``: the command line of usbredirect, for programs that start it, such as virtctl."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from farplug.app.settings import DeviceRules, Source, StorageSettings, TargetSettings
from farplug.cli.device_options import Devices
from farplug.cli.session_options import SessionOptions

_BUS_AND_ADDRESS = re.compile(r"\d{1,4}-\d{1,3}", re.ASCII)


def usbredirect(
    device: Annotated[
        str,
        typer.Option(
            metavar="DEVICE",
            help="A USB device of this machine, VID:PID or BUS-ADDRESS. Or a path: an ISO (.iso) becomes a CD-ROM "
            "drive, a folder a copy of it on a disk, any other file a disk.",
            show_default=False,
        ),
    ],
    to: Annotated[
        str,
        typer.Option(metavar="HOST:PORT", help="The usbredir socket that the device goes to.", show_default=False),
    ],
) -> None:
    """Plug one device into a usbredir socket, with the command line of usbredirect.

    For programs that start usbredirect. 'virtctl usbredir DEVICE VM' does: with an executable file 'usbredirect' in \
the PATH that consists of the two lines '#!/bin/sh' and 'exec farplug usbredirect "$@"', its DEVICE may be an image. \
'farplug connect' does the same with more options, and reaches VMs of KubeVirt without virtctl.
    """
    devices = Devices((_source(device),), StorageSettings(), DeviceRules())
    SessionOptions().run(TargetSettings(f"tcp://{to}"), devices, None)


def _source(device: str) -> Source:
    """Return what a path, or the name of a USB device, is plugged in as."""
    path = Path(device)
    if path.is_dir():
        return Source.folder(path)
    if path.exists():
        return Source.cdrom(path) if path.suffix.lower() == ".iso" else Source.disk(path)
    # usbredirect takes the address of a device, never its port.
    return Source.usb_device(f"address:{device}" if _BUS_AND_ADDRESS.fullmatch(device) else device)
