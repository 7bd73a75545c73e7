from __future__ import annotations

import pytest

from farplug.cli import needs
from farplug.cli.demo import demo
from farplug.errors import Reason, SetupError


def test_what_is_missing_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = (needs.SPICE.name, "mcopy", needs.PARSER.name)
    monkeypatch.setattr(needs.Need, "found", lambda need: "" if need.name in missing else "/x")
    with pytest.raises(SetupError, match=r"not installed: SPICE in QEMU, mcopy$") as caught:
        demo()
    assert caught.value.reason is Reason.MISSING_PROGRAM
    assert caught.value.remedy == "sudo apt-get install mtools qemu-system-modules-spice"


@pytest.mark.parametrize(
    ("missing", "packages"),
    [
        ((needs.SPICE, needs.PARSER), "libusbredirparser1 qemu-system-modules-spice"),
        ((needs.EMULATOR, needs.SPICE), "qemu-system-x86"),  # Debian 12 has no package of SPICE's own
    ],
)
def test_install_command(missing: tuple[needs.Need, ...], packages: str) -> None:
    assert needs.install_command(missing) == f"sudo apt-get install {packages}"


def test_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert needs.Need("sh", "", "dash").found().endswith("/sh")
    assert needs.Need("no-such-program", "", "x").found() == ""
    monkeypatch.setenv("PATH", "/nowhere")
    assert needs.SPICE.found() == ""
