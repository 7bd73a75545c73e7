"""What a person names to be plugged in, opened, and put into devices."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from pathlib import Path
from threading import Event

from farplug.errors import ImageError, Reason
from farplug.scsi.disk import DiskUnit
from farplug.scsi.inquiry import CDROM_PRODUCT, PRODUCT
from farplug.shell import shell_word
from farplug.store import BLOCK_SIZE, CacheMode, FileStore, OverlayStore, Store, open_iso
from farplug.store.content import Content
from farplug.usb.types import Speed
from farplug.virtual.cdrom import CdromDrive
from farplug.virtual.device import VirtualDevice
from farplug.virtual.storage import MassStorage, StorageTransport
from farplug.virtual.unit import LogicalUnit


class _GivenUp(Exception):
    """Nobody waits for a copy any more."""


class Kind(Enum):
    """What a medium is for the guest."""

    DISK = auto()
    READ_ONLY_DISK = auto()
    CDROM = auto()
    FOLDER = auto()


@dataclass(frozen=True, slots=True)
class Wish:
    """What a person names.

    Attributes:
        kind: what it is to be.
        path: of the image or folder.
        snapshot: the file that keeps what the VM writes to a disk; None: there is none.
        place: where it was named among all devices of the command line.
    """

    kind: Kind
    path: Path
    snapshot: Path | None = None
    place: int = 0


@dataclass(frozen=True, slots=True)
class Manner:
    """How all of them are plugged.

    Attributes:
        speeds: what the devices may run at, the best first.
        transport: how the guest may talk to them.
        block_size: of disks, in bytes.
        cache: when what is written to disks is durable.
        force: also an image that this machine uses, or of another format: its bytes as they are.
        snapshot: what is written to disks that have no snapshot file is discarded, and the images do not change.
        folder_format: the file system of folders, a value of :class:`farplug.image.Format`; None: what fits.
    """

    speeds: Sequence[Speed] = (Speed.SUPER, Speed.HIGH)
    transport: StorageTransport = StorageTransport.AUTO
    block_size: int = BLOCK_SIZE
    cache: CacheMode = CacheMode.WRITEBACK
    force: bool = False
    snapshot: bool = False
    folder_format: str | None = None


@dataclass(frozen=True, slots=True)
class Medium:
    """Something that was opened.

    Attributes:
        kind: what it is.
        label: what it is called in the output, and in commands: the name of a file, or ``cdrom0``.
        title: the same, and what is in it: ``cdrom0 (installer.iso)``.
        store: its blocks.
        place: that of its :class:`Wish`.
    """

    kind: Kind
    label: str
    title: str
    store: Store
    place: int

    @property
    def product(self) -> str:
        """What the device is called in the guest."""
        return CDROM_PRODUCT if self.kind is Kind.CDROM else PRODUCT

    def unit(self, luns: int) -> LogicalUnit:
        """Make it one of so many logical units."""
        if self.kind is Kind.CDROM:
            return CdromDrive(self.store, luns=luns)
        return LogicalUnit(DiskUnit(self.store, luns=luns), self.store)


@dataclass(slots=True)
class Media:
    """What is to be plugged in: opened by :meth:`open`, put into devices by :meth:`devices`."""

    wishes: Sequence[Wish]
    manner: Manner = Manner()
    _media: list[Medium] = field(default_factory=list)
    _units: list[tuple[str, LogicalUnit]] = field(default_factory=list)

    async def open(
        self, progress: Callable[[str, int, int], None], note: Callable[[str], None] = lambda text: None
    ) -> None:
        """Open all of them. A folder is copied first.

        Args:
            progress: called from another thread with the name of a folder, how many bytes are copied, and of how many.
            note: called with what may be a mistake.

        Raises:
            ImageError: one cannot be used. :meth:`close` closes the others.
        """
        drives = 0
        for wish in self.wishes:
            name = wish.path.name or str(wish.path)
            label = title = str(wish.path) if any(medium.label == name for medium in self._media) else name
            if wish.kind is Kind.CDROM:
                label, title, drives = f"cdrom{drives}", f"cdrom{drives} ({name})", drives + 1
            try:
                if wish.kind is Kind.FOLDER:
                    store = await self._open_folder(wish.path, partial(progress, label))
                else:
                    store = self._open(wish)
            except ImageError as error:
                raise self._explained(wish, error) from error
            self._media.append(Medium(wish.kind, label, title, store, wish.place))
            if wish.kind in (Kind.DISK, Kind.READ_ONLY_DISK) and _looks_like_iso(wish.path):
                note(f"{label} is an ISO image: --usb-cdrom {shell_word(wish.path)} shows it as a CD-ROM")

    def _explained(self, wish: Wish, error: ImageError) -> ImageError:
        """Return the error of opening it, with what the command line knows."""
        before = self.wishes[: len(self._media)]
        if error.reason is Reason.IN_USE and any(_same_file(wish.path, other.path) for other in before):
            return ImageError(
                f"{wish.path} is named twice: a disk that the VM writes to is the only one of its image",
                reason=error.reason,
                remedy="name it once; only read-only disks (--usb-disk-ro) and disks with a snapshot share an image",
            )
        return error

    def _open(self, wish: Wish) -> Store:
        manner = self.manner
        if wish.kind is Kind.CDROM:
            return open_iso(wish.path, force=manner.force)
        if wish.kind is Kind.DISK and (manner.snapshot or wish.snapshot is not None):
            return OverlayStore.open(
                wish.path,
                wish.snapshot,
                block_size=manner.block_size,
                cache=manner.cache,
                force=manner.force,
            )
        return FileStore.open(
            wish.path,
            read_only=wish.kind is Kind.READ_ONLY_DISK,
            block_size=manner.block_size,
            cache=manner.cache,
            force=manner.force,
        )

    async def _open_folder(self, path: Path, progress: Callable[[int, int], None]) -> Store:
        """In a thread, because it takes long; when that is given up, the thread ends soon."""
        from farplug.image import Format, folder_store

        given_up = Event()

        def report(done: int, total: int) -> None:
            if given_up.is_set():
                raise _GivenUp
            progress(done, total)

        copying = asyncio.ensure_future(
            asyncio.to_thread(
                folder_store,
                path,
                format=None if self.manner.folder_format is None else Format(self.manner.folder_format),
                block_size=self.manner.block_size,
                progress=report,
            )
        )
        try:
            return await asyncio.shield(copying)
        except asyncio.CancelledError:
            given_up.set()
            await asyncio.wait([copying])
            if copying.exception() is None:
                await copying.result().close()
            raise

    def drives(self) -> Sequence[tuple[str, CdromDrive]]:
        """The CD-ROM drives of the devices, with a label each."""
        return [(label, unit) for label, unit in self._units if isinstance(unit, CdromDrive)]

    def unfinished(self) -> dict[str, int]:
        """Return the labels of the disks that the VM may not have finished writing to (:attr:`LogicalUnit.unfinished`).

        The value tells one run of writes from the next.
        """
        return {label: run for label, unit in self._units if (run := unit.unfinished)}

    def devices(self, ports: int) -> dict[VirtualDevice, Sequence[Medium]]:
        """Make devices of them, with their logical units: one of each; if there are fewer ports, one of all."""
        groups = [self._media] if ports < len(self._media) else [[medium] for medium in self._media]
        return {self._device(group): tuple(group) for group in groups}

    def _device(self, media: Sequence[Medium]) -> VirtualDevice:
        units = [medium.unit(len(media)) for medium in media]
        self._units += [(medium.label, unit) for medium, unit in zip(media, units, strict=True)]
        return VirtualDevice(
            MassStorage(*units, transport=self.manner.transport),
            product=media[0].product,
            serial_number=media[0].store.serial_number,
            speeds=self.manner.speeds,
        )

    async def close(self) -> None:
        """Give everything back. The devices are unplugged."""
        media, self._media = self._media, []
        self._units.clear()
        for medium in media:
            await medium.store.close()


def _same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def _looks_like_iso(path: Path) -> bool:
    """Whether an image is of a CD only: what boots as a disk, too, begins with a master boot record."""
    try:
        with path.open("rb") as file:
            content = Content.read(file.fileno())
    except OSError:
        return False
    return content.is_cd and not content.has_mbr
