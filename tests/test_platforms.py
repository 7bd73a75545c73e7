"""farplug imports on systems that are not this one, and refuses there what it cannot do."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from scripts.check_platforms import POSIX_ONLY, SOURCES
from tests.docs import ROOT

CHECK = ROOT / "scripts/check_platforms.py"


SIMULATE = """
import os, sys
sys.path.insert(0, {scripts!r})
import check_platforms
check_platforms.simulate({platform!r})
folder = sys.argv.pop()
sys.argv.append("imports")
assert check_platforms.main() == 0
"""


def simulated(platform: str, code: str, folder: Path) -> list[str]:
    """Import every module as on another system, then run code there; return the lines that were printed."""
    begin = SIMULATE.format(scripts=str(CHECK.parent), platform=platform)
    run = subprocess.run([sys.executable, "-c", begin + code, folder], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout.splitlines()


IMAGES_ON_MACOS = """
import fcntl
from errno import ENOTSUP, EIO
calls, flushes = [], [None, ENOTSUP, EIO]
def full_sync(fd, command):
    calls.append(command)
    if number := flushes.pop(0):
        raise OSError(number, os.strerror(number))
fcntl.F_FULLFSYNC, fcntl.fcntl = 51, full_sync
from farplug.errors import ImageError
from farplug.store.image import Image
path = f"{folder}/x.raw"
image = Image.open(path)
try:
    Image.open(path, read_only=True)
except ImageError as error:
    print(error.reason)
data = memoryview(bytearray(512))
print(image.read_cached(data, 0))
image.write(memoryview(b"x" * 512), 512)
image.zero(512, 256, unmap=True)
image.sync()
image.sync()
try:
    image.sync()
except OSError as error:
    print(error.errno == EIO)
image.read(data, 512)
print(bytes(data) == bytes(256) + b"x" * 256, calls)
image.close()
shared = [Image.open(path, read_only=True) for _ in range(2)]
print(len(shared))
"""


REFUSALS = """
from pathlib import Path
from farplug.cli import session
from farplug.errors import FarplugError
from farplug.image.build import create_image
from farplug.image.folder import folder_store
from farplug.machine.listing import list_devices
from farplug.store import overlay
from farplug.store.image import Image
from farplug.testing import GuestConfig, QemuGuest
folder = Path(folder)
image = folder / "x.raw"
launch = {"kernel": None, "initramfs": b"", "firmware": None, "version": (1, 0), "snapshot": None}
common = {
    "folder": lambda: folder_store(folder),
    "create": lambda: create_image(folder / "new.raw", size=1 << 26),
    "guest": lambda: QemuGuest(GuestConfig())._launch(**launch).send(None),
}
for name, refused in (common | {
    "darwin": {"devices": list_devices},
    "win32": {
        "image": lambda: Image.open(image),
        "snapshot": lambda: overlay.info(image),
        "connect": lambda: session.run(None, None).send(None),
    },
}[sys.platform]).items():
    try:
        refused()
    except FarplugError as error:
        assert error.reason == "unsupported-system", error
        print(name)
"""


WORKS_ON_MACOS = ["in-use", "0", "True", "True [51, 51, 51]", "2"]
"""An image is locked, read, written and flushed."""


@pytest.mark.parametrize(
    ("platform", "code", "works", "refused"),
    [
        ("darwin", IMAGES_ON_MACOS, WORKS_ON_MACOS, "folder create guest devices"),
        ("win32", "", [], "folder create guest image snapshot connect"),
    ],
)
def test_it_imports_and_refuses_what_cannot_work(
    tmp_path: Path, platform: str, code: str, works: list[str], refused: str
) -> None:
    (tmp_path / "x.raw").write_bytes(bytes(4096))
    imported, *printed = simulated(platform, code + REFUSALS, tmp_path)
    assert f"modules imported on {platform}, 0 failed" in imported
    assert printed == [*works, *refused.split()]


def test_modules_that_need_posix_exist_and_are_documented() -> None:
    assert {name for name in POSIX_ONLY if not (SOURCES / name).is_file()} == set()
    page = (ROOT / "docs/platforms.md").read_text().partition("## Windows")[2]
    assert set(re.findall(r"`((?:\w+/)+\w+\.py)`", page)) - {"tests/test_platforms.py"} == set(POSIX_ONLY)
