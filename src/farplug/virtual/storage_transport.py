"""The protocols that mass storage offers: an enum of its own, which costs no import of the protocols."""

from __future__ import annotations

from enum import StrEnum


class StorageTransport(StrEnum):
    """How the guest may talk to mass storage."""

    AUTO = "auto"
    """Bulk-Only as setting 0, and Attached SCSI as setting 1, which can be left out. CD-ROM drives: Bulk-Only alone."""
    BOT = "bot"
    UAS = "uas"
    """Attached SCSI alone: no firmware boots from it."""
