"""``farplug capture``: captures for Wireshark."""

from __future__ import annotations

from typing import Annotated

import typer

from farplug.capture.dissector import install_dissector
from farplug.errors import Reason, UsageError


def capture(
    install: Annotated[
        bool,
        typer.Option(
            "--install-dissector", help="Install the dissector for usbredir into the Wireshark folder of this user."
        ),
    ] = False,
) -> None:
    """Prepare Wireshark for captures: 'farplug connect --capture FILE' writes them.

    Wireshark decodes USB, SCSI and SPICE by itself. With the dissector it also decodes each usbredir packet.
    """
    if not install:
        raise UsageError(
            "nothing to do",
            reason=Reason.BAD_OPTION,
            remedy="to write a capture: farplug connect TARGET --capture FILE; "
            "for usbredir in Wireshark: farplug capture --install-dissector",
        )
    path = install_dissector()
    typer.echo(f"{path}\nWireshark loads it at its next start; the filter is: usbredir")
