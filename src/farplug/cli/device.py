"""``farplug device``: what can be made of a USB device of this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from farplug.cli.options import Command, DebugOption, Group

app = typer.Typer(cls=Group, help="Make something of a USB device of this machine.")


@app.command("clone", cls=Command)
def clone(
    device: Annotated[
        str,
        typer.Argument(
            metavar="DEVICE",
            help="VID:PID, BUS-ADDRESS, BUS-PORT.PORT, serial:NUMBER, or part of its name.",
            show_default=False,
        ),
    ],
    debug: DebugOption = False,
) -> None:
    """Print the skeleton of a device of your own, in Python, with the descriptors of a real one.

    Nothing is copied but descriptors. The device is not opened: it may be in use.
    """
    from farplug.app.clone import read_original, skeleton

    typer.echo(skeleton(read_original(device)), nl=False)
