"""``farplug image``: make disk images, and finish snapshots."""

from __future__ import annotations

import json as jsonlib
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from farplug.cli.options import OUTPUT, BlockSizeOption, Command, DebugOption, Group, has_terminal
from farplug.errors import Reason, Remedy, UsageError
from farplug.image import Format, Partition
from farplug.text import printable

app = typer.Typer(cls=Group, help="Make disk images, and finish snapshots.")

_SIZE = re.compile(r"([0-9]{1,19})([KMGT]?)(?:iB)?", re.IGNORECASE)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str) -> int:
    """Return the bytes of a size: digits, and K, M, G or T for powers of 1024.

    Raises:
        UsageError: the text is not a valid size.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(
            f"{text!r} is not a valid size", reason=Reason.BAD_OPTION, remedy="write it as 8G, 512M or 1073741824"
        )
    return int(match[1]) * _UNITS[match[2].upper()]


@app.command("create", cls=Command)
def create(
    size: Annotated[
        str | None,
        typer.Argument(
            metavar="SIZE",
            help="Size of the disk, as 8G, 512M or in bytes. Default: as large as the folder needs.",
            show_default=False,
        ),
    ] = None,
    format: Annotated[Format, typer.Option(help="The filesystem.")] = Format.FAT32,
    partition: Annotated[
        Partition | None, typer.Option(help="The partition table. Default: mbr.", show_default=False)
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--from", metavar="FOLDER", help="Copy the content of FOLDER into the image.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="The image, which must not exist. Default: FOLDER's name with .raw or .iso.",
            show_default=False,
        ),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(metavar="LABEL", help="Label of the volume. Default: FOLDER's name.", show_default=False),
    ] = None,
    block_size: Annotated[
        BlockSizeOption | None,
        typer.Option(help="Bytes in a block of the disk that will use the image. Default: 512.", show_default=False),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Make a ready-to-use disk image: a partition table, a filesystem, and a copy of a folder.

    The image is RAW and sparse. FAT32, ext4 and ISO 9660 are made with programs of this machine; exFAT and NTFS (and \
FAT32 with some names) in a throw-away VM, which needs QEMU. Only you can read an image of a folder \
(mode 0600).
    """
    from farplug.cli.output import size as format_size
    from farplug.image import create_image, create_iso

    is_iso = format is Format.ISO9660
    if is_iso and (folder is None or size is not None or partition is not None or block_size is not None):
        raise UsageError(
            "an ISO 9660 image needs a folder, and has no size, partition table or block size to choose",
            reason=Reason.BAD_OPTION,
            remedy=Remedy("for example", command="farplug image create --format iso9660 --from FOLDER"),
        )
    count = parse_size(size) if size is not None else None
    path = output or _default_output(folder, ".iso" if is_iso else ".raw")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does, and leaves nothing behind
    with _progress_bar() as progress:
        if is_iso:
            assert folder is not None
            create_iso(path, folder, label=label, progress=progress)
            what = "ISO 9660"
        else:
            volume = create_image(
                path,
                size=count,
                format=format,
                partition=partition or Partition.MBR,
                folder=folder,
                label=label,
                block_size=int(block_size or BlockSizeOption.B512),
                progress=progress,
            )
            what = f"{volume.format.full_name} {volume.label!r} in {volume.partition.upper()}"
    status = path.stat()
    _print(f"{path}: {format_size(status.st_size)}, {what}; {format_size(status.st_blocks * 512)} on this machine")


SnapshotArgument: TypeAlias = Annotated[
    Path, typer.Argument(metavar="FILE", help="The file of a snapshot ('farplug connect --snapshot-file FILE').")
]


@app.command("info", cls=Command)
def info(
    file: SnapshotArgument,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=OUTPUT)] = False,
) -> None:
    """Show the image of a snapshot, and how much data the snapshot has."""
    from farplug.cli.output import size as format_size
    from farplug.store import overlay
    from farplug.store.overlay_file import commit_command

    snapshot = overlay.info(file)
    if json:
        about = {
            "snapshot": str(file),
            "image": str(snapshot.base),
            "size": snapshot.size,
            "block_size": snapshot.block_size,
            "changed": snapshot.changed,
            "half_committed": snapshot.half_committed,
        }
        typer.echo(jsonlib.dumps(about))
        return
    size = format_size(snapshot.size)
    _print(f"{file}: a snapshot of {snapshot.base} ({size}, blocks of {snapshot.block_size} bytes)")
    typer.echo(f"{format_size(snapshot.changed)} changed")
    if snapshot.half_committed:
        command = commit_command(file, None)
        _print(f"a commit was interrupted: finish it before the image is used: {command}")


@app.command("commit", cls=Command)
def commit(
    file: SnapshotArgument,
    image: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="The image. Without this option, farplug asks on the terminal.", show_default=False
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Write also to a disk that this machine uses (mounted), that is not a RAW image, or that does not fit "
            "a commit that was interrupted.",
        ),
    ] = False,
) -> None:
    """Write the content of a snapshot to its image, and remove the snapshot.

    A snapshot records the path of its image, but farplug writes only to a path that you give or confirm: a snapshot \
that another user made could record the path of any file.

    An interrupted commit, even by a power cut, has to be repeated before the image is used.
    """
    from farplug.cli.output import size as format_size
    from farplug.store import overlay

    base = _confirmed_image(file, force) if image is None else image
    with _progress_bar() as progress:
        count = overlay.commit(file, base_path=base, progress=progress, force=force)
    _print(f"{format_size(count)} written to {base}; {file} removed")


def _confirmed_image(file: Path, force: bool) -> Path:
    """Return the image that a snapshot recorded, if the user confirms it on the terminal.

    Raises:
        UsageError: there is no terminal, or the user refused.
    """
    from farplug.cli.output import size as format_size
    from farplug.store import overlay
    from farplug.store.overlay_file import commit_command

    snapshot = overlay.info(file)
    question = f"Write {format_size(snapshot.changed)} of {file} to {snapshot.base}?"
    if has_terminal() and typer.confirm(printable(question), err=True):
        return snapshot.base
    command = commit_command(file, snapshot.base)
    raise UsageError(
        f"{file} recorded {snapshot.base} as its image, which was not confirmed",
        reason=Reason.BAD_OPTION,
        remedy=Remedy("if that is the image, name it", command=f"{command} --force" if force else command),
    )


@app.command("discard", cls=Command)
def discard(file: SnapshotArgument) -> None:
    """Remove a snapshot, and the data that the guest wrote to it."""
    from farplug.store import overlay

    overlay.discard(file)
    _print(f"{file} removed")


def _print(text: str) -> None:
    typer.echo(printable(text))  # the path may come from the header of a snapshot


def _default_output(folder: Path | None, suffix: str) -> Path:
    name = folder.resolve().name if folder is not None else ""
    if not name:
        raise UsageError(
            "the image has no name", reason=Reason.BAD_OPTION, remedy="name it with --output, or a folder with --from"
        )
    return Path(name + suffix)


@contextmanager
def _progress_bar() -> Iterator[Callable[[int, int], None]]:
    """Yield a callback that shows a progress bar on a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("copying", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total or None)
