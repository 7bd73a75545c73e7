"""``farplug connect`` with devices of this machine: what is refused, and a session from end to end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
from tests.cli.support import Cli, FakeGuest, in_thread, interrupt
from tests.machine.trees import Machine
from tests.machine.windows import windows_machine

from farplug.app import auto
from farplug.app.attachment import Place
from farplug.app.settings import Source
from farplug.errors import DeviceError, Reason
from farplug.machine import hotplug
from farplug.machine.hotplug import Watch
from farplug.store import MemoryStore
from farplug.usb.device import Device
from farplug.usbredir import packets
from farplug.virtual.disk import disk_device

NOWHERE = "tcp://127.0.0.1:1"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """This machine; its devices are disks in memory."""
    machine = Machine(tmp_path / "machine")
    monkeypatch.setattr(hotplug, "INTERVAL", 0.02)
    monkeypatch.setattr(hotplug, "PAUSE", 0.01)
    monkeypatch.setattr(auto, "Watch", partial(Watch, machine.root))
    monkeypatch.setattr(auto, "find_device", lambda bus, address, **names: disk_device(MemoryStore(1 << 20)))
    return machine


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--usb-device", ""], 2, "an empty text cannot name a USB device"),
        (["--usb-device", "1050:"], 2, "'1050:' is not a valid VID:PID"),
        (["--usb-device", "port:x"], 2, "'port:x' is not a valid port"),
        (["--usb-device", "1-1", "--filter", "permit"], 2, "begins with 'allow' or 'deny'"),
        (["--usb-device", "1-1", "--filter", "1,2,3"], 2, "has 3 fields, not 5"),
        (["--auto-connect", "deny class=hid"], 2, "filter rules allow no device"),
        (["--redirect-on-connect", ""], 2, "filter rules are empty"),
        (["--auto-connect", "allow", "--wait"], 2, "--wait has no effect without --usb-device"),
        (["--usb-disk", "x", "--wait"], 2, "--wait has no effect without --usb-device"),
        (["--usb-disk", "x", "--follow", "port"], 2, "--follow has no effect without --usb-device, --auto-connect"),
        (["--usb-disk", "x", "--filter", "allow"], 2, "--filter has no effect without --usb-device, --auto-connect"),
        (["--usb-device", "1-1", "--follow", "me"], 2, "'me' is not one of 'device', 'port'"),
        (["--usb-device", "dead:beef"], 12, "no USB device matches 'dead:beef'"),
        (["--usb-device", "1209:0001"], 2, "2 USB devices match '1209:0001'"),
        (["--usb-device", "port:1-4"], 12, "cannot be plugged in: it is a USB hub"),
        (["--usb-device", "port:1-5"], 12, "cannot be plugged in: this machine does not authorize it"),
        (["--usb-device", "port:1-6"], 12, "cannot be plugged in: another program uses it"),
        (["--usb-device", "port:1-1", "--usb-device", "address:1-11"], 2, "name the same device"),
        (
            ["--usb-device", "port:1-1", "--filter", "deny class=storage; allow"],
            12,
            "the filter of this machine does not allow it: rule 1 (deny class=storage) denies its class storage (08)",
        ),
    ],
)
def test_refusals(cli: Cli, machine: Machine, arguments: list[str], code: int, said: str) -> None:
    machine.add("1-1", 11)
    machine.add("1-2", 12)
    machine.add("1-4", 14, 0x05E3, 0x0610, ((9, 0, 0),), codes=(9, 0, 1))
    machine.add("1-5", 15, 0x1209, 5, authorized="0")
    machine.add("1-6", 16, 0x1209, 6, drivers=("usbfs",))
    result = cli("connect", NOWHERE, *arguments)
    assert result.code == code
    assert said in result.err
    assert result.err.startswith("farplug: ")


def test_what_was_meant_is_listed(cli: Cli, machine: Machine) -> None:
    machine.add("1-1", 11, 0x1050, 0x0407, product="YubiKey", serial="7")
    result = cli("connect", NOWHERE, "--usb-device", "1050:0408")
    assert result.err.splitlines() == [
        "farplug: no USB device matches '1050:0408'",
        "  these are plugged in:",
        "  1-1  bus 1 address 11  1050:0407  YubiKey  serial:7",
        "  to wait until the device is plugged in: --wait",
    ]


def test_no_usb(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(auto, "Watch", partial(Watch, tmp_path))
    result = cli("connect", NOWHERE, "--usb-device", "1-1", "--json")
    assert result.code == 11
    assert "this machine has no USB" in result.err
    assert json.loads(result.out.splitlines()[-1])["reason"] == "no-usb"


def test_a_device_that_cannot_be_chosen_costs_no_ticket(cli: Cli, machine: Machine, tmp_path: Path) -> None:
    vv = tmp_path / "vm.vv"
    vv.write_text("[virt-viewer]\ntype=spice\nhost=127.0.0.1\nport=1\npassword=once\ndelete-this-file=1\n")
    assert cli("connect", vv, "--usb-device", "1-1").code == 12
    assert vv.exists()


@pytest.mark.parametrize(("leaves", "reason"), [(True, "device-lost"), (False, "device-fault")])
def test_a_device_that_libusb_does_not_know(
    cli: Cli, machine: Machine, monkeypatch: pytest.MonkeyPatch, leaves: bool, reason: str
) -> None:
    """It disappeared between list and open, or its descriptors make no sense to libusb."""

    def gone(bus: int, address: int, **names: str) -> Device:
        if leaves:  # the departure itself is reported later
            raise DeviceError(f"there is no USB device {bus}-{address}", reason=Reason.DEVICE_LOST)
        raise DeviceError(f"libusb cannot read the descriptors of {bus}-{address}", reason=Reason.DEVICE_FAULT)

    monkeypatch.setattr(auto, "find_device", gone)
    machine.add("1-1", 11)
    with in_thread(FakeGuest().listening) as target:
        result = cli("connect", target, "--usb-device", "1-1", "--json")
    assert result.code == 12
    assert json.loads(result.out.splitlines()[-1])["reason"] == reason


def run(cli: Cli, guest: FakeGuest, *arguments: object) -> list[dict[str, object]]:
    """A session that ends well; its events."""
    with in_thread(guest.listening) as target:
        result = cli("connect", target, "--json", *arguments)
    assert (result.code, result.err) == (0, "")
    return [json.loads(line) for line in result.out.splitlines()]


def test_a_session(cli: Cli, machine: Machine) -> None:
    machine.add("1-1", 11, product="Stick")
    lines = run(cli, FakeGuest(), "--usb-device", "stick")
    names = [line["event"] for line in lines if line.get("device") == "Stick"]
    assert [name for name in names if name != "figures"] == [
        *("attaching", "opened", "guest-ready", "attached", "configured", "detached", "removed")
    ]


@pytest.mark.parametrize(
    ("arguments", "first"),
    [
        (["--usb-device", "1209:0001", "--wait"], "waiting for 1209:0001 to be plugged in"),
        (["--auto-connect", "allow"], "what is plugged in from now on goes into the VM if the rules allow it"),
    ],
)
def test_one_that_comes_later(
    cli: Cli, machine: Machine, monkeypatch: pytest.MonkeyPatch, arguments: list[str], first: str
) -> None:
    keep = auto.AutoPlugger.run

    async def plug_and_keep(self: auto.AutoPlugger, hub: auto.Plugger, places: Sequence[Place]) -> NoReturn:
        machine.add("1-2", 12)
        await keep(self, hub, places)

    monkeypatch.setattr(auto.AutoPlugger, "run", plug_and_keep)
    lines = run(cli, FakeGuest(), *arguments)
    notes = [line["message"] for line in lines if line["event"] == "note"]
    assert notes[:2] == [first, "1209:0001 (port 1-2) was plugged in: it goes into the VM"]
    assert "attached" in [line["event"] for line in lines]


def test_pulled_out_and_plugged_in_again(cli: Cli, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "REMOVAL_TIMEOUT", 0.05)
    machine.add("1-1", 11)

    def plugged_again() -> None:
        machine.remove("1-1")
        machine.add("1-1", 12)

    steps = [plugged_again, interrupt]
    guest = FakeGuest(lambda: steps.pop(0)())
    lines = run(cli, guest, "--usb-device", "1-1")
    assert [line["event"] for line in lines].count("attached") == 2
    assert any(isinstance(packet, packets.DeviceDisconnect) for packet in guest.seen)
    assert [line["message"] for line in lines if line["event"] == "note"][:2] == [
        "1209:0001 (port 1-1) was pulled out; when it comes back it goes into the VM again",
        "1209:0001 (port 1-1) is back: it goes into the VM",
    ]


def test_the_guests_filter_with_the_rule_that_decided(cli: Cli, machine: Machine) -> None:
    machine.add("1-1", 11)
    guest = FakeGuest(filter="0x03,-1,-1,-1,1|0x08,-1,-1,-1,0|-1,-1,-1,-1,1")
    with in_thread(guest.listening) as target:
        result = cli("connect", target, "--usb-device", "1-1")
    assert result.code == 8
    assert "rule 2 (deny class=storage) denies its class storage (08)" in result.err


def test_more_named_devices_than_ports(cli: Cli, machine: Machine, image: Path) -> None:
    machine.add("1-1", 11)
    with in_thread(FakeGuest().listening) as target:
        result = cli("connect", target, "--usb-device", "1-1", "--usb-disk", image)
    assert result.code == 7
    assert "2 devices, but the VM has 1 port for them" in result.err


@pytest.mark.parametrize("as_json", [True, False])
def test_devices_that_rules_do_not_take(cli: Cli, machine: Machine, as_json: bool) -> None:
    machine.keyboard("1-1", 11)
    machine.add("1-2", 12)
    with in_thread(FakeGuest().listening) as target:
        result = cli("connect", target, "--redirect-on-connect", "allow", *(["--json"] if as_json else []))
    assert result.code == 0
    if as_json:
        skipped = [line for line in map(json.loads, result.out.splitlines()) if line["event"] == "skipped"]
        assert [line["reason"] for line in skipped] == ["input-device"]
    assert "046d:c31c (port 1-1) is left alone: it is a keyboard of this machine" in result.out
    if as_json:
        assert (skipped[0]["setting"], skipped[0]["value"]) == ("usb_device", "port:1-1")
    else:
        assert "or name the device: --usb-device port:1-1" in result.out


def test_on_windows_it_does_not_run(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    windows_machine(monkeypatch)
    result = cli("connect", NOWHERE, "--usb-device", "1234:0003")
    assert result.code == 11
    assert result.err == "farplug: farplug connect does not run on Windows\n"


def test_order_of_sources(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("farplug.cli.session_verbs.attach", lambda session, devices, **_: seen.append(devices.sources))
    result = cli("attach", "--usb-tablet", "--usb-cdrom", "x.iso", "--usb-keyboard", "--usb-keyboard")
    assert (result.code, result.err) == (0, "")
    assert seen == [(Source.tablet(), Source.cdrom("x.iso"), Source.keyboard(), Source.keyboard())]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--usb-serial", "-", "--detach"), "--detach and --usb-serial - contradict each other"),
        (("--usb-serial", "-", "--commands"), "--commands and --usb-serial - contradict each other"),
        (("--usb-serial", "-", "--capture", "-"), "--capture - and --usb-serial - contradict each other"),
        (("--usb-serial", "-", "--usb-serial", "-"), "two serial lines cannot have the same standard input"),
        (("--usb-serial", "tty"), "'tty' is not a valid end: write it as pty, pty:LINK, -"),
        (("--usb-network", "slirp"), "'slirp' is not a valid end: write it as passt"),
        (("--usb-network", "passt", "--network-mac", "1"), "'1' is not a valid MAC address"),
        (("--usb-network", "passt", "--network-mac", "01:00:00:00:00:00"), "is the MAC address of a group"),
        (("--network-mac", "020000000001"), "--network-mac has no effect without a --usb-network of its own"),
    ],
)
def test_ends_that_are_refused(cli: Cli, arguments: tuple[str, ...], message: str) -> None:
    result = cli("connect", NOWHERE, *arguments)
    assert result.code == 2
    assert message in result.err


def test_order_of_ends(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("farplug.cli.session_verbs.attach", lambda session, devices, **_: seen.append(devices.sources))
    options = (
        "--usb-network",
        "passt",
        "--usb-serial",
        "pty",
        "--usb-network",
        "tap:t",
        "--network-mac",
        "020000000001",
    )
    assert cli("attach", *options).code == 0
    assert seen == [(Source.network("passt", mac="020000000001"), Source.serial("pty"), Source.network("tap:t"))]
