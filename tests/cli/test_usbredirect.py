"""``farplug usbredirect``, started as virtctl starts usbredirect: ``usbredirect --device DEVICE --to HOST:PORT``."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tests.app.test_run import ISO
from tests.cli.support import Cli, FakeGuest, blank, in_thread

from farplug.app.settings import SourceKind
from farplug.cli.usbredirect import _source
from farplug.usbredir import packets

MAIN = "from farplug.cli.script import main; main()"


def test_a_program_that_starts_usbredirect_gets_an_image_plugged_in(tmp_path: Path) -> None:
    image = blank(tmp_path / "a.raw")
    script = tmp_path / "usbredirect"
    script.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{MAIN}' usbredirect \"$@\"\n")
    script.chmod(0o755)
    configured = threading.Event()
    guest = FakeGuest(configured.set)
    with in_thread(guest.listening) as target:
        address = target.removeprefix("tcp://")
        with subprocess.Popen(
            [script, "--device", image, "--to", address], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            assert configured.wait(100)
            process.send_signal(signal.SIGTERM)
            output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    assert any(isinstance(packet, packets.DeviceConnect) for packet in guest.seen)


def test_a_device_is_a_path_or_a_usb_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.ISO").write_bytes(ISO)
    (tmp_path / "1-2").mkdir()
    blank(tmp_path / "b.img")
    for text, kind, path in (
        ("a.ISO", SourceKind.CDROM, "a.ISO"),
        ("b.img", SourceKind.DISK, "b.img"),
        ("1-2", SourceKind.FOLDER, "1-2"),
        ("1050:0407", SourceKind.USB_DEVICE, "1050:0407"),
        ("02-03", SourceKind.USB_DEVICE, "address:02-03"),
        ("serial:7", SourceKind.USB_DEVICE, "serial:7"),
    ):
        source = _source(text)
        assert (source.kind, source.path) == (kind, path)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--to", "127.0.0.1:1"), 2, "--device"),
        (("--device", "{image}"), 2, "--to"),
        (("--device", "{image}", "--to", "127.0.0.1"), 2, "it has no port"),
        (("--device", "{image}", "--to", "127.0.0.1:1"), 4, "Connection refused"),
    ],
)
def test_errors(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    image = blank(tmp_path / "a.raw")
    result = Cli(capfd)("usbredirect", *(argument.format(image=image) for argument in arguments))
    assert (result.code, message in result.err) == (code, True)
