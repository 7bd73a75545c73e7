"""``farplug capture``: captures of a running session, and the dissector for Wireshark."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from farplug.cli.options import DebugOption
from farplug.cli.sessions import JsonEventsOption, SessionOption
from farplug.errors import Reason, UsageError


def capture(
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="FILE",
            help="The capture, a pcapng file that is made new; or a named pipe.",
            show_default=False,
        ),
    ] = None,
    stop: Annotated[bool, typer.Option("--stop", help="End the capture of the session.")] = False,
    bytes: Annotated[
        int | None,
        typer.Option(
            "--capture-bytes",
            metavar="N",
            min=0,
            help="Capture at most N bytes of each transfer, and not what the connections carry.",
            show_default=False,
        ),
    ] = None,
    install: Annotated[
        bool,
        typer.Option(
            "--install-dissector", help="Install the dissector for usbredir into the Wireshark folder of this user."
        ),
    ] = False,
    session: SessionOption = None,
    json: JsonEventsOption = False,
    debug: DebugOption = False,
) -> None:
    """Capture what moves between a running session's VM and its devices, for Wireshark.

    Wireshark decodes USB, SCSI and SPICE by itself. With the dissector it also decodes each usbredir packet.
    """
    if [file is not None, stop, install].count(True) != 1:
        raise UsageError(
            "give one of FILE, --stop and --install-dissector",
            reason=Reason.BAD_OPTION,
            remedy="to write a capture: farplug capture -s NAME FILE; from the start of a session: "
            "farplug connect TARGET --capture FILE",
        )
    if bytes is not None and file is None:
        raise UsageError("--capture-bytes has no effect without FILE", reason=Reason.BAD_OPTION)
    if install:
        from farplug.capture.dissector import install_dissector

        typer.echo(f"{install_dissector()}\nWireshark loads it at its next start; the filter is: usbredir")
        return
    if file == "-":
        raise UsageError(
            "a session writes to files, not to the standard output of this command",
            reason=Reason.BAD_OPTION,
            remedy="name a file, or a named pipe that Wireshark reads",
        )
    from farplug.cli import session_verbs

    if file is None:
        session_verbs.capture(session, "stop-capture", {}, as_json=json)
    else:
        path = {"path": os.path.abspath(file), "bytes": bytes}
        session_verbs.capture(session, "capture", path, as_json=json)
