from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from tests.cli.support import Cli, FakeGuest, in_thread, saying
from tests.machine.trees import Machine
from tests.transport.fake_spice import Channel, FakeSpice, running

from farplug.app import checks, requirements
from farplug.cli import doctor
from farplug.errors import Reason, SetupError
from farplug.libusb import library
from farplug.machine import listing, udev


def test_this_machine(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    result = cli("doctor")
    assert (result.code, result.err) == (0, "")
    assert "  ok      cryptography" in result.out
    monkeypatch.setattr(requirements.Need, "found", lambda need: "" if need.package in ("mtools", "zstd") else "/x")
    result = cli("doctor")
    assert result.code == 0, "connect needs none of them"
    assert "  -       mcopy               not installed: files in and out of images" in result.out
    assert "  -       to install          sudo apt-get install mtools\n" in result.out
    assert "  -       throw-away VM       not installed: mcopy, zstd (for exFAT, NTFS and farplug demo)" in result.out
    assert "          install it:\n            sudo apt-get install mtools zstd\n" in result.out
    assert "setpriv" not in result.out
    assert "usbredirparser" not in result.out
    result = cli("doctor", "--all")
    assert "  ok      usbredirparser" in result.out
    assert "  -       zstd                not installed: unpacks the VM's kernel" in result.out
    monkeypatch.setattr(requirements.Need, "found", lambda need: "/x")
    assert "  ok      throw-away VM       for exFAT, NTFS and farplug demo\n" in cli("doctor").out
    monkeypatch.setattr(doctor, "LIBRARIES", ("rich", "no-such-library"))
    result = cli("doctor")
    assert result.code == 11
    assert "MISSING no-such-library     not installed" in result.out
    assert "-m pip install no-such-library" in result.out


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """This machine."""
    machine = Machine(tmp_path / "machine")
    monkeypatch.setattr(listing, "list_devices", partial(listing.list_devices, machine.root))
    return machine


def _usb_lines(out: str) -> list[str]:
    part = out.split("USB devices of this machine (farplug connect --usb-device)\n")[1]
    return part.split("\n\n")[0].splitlines()


def test_usb_devices(cli: Cli, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.add("usb1", 1, 0x1D6B, 2, ((9, 0, 0),), codes=(9, 0, 1))
    machine.add("1-1", 2)
    machine.add("1-2", 3, authorized="0")
    result = cli("doctor")
    assert (result.code, result.err) == (0, "")
    libusb, found = _usb_lines(result.out)
    assert libusb.startswith("  ok      libusb              with python-libusb1 3")
    assert found == "  ok      devices             2, of which 1 can be plugged in: see 'farplug devices'"
    monkeypatch.setattr("os.access", lambda path, mode: False)
    lines = _usb_lines(cli("doctor").out)
    assert lines[1].startswith("  ok      devices             2, of which 0 can")
    assert lines[2] == "  -       permission          missing for 2 of them: 1-1, 1-2"
    assert lines[3] == "          run these commands, or 'farplug doctor --install-udev-rule' as root:"
    assert lines[4].startswith('            echo \'SUBSYSTEM=="usb", ENV{DEVTYPE}=="usb_device", ')


def test_json(cli: Cli, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.add("1-1", 2)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    monkeypatch.setattr(udev, "install", lambda rule: Path("/etc/udev/rules.d/70-farplug.rules"))
    result = cli("doctor", "--json", "--install-udev-rule")
    assert (result.code, result.err) == (0, "")
    lines = [json.loads(line) for line in result.out.splitlines()]
    assert lines[0]["message"] == "/etc/udev/rules.d/70-farplug.rules:"
    checks = {line["name"]: line for line in lines if line["event"] == "check"}
    assert {line["section"] for line in checks.values()} == {"connect", "usb", "images"}
    assert checks["farplug"]["status"] == "ok"
    assert checks["permission"]["status"] == "note"
    assert "--install-udev-rule" in checks["permission"]["remedy"]
    assert checks["permission"]["command"] == udev.install_commands(udev.udev_rule())
    monkeypatch.setattr(doctor, "LIBRARIES", ("no-such-library",))
    result = cli("doctor", "--json")
    checks = {line["name"]: line for line in map(json.loads, result.out.splitlines())}
    assert result.code == 11
    assert checks["no-such-library"]["status"] == "missing"
    assert checks["no-such-library"]["command"].endswith("-m pip install no-such-library")


def test_no_usb(cli: Cli, machine: Machine) -> None:
    machine.devices.rmdir()
    result = cli("doctor")
    assert result.code == 0, "images can be plugged"
    assert "  -       devices             this machine has no USB: " in result.out


def test_no_libusb(cli: Cli, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise SetupError("libusb-1.0 cannot be loaded", reason=Reason.NO_LIBUSB, remedy="install it")

    monkeypatch.setattr(library, "Library", missing)
    result = cli("doctor")
    assert result.code == 11
    assert _usb_lines(result.out)[:2] == [
        "  MISSING libusb              libusb-1.0 cannot be loaded",
        "          install it",
    ]


def test_install_the_udev_rule(cli: Cli, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(udev, "install", lambda rule: Path("/etc/udev/rules.d/70-farplug.rules"))
    result = cli("doctor", "--install-udev-rule")
    assert result.code == 0
    path, rule, users = result.out.splitlines()[:3]
    assert (path, rule) == ("/etc/udev/rules.d/70-farplug.rules:", f"  {udev.udev_rule()}")
    assert users.startswith("  for the user at this machine's screen")

    def refuse(rule: str) -> Path:
        raise SetupError("no permission", reason=Reason.NO_PERMISSION, remedy=udev.install_commands(rule))

    monkeypatch.setattr(udev, "install", refuse)
    result = cli("doctor", "--install-udev-rule")
    assert result.code == 11
    assert "sudo tee -a /etc/udev/rules.d/70-farplug.rules" in result.err


def test_a_spice_target(cli: Cli) -> None:
    with in_thread(lambda: running(FakeSpice(usbredir=FakeGuest().behave, vmc_caps=0))) as port:
        result = cli("doctor", f"spice://127.0.0.1:{port}")
    assert (result.code, result.err) == (0, "")
    where = f"127.0.0.1:{port}"
    assert result.out.split("the target\n")[1].splitlines() == [
        f"  ok      reach               {where}",
        f"  ok      ticket              {where}",
        f"  ok      channels            {where}",
        "  ok      VM                  testvm 00010203-0405-0607-0809-0a0b0c0d0e0f",
        "  ok      usbredir channels   2 (up to 2 devices)",
        "  ok      usbredir 0          ready: farplug 0.1.0",
        "  ok      usbredir 1          ready: farplug 0.1.0",
    ]


async def _in_use(channel: Channel) -> None:
    await channel.close()


@pytest.mark.parametrize(
    ("fake", "code", "said", "remedy"),
    [
        (FakeSpice(password="sesame"), 6, "FAILED  ticket ", "give one: --password-file FILE"),
        (FakeSpice(channels=()), 7, "FAILED  usbredir channels   none", "<redirdev bus='usb' type='spicevmc'/>"),
        (FakeSpice(usbredir=_in_use), 7, "FAILED  usbredir 0", "add a usbredir channel"),
        (FakeSpice(greeting=b"HTTP/1.1 400 No\r\n\r\n"), 10, "FAILED  ticket ", "an HTTP server"),
    ],
)
def test_the_stage_that_failed(cli: Cli, fake: FakeSpice, code: int, said: str, remedy: str) -> None:
    with in_thread(lambda: running(fake)) as port:
        result = cli("doctor", f"spice://127.0.0.1:{port}")
    assert said in result.out
    assert remedy in result.err
    assert result.code == code


def test_plain_sockets(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    with in_thread(FakeGuest().listening) as target:
        result = cli("doctor", target)
        assert result.code == 0
        assert "ok      tcp                 ready: farplug" in result.out
    result = cli("doctor", "tcp://127.0.0.1:1")
    assert (result.code, "FAILED  reach               127.0.0.1:1" in result.out) == (4, True)
    result = cli("doctor", "tcp-listen://127.0.0.1:4000")
    assert (result.code, "QEMU connects to 127.0.0.1:4000" in result.out) == (0, True)
    result = cli("doctor", "usbip-listen://127.0.0.1:4000")
    assert (result.code, "run 'farplug serve --listen 127.0.0.1:4000'" in result.out) == (0, True)
    monkeypatch.setattr(checks, "HELLO_SECONDS", 0.2)
    with in_thread(FakeGuest(silent=True).listening) as target:
        result = cli("doctor", target)
        assert result.code == 13
        assert "  PAUSED  tcp                 no answer within 0.2 s: the VM is paused" in result.out
        assert result.err.startswith(
            "farplug: the VM does not answer: it is paused, or the port serves another client\n"
        )
        lines = [json.loads(line) for line in cli("doctor", target, "--json").out.splitlines()]
        assert [(line["name"], line["status"]) for line in lines if line.get("section") == "target"] == [
            ("reach", "ok"),
            ("tcp", "paused"),
        ]
        assert (lines[-1]["event"], lines[-1]["reason"], lines[-1]["exit_code"]) == ("failed", "paused", 13)
    with in_thread(lambda: saying(b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(99))) as port:
        monkeypatch.setattr(checks, "HELLO_SECONDS", 5.0)
        result = cli("doctor", f"tcp://127.0.0.1:{port}")
        assert (result.code, "FAILED  tcp" in result.out) == (10, True)


def test_bad_targets(cli: Cli, tmp_path: Path) -> None:
    for target in ("nonsense", tmp_path / "none.vv"):
        result = cli("doctor", target)
        assert (result.code, result.out) == (2, ""), "no check hides the error"


def test_a_vv_file_is_kept_for_connect(cli: Cli, image: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.vv"
    path.write_text("[virt-viewer]\ntype=spice\nhost=127.0.0.1\nport=1\ndelete-this-file=1\n")
    assert cli("doctor", path).code == 4
    assert path.exists()
    assert cli("connect", path, "--usb-disk", image).code == 4
    assert not path.exists()
