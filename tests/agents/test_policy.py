"""What an agent may do: folders, links out of them, secrets; and the records of what it did."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from farplug.agents.audit import Audit
from farplug.agents.policy import MAX_LISTED, Folders, Policy, read_secrets
from farplug.errors import FarplugError, Reason, SetupError, UsageError


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "allowed/sub").mkdir(parents=True)
    (tmp_path / "allowed/a.iso").write_bytes(b"iso")
    (tmp_path / "allowed-too").mkdir()
    (tmp_path / "allowed-too/b.raw").write_bytes(b"raw")
    (tmp_path / "secret.raw").write_bytes(b"secret")
    (tmp_path / "allowed/out.raw").symlink_to(tmp_path / "secret.raw")
    (tmp_path / "allowed/up").symlink_to(tmp_path)
    (tmp_path / "allowed/in.iso").symlink_to(tmp_path / "allowed/a.iso")
    (tmp_path / "allowed/loop").symlink_to("loop")
    (tmp_path / "allowed/.hidden").write_bytes(b"")
    os.mkfifo(tmp_path / "allowed/pipe")
    return tmp_path


def reason(folders: Folders, path: str) -> Reason:
    with pytest.raises(UsageError) as error:
        folders.existing(path)
    assert "secret" not in str(error.value.remedy)
    return error.value.reason


def test_paths_below_the_folders(tree: Path) -> None:
    allowed = tree / "allowed"
    folders = Folders.of([allowed, tree / "allowed-too"])
    for path in ("a.iso", str(allowed / "a.iso"), "sub/../a.iso", "in.iso"):
        assert folders.existing(path) == str(allowed / "a.iso")
    assert folders.existing("b.raw") == str(tree / "allowed-too/b.raw")
    assert folders.existing("sub") == str(allowed / "sub")
    assert [Path(one["path"]).name for one in folders.listing()] == ["a.iso", "in.iso", "sub", "b.raw"]


@pytest.mark.parametrize(
    "path",
    [
        "../secret.raw",
        "out.raw",
        "up/secret.raw",
        "up/no-such-file",
        "/etc/passwd",
        "/no/such/file",
        "sub/../../secret.raw",
        "../allowed-too/b.raw",
    ],
)
def test_paths_out_of_the_folder_are_refused_without_a_hint_whether_they_exist(tree: Path, path: str) -> None:
    assert reason(Folders.of([tree / "allowed"]), path) is Reason.NOT_ALLOWED


def test_other_paths(tree: Path) -> None:
    folders = Folders.of([tree / "allowed"])
    for path in ("no-such-file", str(tree / "allowed/none"), "", "a\0b", "x" * 5000, "\ud800", "loop"):
        assert reason(folders, path) is Reason.NOT_FOUND, path
    assert reason(folders, "pipe") is Reason.NOT_A_FILE
    assert reason(Folders(), "a.iso") is Reason.NOT_ALLOWED
    for wrong in (tree / "none", tree / "secret.raw"):
        with pytest.raises(UsageError):
            Folders.of([wrong])


def test_a_listing_is_bounded(tmp_path: Path) -> None:
    for number in range(MAX_LISTED + 5):
        (tmp_path / f"{number}.iso").touch()
    assert len(Folders.of([tmp_path]).listing()) == MAX_LISTED


def test_what_must_be_allowed() -> None:
    for kind, writable, expected in (
        ("disk", True, Reason.NOT_ALLOWED),
        ("usb-device", False, Reason.NOT_ALLOWED),
        ("cdrom", True, Reason.BAD_SETTING),
    ):
        with pytest.raises(UsageError) as error:
            Policy().check_source(kind, writable=writable)
        assert error.value.reason is expected
    for kind in ("disk", "cdrom", "folder", "keyboard"):
        Policy().check_source(kind, writable=False)
    everything = Policy(allow_write=True, allow_devices=True)
    everything.check_source("disk", writable=True)
    everything.check_source("usb-device", writable=False)


def test_secrets(tmp_path: Path) -> None:
    file = tmp_path / "secrets"
    file.touch(mode=0o600)
    file.write_text("# of the lab\n\nroot=pass=word \nVPN.2=ü\n")
    secrets = read_secrets(file)
    assert secrets == {"root": "pass=word ", "VPN.2": "ü"}
    policy = Policy(secrets=secrets)
    assert policy.secret("root") == "pass=word "
    assert "pass" not in repr(policy)
    with pytest.raises(UsageError, match="there is no secret 'admin'") as error:
        policy.secret("admin")
    assert error.value.remedy == "secrets: VPN.2, root"


@pytest.mark.parametrize("data", [b"hunter2", b"a b=x", b"a=", b"a=1\na=2", b"\xff=1", b"a=" + b"x" * (1 << 17)])
def test_a_file_that_has_no_secrets_is_not_quoted(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "secrets"
    file.touch(mode=0o600)
    file.write_bytes(data)
    with pytest.raises(UsageError) as error:
        read_secrets(file)
    assert "hunter2" not in error.value.message
    assert error.value.reason in (Reason.WRONG_FORMAT, Reason.TOO_LARGE)


def test_secrets_that_others_may_read_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "secrets"
    file.write_text("a=b")
    file.chmod(0o640)
    with pytest.raises(SetupError, match="may be read by other users") as error:
        read_secrets(file)
    assert error.value.remedy.command == f"chmod 600 {file}"
    with pytest.raises(FarplugError, match="no such file"):
        read_secrets(tmp_path / "none")


def test_records_are_bounded_and_private(tmp_path: Path) -> None:
    file = tmp_path / "audit"
    with Audit(file) as audit:
        deep: dict[str, object] = {}
        for _ in range(100):
            deep = {"x": deep}
        hostile = {"text": "x" * 100_000, "n": 1 << 5000, "f": float("nan"), "deep": deep, "l": list(range(1000))}
        call = audit.begin("key", {**hostile, "surrogate": "\ud800\n"})
        audit.end(call, "refused", "y" * 100_000)
    assert file.stat().st_mode & 0o777 == 0o600
    begin, end = map(json.loads, file.read_text().splitlines())
    assert (begin["call"], begin["event"], begin["tool"]) == (1, "begin", "key")
    assert (end["call"], end["outcome"]) == (1, "refused")
    assert file.stat().st_size < 20_000
    with Audit(file) as audit:  # it is appended to
        audit.begin("wait", {})
    assert len(file.read_text().splitlines()) == 3
    with pytest.raises(SetupError):
        Audit(tmp_path / "none/audit")


def test_a_record_that_cannot_be_written() -> None:
    with Audit("/dev/full") as audit, pytest.raises(SetupError, match="cannot be written: no space left") as error:
        audit.begin("key", {})
    assert error.value.reason is Reason.NO_SPACE
    with Audit(None) as audit:
        audit.end(audit.begin("key", {}), "done")
