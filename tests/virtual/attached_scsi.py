"""A small USB Attached SCSI initiator in memory, for the tests of the disk."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.virtual.bulk_only import IN, OUT, Guest, Listener, Pattern, pieces

from farplug.store import Store
from farplug.usb import Speed, Status, Transfer, TransferType
from farplug.virtual import Numbers, VirtualDevice, disk_device
from farplug.virtual.iu import IuId, TaskFunction
from farplug.virtual.storage_transport import StorageTransport
from farplug.virtual.uas import Uas

COMMAND_PIPE, STATUS_PIPE = 0x04, 0x83
TUR = bytes(6)


def address(lun: int) -> bytes:
    """Return the 8 bytes of a LUN, single level."""
    return bytes((0, lun, 0, 0, 0, 0, 0, 0))


def command_iu(cdb: bytes, tag: int, *, lun: int | bytes = 0, attribute: int = 0) -> bytes:
    """Build a command IU; additional CDB bytes come in words of four."""
    extra = cdb[16:]
    extra += bytes(-len(extra) % 4)
    where = lun if isinstance(lun, bytes) else address(lun)
    return struct.pack(">BxHBxBx8s16s", 1, tag, attribute, len(extra), where, cdb[:16]) + extra


def management_iu(function: int, tag: int, managed: int = 0, *, lun: int | bytes = 0) -> bytes:
    """Build a task management IU."""
    return struct.pack(">BxHBxH8s", 5, tag, function, managed, lun if isinstance(lun, bytes) else address(lun))


def response(tag: int, code: int) -> bytes:
    """Build the response IU that is expected."""
    return struct.pack(">BxHxxxB", 4, tag, code)


@dataclass(eq=False)
class Issued:
    """A command that was issued: its data transfers, and the IU that ended it (empty so far)."""

    tag: int
    receive: Sequence[int]
    send: Sequence[bytes]
    parts: list[Transfer] = field(default_factory=list)
    iu: bytes = b""

    @property
    def status(self) -> int:
        """Return the status of the sense IU, which must be well formed."""
        assert self.iu, "it has not ended"
        id, tag, qualifier, status, length = struct.unpack_from(">BxHHB7xH", self.iu)
        assert (id, tag, qualifier, length) == (3, self.tag, 0, len(self.iu) - 16)
        assert bool(length) == (status == 2)
        return int(status)

    @property
    def sense(self) -> tuple[int, int, int]:
        """Return key, code and qualifier; zeros for none."""
        if self.status != 2:
            return 0, 0, 0
        return self.iu[16 + 2], self.iu[16 + 12], self.iu[16 + 13]

    @property
    def data(self) -> bytes:
        """Return the data-in so far."""
        return b"".join(bytes(part.reply) for part in self.parts if part.endpoint == IN)


class Initiator(Guest):
    """Drives a device at SuperSpeed (with streams) or High Speed. No transfer is completed twice."""

    def __init__(self, device: VirtualDevice) -> None:
        super().__init__(device)
        self.submitted: list[Transfer] = []
        self.issued: dict[int, Issued] = {}
        self.asked: list[Transfer] = []
        self.ius: list[bytes] = []
        self.stores: Sequence[Store] = ()
        self.streams = False

    @classmethod
    async def plug_in(
        cls,
        *stores: Store,
        speed: Speed = Speed.SUPER,
        transport: StorageTransport = StorageTransport.AUTO,
        attention: bool = False,
    ) -> Initiator:
        """Plug a disk for each store into a guest that has selected USB Attached SCSI."""
        initiator = cls(disk_device(*stores, speeds=(speed,), transport=transport))
        initiator.stores = stores
        await initiator.device.open(Listener())
        await initiator.enumerate()
        if not attention:
            initiator.clear_unit_attentions()
        return initiator

    async def enumerate(self) -> None:
        await super().enumerate()
        await self.choose(len(self.settings()) - 1)

    def settings(self) -> list[int]:
        """Return the protocols of the alternate settings."""
        (function,) = self.device.functions
        return [one.interface_protocol for one in function.interfaces(self.device.identity.speed, Numbers())]

    async def choose(self, alternate: int) -> None:
        """Select an alternate setting, and allocate streams if it has any. Earlier commands are forgotten."""
        assert await self.device.set_interface(0, alternate) is Status.SUCCESS
        self.issued.clear()
        self.asked.clear()
        self.streams = self.settings()[alternate] == 0x62 and self.device.identity.speed is Speed.SUPER
        if self.streams:
            assert await self.device.allocate_streams((IN, OUT, STATUS_PIPE), 32) is Status.SUCCESS

    def clear_unit_attentions(self) -> None:
        """Clear the unit attentions of all units."""
        for lun in range(16):
            self.run(TUR, lun=lun)

    @property
    def uas(self) -> Uas:
        """Return the state machine, for assertions on the memory that it uses."""
        (function,) = self.device.functions
        found = getattr(function, "_uas")  # noqa: B009
        assert isinstance(found, Uas)
        return found

    # Transfers

    def _submit(self, transfer: Transfer) -> Transfer:
        self.submitted.append(transfer)
        return super()._submit(transfer)

    def _bulk(self, endpoint: int, tag: int, *, length: int = 0, data: bytes = b"") -> Transfer:
        stream = tag if self.streams else 0
        transfer = Transfer(
            TransferType.BULK, endpoint, self.completed.append, length=length, data=data, stream_id=stream
        )
        return self._submit(transfer)

    def issue(self, iu: bytes) -> None:
        """Send an IU, which is always accepted."""
        transfer = Transfer(TransferType.BULK, COMMAND_PIPE, self.completed.append, data=iu)
        assert self._submit(transfer).status is Status.SUCCESS

    def read_status(self, tag: int = 0, length: int = 128) -> Transfer:
        """Submit a transfer for a status: with streams of one command, without streams of any command."""
        return self._bulk(STATUS_PIPE, tag, length=length)

    def data_in(self, tag: int, length: int) -> Transfer:
        return self._bulk(IN, tag, length=length)

    def data_out(self, tag: int, data: bytes) -> Transfer:
        return self._bulk(OUT, tag, data=data)

    # Commands

    def start(
        self,
        cdb: str | bytes,
        *,
        receive: int = 0,
        send: bytes = b"",
        sizes: Sequence[int] = (),
        tag: int | None = None,
        lun: int | bytes = 0,
        attribute: int = 0,
        late: bool = False,
    ) -> Issued:
        """Issue a command.

        Args:
            cdb: hex digits, or bytes.
            receive: bytes of the data-in transfers.
            send: the data-out.
            sizes: of the data transfers.
            tag: the lowest free one if it is not given.
            lun: its number, or all 8 bytes.
            attribute: of the task.
            late: with streams, send the command first.
        """
        raw = bytes.fromhex(cdb) if isinstance(cdb, str) else cdb
        if tag is None:
            tag = next(one for one in range(1, 33) if one not in self.issued)
        cuts = pieces(len(send), sizes)
        parts = [send[sum(cuts[:index]) : sum(cuts[: index + 1])] for index in range(len(cuts))]
        issued = self.issued[tag] = Issued(tag, pieces(receive, sizes), parts)
        iu = command_iu(raw, tag, lun=lun, attribute=attribute)
        if late:
            self.issue(iu)
        self.asked.append(self.read_status(tag))
        if self.streams:
            self._move(issued)
        if not late:
            self.issue(iu)
        self.pump()
        return issued

    def run(
        self,
        cdb: str | bytes,
        *,
        receive: int = 0,
        send: bytes = b"",
        sizes: Sequence[int] = (),
        lun: int | bytes = 0,
        late: bool = False,
    ) -> Issued:
        """Issue a command that ends immediately, with all its transfers."""
        issued = self.start(cdb, receive=receive, send=send, sizes=sizes, lun=lun, late=late)
        assert issued.iu
        assert all(part.status is Status.SUCCESS for part in issued.parts)
        assert all(part.actual == part.length for part in issued.parts if part.endpoint == OUT)
        return issued

    def manage(self, function: TaskFunction | int, managed: int = 0, *, tag: int = 32, lun: int | bytes = 0) -> int:
        """Send a task management IU. Returns the response code."""
        issued = self.issued[tag] = Issued(tag, (), ())
        self.asked.append(self.read_status(tag))
        self.issue(management_iu(function, tag, managed, lun=lun))
        self.pump()
        assert issued.iu[:-1] == response(tag, 0)[:-1]
        return issued.iu[-1]

    def forget(self, *gone: Issued) -> None:
        """Cancel the status transfers of aborted commands."""
        for issued in gone:
            assert not issued.iu
            del self.issued[issued.tag]
            status = next(one for one in self.asked if one.stream_id in (0, issued.tag))
            self.asked.remove(status)
            self.device.cancel(status)
            assert status.status is Status.CANCELLED

    def resubmit(self, issued: Issued) -> bool:
        """Cancel the data transfers of a command that are pending, and submit them again, as QEMU does."""
        pending = [index for index, part in enumerate(issued.parts) if part.status is None]
        for index in reversed(pending):
            self.device.cancel(issued.parts[index])
            assert issued.parts[index].status is Status.CANCELLED
        for index in pending:
            old = issued.parts[index]
            again = (
                self.data_in(issued.tag, old.length)
                if old.endpoint == IN
                else self.data_out(issued.tag, bytes(old.data))
            )
            issued.parts[index] = again
        self.pump()
        return bool(pending)

    def pump(self) -> None:
        """Handle the IUs that arrived on the status pipe."""
        while ended := [one for one in self.asked if one.status is not None]:
            for transfer in ended:
                self.asked.remove(transfer)
                if transfer.status is Status.SUCCESS:
                    self._take(bytes(transfer.reply))

    def _take(self, iu: bytes) -> None:
        self.ius.append(iu)
        tag = int.from_bytes(iu[2:4])
        issued = self.issued[tag]
        if iu[0] in (IuId.READ_READY, IuId.WRITE_READY):
            assert not self.streams
            assert len(iu) == 4
            assert bool(issued.receive) == (iu[0] == IuId.READ_READY)
            self.asked.append(self.read_status())
            self._move(issued)
        else:
            issued.iu = iu
            del self.issued[tag]

    def _move(self, issued: Issued) -> None:
        issued.parts += [self.data_in(issued.tag, size) for size in issued.receive]
        issued.parts += [self.data_out(issued.tag, data) for data in issued.send]

    async def leave(self) -> None:
        """Unplug after the stores have completed all requests, and check that each transfer was completed once."""
        for store in self.stores:
            if isinstance(store, Pattern):
                store.holding = False
                store.release()
        await self.device.close()
        assert all(one.status is not None for one in self.submitted)
        assert len(self.completed) == len(self.submitted) == len(set(self.completed))
