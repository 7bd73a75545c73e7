"""``farplug serve``: offer devices to USB/IP clients, such as Linux's ``usbip attach``."""

from __future__ import annotations

from typing import Annotated

import typer

from farplug.app.settings import TargetSettings
from farplug.cli.device_options import DeviceOptions, with_device_options
from farplug.cli.options import CONNECTION_USBIP
from farplug.cli.session_options import SessionOptions, with_session_options


@with_session_options
@with_device_options
def serve(
    context: typer.Context,
    options: DeviceOptions,
    listen: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS:PORT",
            help="Where clients connect; port 0: any free port. USB/IP has no passwords and no encryption: anyone who "
            "reaches this address can use the devices.",
            rich_help_panel=CONNECTION_USBIP,
        ),
    ] = "127.0.0.1:3240",
    *,
    session: SessionOptions,
) -> None:
    """Offer devices to USB/IP clients, until Ctrl-C.

    A Linux attaches a device with 'usbip attach -r HOST -b BUSID', as root and with its module vhci_hcd. The command \
for each device is printed. The devices are 1-1, 1-2 and so on, in the order of the command line; one client at a time \
uses a device. From another machine: 'ssh -L 3240:127.0.0.1:3240 HOST' there, then -r 127.0.0.1.
    """
    session.check_capture()
    devices = options.devices(context)
    session.run(TargetSettings(f"usbip-listen://{listen}"), devices, None)
