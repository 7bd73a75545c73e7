from __future__ import annotations

from pathlib import Path

import pytest

from farplug.errors import Reason, SetupError
from farplug.exit_codes import ExitCode, exit_code
from farplug.machine import udev

RULE = udev.udev_rule((0x1050, 0x0407))


@pytest.fixture
def udevadm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A udevadm that records its calls, and fails if there is a file called "broken"; the folder of both."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "udevadm"
    script.write_text(
        f'#!/bin/sh\necho "$@" >> {folder}/calls\n[ ! -e {folder}/broken ] || {{ echo no udev >&2; exit 2; }}\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr("farplug.programs.search_path", lambda: str(folder))
    return folder


def test_for_all_devices_and_for_one() -> None:
    assert udev.udev_rule().startswith('SUBSYSTEM=="usb", ENV{DEVTYPE}=="usb_device", ')
    assert "idVendor" not in udev.udev_rule()
    assert 'ATTR{idVendor}=="1050", ATTR{idProduct}=="0407"' in RULE


@pytest.mark.parametrize(
    ("group", "rule", "users"),
    [
        (
            46,
            'MODE="0660", GROUP="plugdev", TAG+="uaccess"',
            "and for the group plugdev: sudo usermod -aG plugdev USER",
        ),
        (
            None,
            '"usb_device", TAG+="uaccess"',
            "over the network: sudo groupadd --system plugdev, then install the rule",
        ),
    ],
)
def test_permitted_users(monkeypatch: pytest.MonkeyPatch, group: int | None, rule: str, users: str) -> None:
    monkeypatch.setattr(udev, "_group", lambda: group)
    assert rule in udev.udev_rule()
    assert users in udev.permitted_users()
    assert (users in udev.install_commands(udev.udev_rule())) == (group is None)


def test_install(tmp_path: Path, udevadm: Path) -> None:
    for rule in (RULE, udev.udev_rule(), RULE):
        path = udev.install(rule, tmp_path)
    assert path == tmp_path / "etc/udev/rules.d/70-farplug.rules"
    assert path.read_text() == f"{RULE}\n{udev.udev_rule()}\n"
    calls = (udevadm / "calls").read_text().splitlines()
    assert calls == ["control --reload", "trigger --settle --subsystem-match=usb --action=change"] * 3


def test_other_rules_stay(tmp_path: Path, udevadm: Path) -> None:
    path = tmp_path / udev.RULES
    path.parent.mkdir(parents=True)
    path.write_text("# mine\nSUBSYSTEM==...")
    udev.install(RULE, tmp_path)
    assert path.read_text() == f"# mine\nSUBSYSTEM==...\n{RULE}\n"


def test_no_permission(tmp_path: Path, udevadm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(SetupError, match="no permission to write") as caught:
        udev.install(RULE, tmp_path)
    assert (caught.value.reason, exit_code(caught.value)) == (Reason.NO_PERMISSION, ExitCode.SETUP)
    assert caught.value.remedy.command.startswith(f"echo '{RULE}' | sudo tee -a /etc/udev/rules.d/70-farplug.rules\n")


@pytest.mark.parametrize(("content", "message"), [(None, "Is a directory"), (b"\xff", "it is not text in UTF-8")])
def test_a_file_that_cannot_be_used(tmp_path: Path, udevadm: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / udev.RULES
    path.parent.mkdir(parents=True)
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(SetupError, match=f"cannot write .*: {message}") as caught:
        udev.install(RULE, tmp_path)
    assert caught.value.reason is Reason.IO_ERROR


def test_udev_does_not_answer(tmp_path: Path, udevadm: Path) -> None:
    (udevadm / "broken").touch()
    with pytest.raises(SetupError, match="udevadm control failed: no udev") as caught:
        udev.install(RULE, tmp_path)
    assert "70-farplug.rules was written" in caught.value.remedy


def test_udev_hangs(tmp_path: Path, udevadm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(udev, "UDEV_TIMEOUT", 0.2)
    (udevadm / "udevadm").write_text("#!/bin/sh\nkill -STOP $$\n")
    with pytest.raises(SetupError, match=r"udevadm control failed: no answer within 0\.2 s") as caught:
        udev.install(RULE, tmp_path)
    assert "70-farplug.rules was written" in caught.value.remedy


def test_no_udev(tmp_path: Path, udevadm: Path) -> None:
    (udevadm / "udevadm").unlink()
    with pytest.raises(SetupError, match="the program udevadm is not installed") as caught:
        udev.install(RULE, tmp_path)
    assert caught.value.remedy == "install udevadm"
