"""Storage for a disk's blocks: a file, a snapshot of one, memory. Independent of USB and SCSI."""

from typing import TYPE_CHECKING

from farplug.lazy import lazy_import

if TYPE_CHECKING:
    from farplug.store.base import BLOCK_SIZE, CacheMode, ReadDone, Store, WriteDone
    from farplug.store.file import FileStore
    from farplug.store.iso import open_iso
    from farplug.store.memory import MemoryStore
    from farplug.store.overlay import OverlayStore

__all__ = [
    "BLOCK_SIZE",
    "CacheMode",
    "FileStore",
    "MemoryStore",
    "OverlayStore",
    "ReadDone",
    "Store",
    "WriteDone",
    "open_iso",
]

lazy_import(
    globals(),
    {
        "BLOCK_SIZE": ".base",
        "CacheMode": ".base",
        "FileStore": ".file",
        "MemoryStore": ".memory",
        "OverlayStore": ".overlay",
        "ReadDone": ".base",
        "Store": ".base",
        "WriteDone": ".base",
        "open_iso": ".iso",
    },
)
