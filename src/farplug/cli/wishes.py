"""Options of ``farplug connect`` about the USB devices of this machine."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from farplug.cli.options import DEVICES
from farplug.errors import Reason, UsageError

if TYPE_CHECKING:
    from farplug.app.policy import Wishes

RULES_HELP = "Rules as 'deny class=hid; allow': the first that matches counts."


class FollowBy(StrEnum):
    """Values of ``--follow``: those of :class:`~farplug.app.policy.Follow`."""

    DEVICE = "device"
    PORT = "port"


DevicesOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--usb-device",
        metavar="DEVICE",
        help="Plug in a USB device of this machine: VID:PID, BUS-ADDRESS, BUS-PORT.PORT, serial:NUMBER, or a part of "
        "its name. May be repeated.",
        show_default=False,
        rich_help_panel=DEVICES,
    ),
]
WaitOption: TypeAlias = Annotated[
    bool, typer.Option("--wait", help="Wait until every named --usb-device is present.", rich_help_panel=DEVICES)
]
FollowOption: TypeAlias = Annotated[
    FollowBy,
    typer.Option(
        "--follow",
        help="What to reconnect after an unplug: that device in any port, or any device in that port (a firmware "
        "update changes a device's id).",
        rich_help_panel=DEVICES,
    ),
]
FilterOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--filter",
        metavar="RULES",
        help=f"Which devices of this machine may be plugged in at all. {RULES_HELP}",
        show_default=False,
        rich_help_panel=DEVICES,
    ),
]
AutoConnectOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--auto-connect",
        metavar="RULES",
        help="Plug in what comes later and these rules allow. This machine's keyboard, mouse and network only if a "
        "rule names their vendor= and product=.",
        show_default=False,
        rich_help_panel=DEVICES,
    ),
]
RedirectOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--redirect-on-connect",
        metavar="RULES",
        help="The same for what is there at the start.",
        show_default=False,
        rich_help_panel=DEVICES,
    ),
]


def device_wishes(
    devices: Sequence[str],
    *,
    wait: bool,
    follow: FollowBy,
    allowed: str | None,
    auto_connect: str | None,
    redirect_on_connect: str | None,
    force: bool,
) -> Wishes | None:
    """Put the options together; None if no device of this machine is wanted.

    Raises:
        UsageError: one is written wrong, or has no effect without another one.
    """
    if wait and not devices:
        raise _alone("--wait", "--usb-device")
    if not devices and auto_connect is None and redirect_on_connect is None:
        for option, given in (("--filter", allowed is not None), ("--follow", follow is not FollowBy.DEVICE)):
            if given:
                raise _alone(option, "--usb-device, --auto-connect or --redirect-on-connect")
        return None
    from farplug.app.policy import Follow, Wishes
    from farplug.machine.choose import Choice
    from farplug.usbredir.rules import parse_rules

    return Wishes(
        choices=[Choice.parse(device) for device in devices],
        wait=wait,
        follow=Follow(follow),
        allowed=None if allowed is None else parse_rules(allowed),
        on_connect=None if redirect_on_connect is None else parse_rules(redirect_on_connect),
        later=None if auto_connect is None else parse_rules(auto_connect),
        force=force,
    )


def _alone(option: str, needed: str) -> UsageError:
    return UsageError(f"{option} has no effect without {needed}", reason=Reason.BAD_OPTION)
