"""Why a device of this machine cannot be plugged in, and what to do about it."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from farplug.errors import DeviceError, Reason, SetupError
from farplug.machine.device_info import Found, Obstacle
from farplug.machine.sysfs import check, listed, read, read_bytes
from farplug.machine.udev import install_commands, udev_rule
from farplug.text import printable

MAX_FOLDERS = 4096
"""Folders of a device in sysfs that are looked into for disks, keyboards and networks."""
LOCKS = Path("/proc/locks")
MAX_LOCKS = 1 << 20
"""Bytes of it that are read: each lock has a line of some 60."""
MAX_HOLDERS = 3
"""Programs that are named."""
ROUTES, ROUTES6 = Path("/proc/net/route"), Path("/proc/net/ipv6_route")
MAX_ROUTES = 1 << 20
"""Bytes of each that are read: a route has a line of some 150."""
_EVERYWHERE = re.compile("fe[89ab]|ff", re.IGNORECASE)
"""Link-local and multicast networks, which Linux gives to every interface (RFC 4291, section 2.4)."""

IS_HUB = Obstacle(Reason.HUB, "it is a hub", "name the devices that are plugged into it")

_BTN_LEFT = 0x110
_TYPING_KEYS = 0xFFFF_FFFE
"""Escape, the digits and the letters up to D: what udev takes for a keyboard."""
_WORD_BITS = 8 * struct.calcsize("L")


@dataclass(slots=True)
class Uses:
    """What the kernel made of a device: its disks, the keyboards and mice that are read, the networks in use.

    Attributes:
        disks: folders of block devices in sysfs.
        inputs: "keyboard", "mouse".
        networks: names of interfaces.
    """

    disks: list[Path] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    networks: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, found: Found) -> Uses:
        """Look below a device's interfaces that have a driver."""
        uses = cls()
        prefix = f"{found.port}:"
        if any(interface.driver for interface in found.interfaces):
            for folder in _below([entry for entry in listed(found.path) if entry.name.startswith(prefix)]):
                if folder.parent.name == "block":
                    uses.disks.append(folder)
                elif folder.parent.name == "input" and (kind := _input_kind(folder)):
                    uses.inputs.append(kind)
                elif folder.parent.name == "net" and _is_network_in_use(folder):
                    uses.networks.append(printable(folder.name))
        return uses


def _below(folders: list[Path]) -> Iterator[Path]:
    """All folders below, not following links; a bounded number."""
    for _ in range(MAX_FOLDERS):
        if not folders:
            return
        folder = folders.pop(0)
        yield folder
        folders += [entry for entry in listed(folder) if not entry.is_symlink() and entry.is_dir()]


def _input_kind(folder: Path) -> str:
    """What an input device is used for, by its capabilities (the rules of udev's input_id)."""
    keys, axes = _bits(folder, "key"), _bits(folder, "rel") | _bits(folder, "abs")
    if keys & _TYPING_KEYS == _TYPING_KEYS:
        return "keyboard"
    return "mouse" if axes & 3 == 3 and keys >> _BTN_LEFT & 1 else ""


def _bits(folder: Path, kind: str) -> int:
    """A bitmap: words of the machine in hexadecimal, the highest first."""
    number = 0
    for word in read(folder / "capabilities" / kind).split():
        if not re.fullmatch(r"[0-9a-f]{1,16}", word):
            return 0
        number = number << _WORD_BITS | int(word, 16)
    return number


def _is_network_in_use(folder: Path) -> bool:
    """Whether a network interface has a route, or is part of another one: of a bridge, say.

    Source: proc_net(5), "route"; Linux, Documentation/ABI/testing/sysfs-class-net ("upper_").
    """
    if any(entry.name.startswith("upper_") for entry in listed(folder)):
        return True
    routes = [line.split() for line in read_bytes(ROUTES, MAX_ROUTES).decode(errors="replace").splitlines()]
    routes6 = [line.split() for line in read_bytes(ROUTES6, MAX_ROUTES).decode(errors="replace").splitlines()]
    return any(route[:1] == [folder.name] for route in routes) or any(
        route[-1:] == [folder.name] and not _EVERYWHERE.match(route[0]) for route in routes6
    )


def obstacles(found: Found, root: Path, uses: Uses) -> Iterator[Obstacle]:
    """What stands against plugging a device in, the worst first."""
    if found.is_hub:
        yield IS_HUB
        return
    if read(found.path / "authorized") == "0":
        yield Obstacle(
            Reason.NOT_AUTHORIZED,
            "this machine does not authorize it",
            f"allow it in USBGuard, or: echo 1 | sudo tee {found.path}/authorized",
        )
    yield from _node_obstacles(found, root)
    driver = _link_name(found.path / "driver")
    if driver not in ("", "usb"):
        yield Obstacle(
            Reason.KERNEL_DRIVER,
            f"the kernel's driver {driver} has the whole device, and it cannot be detached from here",
            f"usbip unbind --busid {found.port}" if driver == "usbip-host" else f"unbind it from {driver}",
        )
    locked = _is_locked(found.node)
    if locked or any(interface.driver == "usbfs" for interface in found.interfaces):
        yield busy(found.node, "another farplug" if locked else "another program")
    for disk in uses.disks:
        yield from _disk_obstacles(disk)
    if not found.interfaces and found.warnings:
        yield Obstacle(
            Reason.DEVICE_FAULT, f"its descriptors make no sense: {found.warnings[0]}", "unplug it and plug it in again"
        )


def caution(uses: Uses) -> Obstacle | None:
    """Why somebody may want to keep the device: it is what this machine is used with."""
    if uses.inputs:
        what = " and ".join(dict.fromkeys(uses.inputs))
        return Obstacle(
            Reason.INPUT_DEVICE,
            f"it is a {what} of this machine: while it is plugged in, it works in the VM only",
            "to leave without it: end farplug from another keyboard, over the network, or by pulling it out",
        )
    if uses.networks:
        return Obstacle(
            Reason.NETWORK_DEVICE,
            f"this machine uses its network ({', '.join(uses.networks)}): while it is plugged in, only the VM has it",
            "to leave without that network: end farplug at this machine's own keyboard, or by pulling it out",
        )
    return None


def _node_obstacles(found: Found, root: Path) -> Iterator[Obstacle]:
    usbfs = root / "dev/bus/usb"
    if not os.path.isdir(usbfs):
        yield Obstacle(
            Reason.NO_USB,
            f"there is no {usbfs}: devices cannot be opened here",
            "in a container: start it with --device=/dev/bus/usb (Docker, Podman); else: sudo modprobe usbcore",
        )
    elif _is_missing(found.node):
        yield Obstacle(
            Reason.NO_USB,
            f"there is no {found.node}: it is just leaving, or was plugged in after this container was started",
            "in a container: mount the folder (--volume=/dev/bus/usb:/dev/bus/usb) to have what comes later",
        )
    elif not os.access(found.node, os.R_OK | os.W_OK):
        yield no_permission(found.vendor_id, found.product_id)


def _is_missing(node: Path) -> bool:
    """Whether there is no such file. One in a folder that may not be looked into counts as there."""
    try:
        node.stat()
    except PermissionError:
        return False
    except OSError:
        return True
    return False


def no_permission(vendor_id: int, product_id: int) -> Obstacle:
    """The user, or the container, may not open a kind of device."""
    if os.geteuid() == 0:
        remedy = "in a container, allow it USB devices: --device-cgroup-rule='c 189:* rwm' (Docker, Podman)"
    else:
        rule = udev_rule((vendor_id, product_id))
        remedy = f"{install_commands(rule)}\n(for all devices: sudo farplug doctor --install-udev-rule)"
    return Obstacle(Reason.NO_PERMISSION, "no permission to use it", remedy)


def busy(node: Path, who: str = "another program") -> Obstacle:
    """Somebody else has the device."""
    programs = ", ".join(holders(node))
    remedy = "end that program first"
    if not programs:
        remedy += f": sudo lsof {node} names it"
    return Obstacle(Reason.BUSY, f"{who} uses it{f': {programs}' if programs else ''}", remedy)


def gone(device: object, detail: str = "", remedy: str = "plug it in again") -> DeviceError:
    """A device that was found has left since."""
    message = f"{device} is not there any more{f': {detail}' if detail else ''}"
    return DeviceError(message, reason=Reason.DEVICE_LOST, remedy=remedy)


def _disk_obstacles(folder: Path) -> Iterator[Obstacle]:
    from farplug.store.usage import device_uses  # with stores, which need what Windows lacks

    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", read(folder / "dev"))
    try:
        uses = device_uses(os.makedev(int(match[1]), int(match[2]))) if match else []
    except OSError as error:
        check(error)
        raise
    if uses:
        ends = "\n".join(f"sudo {use.end}" for use in uses if use.end)
        yield Obstacle(
            Reason.IN_USE,
            f"this machine uses the disk: {', '.join(map(str, uses))}",
            f"{ends}\nor plug it in nevertheless, which can damage its file systems: --force".lstrip(),
            forceable=True,
        )


def _is_locked(node: Path) -> bool:
    """Whether a process other than ours has locked a device's node: another farplug, which may not use it yet.

    Source: proc_pid_locks(5).
    """
    try:
        status = node.stat()
    except OSError:
        return False
    file = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    locks = (line.split() for line in read_bytes(LOCKS, MAX_LOCKS).decode(errors="replace").splitlines())
    return any(lock[1:2] == ["FLOCK"] and lock[5:6] == [file] and lock[4] != str(os.getpid()) for lock in locks)


def holders(node: Path) -> list[str]:
    """Programs that have a device open: ``usbredirect (process 123)``. Of other users' programs only root knows."""
    try:
        holding = [
            process
            for process in listed(Path("/proc"))
            if process.name.isdecimal()
            and int(process.name) != os.getpid()
            and any(_link(descriptor) == str(node) for descriptor in listed(process / "fd"))
        ]
        names = [
            (printable(read(process / "comm").strip()) or "a program", process.name)
            for process in holding[:MAX_HOLDERS]
        ]
    except SetupError:  # too many open files: that it is in use is to be told all the same
        return []
    return [f"{name} (process {number})" for name, number in names]


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _link_name(path: Path) -> str:
    return os.path.basename(_link(path))
