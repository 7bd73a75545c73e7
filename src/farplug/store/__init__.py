"""Where a disk's blocks live: a file, memory. Knows nothing of USB and SCSI."""

from farplug.store.base import ReadDone, Store, WriteDone
from farplug.store.file import FileStore
from farplug.store.memory import MemoryStore

__all__ = ["FileStore", "MemoryStore", "ReadDone", "Store", "WriteDone"]
