"""Commands: a table with one row for each, and the actions of logical units.

A logical unit takes a CDB and returns an :data:`Action`, which the transport carries out: so a command is implemented
once for Bulk-Only Transport and UAS. The action also determines the direction and the length of the data before any
data moves.

Sources: SPC-4, chapter 4.3 (CDBs); SBC-3, chapter 5 (commands).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeAlias, TypeVar

from farplug.scsi.sense import Sense
from farplug.usb.types import Buffer

MAX_CDB_SIZE = 16
"""Bytes. No unit supports longer ones (variable length, opcode 7F)."""

SERVICE_ACTION_OPCODES = frozenset((0x9E, 0x9F, 0xA3, 0xA4))
"""Opcodes that several commands share: the low five bits of byte 1, the service action, select the command."""

_GROUP_LENGTHS = {0: 6, 1: 10, 2: 10, 4: 16, 5: 12}

_LUN_BITS = 0xE0
"""Bits of byte 1 that are ignored, because SCSI-2 hosts put a logical unit number there. Where a command has a
protection field in these bits, its handler checks the field."""


def cdb_length(opcode: int) -> int | None:
    """Return the length of a CDB by its group code (SPC-4, table 26); None if the group has no fixed length."""
    return _GROUP_LENGTHS.get(opcode >> 5)


def extent(cdb: Buffer) -> tuple[int, int, int]:
    """Read the block range of a READ, WRITE, VERIFY or WRITE SAME of any length (SBC-3, chapter 5).

    Returns:
        The first block, the number of blocks, and byte 1: protection, DPO, FUA, BytChk, UNMAP, NDOB. READ(6) and
        WRITE(6) have none of these flags, and return 0.
    """
    length = cdb_length(cdb[0])
    if length == 10:
        return int.from_bytes(cdb[2:6]), int.from_bytes(cdb[7:9]), cdb[1]
    if length == 16:
        return int.from_bytes(cdb[2:10]), int.from_bytes(cdb[10:14]), cdb[1]
    if length == 12:
        return int.from_bytes(cdb[2:6]), int.from_bytes(cdb[6:10]), cdb[1]
    return int.from_bytes(cdb[1:4]) & 0x1FFFFF, cdb[4] or 256, 0


@dataclass(frozen=True, slots=True)
class Done:
    """No data moves: end with GOOD status."""


@dataclass(frozen=True, slots=True)
class Fail:
    """No data moves: end with CHECK CONDITION."""

    sense: Sense


@dataclass(frozen=True, slots=True)
class Respond:
    """Data-in: send these bytes, already cut to the allocation length."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Read:
    """Data-in: blocks inside the medium. With ``fua`` earlier writes are made durable first."""

    lba: int
    count: int
    fua: bool = False


@dataclass(frozen=True, slots=True)
class Write:
    """Data-out: blocks inside the medium.

    Attributes:
        lba: the first block.
        count: the number of blocks.
        durable: make the blocks durable before the status is sent.
        forced: ``durable`` because of this command (FUA, WRITE AND VERIFY), not because the write cache is off.
    """

    lba: int
    count: int
    durable: bool
    forced: bool = False


@dataclass(frozen=True, slots=True)
class Compare:
    """Data-out: compare with blocks inside the medium. The command fails with MISCOMPARE if they differ."""

    lba: int
    count: int


@dataclass(frozen=True, slots=True)
class Receive:
    """Data-out: parameters or a single block. ``then`` takes all ``length`` bytes and returns what to do."""

    length: int
    then: Callable[[Buffer], Outcome]


@dataclass(frozen=True, slots=True)
class Flush:
    """No data moves: make earlier writes durable."""


@dataclass(frozen=True, slots=True)
class Verify:
    """No data moves: check that blocks inside the medium can be read."""

    lba: int
    count: int


@dataclass(frozen=True, slots=True)
class Zero:
    """No data moves: write zeros.

    Attributes:
        extents: first block and number of blocks of each extent, inside the medium.
        unmap: release the space of the blocks, which then read as zeros.
        durable: make the zeros durable before the status is sent.
    """

    extents: tuple[tuple[int, int], ...]
    unmap: bool
    durable: bool


@dataclass(frozen=True, slots=True)
class Fill:
    """No data moves: write the same block ``count`` times, inside the medium."""

    lba: int
    count: int
    block: bytes
    durable: bool


Work: TypeAlias = Flush | Verify | Zero | Fill
"""Work that precedes the status."""

Outcome: TypeAlias = Done | Fail | Work
"""An action that moves no data."""

Action: TypeAlias = Outcome | Respond | Read | Write | Compare | Receive
"""What a command does."""

UnitT = TypeVar("UnitT", contravariant=True)


@dataclass(frozen=True, slots=True)
class Command(Generic[UnitT]):
    """A row of a unit's command table.

    Attributes:
        name: the name in the standard.
        usage: the CDB usage data (SPC-4, chapter 6.35.3): the opcode, then for each byte the bits that may be set; a
            service action has its value. As long as the CDB. A CDB with another bit set ends with INVALID FIELD IN CDB.
        handler: returns the action; called with the unit and a CDB of at least the length of ``usage``.
    """

    name: str
    usage: bytes
    handler: Callable[[UnitT, Buffer], Action]
    forbidden: int = field(init=False)
    """The bits that must not be set, for the CDB as one big-endian number."""

    def __post_init__(self) -> None:
        length = len(self.usage)
        if length != cdb_length(self.usage[0]):
            raise ValueError(f"a CDB with the opcode {self.usage[0]:02x} does not have {length} bytes")
        allowed = int.from_bytes((0xFF, self.usage[1] | _LUN_BITS, *self.usage[2:]))
        object.__setattr__(self, "forbidden", (1 << 8 * length) - 1 & ~allowed)

    @property
    def opcode(self) -> int:
        """Return the first byte."""
        return self.usage[0]

    @property
    def service_action(self) -> int | None:
        """Return the service action; None if the opcode has only one command."""
        return self.usage[1] & 0x1F if self.opcode in SERVICE_ACTION_OPCODES else None

    @property
    def length(self) -> int:
        """Return the length of the CDB in bytes."""
        return len(self.usage)

    def __str__(self) -> str:
        return self.name


class CommandTable(Generic[UnitT]):
    """Commands by opcode and service action. Iteration yields the rows in this order."""

    def __init__(self, rows: Iterable[Command[UnitT]]) -> None:
        self._rows = {(row.service_action or 0) << 8 | row.opcode: row for row in rows}

    def find(self, cdb: Buffer) -> Command[UnitT] | None:
        """Return the command of a CDB of at least one byte; None if the table has no such command."""
        key = cdb[0]
        if key in SERVICE_ACTION_OPCODES and len(cdb) > 1:
            key |= (cdb[1] & 0x1F) << 8
        return self._rows.get(key)

    def __iter__(self) -> Iterator[Command[UnitT]]:
        return iter(sorted(self._rows.values(), key=lambda row: (row.opcode, row.service_action or 0)))
