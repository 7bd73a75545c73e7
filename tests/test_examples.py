"""The examples run as their docstrings say, against a guest on a TCP port. ``examples/test_own_disk.py`` is a test."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from examples import real_device
from tests.cli.support import FakeGuest, blank
from tests.libusb.fake_libusb import FakeDevice
from tests.physical.support import EVERYTHING, OTHER, on_bench

from farplug.app import auto
from farplug.usbredir import packets

EXAMPLES = Path(__file__).parents[1] / "examples"


async def run_until_configured(name: str, *arguments: object, shown: bytes = b"configured") -> tuple[str, FakeGuest]:
    """Run an example, its target first, until the guest has configured its device; then press Ctrl-C. Its output."""
    configured = asyncio.Event()
    guest = FakeGuest(configured.set)
    async with asyncio.timeout(100), guest.listening() as target:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, str(EXAMPLES / name), target, *map(str, arguments)), stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        await configured.wait()
        output = b""
        while shown not in output:
            output += await process.stdout.readline()
        process.send_signal(signal.SIGINT)
        output += (await process.communicate())[0]
        assert process.returncode == 0
    return output.decode(), guest


async def test_an_image_is_plugged_until_ctrl_c(tmp_path: Path) -> None:
    output, guest = await run_until_configured("plug.py", blank(tmp_path / "drivers.raw"), shown=b"in use")
    assert output.startswith("drivers.raw: in use\n")
    assert isinstance(guest.seen[-1], packets.DeviceDisconnect)


async def test_a_device_of_ones_own_is_plugged_until_ctrl_c() -> None:
    output, guest = await run_until_configured("gadget_zero.py")
    assert output == "the VM has configured the device; Ctrl-C unplugs it\n"
    (device,) = [packet for packet in guest.seen if isinstance(packet, packets.DeviceConnect)]
    assert (device.vendor_id, device.product_id) == (0x0525, 0xA4A0)
    assert isinstance(guest.seen[-1], packets.DeviceDisconnect)


async def test_a_real_device_is_plugged_and_released(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeDevice(EVERYTHING, OTHER, drivers={0: "storage"})
    chosen: list[str] = []

    async def choose_device(text: str, *, force: bool) -> tuple[object, object]:
        chosen.append(text)
        return on_bench(fake).device, SimpleNamespace(release=lambda: chosen.append("released"))

    monkeypatch.setattr(auto, "choose_device", choose_device)
    configured = asyncio.Event()
    async with asyncio.timeout(100), FakeGuest(configured.set).listening() as target:
        plugged = asyncio.create_task(real_device.main("1050:0407", target))
        await configured.wait()
        assert fake.drivers == {}
        plugged.cancel()  # as asyncio.run() does after Ctrl-C
        with pytest.raises(asyncio.CancelledError):
            await plugged
    assert chosen == ["1050:0407", "released"]
    assert fake.drivers == {0: "storage"}
    assert fake.handle.closed
    assert "configured by the guest (configuration 1)\n" in capsys.readouterr().out
