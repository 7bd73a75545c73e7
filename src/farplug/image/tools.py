"""Running the tools: watched, so that a long one tells how far it is and can be given up."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from farplug.errors import ImageError, Reason
from farplug.image.tree import Tree
from farplug.programs import find_program
from farplug.store.base import ProgressCallback

log = logging.getLogger(__name__)

PROGRESS_INTERVAL = 0.1
"""Seconds between two calls of a progress callback while a tool runs."""

_NO_SPACE = "No space left on device"
_FULL = ("Disk full", "No directory slots", "Could not allocate", "No free space")
"""What mtools, mke2fs and tar say when the filesystem in the image is full."""


@dataclass(frozen=True, slots=True)
class ImageBuild:
    """An image that is being made.

    Attributes:
        fd: of the image, open for reading and writing. It may have no name.
        tree: what comes into it; None: nothing.
        progress: told how far it is.
    """

    fd: int
    tree: Tree | None
    progress: ProgressCallback

    @property
    def path(self) -> str:
        """The image, for a process that inherits the descriptor."""
        return f"/proc/self/fd/{self.fd}"

    @property
    def total(self) -> int:
        """Bytes to copy."""
        return self.tree.size if self.tree is not None else 0

    def report_progress(self) -> None:
        """Tell how far it is: by the space that the image takes, which no tool has to be asked for."""
        self.progress(min(os.fstat(self.fd).st_blocks * 512, self.total), self.total)

    def run(self, program: str, *arguments: str, stdin: str = "", **environment: str) -> str:
        """Run a tool on the image, which it inherits, and return what it wrote to both outputs.

        Raises:
            SetupError: the program is not installed.
            ImageError: it failed.
        """
        command = [str(find_program(program)), *arguments]
        log.debug("run %s", shlex.join(command))
        output, code = self._watch(command, subprocess.PIPE, stdin, environment)
        check(program, code, output)
        return output

    def run_into(self, program: str, *arguments: str) -> None:
        """Run a tool whose standard output becomes the image.

        Raises:
            SetupError: the program is not installed.
            ImageError: it failed.
        """
        command = [str(find_program(program)), *arguments]
        log.debug("run %s", shlex.join(command))
        output, code = self._watch(command, self.fd, "", {})
        check(program, code, output)

    def _watch(self, command: Sequence[str], stdout: int, stdin: str, environment: dict[str, str]) -> tuple[str, int]:
        data: bytes | None = stdin.encode(errors="surrogateescape")
        process: subprocess.Popen[bytes] | None = None
        try:
            with _deferred_signals():  # else one could come when the tool runs, and nobody knows it yet
                process = self._start(command, stdout, environment)
            while True:
                try:
                    output, errors = process.communicate(data, timeout=PROGRESS_INTERVAL)
                    self.report_progress()
                    said = output if stdout == subprocess.PIPE else errors
                    return said.decode(errors="replace"), process.returncode
                except subprocess.TimeoutExpired:
                    data = None  # communicate keeps what it has
                    self.report_progress()
        finally:
            if process is not None:
                if process.poll() is None:
                    process.kill()
                    process.wait()
                for pipe in (process.stdin, process.stdout, process.stderr):
                    if pipe is not None:
                        pipe.close()

    def _start(self, command: Sequence[str], stdout: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=stdout,
                stderr=subprocess.STDOUT if stdout == subprocess.PIPE else subprocess.PIPE,
                env={**os.environ, "LC_ALL": "C.UTF-8", **environment},
                pass_fds=[self.fd],
            )
        except OSError as error:  # too many processes, no memory
            raise ImageError(f"{command[0]} cannot be run: {error.strerror}", reason=Reason.IO_ERROR) from error


@contextmanager
def _deferred_signals() -> Iterator[None]:
    """Have Python's handlers of SIGINT and SIGTERM called when the block has ended. Only the main thread runs them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    handlers = {
        number: handler for number in (signal.SIGINT, signal.SIGTERM) if callable(handler := signal.getsignal(number))
    }
    for number in handlers:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for one in came:
        signal.raise_signal(one)


def check(program: str, code: int, output: str) -> None:
    """Turn a tool's failure into an error.

    Raises:
        ImageError: NO_SPACE on this machine, TOO_LARGE for the image, or IO_ERROR.
    """
    if code == 0:
        return
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    said = lines[-1] if lines else f"exit code {code}"
    if _NO_SPACE in output:
        raise no_space_error(f"{program}: {said}")
    if any(text in output for text in _FULL):
        raise ImageError(
            f"the image is full ({program}: {said})", reason=Reason.TOO_LARGE, remedy="make the image larger"
        )
    raise ImageError(f"{program} failed: {said}", reason=Reason.IO_ERROR)


def no_space_error(what: str) -> ImageError:
    """The error for a full disk of this machine."""
    return ImageError(
        f"no space left for the image ({what})",
        reason=Reason.NO_SPACE,
        remedy="make room, or name another folder: TMPDIR for a folder that becomes a disk, --output for an image",
    )


def check_room(fd: int, needed: int, place: str) -> None:
    """Check that there is room on the file system of a file, before hours of copying.

    Raises:
        ImageError: NO_SPACE.
    """
    figures = os.fstatvfs(fd)
    free = figures.f_bavail * figures.f_frsize
    if free < needed:
        raise no_space_error(f"{needed} bytes are needed in {place}, {free} are free")
