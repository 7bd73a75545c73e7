"""Options of ``farplug connect`` for the USB devices of this machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, TypeAlias

import typer

from farplug.app.settings import DeviceRules, Follow
from farplug.cli.options import DEVICES
from farplug.errors import Reason, UsageError

RULES_HELP = "Rules such as 'deny class=hid; allow': the first match decides."


DevicesOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--usb-device",
        metavar="DEVICE",
        help="Plug in a USB device of this machine: VID:PID, BUS-ADDRESS, BUS-PORT.PORT, serial:NUMBER, or part of "
        "its name. May be repeated.",
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


def device_rules(
    devices: Sequence[str],
    *,
    wait: bool,
    follow: Follow,
    allowed: str | None,
    auto_connect: str | None,
    redirect_on_connect: str | None,
    force: bool,
) -> DeviceRules:
    """Return the options as settings.

    Raises:
        UsageError: an option is not valid, or has no effect without another one.
    """
    if wait and not devices:
        raise _alone("--wait", "--usb-device")
    if not devices and auto_connect is None and redirect_on_connect is None:
        for option, given in (("--filter", allowed is not None), ("--follow", follow is not Follow.DEVICE)):
            if given:
                raise _alone(option, "--usb-device, --auto-connect or --redirect-on-connect")
    return DeviceRules(
        wait=wait,
        follow=follow,
        filter=allowed,
        auto_connect=auto_connect,
        redirect_on_connect=redirect_on_connect,
        force=force,
    )


def _alone(option: str, needed: str) -> UsageError:
    return UsageError(f"{option} has no effect without {needed}", reason=Reason.BAD_OPTION)
