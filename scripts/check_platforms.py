"""Check that farplug imports, and that its types hold, on systems that are not this one.

``check_platforms.py imports [PLATFORM]`` imports every module of farplug: as this system does it, or as ``darwin`` or
``win32`` would. The latter is a simulation: ``sys.platform`` is the other system's, and the modules and names that
Python does not have there are gone. ``check_platforms.py types`` runs ``mypy`` for both systems.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import importlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import farplug

SOURCES = Path(farplug.__file__).parent

PLATFORMS = ("darwin", "win32")

POSIX_ONLY = (
    "cli/image.py",
    "control/names.py",
    "control/server.py",
    "ends/passt.py",
    "ends/pty.py",
    "ends/sockets.py",
    "ends/tap.py",
    "image/build.py",
    "image/fill.py",
    "image/tools.py",
    "load/client.py",
    "machine/hotplug.py",
    "machine/lock.py",
    "machine/obstacles.py",
    "machine/sysfs.py",
    "machine/udev.py",
    "store/content.py",
    "store/holes.py",
    "store/image.py",
    "store/overlay.py",
    "store/overlay_file.py",
    "store/usage.py",
    "testing/scratch.py",
    "transport/connection.py",
    "virtual/fido/key_file.py",
    "virtual/video/frames.py",
    "vm/guest_kernel.py",
    "vm/qemu.py",
    "vm/snapshots.py",
    "web/uploads.py",
)
"""Modules that call what Windows does not have; they import there. ``docs/platforms.md`` describes what is missing."""

LOCUST_ONLY = SOURCES / "load/user.py"
"""Imported by locustfiles: it needs a process in which Locust has replaced the sockets."""

_NOT_ON_MACOS: dict[Any, tuple[str, ...]] = {
    errno: ("ENOMEDIUM",),
    os: ("O_DIRECT", "O_NOATIME", "O_TMPFILE", "RWF_NOWAIT", "fdatasync", "memfd_create", "pidfd_open"),
    signal: ("SIGRTMAX", "SIGRTMIN"),
    socket: (
        "AF_NETLINK",
        "AF_VSOCK",
        "SOCK_CLOEXEC",
        "SOCK_NONBLOCK",
        "TCP_KEEPIDLE",
        "TCP_QUICKACK",
        "TCP_USER_TIMEOUT",
    ),
}
_NOT_ON_WINDOWS: dict[Any, tuple[str, ...]] = {
    errno: (*_NOT_ON_MACOS[errno],),
    os: (
        *_NOT_ON_MACOS[os],
        *("O_CLOEXEC", "O_DIRECTORY", "O_NONBLOCK", "SEEK_DATA", "SEEK_HOLE"),
        *("geteuid", "getuid", "getgid", "getegid", "getgroups", "fork", "major", "makedev", "minor"),
        *("pread", "preadv", "pwrite", "pwritev", "fstatvfs", "statvfs", "sched_getaffinity"),
    ),
    signal: (*_NOT_ON_MACOS[signal], "SIGALRM", "SIGHUP", "SIGKILL", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGWINCH"),
    socket: (*_NOT_ON_MACOS[socket], "AF_UNIX"),
}
_MODULES_NOT_ON_WINDOWS = (
    *("curses", "fcntl", "grp", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"),
)


def modules() -> list[str]:
    """Return the name of every module of farplug, without the one that only Locust can import."""
    files = (path for path in SOURCES.rglob("*.py") if path != LOCUST_ONLY)
    paths = (path.relative_to(SOURCES.parent).with_suffix("") for path in files)
    return sorted(".".join(path.parts).removesuffix(".__init__") for path in paths)


def import_all() -> dict[str, Exception]:
    """Import every module of farplug; return the error of each module that cannot be imported."""
    failed: dict[str, Exception] = {}
    for name in modules():
        try:
            importlib.import_module(name)
        except Exception as error:
            failed[name] = error
    return failed


def simulate(platform: str) -> None:
    """Make this process look like one on another system to what is imported next: farplug, and nothing else."""
    import_all()  # the standard library and the dependencies keep what they have
    for name in list(sys.modules):
        if name == "farplug" or name.startswith("farplug."):
            del sys.modules[name]
    sys.platform = platform
    for module, names in (_NOT_ON_WINDOWS if platform == "win32" else _NOT_ON_MACOS).items():
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    if platform == "win32":
        sys.modules.update(dict.fromkeys(_MODULES_NOT_ON_WINDOWS))  # type: ignore[arg-type]  # None: not importable
    ctypes.CDLL = _no_library  # type: ignore[misc,assignment]


def _no_library(name: str | None, *_: object, **__: object) -> object:
    raise TypeError(f"the C library is another one there: {name}")


def check_types() -> int:
    """Run mypy for each other system; return the exit code. What is POSIX only is not checked for Windows."""
    result = 0
    for platform in PLATFORMS:
        left_out = POSIX_ONLY if platform == "win32" else ()
        checked = [path for path in SOURCES.rglob("*.py") if path.relative_to(SOURCES).as_posix() not in left_out]
        command = [sys.executable, "-m", "mypy", "--platform", platform, "--cache-dir", f".mypy_cache/{platform}"]
        if left_out:
            command += ["--follow-imports", "silent"]
        print(f"mypy --platform {platform}", flush=True)
        result |= subprocess.run([*command, *map(str, sorted(checked))], check=False).returncode
    return result


def main() -> int:
    """Run one check; return the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("check", choices=["imports", "types"])
    parser.add_argument("platform", nargs="?", choices=PLATFORMS)
    arguments = parser.parse_args()
    if arguments.check == "types":
        return check_types()
    if arguments.platform is not None:
        simulate(arguments.platform)
    failed = import_all()
    for name, error in failed.items():
        print(f"{name}: {type(error).__name__}: {error}")
    print(f"{len(modules()) - len(failed)} modules imported on {sys.platform}, {len(failed)} failed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
