"""Commands: a table with one row for each, and what a logical unit wants done for one.

A logical unit is handed a CDB and returns an :data:`Action`, which the transport carries out: so a command is written
once, whether it comes over Bulk-Only Transport or UAS. The action also says in which direction data moves and how
much, before any of it moves.

Sources: SPC-4, chapter 4.3 (CDBs); SBC-3, chapter 5 (commands).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeAlias, TypeVar

from farplug.scsi.sense import Sense
from farplug.usb.types import Buffer

MAX_CDB_SIZE = 16
"""Longer ones (variable length, opcode 7F) are not supported by any unit."""

SERVICE_ACTION_OPCODES = frozenset((0x9E, 0x9F, 0xA3, 0xA4))
"""Opcodes that many commands share: the low five bits of byte 1, the service action, tell which one it is."""

_GROUP_LENGTHS = {0: 6, 1: 10, 2: 10, 4: 16, 5: 12}

_LUN_BITS = 0xE0
"""Of byte 1. SCSI-2 hosts put a logical unit number there, so it is ignored. Where a command has a protection field
in its place, the handler looks at it."""


def cdb_length(opcode: int) -> int | None:
    """How long a CDB is by its group code (SPC-4, table 26); None if the opcode does not tell."""
    return _GROUP_LENGTHS.get(opcode >> 5)


def extent(cdb: Buffer) -> tuple[int, int, int]:
    """Read which blocks a READ, WRITE, VERIFY or WRITE SAME of any length names (SBC-3, chapter 5).

    Returns:
        The first block, how many, and byte 1: protection, DPO, FUA, BytChk, UNMAP, NDOB. READ(6) and WRITE(6) have
        none of these.
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
    """Data-in: blocks of the medium, inside it. With ``fua`` what was written is made durable before."""

    lba: int
    count: int
    fua: bool = False


@dataclass(frozen=True, slots=True)
class Write:
    """Data-out: blocks of the medium, inside it.

    Attributes:
        lba: the first one.
        count: how many.
        durable: they are so before the status is sent.
        forced: because this command asks for it (FUA, WRITE AND VERIFY), not because the write cache is off.
    """

    lba: int
    count: int
    durable: bool
    forced: bool = False


@dataclass(frozen=True, slots=True)
class Compare:
    """Data-out: compare with blocks of the medium, inside it. The command fails with MISCOMPARE if they differ."""

    lba: int
    count: int


@dataclass(frozen=True, slots=True)
class Receive:
    """Data-out: parameters or a single block. When all ``length`` bytes have come, ``then`` says what they ask for."""

    length: int
    then: Callable[[Buffer], Outcome]


@dataclass(frozen=True, slots=True)
class Flush:
    """No data moves: make durable what was written."""


@dataclass(frozen=True, slots=True)
class Verify:
    """No data moves: see whether these blocks, inside the medium, can be read."""

    lba: int
    count: int


@dataclass(frozen=True, slots=True)
class Zero:
    """No data moves: the blocks read as zeros from now on.

    Attributes:
        extents: first block and number of blocks of each, inside the medium.
        unmap: give their space back.
        durable: before the status is sent.
    """

    extents: tuple[tuple[int, int], ...]
    unmap: bool
    durable: bool


@dataclass(frozen=True, slots=True)
class Fill:
    """No data moves: write the same block to all these, inside the medium."""

    lba: int
    count: int
    block: bytes
    durable: bool


Work: TypeAlias = Flush | Verify | Zero | Fill
"""What a transport has done before it sends the status."""

Outcome: TypeAlias = Done | Fail | Work
"""What can follow when no data moves (any more)."""

Action: TypeAlias = Outcome | Respond | Read | Write | Compare | Receive
"""What a transport does for a command."""

UnitT = TypeVar("UnitT", contravariant=True)


@dataclass(frozen=True, slots=True)
class Command(Generic[UnitT]):
    """A row of a unit's command table.

    Attributes:
        name: as the standard spells it.
        usage: the CDB usage data (SPC-4, chapter 6.35.3): the opcode, then each byte's bits that may be set; a service
            action stands for itself. The CDB's length is its length. A CDB with another bit set ends with INVALID FIELD
            IN CDB.
        handler: decides; called with the unit and a CDB of at least that length.
    """

    name: str
    usage: bytes
    handler: Callable[[UnitT, Buffer], Action]
    forbidden: int = field(init=False)
    """The bits that must not be set, in the CDB read as one big-endian number."""

    def __post_init__(self) -> None:
        length = len(self.usage)
        if length != cdb_length(self.usage[0]):
            raise ValueError(f"a CDB with the opcode {self.usage[0]:02x} has not {length} bytes")
        allowed = int.from_bytes((0xFF, self.usage[1] | _LUN_BITS, *self.usage[2:]))
        object.__setattr__(self, "forbidden", (1 << 8 * length) - 1 & ~allowed)

    @property
    def opcode(self) -> int:
        """The first byte."""
        return self.usage[0]

    @property
    def service_action(self) -> int | None:
        """Which of the opcode's commands it is; None if the opcode has one only."""
        return self.usage[1] & 0x1F if self.opcode in SERVICE_ACTION_OPCODES else None

    @property
    def length(self) -> int:
        """Of the CDB, in bytes."""
        return len(self.usage)

    def __str__(self) -> str:
        return self.name


class CommandTable(Generic[UnitT]):
    """Commands by opcode and service action. Iterating gives the rows in this order."""

    def __init__(self, rows: Iterable[Command[UnitT]]) -> None:
        self._rows = {(row.service_action or 0) << 8 | row.opcode: row for row in rows}

    def find(self, cdb: Buffer) -> Command[UnitT] | None:
        """Find the command that a CDB of one byte at least asks for; None if there is none."""
        key = cdb[0]
        if key in SERVICE_ACTION_OPCODES and len(cdb) > 1:
            key |= (cdb[1] & 0x1F) << 8
        return self._rows.get(key)

    def __iter__(self) -> Iterator[Command[UnitT]]:
        return iter(sorted(self._rows.values(), key=lambda row: (row.opcode, row.service_action or 0)))
