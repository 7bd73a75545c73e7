from __future__ import annotations

import ctypes
import errno
import struct
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import libusb_package
import pytest
import usb1
from tests.physical.support import EVERYTHING

import farplug
from farplug.errors import Reason, SetupError
from farplug.exit_codes import ExitCode, exit_code
from farplug.libusb import library
from farplug.libusb.library import Library
from farplug.usb import Status
from farplug.usb.descriptors import DeviceDescriptor

DEVICE = DeviceDescriptor(0x0200, 0x1234, 0x5678, 0x0102)


@pytest.fixture
def unloaded() -> Iterator[None]:
    library._load.cache_clear()
    yield
    library._load.cache_clear()


def test_libusb_is_there() -> None:
    with Library().devices() as devices:
        assert isinstance(devices, list)


@pytest.mark.usefixtures("unloaded")
def test_without_a_system_library_the_packaged_one_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    real = ctypes.CDLL

    def load(name: str, **options: object) -> ctypes.CDLL:
        asked.append(name)
        if len(asked) == 1:
            raise OSError(f"{name}: cannot open shared object file")
        return real(name)

    monkeypatch.setattr(ctypes, "CDLL", load)
    Library()
    assert asked == ["libusb-1.0.so.0", str(libusb_package.get_library_path())]


@pytest.mark.usefixtures("unloaded")
def test_without_any_library_there_is_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, **options: object) -> ctypes.CDLL:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(libusb_package, "get_library_path", lambda: None)
    with pytest.raises(SetupError, match=r"libusb-1\.0 cannot be loaded: libusb-1\.0\.so\.0: cannot open") as caught:
        Library()
    assert caught.value.reason is Reason.NO_LIBUSB
    assert exit_code(caught.value) is ExitCode.SETUP
    assert "apt install libusb-1.0-0" in caught.value.remedy.command


def test_a_machine_without_usb(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object) -> None:
        raise usb1.USBErrorOther

    monkeypatch.setattr(usb1.USBContext, "open", refuse)
    with pytest.raises(SetupError, match="libusb cannot be used on this machine: LIBUSB_ERROR_OTHER") as caught:
        Library().open_context()
    assert caught.value.reason is Reason.NO_LIBUSB


@pytest.mark.parametrize(("code", "status"), [(-errno.EXDEV, Status.SUCCESS), (-errno.EPROTO, Status.IO_ERROR)])
def test_codes_of_packets(code: int, status: Status) -> None:
    assert library.transfer_status(code) is status


def test_a_device_of_the_real_libusb(tmp_path: Path) -> None:
    """umockdev shows libusb a device; it takes no requests, so the device cannot be taken."""
    descriptors = bytes(DEVICE) + bytes(EVERYTHING)
    (tmp_path / "thing.umockdev").write_text(
        textwrap.dedent(f"""\
            P: /devices/pci0000:00/0000:00:14.0/usb1/1-1
            N: bus/usb/001/002={descriptors.hex().upper()}
            E: BUSNUM=001
            E: DEVNUM=002
            E: DEVNAME=/dev/bus/usb/001/002
            E: DEVTYPE=usb_device
            E: SUBSYSTEM=usb
            A: busnum=1\\n
            A: devnum=2\\n
            A: speed=480\\n
            A: bConfigurationValue=1\\n
            H: descriptors={descriptors.hex().upper()}
            """)
    )
    script = """
        import asyncio
        from farplug.errors import DeviceError
        from farplug.physical import find_device
        from tests.physical.support import Listener

        async def main():
            device = find_device(1, 2)
            print(device, device.identity.speed, device.warnings)
            for interface in device.interfaces:
                print(interface.number, [f"{endpoint.address:02x}" for endpoint in interface.endpoints])
            try:
                await device.open(Listener())
            except DeviceError as error:
                print(error.reason)

        asyncio.run(main())
    """
    result = subprocess.run(
        ["umockdev-run", "--device", tmp_path / "thing.umockdev", "--", sys.executable, "-c", textwrap.dedent(script)],
        env={"PYTHONPATH": f"{Path(farplug.__file__).parents[1]}:{Path(__file__).parents[2]}", "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert result.stdout.splitlines() == [
        "1234:5678 (1-2) high ()",
        "0 ['81', '02', '83', '03']",
        "2 []",
        "device-lost",
    ], result.stderr


def test_descriptors_have_the_size_that_the_mock_needs() -> None:
    assert struct.unpack_from("<H", bytes(EVERYTHING), 2)[0] == len(bytes(EVERYTHING))
