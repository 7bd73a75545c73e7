from __future__ import annotations

import logging
from pathlib import Path

import pytest

from farplug.errors import Reason, UsageError
from farplug.spice.vv import MAX_VV_FILE
from farplug.transport.vv_file import delete_vv_file, read_vv_file

TEXT = "[virt-viewer]\ntype=spice\nhost=vmhost\nport=5900\npassword=hush\n"


def test_read_and_delete(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    path = tmp_path / "x.vv"
    path.write_text(TEXT + "delete-this-file=1\n")
    vv = read_vv_file(path)
    assert (vv.password, vv.delete_this_file) == ("hush", True)
    assert path.exists(), "it may not be usable"
    delete_vv_file(path)
    assert not path.exists()
    assert f"{path} deleted" in caplog.text
    assert "hush" not in caplog.text


def test_a_file_that_cannot_be_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.vv"
    path.write_text(TEXT + "delete-this-file=1\n")

    def refuse(self: Path) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refuse)
    delete_vv_file(path)
    assert "cannot be deleted (delete-this-file=1): read-only file system" in caplog.text


def test_what_is_ignored_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "x.vv"
    path.write_text(TEXT + "tls-port=None\nsecure-channels=man\n")
    assert read_vv_file(path).port == 5900
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert f"{path}, line 6: tls-port=None" in caplog.text
    assert f"{path}, line 7: secure-channels has unknown channels ('man')" in caplog.text


def test_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = tmp_path / "large.vv"
    with large.open("wb") as file:
        file.truncate(MAX_VV_FILE + 1)
    for path, expected_text in [
        (tmp_path, "is not a file"),
        (tmp_path / "absent", "does not exist"),
        (large, "larger than"),
    ]:
        with pytest.raises(UsageError, match=expected_text) as caught:
            read_vv_file(path)
        assert caught.value.reason is Reason.BAD_VV_FILE

    def refuse(self: Path, mode: str) -> None:
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UsageError, match="cannot be read: permission denied"):
        read_vv_file(large)
