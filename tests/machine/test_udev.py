from __future__ import annotations

import errno
import os
import resource
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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
    path.write_bytes("# mine\r\n# U+2028: \u2028, VT: \x0b\nSUBSYSTEM==...".encode())
    path.chmod(0o640)
    os.chown(path, os.getuid(), 54321) if not os.getuid() else None
    before = path.stat()
    udev.install(RULE, tmp_path)
    assert path.read_bytes().decode() == f"# mine\r\n# U+2028: \u2028, VT: \x0b\nSUBSYSTEM==...\n{RULE}\n"
    after = path.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)


def test_a_new_file_can_be_read_by_all(tmp_path: Path, udevadm: Path) -> None:
    assert stat.S_IMODE(udev.install(RULE, tmp_path).stat().st_mode) == 0o644


def test_a_link_stays_a_link(tmp_path: Path, udevadm: Path) -> None:
    path = tmp_path / udev.RULES
    path.parent.mkdir(parents=True)
    (tmp_path / "elsewhere").write_text("# mine\n")
    path.symlink_to(tmp_path / "elsewhere")
    udev.install(RULE, tmp_path)
    assert path.is_symlink()
    assert (tmp_path / "elsewhere").read_text() == f"# mine\n{RULE}\n"


@contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process can have more than 100 bytes, the output of pytest included."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("failing", ["write", "fsync", "replace", "chmod"])
def test_a_failure_leaves_the_rules_as_they_are(
    tmp_path: Path, udevadm: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / udev.RULES
    path.parent.mkdir(parents=True)
    path.write_text(rules := "# mine\n" * 50)

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    if failing != "write":
        monkeypatch.setattr(os, failing, fail)
    with (
        pytest.raises(SetupError, match="cannot write") as caught,
        full_disk() if failing == "write" else nullcontext(),
    ):
        udev.install(RULE, tmp_path)
    assert caught.value.reason is Reason.IO_ERROR
    assert path.read_text() == rules
    assert list(path.parent.iterdir()) == [path]
    assert not (udevadm / "calls").exists()


def test_no_permission(tmp_path: Path, udevadm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "replace", refuse)
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
