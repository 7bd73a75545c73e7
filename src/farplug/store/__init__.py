"""Where a disk's blocks live: a file, memory. Knows nothing of USB and SCSI."""

from farplug.store.base import BLOCK_SIZE, CacheMode, ReadDone, Store, WriteDone
from farplug.store.file import FileStore
from farplug.store.iso import open_iso
from farplug.store.memory import MemoryStore

__all__ = ["BLOCK_SIZE", "CacheMode", "FileStore", "MemoryStore", "ReadDone", "Store", "WriteDone", "open_iso"]
