from __future__ import annotations

import json
from pathlib import Path

from tests.cli.support import Cli, blank


def test_kinds(cli: Cli) -> None:
    result = cli("devices")
    assert (result.code, result.err) == (0, "")
    assert "--usb-disk PATH" in result.out
    assert "--usb-disk-ro PATH" in result.out


def test_images(cli: Cli, image: Path, tmp_path: Path) -> None:
    result = cli("devices", image)
    assert result.code == 0
    assert f"{image}  can be plugged: 1.0 MB, serial number " in result.out
    before = image.stat()
    result = cli("devices", image, tmp_path / "none", tmp_path)
    assert result.code == 3
    assert "none  " in result.out
    assert "cannot be plugged" in result.out
    assert "is a folder, not a disk image" in result.out
    assert image.stat() == before


def test_json(cli: Cli, image: Path, tmp_path: Path) -> None:
    result = cli("devices", image, blank(tmp_path / "empty", 0), "--json")
    assert result.code == 3
    answer = json.loads(result.out)
    options = [kind["option"] for kind in answer["kinds"]]
    assert options == ["--usb-disk PATH", "--usb-disk-ro PATH", "--usb-cdrom PATH", "--usb-folder PATH"]
    good, bad = answer["images"]
    assert (good["path"], good["size"], len(good["serial_number"])) == (str(image), 1 << 20, 16)
    assert (bad["error"]["reason"], sorted(bad["error"])) == ("empty", ["message", "reason", "remedy"])
