from __future__ import annotations

import ctypes
import errno
import os
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from farplug.store import holes


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"\xaa" * 65536)
    return path


def content(path: Path) -> bytes:
    return path.read_bytes()


@pytest.mark.parametrize("unmap", [True, False])
def test_a_range_becomes_zeros(image: Path, unmap: bool) -> None:
    with image.open("r+b") as file:
        if not holes.zero_range(file.fileno(), 1000, 50000, unmap=unmap):
            pytest.skip("this file system does not support it")
    assert content(image) == b"\xaa" * 1000 + bytes(50000) + b"\xaa" * 14536


def test_can_unmap_changes_nothing(image: Path) -> None:
    with image.open("r+b") as file:
        before = os.fstat(file.fileno()).st_blocks
        holes.can_unmap(file.fileno())
        assert os.fstat(file.fileno()).st_blocks == before
    assert content(image) == b"\xaa" * 65536


@pytest.mark.parametrize(
    ("answers", "result"),
    [
        ([0], True),
        ([errno.EINTR, errno.EINTR, 0], True),
        ([errno.EOPNOTSUPP], False),
        ([errno.ENOSYS], False),
        ([errno.EINVAL], False),
        ([errno.EIO], errno.EIO),
        ([errno.ENOSPC], errno.ENOSPC),
    ],
)
def test_results_of_the_kernel(monkeypatch: pytest.MonkeyPatch, answers: list[int], result: bool | int) -> None:
    def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
        assert (fd, mode, offset, length) == (7, 0x03, 1 << 41, 512)
        ctypes.set_errno(answers.pop(0))
        return -1 if ctypes.get_errno() else 0

    monkeypatch.setattr(holes, "_fallocate64", fallocate)
    if isinstance(result, bool):
        assert holes.zero_range(7, 1 << 41, 512, unmap=True) is result
    else:
        with pytest.raises(OSError) as caught:
            holes.zero_range(7, 1 << 41, 512, unmap=True)
        assert caught.value.errno == result
    assert not answers


@pytest.mark.parametrize(
    ("files", "result"),
    [
        ({"sda/queue": "4294966784\n"}, True),
        ({"sda/queue": "0\n"}, False),
        ({"queue": "4096\n"}, True),  # of the disk whose partition it is
        ({"sda/queue": "nonsense"}, False),
        ({}, False),
    ],
)
def test_block_devices_that_can_unmap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], result: bool
) -> None:
    (tmp_path / "sda").mkdir()
    (tmp_path / "8:1").symlink_to("sda")
    for folder, text in files.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "write_zeroes_max_bytes").write_text(text)
    monkeypatch.setattr(holes, "BLOCK_DEVICES", tmp_path)
    status = SimpleNamespace(st_mode=stat.S_IFBLK, st_rdev=os.makedev(8, 1))
    monkeypatch.setattr(holes, "os", SimpleNamespace(fstat=lambda fd: status, major=os.major, minor=os.minor))
    assert holes.can_unmap(7) is result
