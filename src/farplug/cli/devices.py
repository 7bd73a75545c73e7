"""``farplug devices``: what can be plugged in."""

from __future__ import annotations

import asyncio
import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

import typer

from farplug.cli.log import printable
from farplug.errors import FarplugError

KINDS = (
    {
        "kind": "USB disk",
        "option": "--usb-disk PATH",
        "description": "a RAW image, read and written by the guest",
    },
    {
        "kind": "USB disk, read-only",
        "option": "--usb-disk-ro PATH",
        "description": "a RAW image that never changes, write-protected in the guest",
    },
    {
        "kind": "USB CD-ROM",
        "option": "--usb-cdrom PATH",
        "description": "an ISO image, in a drive that the guest can eject it from",
    },
    {
        "kind": "folder",
        "option": "--usb-folder PATH",
        "description": "a copy of a folder, as a read-only disk",
    },
)


def devices(
    images: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[IMAGE]...", help="RAW images to look at: can they be plugged?", show_default=False),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List what can be plugged in, and look at images: their size, serial number, and why one cannot be plugged.

    The exit code is 0 if all images can be plugged, else that of the first error.
    """
    looked = [_look(path) for path in images or []]
    failed = next((entry["error"] for entry in looked if "error" in entry), None)
    if json:
        plain = [{**e, "error": _error(e["error"])} if "error" in e else e for e in looked]
        typer.echo(jsonlib.dumps({"kinds": KINDS, "images": plain}))
    else:
        _print(looked)
    if failed is not None:
        raise typer.Exit(failed.exit_code)


def _look(path: Path) -> dict[str, Any]:
    from farplug.store import FileStore

    try:
        store = FileStore.open(path, read_only=True)
    except FarplugError as error:
        return {"path": str(path), "error": error}
    asyncio.run(store.close())
    return {"path": str(path), "size": store.block_count * store.block_size, "serial_number": store.serial_number}


def _error(error: FarplugError) -> dict[str, str]:
    return {"reason": str(error.reason), "message": error.message, "remedy": error.remedy}


def _print(looked: list[dict[str, Any]]) -> None:
    from farplug.cli.output import size

    for kind in KINDS:
        typer.echo(f"{kind['kind']:<22}{kind['option']:<22}{kind['description']}")
    if looked:
        typer.echo()
    width = max((len(entry["path"]) for entry in looked), default=0)
    for entry in looked:
        error = entry.get("error")
        if error is None:
            about = f"can be plugged: {size(entry['size'])}, serial number {entry['serial_number']}"
        else:
            about = f"cannot be plugged: {error.message}"
        typer.echo(printable(f"{entry['path']:<{width}}  {about}"))
        for line in error.remedy.splitlines() if error is not None else ():
            typer.echo(printable(f"{'':<{width}}  {line}"))
