"""What prevents plugging in a device of this machine, and how to remove it."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from farplug.errors import DeviceError, Reason, Remedy, SetupError
from farplug.machine.device_info import DeviceInfo, Obstacle
from farplug.machine.sysfs import list_folder, raise_if_too_many_open, read, read_bytes
from farplug.machine.udev import install_commands, udev_rule
from farplug.shell import shell_quote, shell_word
from farplug.text import printable

MAX_FOLDERS = 4096
"""Folders of a device in sysfs that are searched for disks, keyboards and networks."""
LOCKS = Path("/proc/locks")
MAX_LOCKS = 1 << 20
"""Bytes of :data:`LOCKS` that are read: a lock has a line of about 60 bytes."""
MAX_HOLDERS = 3
"""Programs that a message names."""
ROUTES, ROUTES6 = Path("/proc/net/route"), Path("/proc/net/ipv6_route")
MAX_ROUTES = 1 << 20
"""Bytes of each file of routes that are read: a route has a line of about 150 bytes."""
_EVERYWHERE = re.compile("fe[89ab]|ff", re.IGNORECASE)
"""Link-local and multicast networks, which every interface has (RFC 4291, section 2.4)."""

REPLUG = Remedy("unplug it and plug it in again")

IS_HUB = Obstacle(Reason.HUB, "it is a USB hub", Remedy("choose the devices that are plugged into the hub"))

_BTN_LEFT = 0x110
_TYPING_KEYS = 0xFFFF_FFFE
"""Escape, the digits and the letters up to D: a device that has them is a keyboard (udev's input_id)."""
_WORD_BITS = 8 * struct.calcsize("L")


@dataclass(slots=True)
class Uses:
    """The disks, keyboards, mice and networks in use that the kernel has created for a device.

    Attributes:
        disks: folders of block devices in sysfs.
        inputs: "keyboard", "mouse".
        networks: names of network interfaces.
    """

    disks: list[Path] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    networks: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, device: DeviceInfo) -> Uses:
        """Search the folders of a device's interfaces, if any of these has a driver."""
        uses = cls()
        prefix = f"{device.port}:"
        if any(interface.driver for interface in device.interfaces):
            for folder in _below([entry for entry in list_folder(device.path) if entry.name.startswith(prefix)]):
                if folder.parent.name == "block":
                    uses.disks.append(folder)
                elif folder.parent.name == "input" and (kind := _input_kind(folder)):
                    uses.inputs.append(kind)
                elif folder.parent.name == "net" and _is_network_in_use(folder):
                    uses.networks.append(printable(folder.name))
        return uses


def _below(folders: list[Path]) -> Iterator[Path]:
    """Yield folders and the folders in them, at most :data:`MAX_FOLDERS`; links are not followed."""
    for _ in range(MAX_FOLDERS):
        if not folders:
            return
        folder = folders.pop(0)
        yield folder
        folders += [entry for entry in list_folder(folder) if not entry.is_symlink() and entry.is_dir()]


def _input_kind(folder: Path) -> str:
    """Return "keyboard", "mouse" or "" for an input device, by its capabilities (the rules of udev's input_id)."""
    keys, axes = _bits(folder, "key"), _bits(folder, "rel") | _bits(folder, "abs")
    if keys & _TYPING_KEYS == _TYPING_KEYS:
        return "keyboard"
    return "mouse" if axes & 3 == 3 and keys >> _BTN_LEFT & 1 else ""


def _bits(folder: Path, kind: str) -> int:
    """Return a bitmap of capabilities: machine words in hexadecimal, the highest first."""
    number = 0
    for word in read(folder / "capabilities" / kind).split():
        if not re.fullmatch(r"[0-9a-f]{1,16}", word):
            return 0
        number = number << _WORD_BITS | int(word, 16)
    return number


def _is_network_in_use(folder: Path) -> bool:
    """Return whether a network interface has a route, or is part of another interface, as of a bridge.

    Source: proc_net(5), "route"; Linux, Documentation/ABI/testing/sysfs-class-net ("upper_").
    """
    if any(entry.name.startswith("upper_") for entry in list_folder(folder)):
        return True
    routes = _table(ROUTES, MAX_ROUTES)
    routes6 = _table(ROUTES6, MAX_ROUTES)
    return any(route[:1] == [folder.name] for route in routes) or any(
        route[-1:] == [folder.name] and not _EVERYWHERE.match(route[0]) for route in routes6
    )


def obstacles(device: DeviceInfo, root: Path, uses: Uses) -> Iterator[Obstacle]:
    """Yield what prevents plugging in a device, the worst first."""
    if device.is_hub:
        yield IS_HUB
        return
    if read(device.path / "authorized") == "0":
        file = shell_word(device.path / "authorized")
        yield Obstacle(
            Reason.NOT_AUTHORIZED,
            "this machine does not authorize it",
            Remedy("allow it in USBGuard, or authorize it once", command=f"echo 1 | sudo tee {file}"),
        )
    yield from _node_obstacles(device, root)
    driver = _link_name(device.path / "driver")
    if driver not in ("", "usb"):
        command = f"sudo usbip unbind --busid {shell_quote(device.port)}" if driver == "usbip-host" else ""
        yield Obstacle(
            Reason.KERNEL_DRIVER,
            f"the kernel driver {driver} is bound to the whole device, and farplug cannot unbind it",
            Remedy(f"unbind it from {driver}", command=command),
        )
    locked = _is_locked(device.node)
    if locked or any(interface.driver == "usbfs" for interface in device.interfaces):
        yield busy(device.node, "another farplug" if locked else "another program")
    for disk in uses.disks:
        yield from _disk_obstacles(disk)
    if not device.interfaces and device.warnings:
        yield Obstacle(Reason.DEVICE_FAULT, f"its descriptors are invalid: {device.warnings[0]}", REPLUG)


def in_use_as(uses: Uses) -> Obstacle | None:
    """Return the keyboard, mouse or network of this machine that the device is in use as; None if it is none."""
    if uses.inputs:
        what = " and ".join(dict.fromkeys(uses.inputs))
        return Obstacle(
            Reason.INPUT_DEVICE,
            f"it is a {what} of this machine: while it is plugged in, it works in the VM only",
            Remedy("to stop farplug without it, use another keyboard or the network, or unplug it"),
        )
    if uses.networks:
        return Obstacle(
            Reason.NETWORK_DEVICE,
            f"this machine uses its network ({', '.join(uses.networks)}): while it is plugged in, only the VM has it",
            Remedy("to stop farplug without that network, use this machine's own keyboard, or unplug the device"),
        )
    return None


def _node_obstacles(device: DeviceInfo, root: Path) -> Iterator[Obstacle]:
    usbfs = root / "dev/bus/usb"
    if not os.path.isdir(usbfs):
        yield Obstacle(
            Reason.NO_USB,
            f"there is no {usbfs}: devices cannot be opened here",
            Remedy(
                "start a container with --device=/dev/bus/usb (Docker, Podman); elsewhere, load USB support",
                command="sudo modprobe usbcore",
            ),
        )
    elif _is_missing(device.node):
        yield Obstacle(
            Reason.NO_USB,
            f"there is no {device.node}: it was just unplugged, or was plugged in after this container was started",
            Remedy(
                "start the container with --volume=/dev/bus/usb:/dev/bus/usb (Docker, Podman), "
                "so that it sees devices that are plugged in later"
            ),
        )
    elif not os.access(device.node, os.R_OK | os.W_OK):
        yield no_permission(device.vendor_id, device.product_id)


def _is_missing(node: Path) -> bool:
    """Return whether a file does not exist. A file in a folder that may not be searched counts as existing."""
    try:
        node.stat()
    except PermissionError:
        return False
    except OSError:
        return True
    return False


def no_permission(vendor_id: int, product_id: int) -> Obstacle:
    """Return the obstacle that the user, or the container, may not open a device with these ids."""
    if os.geteuid() == 0:
        remedy = Remedy("start the container with --device-cgroup-rule='c 189:* rwm' (Docker, Podman)")
    else:
        rule = udev_rule((vendor_id, product_id))
        all_devices = "# for all USB devices instead: sudo farplug doctor --install-udev-rule"
        remedy = Remedy("install a udev rule for it", command=f"{install_commands(rule)}\n{all_devices}")
    return Obstacle(Reason.NO_PERMISSION, "no permission to use it", remedy)


def busy(node: Path, who: str = "another program") -> Obstacle:
    """Return the obstacle that another program uses the device."""
    programs = ", ".join(holders(node))
    if programs:
        remedy = Remedy("end that program first")
    else:
        remedy = Remedy("end that program first; lsof shows which it is", command=f"sudo lsof {shell_word(node)}")
    return Obstacle(Reason.BUSY, f"{who} uses it{f': {programs}' if programs else ''}", remedy)


def device_lost(device: object, detail: str = "", remedy: str = "plug it in again") -> DeviceError:
    """Return the error that a device was unplugged after it was listed."""
    message = f"{device} is no longer plugged in{f': {detail}' if detail else ''}"
    return DeviceError(message, reason=Reason.DEVICE_LOST, remedy=remedy)


def _disk_obstacles(folder: Path) -> Iterator[Obstacle]:
    from farplug.store.usage import device_uses  # imports modules that Windows does not have

    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", read(folder / "dev"))
    try:
        uses = device_uses(os.makedev(int(match[1]), int(match[2]))) if match else []
    except OSError as error:
        raise_if_too_many_open(error)
        raise
    if uses:
        yield Obstacle(
            Reason.IN_USE,
            f"this machine uses the disk: {', '.join(map(str, uses))}",
            Remedy(
                "end that use, or plug it in nevertheless, which can damage its file systems",
                setting="rules.force",
                value=True,
                command="\n".join(f"sudo {use.end}" for use in uses if use.end),
            ),
            forceable=True,
        )


def _is_locked(node: Path) -> bool:
    """Return whether another process has locked the device's file: another farplug, which may not use it yet.

    Source: proc_pid_locks(5).
    """
    try:
        status = node.stat()
    except OSError:
        return False
    file = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    locks = _table(LOCKS, MAX_LOCKS)
    return any(lock[1:2] == ["FLOCK"] and lock[5:6] == [file] and lock[4] != str(os.getpid()) for lock in locks)


def _table(path: Path, limit: int) -> list[list[str]]:
    """Return the fields of each line of a file of procfs. Names in it may have any white space but blanks."""
    lines = os.fsdecode(read_bytes(path, limit)).split("\n")
    return [re.split("[ \t]+", line.strip(" \t")) for line in lines]


def holders(node: Path) -> list[str]:
    """Return the programs that have a device open: ``usbredirect (process 123)``.

    Only root sees the programs of other users.
    """
    try:
        holding = [
            process
            for process in list_folder(Path("/proc"))
            if process.name.isdecimal()
            and int(process.name) != os.getpid()
            and any(_link(descriptor) == str(node) for descriptor in list_folder(process / "fd"))
        ]
        names = [
            (printable(read(process / "comm").strip()) or "a program", process.name)
            for process in holding[:MAX_HOLDERS]
        ]
    except SetupError:  # too many open files: report that the device is in use, without names
        return []
    return [f"{name} (process {number})" for name, number in names]


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _link_name(path: Path) -> str:
    return os.path.basename(_link(path))
