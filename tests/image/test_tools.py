from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.image.support import MIB

from farplug.errors import ImageError, Reason, SetupError
from farplug.image.tools import ImageBuild, check, check_room
from farplug.image.tree import Entry, Tree


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path, os.O_RDWR | os.O_TMPFILE)
    yield descriptor
    os.close(descriptor)


def nothing(done: int, total: int) -> None:
    pass


def test_a_tool_gets_image_input_and_environment(fd: int) -> None:
    build = ImageBuild(fd, None, nothing)
    assert build.run("dash", "-c", 'cat; echo "$A $LC_ALL"; echo x >&2; printf 123 >"$1"', "-", build.path, stdin="in ",
                   A="b") == "in b C.UTF-8\nx\n"  # fmt: skip
    assert os.pread(fd, 9, 0) == b"123"
    build.run_into("dash", "-c", "printf 4567; echo text >&2")
    assert os.pread(fd, 9, 0) == b"4567"


def test_progress_follows_the_image(fd: int, tmp_path: Path) -> None:
    tree = Tree(Path("/"), (Entry("a", False, 3 * MIB, 0),))
    reported: list[tuple[int, int]] = []
    enough = tmp_path / "enough"

    def report(done: int, total: int) -> None:
        reported.append((done, total))
        if len(reported) > 2:
            enough.touch()

    build = ImageBuild(fd, tree, report)
    script = f'head -c {2 * MIB} /dev/zero >"$1"; until [ -e {enough} ]; do sleep 0.01; done'
    build.run("dash", "-c", script, "-", build.path)
    assert reported[-1] == (2 * MIB, 3 * MIB)
    build.run("dash", "-c", f'head -c {5 * MIB} /dev/zero >"$1"', "-", build.path)
    assert reported[-1] == (3 * MIB, 3 * MIB)


def test_interrupted_while_the_tool_starts(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Interrupted(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self)
            signal.raise_signal(signal.SIGINT)
            time.sleep(0)

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        ImageBuild(fd, None, nothing).run("dash", "-c", "exec sleep 1000")
    assert [process.returncode for process in started] == [-signal.SIGKILL]
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_cancelling_kills_the_tool(fd: int, tmp_path: Path, error: type[BaseException]) -> None:
    def progress(done: int, total: int) -> None:
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            raise error

    with pytest.raises(error):
        ImageBuild(fd, None, progress).run("dash", "-c", 'echo $$ >"$1"; exec sleep 1000', "-", str(tmp_path / "pid"))
    pid = int((tmp_path / "pid").read_text())
    time.sleep(0)
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize(
    ("output", "reason", "text"),
    [
        ("a\nwrite: No space left on device\n", Reason.NO_SPACE, "no space left for the image .x: write"),
        ("Disk full\n", Reason.TOO_LARGE, "the image is full .x: Disk full"),
        ("first\n\nlast\n \n", Reason.IO_ERROR, "x failed: last"),
        ("", Reason.IO_ERROR, "x failed: exit code 3"),
    ],
)
def test_failures(output: str, reason: Reason, text: str) -> None:
    check("x", 0, output)
    with pytest.raises(ImageError, match=text) as caught:
        check("x", 3, output)
    assert caught.value.reason is reason


def test_a_tool_that_fails_or_is_missing(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    build = ImageBuild(fd, None, nothing)
    with pytest.raises(ImageError, match="dash failed: no way"):
        build.run("dash", "-c", "echo no way >&2; exit 1")
    with pytest.raises(ImageError, match="dash failed: no way"):
        build.run_into("dash", "-c", "echo no way >&2; exit 1")
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(SetupError, match="fdisk is not installed") as caught:
        build.run("fdisk")
    assert caught.value.remedy.command == "sudo apt-get install fdisk"


def test_a_tool_that_cannot_be_started(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("subprocess.Popen", refuse)
    with pytest.raises(ImageError, match="dash cannot be run: Resource temporarily unavailable"):
        ImageBuild(fd, None, nothing).run("dash")


def test_room(fd: int) -> None:
    check_room(fd, 1, "here")
    with pytest.raises(ImageError, match=r"1152921504606846976 bytes are needed in here, \d+ are free") as caught:
        check_room(fd, 1 << 60, "here")
    assert caught.value.reason is Reason.NO_SPACE
