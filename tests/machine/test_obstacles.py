"""Each reason why a device cannot be plugged in: message, remedy, exit code."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.machine.trees import BOOT_KEYBOARD, HID, STORAGE, Machine

from farplug.errors import DeviceError, Reason, SetupError
from farplug.exit_codes import ExitCode, exit_code
from farplug.machine import obstacles
from farplug.machine.device_info import DeviceInfo, Obstacle
from farplug.machine.listing import list_devices
from farplug.store import usage


def only(machine: Machine) -> DeviceInfo:
    (device,) = list_devices(machine.root)
    return device


def _authorized(machine: Machine) -> None:
    machine.add("1-1", 2, authorized="0")


def _hub(machine: Machine) -> None:
    machine.add("1-1", 2, 1, 2, ((9, 0, 0),), codes=(9, 0, 1), drivers=("hub",), node=False)


def _no_usbfs(machine: Machine) -> None:
    machine.add("1-1", 2, node=False)
    (machine.root / "dev/bus/usb").rmdir()


def _usbip(machine: Machine) -> None:
    machine.link(machine.add("1-1", 2) / "driver", "usbip-host")


@pytest.mark.parametrize(
    ("make", "reason", "message", "remedy"),
    [
        (_hub, Reason.HUB, "it is a USB hub", "plugged into the hub"),
        (lambda m: m.add("1-1", 2, 1, 2, (STORAGE, (9, 0, 0))), Reason.HUB, "it is a USB hub", "plugged into the hub"),
        (_authorized, Reason.NOT_AUTHORIZED, "this machine does not authorize it", "authorized"),
        (_no_usbfs, Reason.NO_USB, "devices cannot be opened here", "--device=/dev/bus/usb"),
        (lambda m: m.add("1-1", 2, node=False), Reason.NO_USB, "bus/usb/001/002: it was just unplugged", "container"),
        (_usbip, Reason.KERNEL_DRIVER, "driver usbip-host is bound to the whole device", "usbip unbind --busid 1-1"),
        (lambda m: m.add("1-1", 2, drivers=("usbfs",)), Reason.BUSY, "another program uses it", "end that program"),
    ],
)
def test_obstacles(
    machine: Machine, make: Callable[[Machine], object], reason: Reason, message: str, remedy: str
) -> None:
    make(machine)
    device = only(machine)
    assert [one.reason for one in device.obstacles] == [reason]
    for force in (False, True):
        with pytest.raises(DeviceError) as caught:
            device.check(force=force)
    error = caught.value
    assert error.message.startswith(f"{device} cannot be plugged in: ")
    assert message in error.message
    assert remedy in f"{error.remedy}\n{error.remedy.command}"
    assert (error.reason, exit_code(error)) == (reason, ExitCode.DEVICE)


def test_another_kernel_driver(machine: Machine) -> None:
    machine.link(machine.add("1-1", 2) / "driver", "apple-mfi-fastcharge")
    obstacle = only(machine).obstacle
    assert obstacle is not None
    assert (str(obstacle).count("apple-mfi-fastcharge"), obstacle.remedy) == (1, "unbind it from apple-mfi-fastcharge")


@pytest.mark.parametrize("group", [True, False])
def test_no_permission(machine: Machine, monkeypatch: pytest.MonkeyPatch, group: bool) -> None:
    def getgrnam(name: str) -> object:
        if not group:
            raise KeyError(name)
        return SimpleNamespace(gr_gid=46)

    machine.add("1-1", 2, 0x1050, 0x0407, drivers=("usbfs",))
    monkeypatch.setattr("grp.getgrnam", getgrnam)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr("os.getgroups", list)
    device = only(machine)
    assert [one.reason for one in device.obstacles] == [Reason.NO_PERMISSION, Reason.BUSY]
    with pytest.raises(DeviceError, match="cannot be plugged in: no permission to use it") as caught:
        device.check()
    assert exit_code(caught.value) == ExitCode.DEVICE
    write, reload, group_line, doctor = caught.value.remedy.command.splitlines()
    assert group_line.startswith('sudo usermod -aG plugdev "$USER"' if group else "# for the user at this machine's")
    monkeypatch.setattr("os.getgroups", lambda: [46])
    assert "usermod" not in only(machine).obstacles[0].remedy.command
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert only(machine).obstacles[0].remedy.startswith("start the container with --device-cgroup-rule=")
    access = 'MODE="0660", GROUP="plugdev", ' if group else ""
    assert write == (
        'echo \'SUBSYSTEM=="usb", ENV{DEVTYPE}=="usb_device", ATTR{idVendor}=="1050", ATTR{idProduct}=="0407", '
        f'{access}TAG+="uaccess"\' | sudo tee -a /etc/udev/rules.d/70-farplug.rules'
    )
    assert reload == (
        "sudo udevadm control --reload && sudo udevadm trigger --settle --subsystem-match=usb --action=change"
    )
    assert "farplug doctor --install-udev-rule" in doctor


def test_a_folder_of_nodes_that_may_not_be_looked_into(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.add("1-1", 2)
    (device,) = list_devices(machine.root)
    stat = os.stat

    def denied(path: Path, **options: Any) -> object:
        if path == device.node:
            raise PermissionError(13, "Permission denied")
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", denied)
    monkeypatch.setattr(os, "access", lambda path, mode: path != device.node)
    device = only(machine)
    assert device.obstacle is not None
    assert device.obstacle.reason is Reason.NO_PERMISSION


def test_the_program_that_uses_it(machine: Machine) -> None:
    machine.add("1-1", 2, drivers=("usbfs",))
    node = machine.root / "dev/bus/usb/001/002"
    child_ready, ready = os.pipe()
    stay, leave = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(leave)
        os.open(node, os.O_RDONLY)
        os.write(ready, b"x")
        os.read(stay, 1)
        os._exit(0)
    try:
        os.read(child_ready, 1)
        assert f"(process {child})" in str(only(machine).obstacle)
    finally:
        for descriptor in (child_ready, ready, stay, leave):
            os.close(descriptor)
        os.waitpid(child, 0)
    assert str(only(machine).obstacle) == "another program uses it"


@pytest.mark.parametrize("text", ["", "1: FLOCK\n\n", "1: POSIX  ADVISORY  WRITE 1 00:05:1 0 EOF\n\xff"])
def test_invalid_locks(machine: Machine, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    locks = machine.root / "locks"
    locks.write_text(text, encoding="latin-1")
    monkeypatch.setattr(obstacles, "LOCKS", locks)
    machine.add("1-1", 2)
    assert only(machine).obstacle is None


def test_this_process_is_not_named(machine: Machine) -> None:
    machine.add("1-1", 2, drivers=("usbfs",))
    with (machine.root / "dev/bus/usb/001/002").open():
        assert str(only(machine).obstacle) == "another program uses it"


@pytest.fixture
def mounted(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A stick whose partition is mounted."""
    folder = machine.disk("1-1", 2)
    disk = folder / "1-1:1.0/host0/target0:0:0/0:0:0:0/block/sda"
    (disk / "sda1").mkdir()
    (disk / "sda1/partition").write_text("1\n")
    (disk / "sda1/dev").write_text("8:1\n")
    numbers = machine.root / "numbers"
    numbers.mkdir()
    (numbers / "8:0").symlink_to(disk)
    mounts = machine.root / "mountinfo"
    mounts.write_text("1 2 8:1 / /media/my\\040stick rw - vfat /dev/sda1 rw\n")
    monkeypatch.setattr(usage, "BLOCK_DEVICES", numbers)
    monkeypatch.setattr(usage, "MOUNTS", mounts)
    monkeypatch.setattr(usage, "SWAPS", machine.root / "swaps")
    return machine


def test_a_disk_that_is_mounted(mounted: Machine) -> None:
    device = only(mounted)
    with pytest.raises(
        DeviceError, match="this machine uses the disk: /dev/sda1 is mounted on /media/my stick"
    ) as caught:
        device.check()
    assert (caught.value.reason, exit_code(caught.value)) == (Reason.IN_USE, ExitCode.DEVICE)
    remedy = caught.value.remedy
    assert remedy.command == "sudo umount '/media/my stick'"
    assert (remedy.setting, remedy.value) == ("rules.force", True)
    device.check(force=True)


def test_force_overrides_no_other_obstacle(mounted: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(DeviceError) as caught:
        only(mounted).check(force=True)
    assert caught.value.reason is Reason.NO_PERMISSION


def test_too_many_open_files_do_not_look_like_a_disk_that_is_not_mounted(
    mounted: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lines(path: Path) -> list[str]:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(usage, "_lines", lines)
    with pytest.raises(SetupError, match="this process has too many open files"):
        only(mounted).check()


def test_a_disk_that_is_not_mounted(mounted: Machine) -> None:
    (mounted.root / "mountinfo").write_text("")
    assert only(mounted).obstacle is None


@pytest.mark.parametrize("number", ["", "x", "8:0:0", "99999999999:0", "-1:0"])
def test_a_disk_without_a_number(machine: Machine, number: str) -> None:
    machine.disk("1-1", 2, number)
    assert only(machine).obstacle is None


def test_keyboard_and_mouse_are_in_use(machine: Machine) -> None:
    machine.keyboard("1-1", 2)
    machine.mouse("1-2", 3)
    keyboard, mouse = list_devices(machine.root)
    assert keyboard.in_use_as is not None
    assert mouse.in_use_as is not None
    assert "it is a keyboard of this machine" in str(keyboard.in_use_as)
    assert "it is a mouse of this machine" in str(mouse.in_use_as)
    assert keyboard.in_use_as.reason is Reason.INPUT_DEVICE
    keyboard.check()


@pytest.mark.parametrize(
    "capabilities",
    [
        {},
        {"key": "zzz", "rel": "3"},
        {"key": "1 " * 2000},
        {"key": "e080ffdf01cfffff"},  # the knobs of a headset
        {"rel": "3"},
        {"key": "10000 0 0 0 0"},
        {"key": "-fffffffffffffffe"},
    ],
)
def test_what_is_neither(machine: Machine, capabilities: dict[str, str]) -> None:
    folder = machine.add("1-1", 2, 1, 2, (BOOT_KEYBOARD,), drivers=("usbhid",))
    machine.input(folder, "1-1:1.0", **capabilities)
    assert only(machine).in_use_as is None


def test_a_tablet_is_a_mouse(machine: Machine) -> None:
    folder = machine.add("1-1", 2, 1, 2, (STORAGE, HID), drivers=("", "usbhid"))
    machine.input(folder, "1-1:1.1", key="70000 0 0 0 0", abs="3")
    assert "a mouse of this machine" in str(only(machine).in_use_as)


def test_a_keyboard_that_no_driver_reads(machine: Machine) -> None:
    machine.add("1-1", 2, 1, 2, (BOOT_KEYBOARD,))
    assert only(machine).in_use_as is None


ROUTES = "Iface Destination Gateway Flags\nusb0 0008090A 00000000 0001\n"
"""10.9.8.0/24, as Linux shows it."""
ROUTES6 = "{} 40 {} 00 {} 00000100 00000001 00000000 00000001     usb0\n"
ALL, NOWHERE = "0" * 32, "0" * 32


@pytest.mark.parametrize(
    ("routes", "routes6", "upper", "is_used"),
    [
        ("", "", "", False),
        (ROUTES, "", "", True),
        (ROUTES.replace("usb0", "usb01"), "", "", False),
        ("", ROUTES6.format(ALL, NOWHERE, NOWHERE), "", True),
        ("", ROUTES6.format("20010db8" + "0" * 24, NOWHERE, NOWHERE), "", True),
        ("", ROUTES6.format("fe80" + "0" * 28, NOWHERE, NOWHERE), "", False),
        ("", ROUTES6.format("ff00" + "0" * 28, NOWHERE, NOWHERE), "", False),
        ("\n\xff usb0\n", "\n\xff\n", "", False),
        ("", "", "upper_br0", True),
    ],
)
def test_a_network_in_use(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, routes: str, routes6: str, upper: str, is_used: bool
) -> None:
    (machine.root / "route").write_text(routes, encoding="latin-1")
    (machine.root / "ipv6_route").write_text(routes6, encoding="latin-1")
    monkeypatch.setattr(obstacles, "ROUTES", machine.root / "route")
    monkeypatch.setattr(obstacles, "ROUTES6", machine.root / "ipv6_route")
    interface = machine.network("1-1", 2, "usb0")
    if upper:
        (interface / upper).symlink_to(interface)
    device = only(machine)
    device.check()
    assert (device.in_use_as is not None) == is_used
    if device.in_use_as is not None:
        assert "this machine uses its network (usb0)" in str(device.in_use_as)
        assert device.in_use_as.reason is Reason.NETWORK_DEVICE


def test_a_network_without_files_of_routes(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(obstacles, "ROUTES", machine.root / "none")
    monkeypatch.setattr(obstacles, "ROUTES6", machine.root / "none")
    machine.network("1-1", 2, "usb0")
    assert only(machine).in_use_as is None


def test_a_tree_that_is_too_large_is_not_searched_to_its_end(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = machine.keyboard("1-1", 2)
    (folder / "1-1:1.0/loop").symlink_to(folder)
    assert only(machine).in_use_as is not None
    monkeypatch.setattr(obstacles, "MAX_FOLDERS", 3)
    assert only(machine).in_use_as is None


def test_texts() -> None:
    obstacle = Obstacle(Reason.HUB, "it is a USB hub")
    device = DeviceInfo(1, 2, "1-1", 1, 2, obstacles=(obstacle,), node=Path("/dev/null"))
    assert (str(obstacle), device.obstacle, str(device)) == ("it is a USB hub", obstacle, "0001:0002 (port 1-1)")
