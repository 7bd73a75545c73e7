from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.leaks import descriptors
from tests.machine.trees import Machine

from farplug.errors import DeviceError, Reason
from farplug.exit_codes import ExitCode, exit_code
from farplug.machine.device_info import DeviceInfo
from farplug.machine.listing import list_devices
from farplug.machine.lock import DeviceLock


@pytest.fixture
def device(machine: Machine) -> DeviceInfo:
    machine.add("1-1", 2)
    return list_devices(machine.root)[0]


def test_one_at_a_time(device: DeviceInfo) -> None:
    lock = DeviceLock(device)
    with pytest.raises(
        DeviceError, match=r"1209:0001 \(port 1-1\) cannot be plugged in: another farplug uses it"
    ) as caught:
        DeviceLock(device)
    assert (caught.value.reason, exit_code(caught.value)) == (Reason.BUSY, ExitCode.DEVICE)
    lock.release()
    lock.release()
    DeviceLock(device).release()


def test_another_process_is_named_and_its_lock_ends_with_it(device: DeviceInfo, machine: Machine) -> None:
    code = (
        f"import fcntl, sys\nf = open({str(device.node)!r})\nfcntl.flock(f, fcntl.LOCK_EX)\nprint(flush=True)\ninput()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        (listed,) = list_devices(machine.root)
        assert str(listed.obstacle).startswith("another farplug uses it: ")
        assert f"(process {process.pid})" in str(listed.obstacle)
        with pytest.raises(DeviceError, match=rf"another farplug uses it: .*\(process {process.pid}\)"):
            DeviceLock(device)
        process.kill()
    DeviceLock(device).release()


def test_a_device_that_was_unplugged(device: DeviceInfo, machine: Machine) -> None:
    machine.remove("1-1")
    with pytest.raises(DeviceError, match="is no longer plugged in: No such file or directory") as caught:
        DeviceLock(device)
    assert (caught.value.reason, exit_code(caught.value)) == (Reason.DEVICE_LOST, ExitCode.DEVICE)
    assert caught.value.remedy.setting == "rules.wait"


def test_no_permission(device: DeviceInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(DeviceError, match=r"1209:0001 .* cannot be plugged in: no permission to use it") as caught:
        DeviceLock(device)
    assert caught.value.reason is Reason.NO_PERMISSION


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_too_many_open_files(device: DeviceInfo, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(DeviceError, match="cannot be plugged in: Too many open files") as caught:
        DeviceLock(device)
    assert caught.value.reason is Reason.IO_ERROR, "it was not unplugged"


def test_with_too_many_open_files_no_program_is_named(device: DeviceInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> Iterator[Path]:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    lock = DeviceLock(device)
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(DeviceError, match=r"another farplug uses it$"):
        DeviceLock(device)
    lock.release()


def test_no_descriptor_is_left_behind(device: DeviceInfo) -> None:
    before = len(descriptors())
    for _ in range(5):
        lock = DeviceLock(device)
        with pytest.raises(DeviceError):
            DeviceLock(device)
        lock.release()
    assert len(descriptors()) <= before
