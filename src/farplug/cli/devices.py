"""``farplug devices``: list what can be plugged in."""

from __future__ import annotations

import asyncio
import json as jsonlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farplug.cli.device_options import FilterOption
from farplug.cli.log import remedy_lines
from farplug.cli.options import OUTPUT
from farplug.errors import FarplugError, SetupError
from farplug.exit_codes import exit_code
from farplug.text import printable

if TYPE_CHECKING:
    from farplug.machine.device_info import DeviceInfo

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
        "description": "an ISO image, in a drive from which the guest can eject it",
    },
    {
        "kind": "folder",
        "option": "--usb-folder PATH",
        "description": "a copy of a folder, as a read-only disk",
    },
    {
        "kind": "USB keyboard",
        "option": "--usb-keyboard",
        "description": "a keyboard on which 'farplug type' types; it works in firmware, too",
    },
    {
        "kind": "USB tablet",
        "option": "--usb-tablet",
        "description": "a pointer with absolute positions, for 'farplug click'",
    },
    {
        "kind": "USB mouse",
        "option": "--usb-mouse",
        "description": "a pointer that is moved by distances, for 'farplug click --relative'",
    },
    {
        "kind": "USB touchscreen",
        "option": "--usb-touchscreen",
        "description": "a touchscreen for one finger, for programs in Python",
    },
    {
        "kind": "USB gamepad",
        "option": "--usb-gamepad",
        "description": "two sticks, a hat switch and 16 buttons, for programs in Python",
    },
    {
        "kind": "USB serial line",
        "option": "--usb-serial END",
        "description": "a serial line to a terminal, a socket or a file of this machine",
    },
    {
        "kind": "USB network adapter",
        "option": "--usb-network END",
        "description": "a network adapter in this user's network (passt), or in another one",
    },
    {
        "kind": "security key",
        "option": "--usb-fido FILE",
        "description": "a FIDO2 and U2F security key for tests, whose keys are in a file",
    },
    {
        "kind": "camera",
        "option": "--usb-camera CLIP",
        "description": "a camera that shows a clip, the images of a folder, or a test picture ('pattern')",
    },
    {
        "kind": "real device",
        "option": "--usb-device DEVICE",
        "description": "a USB device of this machine: VID:PID, BUS-ADDRESS, BUS-PORT.PORT, serial:..., or its name",
    },
)


def devices(
    images: Annotated[
        list[Path] | None,
        typer.Argument(metavar="IMAGE", help="RAW and ISO images to check.", show_default=False),
    ] = None,
    filter: FilterOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=OUTPUT)] = False,
) -> None:
    """List USB devices and check images; show why one cannot be used and how to fix it.

    With images, only the images are checked; --json lists the USB devices, too.

    The exit code is 0 if all images can be plugged, else that of the first error.
    """
    checks = [_check_image(path) for path in images or []]
    failed = next((entry["error"] for entry in checks if "error" in entry), None)
    no_usb: SetupError | None = None
    found: Sequence[DeviceInfo] = ()
    if json or not checks:
        try:
            found = _find(filter)
        except SetupError as error:
            no_usb = error
    if json:
        plain = [{**e, "error": _error(e["error"])} if "error" in e else e for e in checks]
        usb = {"devices": [device.to_json() for device in found], "error": None if no_usb is None else _error(no_usb)}
        typer.echo(jsonlib.dumps({"kinds": KINDS, "usb": usb, "images": plain}))
    else:
        for line in _image_lines(checks) if checks else [*_kind_lines(), "", *_device_lines(found, no_usb)]:
            typer.echo(printable(line))
    if failed is not None:
        raise typer.Exit(exit_code(failed))


def _find(rules: str | None) -> Sequence[DeviceInfo]:
    from farplug.machine.listing import list_devices
    from farplug.usbredir.rules import parse_rules

    allowed = None if rules is None else parse_rules(rules)
    found = list_devices()
    if allowed is None:
        return found
    obstacles = [(device, device.filtered(allowed)) for device in found]
    return [
        device if obstacle is None else replace(device, obstacles=(*device.obstacles, obstacle))
        for device, obstacle in obstacles
    ]


def _check_image(path: Path) -> dict[str, Any]:
    from farplug.store import FileStore

    try:
        store = FileStore.open(path, read_only=True)
    except FarplugError as error:
        return {"path": str(path), "error": error}
    asyncio.run(store.close())
    return {"path": str(path), "size": store.block_count * store.block_size, "serial_number": store.serial_number}


def _error(error: FarplugError) -> dict[str, str]:
    return error.as_dict()


def _kind_lines() -> Iterator[str]:
    for kind in KINDS:
        yield f"{kind['kind']:<22}{kind['option']:<22}{kind['description']}"


def _device_lines(devices: Sequence[DeviceInfo], no_usb: SetupError | None) -> Iterator[str]:
    """Yield the lines of all devices but root hubs, which are a part of the machine."""
    if no_usb is not None:
        yield f"no USB devices: {no_usb.message}"
        yield from (f"  {line}" for line in remedy_lines(no_usb.remedy))
        return
    plugged = [found for found in devices if not found.port.startswith("usb")]
    if not plugged:
        yield "no USB device is plugged into this machine"
        return
    rows = [("PORT", "ADDRESS", "VID:PID", "SPEED", "CLASS", "NAME"), *map(_row, plugged)]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ["  ".join([*map(str.ljust, row, widths), row[5]]).rstrip() for row in rows]
    yield lines[0]
    for found, line in zip(plugged, lines[1:], strict=True):
        yield line
        for obstacle in found.obstacles:
            yield f"    cannot be plugged in: {obstacle}"
            yield from (f"      {remedy}" for remedy in remedy_lines(obstacle.remedy))
        if found.in_use_as is not None and found.obstacle is None:
            yield f"    note: {found.in_use_as}"


def _row(found: DeviceInfo) -> tuple[str, ...]:
    return (
        found.port,
        f"{found.bus}-{found.address}",
        found.id,
        "unknown" if found.speed is None else str(found.speed),
        ", ".join(found.classes),
        found.name + (f" (serial:{found.serial_number})" if found.serial_number else ""),
    )


def _image_lines(checks: Sequence[dict[str, Any]]) -> Iterator[str]:
    from farplug.cli.output import size

    width = max((len(entry["path"]) for entry in checks), default=0)
    for entry in checks:
        error = entry.get("error")
        if error is None:
            about = f"can be plugged: {size(entry['size'])}, serial number {entry['serial_number']}"
        else:
            about = f"cannot be plugged: {error.message}"
        yield f"{entry['path']:<{width}}  {about}"
        for line in remedy_lines(error.remedy) if error is not None else ():
            yield f"{'':<{width}}  {line}"
