"""``farplug connect``: plug devices into a guest and keep them there."""

from __future__ import annotations

import inspect

import typer

from farplug.cli.device_options import DeviceOptions, with_device_options
from farplug.cli.options import (
    PASSWORD_HELP,
    NoReconnectOption,
    OptionalTargetArgument,
    ReconnectOption,
    TargetCommandOption,
    TargetOptions,
    reconnect_settings,
    with_target_options,
)
from farplug.cli.session_options import SessionOptions, with_session_options


@with_session_options
@with_target_options
@with_device_options
def connect(
    context: typer.Context,
    options: DeviceOptions,
    target: OptionalTargetArgument = None,
    *,
    access: TargetOptions,
    target_command: TargetCommandOption = None,
    reconnect: ReconnectOption = None,
    no_reconnect: NoReconnectOption = False,
    session: SessionOptions,
) -> None:
    """Plug devices into the VM at TARGET, and keep them there until Ctrl-C.

    Devices get the VM's ports in the order of the command line: the first one gets port 0. Where the VM has too few \
ports, all but USB devices of this machine share one: disks and CD-ROM drives as logical units, in the same order. \
With --separate that is an error.
    """
    session.check_capture()
    where = access.settings(target, target_command)
    devices = options.devices(context)
    session.run(where, devices, reconnect_settings(reconnect, no_reconnect, detach=session.detach))


connect.__doc__ = f"""{inspect.cleandoc(connect.__doc__ or "")}

Ctrl-C (SIGTERM, or closing the terminal) pulls the devices out of the VM, as one pulls a USB stick: first unmount a \
disk in the VM, or "safely remove" it there. What the VM has written is kept; what it still holds in memory is lost. \
If it may have more to write, the first Ctrl-C on a terminal only warns, and the next one leaves. A further Ctrl-C \
leaves at once, without waiting for the VM.

{PASSWORD_HELP}
"""
