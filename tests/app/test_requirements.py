from __future__ import annotations

import pytest

from farplug.app import requirements
from farplug.cli.demo import demo
from farplug.errors import Reason, SetupError


def test_what_is_missing_is_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = (requirements.SPICE.name, "mcopy", requirements.PARSER.name)
    monkeypatch.setattr(requirements.Need, "found", lambda need: "" if need.name in missing else "/x")
    with pytest.raises(SetupError, match=r"not installed: SPICE in QEMU, mcopy$") as caught:
        demo()
    assert caught.value.reason is Reason.MISSING_PROGRAM
    assert caught.value.remedy == "sudo apt-get install mtools qemu-system-modules-spice"


@pytest.mark.parametrize(
    ("missing", "packages"),
    [
        ((requirements.SPICE, requirements.PARSER), "libusbredirparser1 qemu-system-modules-spice"),
        ((requirements.EMULATOR, requirements.SPICE), "qemu-system-x86"),  # Debian 12 has no package of SPICE's own
    ],
)
def test_install_command(missing: tuple[requirements.Need, ...], packages: str) -> None:
    assert requirements.install_command(missing) == f"sudo apt-get install {packages}"


def test_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert requirements.Need("sh", "", "dash").found().endswith("/sh")
    assert requirements.Need("no-such-program", "", "x").found() == ""
    monkeypatch.setenv("PATH", "/nowhere")
    assert requirements.SPICE.found() == ""
