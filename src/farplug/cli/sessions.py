"""Commands of running sessions: ``farplug ls``, ``status``, ``attach``, ``detach``, ``insert``, ``eject``, ``watch``,
``stop``, ``touch``: their options. :mod:`farplug.cli.session_verbs` carries them out.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Annotated, Any, TypeAlias

import typer

from farplug.cli import completion
from farplug.cli.device_options import DeviceOptions, with_device_options
from farplug.cli.options import OUTPUT, SESSION, SESSION_VARIABLE, DebugOption, is_target
from farplug.errors import Reason, Remedy, UsageError
from farplug.text import shown, without_credentials

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.", rich_help_panel=OUTPUT)]
JsonEventsOption = Annotated[
    bool, typer.Option("--json", help="Print events as JSON, one object a line.", rich_help_panel=OUTPUT)
]
ForceMediumOption = Annotated[
    bool, typer.Option("--force", help="Also while the VM has the medium locked, and a file that is not an ISO image.")
]


def _session(text: str | None) -> str | None:
    """Return the name of a session as it was given.

    Raises:
        UsageError: ``no-session``: it is a target.
    """
    if text is not None and is_target(text):
        raise UsageError(
            f"no session {shown(without_credentials(text))} is running, and this command takes no target in its place",
            reason=Reason.NO_SESSION,
            remedy=Remedy(
                "connect first; the command prints the name of the session:", command="farplug connect TARGET --detach"
            ),
        )
    return text


def session_option(metavar: str, help: str, callback: Callable[[str | None], str | None] | None = None) -> Any:
    """Return the option ``--session`` of a command, whose value may also come from :data:`SESSION_VARIABLE`."""
    return typer.Option(
        "--session",
        "-s",
        metavar=metavar,
        envvar=SESSION_VARIABLE,
        show_envvar=False,
        callback=callback,
        autocompletion=completion.sessions,
        help=help,
        show_default=False,
        rich_help_panel=SESSION,
    )


SessionOption: TypeAlias = Annotated[
    str | None,
    session_option(
        "NAME",
        f"The name of the session; by default that in {SESSION_VARIABLE}, else the only one that is running.",
        _session,
    ),
]


def ls(json: JsonOption = False, debug: DebugOption = False) -> None:
    """List the running sessions."""
    from farplug.cli import session_verbs

    session_verbs.ls(as_json=json)


def status(session: SessionOption = None, json: JsonOption = False, debug: DebugOption = False) -> None:
    """Show a session: its VM, its ports with what is in them, its devices with their figures."""
    from farplug.cli import session_verbs

    session_verbs.status(session, as_json=json)


# Devices ----------------------------------------------------------------------------------------------------------


@with_device_options
def attach(
    context: typer.Context,
    options: DeviceOptions,
    session: SessionOption = None,
    no_wait: Annotated[
        bool,
        typer.Option(
            "--no-wait",
            help="Return when the devices are accepted, not when the VM has configured them.",
            rich_help_panel=SESSION,
        ),
    ] = False,
    json: JsonEventsOption = False,
    debug: DebugOption = False,
) -> None:
    """Plug devices into the VM of a running session.

    The command returns when the VM has configured the devices, and shows meanwhile what it waits for. It ends with \
the exit code that 'farplug connect' would have. Ctrl-C ends only the command: the session continues.
    """
    devices = options.devices(context)
    devices.check_any()
    from farplug.cli import session_verbs

    session_verbs.attach(session, devices, wait=not no_wait, as_json=json)


def detach(
    device: Annotated[
        list[str],
        typer.Argument(
            metavar="DEVICE",
            help="The label or the id of a device, as 'farplug status' shows it, or 'all'.",
            autocompletion=completion.devices,
            show_default=False,
        ),
    ],
    session: SessionOption = None,
    json: JsonEventsOption = False,
    debug: DebugOption = False,
) -> None:
    """Take devices out of the VM of a running session, as one pulls a USB stick: unmount a disk in the VM first.

    What the VM has written is kept. A device that is not plugged in is not an error.
    """
    from farplug.cli import session_verbs

    session_verbs.detach(session, device, as_json=json)


# Media ------------------------------------------------------------------------------------------------------------


def insert(
    drive_and_path: Annotated[
        list[str],
        typer.Argument(
            metavar="[DRIVE] PATH",
            help="The drive (cdrom0, or the medium in it; by default the only one), and the ISO image.",
            autocompletion=completion.drives,
            show_default=False,
        ),
    ],
    session: SessionOption = None,
    force: ForceMediumOption = False,
    json: JsonEventsOption = False,
    debug: DebugOption = False,
) -> None:
    """Insert an ISO image into a CD-ROM drive of a running session, in place of the one that is there."""
    *drive, path = drive_and_path
    if len(drive) > 1:
        raise UsageError(
            f"insert takes a drive and a path, not {len(drive_and_path)} values",
            reason=Reason.BAD_OPTION,
            remedy="quote a path with spaces",
        )
    from farplug.cli import session_verbs

    params = {"path": os.path.abspath(path), "drive": drive[0] if drive else None, "force": force}
    session_verbs.media(session, "insert", params, as_json=json)


def eject(
    drive: Annotated[
        str | None,
        typer.Argument(
            metavar="DRIVE",
            help="The drive (cdrom0, or the medium in it); by default the only one.",
            autocompletion=completion.drives,
            show_default=False,
        ),
    ] = None,
    session: SessionOption = None,
    force: ForceMediumOption = False,
    json: JsonEventsOption = False,
    debug: DebugOption = False,
) -> None:
    """Eject the medium of a CD-ROM drive of a running session."""
    from farplug.cli import session_verbs

    session_verbs.media(session, "eject", {"drive": drive, "force": force}, as_json=json)


def reconnect(
    session: SessionOption = None,
    give_up: Annotated[bool, typer.Option("--give-up", help="Make no more attempts: the session ends.")] = False,
    debug: DebugOption = False,
) -> None:
    """Connect a running session to its VM, which is lost, at once: without the delay before the next attempt."""
    from farplug.cli import session_verbs

    session_verbs.reconnect(session, give_up=give_up)


# Security keys ----------------------------------------------------------------------------------------------------


def touch(
    key: Annotated[
        str | None,
        typer.Argument(
            metavar="KEY",
            help="The label or the id of a security key, as 'farplug status' shows it; by default the one that asks.",
            autocompletion=completion.devices,
            show_default=False,
        ),
    ] = None,
    session: SessionOption = None,
    refuse: Annotated[bool, typer.Option("--refuse", help="Refuse what the program asks for.")] = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Touch a security key of a running session: allow what a program in the VM asks for.

    The session asks with the event presence-asked, if the key was plugged in with --fido-presence ask. 'farplug \
status' shows the question while it waits.
    """
    from farplug.cli import session_verbs

    session_verbs.touch(session, key, refuse=refuse, as_json=json)


# The session ------------------------------------------------------------------------------------------------------


def watch(session: SessionOption = None, json: JsonEventsOption = False, debug: DebugOption = False) -> None:
    """Show a session, then everything that happens in it, until it ends or Ctrl-C.

    With --json, the first line is a snapshot: an object with "event": "snapshot".
    """
    from farplug.cli import session_verbs

    session_verbs.watch(session, as_json=json)


def stop(session: SessionOption = None, json: JsonEventsOption = False, debug: DebugOption = False) -> None:
    """End a session: take its devices out of the VM, and wait until the session has ended.

    What the VM has written is kept; the command warns if the VM may not have finished writing.
    """
    from farplug.cli import output, session_verbs

    session_verbs.stop(session, output.choose(as_json=json))
