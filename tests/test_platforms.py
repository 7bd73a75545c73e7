"""farplug imports on systems that are not this one, and refuses there what it cannot do."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from scripts.check_platforms import PLATFORMS, POSIX_ONLY, SOURCES
from tests.docs import ROOT

CHECK = ROOT / "scripts/check_platforms.py"


@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_module_imports(platform: str) -> None:
    run = subprocess.run([sys.executable, CHECK, "imports", platform], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"modules imported on {platform}, 0 failed" in run.stdout


SIMULATE = """
import os, sys
sys.path.insert(0, {scripts!r})
from check_platforms import simulate
simulate({platform!r})
"""


def simulated(platform: str, code: str, *arguments: str | Path) -> str:
    """Run code after :func:`~scripts.check_platforms.simulate`; return its standard output."""
    begin = SIMULATE.format(scripts=str(CHECK.parent), platform=platform)
    run = subprocess.run([sys.executable, "-c", begin + code, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


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
image = Image.open(sys.argv[1])
try:
    Image.open(sys.argv[1], read_only=True)
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
shared = [Image.open(sys.argv[1], read_only=True) for _ in range(2)]
print(len(shared))
"""


def test_on_macos_an_image_is_locked_read_written_and_flushed(tmp_path: Path) -> None:
    image = tmp_path / "x.raw"
    image.write_bytes(bytes(4096))
    assert simulated("darwin", IMAGES_ON_MACOS, image).splitlines() == ["in-use", "0", "True", "True [51, 51, 51]", "2"]


NEW_FILE_ON_MACOS = """
from farplug.image.build import new_file
from pathlib import Path
with new_file(Path(sys.argv[1])) as fd:
    os.write(fd, b"whole")
"""


def test_on_macos_a_new_file_has_its_name_at_once(tmp_path: Path) -> None:
    simulated("darwin", NEW_FILE_ON_MACOS, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"whole"


REFUSALS_ON_WINDOWS = """
from farplug.cli import session
from farplug.errors import FarplugError
from farplug.store.image import Image
for refused in (lambda: Image.open(sys.argv[1]), lambda: session.run(None, None).send(None)):
    try:
        refused()
    except FarplugError as error:
        print(type(error).__name__, error.reason)
"""


def test_on_windows_images_and_connect_are_refused(tmp_path: Path) -> None:
    image = tmp_path / "x.raw"
    image.write_bytes(bytes(4096))
    refused = simulated("win32", REFUSALS_ON_WINDOWS, image).splitlines()
    assert refused == ["ImageError unsupported-system", "SetupError unsupported-system"]


def test_modules_that_need_posix_exist_and_are_documented() -> None:
    assert {name for name in POSIX_ONLY if not (SOURCES / name).is_file()} == set()
    page = (ROOT / "docs/platforms.md").read_text().partition("## Windows")[2]
    assert set(re.findall(r"`(\w+/\w+\.py)`", page)) - {"tests/test_platforms.py"} == set(POSIX_ONLY)
