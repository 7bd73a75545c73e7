"""The USB transports that mass storage offers: in a module of its own, so that settings import no transport."""

from __future__ import annotations

from enum import StrEnum


class StorageTransport(StrEnum):
    """The USB transports that mass storage offers."""

    AUTO = "auto"
    """Bulk-Only as setting 0, and Attached SCSI as setting 1, which can be left out. CD-ROM drives: Bulk-Only only."""
    BOT = "bot"
    UAS = "uas"
    """Attached SCSI only: no firmware boots from it."""
