"""The options of what an agent may do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from farplug.errors import Reason, UsageError

RIGHTS = "What the agent may do"
"""Title of the panel in the help."""


@dataclass(frozen=True, slots=True)
class AgentOptions:
    """What an agent may do. Each field is an option, in the order of the help."""

    read_only: Annotated[
        bool, typer.Option("--read-only", help="Let it look, and do nothing else.", rich_help_panel=RIGHTS)
    ] = False
    allow: Annotated[
        list[Path] | None,
        typer.Option(
            "--allow",
            metavar="DIR",
            help="Let it plug in images and folders below DIR, and insert ISO images. What the VM writes to disks is "
            "discarded. May be given several times. By default no file of this machine can be used.",
            show_default=False,
            rich_help_panel=RIGHTS,
        ),
    ] = None
    allow_write: Annotated[
        bool,
        typer.Option(
            "--allow-write",
            help="Let it plug in disks below --allow so that the VM changes the image. You are asked each time, if the "
            "agent's program can ask.",
            rich_help_panel=RIGHTS,
        ),
    ] = False
    allow_devices: Annotated[
        bool,
        typer.Option(
            "--allow-devices",
            help="Let it plug in USB devices of this machine. You are asked each time, if the agent's program can ask.",
            rich_help_panel=RIGHTS,
        ),
    ] = False
    secrets: Annotated[
        Path | None,
        typer.Option(
            "--secrets",
            metavar="FILE",
            help="Texts that it types by their names, and does not see: a file with lines NAME=TEXT, which only you "
            "may read.",
            show_default=False,
            rich_help_panel=RIGHTS,
        ),
    ] = None
    audit: Annotated[
        Path | None,
        typer.Option(
            "--audit",
            metavar="FILE",
            help="Append a record of each call to FILE, as JSON lines. Without a record nothing is done.",
            show_default=False,
            rich_help_panel=RIGHTS,
        ),
    ] = None

    def check(self) -> None:
        """Raise ``UsageError`` if options contradict each other, or have no effect."""
        rights = {"--allow": self.allow, "--allow-write": self.allow_write, "--allow-devices": self.allow_devices}
        given = [name for name, value in {**rights, "--secrets": self.secrets}.items() if value]
        if self.read_only and given:
            raise UsageError(
                f"--read-only and {given[0]} contradict each other",
                reason=Reason.BAD_OPTION,
                remedy="leave one of them out",
            )
        if self.allow_write and not self.allow:
            raise UsageError(
                "--allow-write has no effect without --allow",
                reason=Reason.BAD_OPTION,
                remedy="name a folder: --allow DIR",
            )

    def check_unused(self, needed: str) -> None:
        """Raise ``UsageError`` if an option was given, which has no effect without another one."""
        values = {f"--{name.replace('_', '-')}": getattr(self, name) for name in self.__slots__}
        given = [name for name, value in values.items() if value]
        if given:
            raise UsageError(
                f"{given[0]} has no effect without {needed}", reason=Reason.BAD_OPTION, remedy=f"add {needed}"
            )
