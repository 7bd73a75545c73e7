"""The udev rule that lets people use USB devices without being root.

``uaccess`` gives them to whoever sits at this machine's screen (systemd's logind). People who come over the network sit
nowhere; for them there is a group, where the distribution has one. Source: udev(7), 70-uaccess.rules of systemd.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Final

from farplug.errors import Reason, SetupError
from farplug.programs import find_program

RULES: Final = Path("etc/udev/rules.d/70-farplug.rules")
"""Where the rules go, below the root: before 73-seat-late.rules, which acts on uaccess."""
GROUP: Final = "plugdev"
"""The group that Debian and its kin have for this."""

UDEV_PATIENCE = 60.0
"""Seconds that udev has to apply the rules. A container that has udev's socket never hears that it did."""

_RELOAD: Final = (
    ("udevadm", "control", "--reload"),
    ("udevadm", "trigger", "--settle", "--subsystem-match=usb", "--action=change"),
)
"""The second one comes back when the rules have taken effect."""


def udev_rule(ids: tuple[int, int] | None = None) -> str:
    """The line that lets people use a kind of device, by idVendor and idProduct; all devices without these."""
    match = 'SUBSYSTEM=="usb", ENV{DEVTYPE}=="usb_device"'
    if ids is not None:
        match += f', ATTR{{idVendor}}=="{ids[0]:04x}", ATTR{{idProduct}}=="{ids[1]:04x}"'
    if _group() is None:
        return f'{match}, TAG+="uaccess"'
    return f'{match}, MODE="0660", GROUP="{GROUP}", TAG+="uaccess"'


def _group() -> int | None:
    """The number of the group; None if there is none."""
    try:
        import grp  # Windows has none

        return grp.getgrnam(GROUP).gr_gid
    except (ImportError, KeyError):
        return None


def whom() -> str:
    """Who is given permission, and what makes others such."""
    seated = "whoever sits at this machine's screen"
    if _group() is None:
        return (
            f"{seated}; for others there is no group yet: sudo groupadd --system {GROUP}, then install the rule again"
        )
    return f"{seated}, and for the group {GROUP}: sudo usermod -aG {GROUP} USER, who then logs in again"


def install_commands(rule: str) -> str:
    """The commands that install a rule, one a line."""
    commands = [
        f"echo {shlex.quote(rule)} | sudo tee -a /{RULES}",
        " && ".join(f"sudo {shlex.join(command)}" for command in _RELOAD),
    ]
    group = _group()
    if group is None:
        commands.append(f"# for {whom()}")
    elif group not in (os.getegid(), *os.getgroups()):
        commands.append(f'sudo usermod -aG {GROUP} "$USER"  # then log in again; not needed at this machine\'s screen')
    return "\n".join(commands)


def install(rule: str, root: Path = Path("/")) -> Path:
    """Write a rule, if it is not there yet, and make udev apply it to what is plugged in; the file.

    Raises:
        SetupError: there is no permission (``NO_PERMISSION``), the file cannot be written (``IO_ERROR``), or udev is
            not installed, or does not answer.
    """
    path = root / RULES
    try:
        lines = path.read_text().splitlines() if path.exists() else []
        if rule not in lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join([*lines, rule]) + "\n")
    except PermissionError as error:
        raise SetupError(
            f"no permission to write {path}", reason=Reason.NO_PERMISSION, remedy=install_commands(rule)
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        what = os.strerror(error.errno or 0) if isinstance(error, OSError) else "it is not text in UTF-8"
        raise SetupError(f"{path} cannot be written: {what}", reason=Reason.IO_ERROR) from error
    for program, *arguments in _RELOAD:
        failure = _run(find_program(program), *arguments)
        if failure:
            raise SetupError(
                f"{program} {arguments[0]} failed: {failure}",
                reason=Reason.IO_ERROR,
                remedy=f"{path} is written: restart the machine, or plug the devices in again when udev runs",
            )
    return path


def _run(*command: str | Path) -> str:
    """Run a command; why it failed, empty if it did not."""
    try:
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=UDEV_PATIENCE
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {UDEV_PATIENCE:g} s"
    said = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
    return said[-1] if result.returncode else ""
