"""Commands: a table with one row for each, and what a logical unit wants done for one.

A logical unit is handed a CDB and returns an :data:`Action`, which the transport carries out: so a command is written
once, whether it comes over Bulk-Only Transport or UAS. The action also says in which direction data moves and how
much, before any of it moves.

Sources: SPC-4, chapter 4.3 (CDBs); SBC-3, chapter 5 (commands).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeAlias, TypeVar

from farplug.scsi.sense import Sense
from farplug.usb.types import Buffer

MAX_CDB_SIZE = 16
"""Longer ones (variable length, opcode 7F) are not supported by any unit."""

_GROUP_LENGTHS = {0: 6, 1: 10, 2: 10, 4: 16, 5: 12}


def cdb_length(opcode: int) -> int | None:
    """How long a CDB is by its group code (SPC-4, table 26); None if the opcode does not tell."""
    return _GROUP_LENGTHS.get(opcode >> 5)


@dataclass(frozen=True, slots=True)
class Done:
    """Nothing is left to do; no data moves."""


@dataclass(frozen=True, slots=True)
class Fail:
    """CHECK CONDITION; no data moves."""

    sense: Sense


@dataclass(frozen=True, slots=True)
class Respond:
    """Data-in: send these bytes, already cut to the allocation length."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Read:
    """Data-in: blocks of the medium, inside it."""

    lba: int
    count: int


@dataclass(frozen=True, slots=True)
class Write:
    """Data-out: blocks of the medium, inside it. With ``fua`` they are durable before the status is sent."""

    lba: int
    count: int
    fua: bool


@dataclass(frozen=True, slots=True)
class Flush:
    """No data moves: make durable what was written."""


Action: TypeAlias = Done | Fail | Respond | Read | Write | Flush
"""What a transport does for a command."""

Unit = TypeVar("Unit")


@dataclass(frozen=True, slots=True)
class Command(Generic[Unit]):
    """A row of a unit's command table.

    Attributes:
        name: as the standard spells it.
        usage: the CDB usage data (SPC-4, chapter 6.35.3): the opcode, then each byte's bits that may be set. The CDB's
            length is its length. A CDB with another bit set ends with INVALID FIELD IN CDB.
        handler: decides; called with the unit and a CDB of at least that length.
        despite_attention: performed also while a unit attention waits, without taking it (SPC-4, chapter 5.14).
    """

    name: str
    usage: bytes
    handler: Callable[[Unit, Buffer], Action]
    despite_attention: bool = False
    forbidden: int = field(init=False)
    """The bits that must not be set, in the CDB read as one big-endian number."""

    def __post_init__(self) -> None:
        length = len(self.usage)
        if length != cdb_length(self.usage[0]):
            raise ValueError(f"a CDB with the opcode {self.usage[0]:02x} has not {length} bytes")
        allowed = int.from_bytes(b"\xff" + self.usage[1:])
        object.__setattr__(self, "forbidden", (1 << 8 * length) - 1 & ~allowed)

    @property
    def opcode(self) -> int:
        """The first byte."""
        return self.usage[0]

    @property
    def length(self) -> int:
        """Of the CDB, in bytes."""
        return len(self.usage)

    def __str__(self) -> str:
        return self.name


def command_table(rows: Iterable[Command[Unit]]) -> dict[int, Command[Unit]]:
    """Index rows by opcode."""
    return {row.opcode: row for row in rows}
