"""``farplug image``: make disk images, and finish snapshots."""

from __future__ import annotations

import json as jsonlib
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from farplug.cli.options import OUTPUT, BlockSizeOption, Command, DebugOption, Group
from farplug.errors import Reason, UsageError
from farplug.text import printable

app = typer.Typer(cls=Group, help="Make disk images, and finish snapshots.")

_SIZE = re.compile(r"([0-9]{1,19})([KMGT]?)(?:iB)?", re.IGNORECASE)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class ImageFormat(StrEnum):
    """Values of ``--format``."""

    FAT32 = "fat32"
    EXFAT = "exfat"
    EXT4 = "ext4"
    NTFS = "ntfs"
    ISO9660 = "iso9660"


class PartitionTable(StrEnum):
    """Values of ``--partition``."""

    MBR = "mbr"
    GPT = "gpt"


def parse_size(text: str) -> int:
    """Bytes of a size: digits, and K, M, G or T for powers of 1024.

    Raises:
        UsageError: it is not a size.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(
            f"{text!r} is not a size", reason=Reason.BAD_OPTION, remedy="write it as 8G, 512M or 1073741824"
        )
    return int(match[1]) * _UNITS[match[2].upper()]


@app.command("create", cls=Command)
def create(
    size: Annotated[
        str | None,
        typer.Argument(
            metavar="SIZE",
            help="Size of the disk, as 8G, 512M or in bytes. As large as the folder needs if it is left out.",
            show_default=False,
        ),
    ] = None,
    format: Annotated[ImageFormat, typer.Option(help="The filesystem.")] = ImageFormat.FAT32,
    partition: Annotated[
        PartitionTable | None, typer.Option(help="The partition table; mbr if it is left out.", show_default=False)
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--from", metavar="FOLDER", help="Copy what is in FOLDER into the image.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="The image; FOLDER's name with .raw or .iso if it is left out. It must not exist.",
            show_default=False,
        ),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(help="Label of the volume; FOLDER's name if it is left out.", show_default=False),
    ] = None,
    block_size: Annotated[
        BlockSizeOption | None,
        typer.Option(
            help="Bytes in a block of the disk that will show the image: 512 if it is left out.", show_default=False
        ),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Make a ready-to-use disk image: a partition table, a filesystem, and what is in a folder.

    The image is RAW and sparse. FAT32, ext4 and ISO 9660 are made with programs of this machine; exFAT and NTFS (and
    some names on FAT32) in a throw-away VM, which needs QEMU.
    """
    from farplug.cli.output import size as for_people
    from farplug.image import Format, Partition, create_image, create_iso

    is_iso = format is ImageFormat.ISO9660
    if is_iso and (folder is None or size is not None or partition is not None or block_size is not None):
        raise UsageError(
            "an ISO 9660 image is made of a folder, and has no size, partition table and block size to choose",
            reason=Reason.BAD_OPTION,
            remedy="farplug image create --format iso9660 --from FOLDER",
        )
    count = parse_size(size) if size is not None else None
    path = output or _default_output(folder, ".iso" if is_iso else ".raw")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leaves as Ctrl-C does: nothing stays behind
    with _progress() as progress:
        if is_iso:
            assert folder is not None
            create_iso(path, folder, label=label, progress=progress)
            what = "ISO 9660"
        else:
            volume = create_image(
                path,
                size=count,
                format=Format(format),
                partition=Partition(partition or PartitionTable.MBR),
                folder=folder,
                label=label,
                block_size=int(block_size or BlockSizeOption.B512),
                progress=progress,
            )
            what = f"{volume.format.full_name} {volume.label!r} in {volume.partition.upper()}"
    status = path.stat()
    _say(f"{path}: {for_people(status.st_size)}, {what}; {for_people(status.st_blocks * 512)} on this machine")


SnapshotArgument: TypeAlias = Annotated[
    Path, typer.Argument(metavar="FILE", help="The file of a snapshot ('farplug connect --snapshot-file FILE').")
]


@app.command("info", cls=Command)
def info(
    file: SnapshotArgument,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=OUTPUT)] = False,
) -> None:
    """Look at a snapshot: of which image it is, and how much is in it."""
    from farplug.cli.output import size as for_people
    from farplug.store import overlay

    found = overlay.info(file)
    if json:
        about = {
            "snapshot": str(file),
            "image": str(found.base),
            "size": found.size,
            "block_size": found.block_size,
            "changed": found.changed,
            "half_committed": found.half_committed,
        }
        typer.echo(jsonlib.dumps(about))
        return
    _say(f"{file}: a snapshot of {found.base} ({for_people(found.size)}, blocks of {found.block_size} bytes)")
    typer.echo(f"{for_people(found.changed)} were changed")
    if found.half_committed:
        _say(f"a commit was broken off: a part of it is in the image. Finish it: farplug image commit {file}")


@app.command("commit", cls=Command)
def commit(
    file: SnapshotArgument,
    image: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Where the image is now, if it was moved.", show_default=False),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Write also to a disk that this machine uses (mounted), or that is not a RAW image."
        ),
    ] = False,
) -> None:
    """Write what is in a snapshot to its image, and remove the snapshot.

    A commit that was broken off, by a power cut even, has to be done again before the image is used.
    """
    from farplug.cli.output import size as for_people
    from farplug.store import overlay

    base = image or overlay.info(file).base
    with _progress() as progress:
        count = overlay.commit(file, base_path=base, progress=progress, force=force)
    _say(f"{for_people(count)} were written to {base}; {file} is removed")


@app.command("discard", cls=Command)
def discard(file: SnapshotArgument) -> None:
    """Remove a snapshot, and what the guest wrote to it."""
    from farplug.store import overlay

    overlay.discard(file)
    _say(f"{file} is removed")


def _say(text: str) -> None:
    typer.echo(printable(text))  # also a path out of a snapshot's header


def _default_output(folder: Path | None, suffix: str) -> Path:
    name = folder.resolve().name if folder is not None else ""
    if not name:
        raise UsageError(
            "the image has no name", reason=Reason.BAD_OPTION, remedy="name it with --output, or a folder with --from"
        )
    return Path(name + suffix)


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A callback that shows a bar on a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("copying", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total or None)
