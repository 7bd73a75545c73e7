"""Run the tools, report the progress meanwhile, and kill a tool when its user cancels."""

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
from pathlib import Path

from farplug.errors import ImageError, Reason
from farplug.image.tree import Tree
from farplug.programs import child_environment, find_program
from farplug.store.base import ProgressCallback

log = logging.getLogger(__name__)

PROGRESS_INTERVAL = 0.1
"""Seconds between calls of the progress callback while a tool runs."""

_NO_HOME = "/dev/null"
"""HOME of the tools: settings of the user (~/.mtoolsrc, ~/.xorrisorc) must not change an image."""

_NO_SPACE = "No space left on device"
_FULL = ("Disk full", "No directory slots", "Could not allocate", "No free space")
"""Messages of mtools, mke2fs and tar for a full filesystem in the image."""


@dataclass(frozen=True, slots=True)
class ImageBuild:
    """An image that is being built.

    Attributes:
        fd: of the image's file, open for reading and writing; the file may have no name.
        tree: what is copied into the image; None: nothing.
        progress: called with the progress.
    """

    fd: int
    tree: Tree | None
    progress: ProgressCallback

    @property
    def path(self) -> str:
        """Return the path of the image for a process that inherits the descriptor."""
        return f"/proc/self/fd/{self.fd}"

    @property
    def total(self) -> int:
        """Return the number of bytes to copy."""
        return self.tree.size if self.tree is not None else 0

    def report_progress(self) -> None:
        """Report the progress, measured by the space that the image uses: the tools themselves report none."""
        self.progress(min(os.fstat(self.fd).st_blocks * 512, self.total), self.total)

    def run(
        self, program: str, *arguments: str, stdin: str = "", inherit: Sequence[int] = (), **environment: str
    ) -> str:
        """Run a tool that inherits the image and other descriptors; return its standard output and standard error.

        Raises:
            SetupError: the program is not installed.
            ImageError: the tool failed.
        """
        command = [str(find_program(program)), *arguments]
        log.debug("run %s", shlex.join(command))
        output, code = self._execute(command, subprocess.PIPE, stdin, environment, inherit)
        check(program, code, output)
        return output

    def run_into(self, program: str, *arguments: str, folder: int | None = None) -> None:
        """Run a tool that writes the image to its standard output.

        Args:
            program: the tool's name.
            arguments: of the tool.
            folder: descriptor of the working folder; None: that of this process.

        Raises:
            SetupError: the program is not installed.
            ImageError: the tool failed.
        """
        command = [str(find_program(program)), *arguments]
        log.debug("run %s", shlex.join(command))
        if folder is None:
            output, code = self._execute(command, self.fd, "", {}, ())
        else:
            output, code = self._execute(command, self.fd, "", {}, (folder,), f"/proc/self/fd/{folder}")
        check(program, code, output)

    def _execute(
        self,
        command: Sequence[str],
        stdout: int,
        stdin: str,
        environment: dict[str, str],
        inherit: Sequence[int],
        folder: str | None = None,
    ) -> tuple[str, int]:
        data: bytes | None = stdin.encode(errors="surrogateescape")
        process: subprocess.Popen[bytes] | None = None
        try:
            with _deferred_signals():  # otherwise a signal could leave a tool running that was just started
                process = self._start(command, stdout, environment, inherit, folder)
            while True:
                try:
                    output, errors = process.communicate(data, timeout=PROGRESS_INTERVAL)
                    self.report_progress()
                    text = output if stdout == subprocess.PIPE else errors
                    return text.decode(errors="replace"), process.returncode
                except subprocess.TimeoutExpired:
                    data = None  # communicate keeps the rest of the input
                    self.report_progress()
        finally:
            if process is not None:
                if process.poll() is None:
                    process.kill()
                    process.wait()
                for pipe in (process.stdin, process.stdout, process.stderr):
                    if pipe is not None:
                        pipe.close()

    def _start(
        self,
        command: Sequence[str],
        stdout: int,
        environment: dict[str, str],
        inherit: Sequence[int],
        folder: str | None,
    ) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=stdout,
                stderr=subprocess.STDOUT if stdout == subprocess.PIPE else subprocess.PIPE,
                env=child_environment(LC_ALL="C.UTF-8", HOME=_NO_HOME, **environment),
                pass_fds=[self.fd, *inherit],
                cwd=folder,
            )
        except OSError as error:  # too many processes, no memory
            raise ImageError(f"{command[0]} cannot be run: {error.strerror}", reason=Reason.IO_ERROR) from error


@contextmanager
def _deferred_signals() -> Iterator[None]:
    """Call Python's handlers of SIGINT and SIGTERM after the block. Only the main thread runs handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    handlers = {
        number: handler for number in (signal.SIGINT, signal.SIGTERM) if callable(handler := signal.getsignal(number))
    }
    for number in handlers:
        signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for signal_number in received:
        signal.raise_signal(signal_number)


def check(program: str, code: int, output: str) -> None:
    """Raise the error for a tool that failed.

    Raises:
        ImageError: NO_SPACE: this machine's disk is full; TOO_LARGE: the image is full; or IO_ERROR.
    """
    if code == 0:
        return
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    message = lines[-1] if lines else f"exit code {code}"
    if _NO_SPACE in output:
        raise no_space_error(f"{program}: {message}")
    if any(text in output for text in _FULL):
        raise ImageError(
            f"the image is full ({program}: {message})", reason=Reason.TOO_LARGE, remedy="make the image larger"
        )
    raise ImageError(f"{program} failed: {message}", reason=Reason.IO_ERROR)


def no_space_error(what: str) -> ImageError:
    """Return the error for a full disk of this machine."""
    return ImageError(
        f"no space left for the image ({what})",
        reason=Reason.NO_SPACE,
        remedy="free space, or put the image into another folder; a copy of a folder is in TMPDIR",
    )


def unsupported_error(path: Path) -> ImageError:
    """Return the error for an image that would be created on another system than Linux."""
    return ImageError(f"{path}: farplug creates images on Linux only", reason=Reason.UNSUPPORTED_SYSTEM)


def check_room(fd: int, needed: int, place: str) -> None:
    """Check for free space on the file system of a file, before hours of copying.

    Raises:
        ImageError: NO_SPACE.
    """
    figures = os.fstatvfs(fd)
    free = figures.f_bavail * figures.f_frsize
    if free < needed:
        raise no_space_error(f"{needed} bytes are needed in {place}, {free} are free")
