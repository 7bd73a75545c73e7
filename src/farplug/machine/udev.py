"""The udev rule that lets users open USB devices without being root.

``uaccess`` gives permission to the user who is logged in at this machine's screen (systemd's logind). Users who log in
over the network have a group instead, where the distribution has one. Source: udev(7), 70-uaccess.rules of systemd.
"""

from __future__ import annotations

import os
import shlex
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from farplug.errors import Reason, Remedy, SetupError
from farplug.programs import child_environment, find_program

RULES: Final = Path("etc/udev/rules.d/70-farplug.rules")
"""Where the rules go, below the root: before 73-seat-late.rules, which acts on uaccess."""
GROUP: Final = "plugdev"
"""The group of Debian and its derivatives for users of removable devices."""

NEW_FILE_MODE: Final = 0o644

UDEV_TIMEOUT = 60.0
"""Seconds that udev has to apply the rules. In a container with udev's socket, udevadm never gets an answer."""

_RELOAD: Final = (
    ("udevadm", "control", "--reload"),
    ("udevadm", "trigger", "--settle", "--subsystem-match=usb", "--action=change"),
)
"""The second command ends when the rules have taken effect."""


def udev_rule(ids: tuple[int, int] | None = None) -> str:
    """Return the rule for devices with these idVendor and idProduct; without ids, for all devices."""
    match = 'SUBSYSTEM=="usb", ENV{DEVTYPE}=="usb_device"'
    if ids is not None:
        match += f', ATTR{{idVendor}}=="{ids[0]:04x}", ATTR{{idProduct}}=="{ids[1]:04x}"'
    if _group() is None:
        return f'{match}, TAG+="uaccess"'
    return f'{match}, MODE="0660", GROUP="{GROUP}", TAG+="uaccess"'


def _group() -> int | None:
    """Return the number of the group; None if the group does not exist."""
    try:
        import grp  # not on Windows

        return grp.getgrnam(GROUP).gr_gid
    except (ImportError, KeyError):
        return None


def permitted_users() -> str:
    """Return who may open USB devices by the rule, and how other users join them."""
    local = "the user at this machine's screen"
    if _group() is None:
        return f"{local}; for users over the network: sudo groupadd --system {GROUP}, then install the rule again"
    return f"{local}, and for the group {GROUP}: sudo usermod -aG {GROUP} USER, then log in again"


def install_commands(rule: str) -> str:
    """Return the shell commands that install a rule, one a line."""
    commands = [
        f"echo {shlex.quote(rule)} | sudo tee -a /{RULES}",
        " && ".join(f"sudo {shlex.join(command)}" for command in _RELOAD),
    ]
    group = _group()
    if group is None:
        commands.append(f"# for {permitted_users()}")
    elif group not in (os.getegid(), *os.getgroups()):
        commands.append(f'sudo usermod -aG {GROUP} "$USER"  # then log in again; not needed at this machine\'s screen')
    return "\n".join(commands)


def install(rule: str, root: Path = Path("/")) -> Path:
    """Add a rule to the file of rules, unless it is there, and have udev apply it to the devices that are plugged in.

    Returns:
        the file.

    Raises:
        SetupError: there is no permission (``NO_PERMISSION``), the file cannot be written (``IO_ERROR``), or udev is
            not installed (``MISSING_PROGRAM``) or fails (``IO_ERROR``).
    """
    path = root / RULES
    try:
        text = path.read_bytes().decode() if path.exists() else ""
        if rule not in text.split("\n"):
            path.parent.mkdir(parents=True, exist_ok=True)
            _replace(path, f"{text}\n{rule}\n" if text and not text.endswith("\n") else f"{text}{rule}\n")
    except PermissionError as error:
        raise SetupError(
            f"no permission to write {path}",
            reason=Reason.NO_PERMISSION,
            remedy=Remedy("install the rule as root", command=install_commands(rule)),
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        what = os.strerror(error.errno or 0) if isinstance(error, OSError) else "it is not text in UTF-8"
        raise SetupError(f"cannot write {path}: {what}", reason=Reason.IO_ERROR) from error
    for program, *arguments in _RELOAD:
        failure = _run(find_program(program), *arguments)
        if failure:
            raise SetupError(
                f"{program} {arguments[0]} failed: {failure}",
                reason=Reason.IO_ERROR,
                remedy=f"{path} was written: restart the machine, or start udev and plug the devices in again",
            )
    return path


def _replace(path: Path, text: str) -> None:
    """Replace the content of a file, or create it: after an error or a power cut, the file has the old or the new text.

    The file keeps its owner and its mode; a link to it stays a link.
    """
    path = Path(os.path.realpath(path))
    # The name does not end in .rules: udev does not read the file.
    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(fd, "wb") as file:
            old = path.stat() if path.exists() else None
            if old is not None and (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
                os.chown(name, old.st_uid, old.st_gid)
            os.chmod(name, NEW_FILE_MODE if old is None else stat.S_IMODE(old.st_mode))
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _run(*command: str | Path) -> str:
    """Run a command; return why it failed, empty if it did not."""
    try:
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=UDEV_TIMEOUT,
            env=child_environment(),
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {UDEV_TIMEOUT:g} s"
    why = result.stderr.strip() or f"exit code {result.returncode}"
    return why.rpartition("\n")[2] if result.returncode else ""
