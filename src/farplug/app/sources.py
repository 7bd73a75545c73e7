"""Sources: images, ISOs and folders of this machine, opened, and made into USB devices."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Event
from typing import TypeAlias

from farplug.app.settings import FolderFormat, Source, SourceKind, StorageSettings
from farplug.errors import ImageError, Reason, Remedy
from farplug.scsi.disk import DiskUnit
from farplug.scsi.inquiry import CDROM_PRODUCT, PRODUCT
from farplug.store import FileStore, OverlayStore, Store, open_iso
from farplug.store.content import Content
from farplug.virtual.cdrom import CdromDrive
from farplug.virtual.device import VirtualDevice
from farplug.virtual.storage import MassStorage
from farplug.virtual.unit import LogicalUnit

Copying: TypeAlias = Callable[[str, int, int], None]
"""Called on the event loop while a folder is copied: its label, bytes copied, bytes in all."""


class _Abandoned(Exception):
    """The copy was cancelled."""


@dataclass(slots=True, eq=False)
class OpenSource:
    """A source that is open.

    Attributes:
        source: what was opened.
        label: what it is called: the name of the file, or ``cdrom0``.
        title: the label, and what is in it: ``cdrom0 (installer.iso)``.
        store: its blocks.
        place: its position among all sources.
        unit: the logical unit that it became; None: none yet.
    """

    source: Source
    label: str
    title: str
    store: Store
    place: int = 0
    unit: LogicalUnit | None = None

    @property
    def product(self) -> str:
        """Return the product name that the guest sees."""
        return CDROM_PRODUCT if self.source.kind is SourceKind.CDROM else PRODUCT

    def make_unit(self, luns: int) -> LogicalUnit:
        """Make the source one of ``luns`` logical units."""
        if self.source.kind is SourceKind.CDROM:
            self.unit = CdromDrive(self.store, luns=luns)
        else:
            self.unit = LogicalUnit(DiskUnit(self.store, luns=luns), self.store)
        return self.unit


@dataclass(slots=True, eq=False)
class Sources:
    """The sources of a guest that are open.

    Attributes:
        opened: those of its settings, in their order.
    """

    opened: list[OpenSource] = field(default_factory=list)
    _labels: set[str] = field(default_factory=set)

    async def open(
        self,
        sources: Sequence[Source],
        storage: StorageSettings,
        copying: Copying,
        note: Callable[[str, Remedy], None] = lambda text, remedy: None,
    ) -> None:
        """Open all sources except USB devices. A folder is copied first.

        Args:
            sources: what to open.
            storage: how.
            copying: called while a folder is copied.
            note: called with what may be a mistake.

        Raises:
            ImageError: a source cannot be used. :meth:`close` closes the others.
        """
        for place, source in enumerate(sources):
            if source.kind is SourceKind.USB_DEVICE:
                continue
            opened = await open_source(source, storage, self, copying)
            opened.place = place
            self.opened.append(opened)
            if source.kind in (SourceKind.DISK, SourceKind.READ_ONLY_DISK) and _looks_like_iso(Path(source.path)):
                remedy = Remedy("to plug it in as a CD-ROM", setting="usb_cdrom", value=source.path)
                note(f"{opened.label} is an ISO image", remedy)

    def name(self, source: Source) -> tuple[str, str]:
        """Return a label that is not in use, and a title for a source."""
        path = Path(source.path)
        name = path.name or str(path)
        if source.kind is SourceKind.CDROM:
            number = next(n for n in range(len(self._labels) + 1) if f"cdrom{n}" not in self._labels)
            label, title = f"cdrom{number}", f"cdrom{number} ({name})"
        else:
            numbers = range(2, len(self._labels) + 3)
            labels = [name, *(f"{name}-{number}" for number in numbers)]
            label = title = next(label for label in labels if label not in self._labels)
        self._labels.add(label)
        return label, title

    def release(self, opened: OpenSource) -> None:
        """Take note that a source is closed: its label is free."""
        self.free(opened.label)
        if opened in self.opened:
            self.opened.remove(opened)

    def free(self, label: str) -> None:
        """Take note that no source has a label any more."""
        self._labels.discard(label)

    async def close(self) -> None:
        """Close the stores of all sources; closing a store twice does nothing."""
        opened, self.opened = self.opened, []
        results = await asyncio.gather(*(one.store.close() for one in opened), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result


async def open_source(source: Source, storage: StorageSettings, sources: Sources, copying: Copying) -> OpenSource:
    """Open a source. A folder is copied first.

    Raises:
        ImageError: the source cannot be used.
    """
    label, title = sources.name(source)
    try:
        if source.kind is SourceKind.FOLDER:
            store = await _open_folder(Path(source.path), storage, partial(copying, label))
        else:
            store = _open(source, storage)
    except ImageError as error:
        sources.free(label)
        raise _explained(source, error, sources) from error
    except BaseException:
        sources.free(label)
        raise
    return OpenSource(source, label, title, store)


def _explained(source: Source, error: ImageError, sources: Sources) -> ImageError:
    """Return the error of opening a source, with what the other sources explain."""
    before = [one.source.path for one in sources.opened]
    if error.reason is Reason.IN_USE and any(_same_file(source.path, path) for path in before):
        return ImageError(
            f"{source.path} is named twice: a disk that the VM writes to is the only one of its image",
            reason=error.reason,
            remedy="name it once; only read-only disks and disks with a snapshot share an image",
        )
    return error


def _open(source: Source, storage: StorageSettings) -> Store:
    if source.kind is SourceKind.CDROM:
        return open_iso(source.path, force=storage.force)
    if source.kind is SourceKind.DISK and (storage.snapshot or source.snapshot is not None):
        return OverlayStore.open(
            source.path,
            source.snapshot,
            block_size=int(storage.block_size),
            cache=storage.cache,
            force=storage.force,
        )
    return FileStore.open(
        source.path,
        read_only=source.kind is SourceKind.READ_ONLY_DISK,
        block_size=int(storage.block_size),
        cache=storage.cache,
        force=storage.force,
    )


async def _open_folder(path: Path, storage: StorageSettings, copying: Callable[[int, int], None]) -> Store:
    """Copy a folder in a thread. When the call is cancelled, the thread ends soon."""
    from farplug.image import Format, folder_store

    loop = asyncio.get_running_loop()
    abandoned = Event()

    def report(done: int, total: int) -> None:
        if abandoned.is_set():
            raise _Abandoned
        loop.call_soon_threadsafe(copying, done, total)

    copy = asyncio.ensure_future(
        asyncio.to_thread(
            folder_store,
            path,
            format=None if storage.folder_format is FolderFormat.AUTO else Format(storage.folder_format),
            block_size=int(storage.block_size),
            progress=report,
        )
    )
    try:
        return await asyncio.shield(copy)
    except asyncio.CancelledError:
        abandoned.set()
        await asyncio.wait([copy])
        if copy.exception() is None:
            await copy.result().close()
        raise


def device_of(group: Sequence[OpenSource], storage: StorageSettings) -> VirtualDevice:
    """Make one device of sources, which become its logical units."""
    units = [one.make_unit(len(group)) for one in group]
    return VirtualDevice(
        MassStorage(*units, transport=storage.transport),
        product=group[0].product,
        serial_number=group[0].store.serial_number,
        speeds=storage.speed.speeds,
    )


def _same_file(one: str, other: str) -> bool:
    try:
        return Path(one).samefile(other)
    except OSError:
        return False


def _looks_like_iso(path: Path) -> bool:
    """Return whether an image is of a CD only: what boots as a disk, too, begins with a master boot record."""
    try:
        with path.open("rb") as file:
            content = Content.read(file.fileno())
    except OSError:
        return False
    return content.is_cd and not content.has_mbr
