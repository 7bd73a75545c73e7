"""USB Attached SCSI: many commands side by side over four bulk endpoints (UAS-2, T10/2276-D; USB UASP 1.0).

Commands come as information units (IU) on the command pipe and end with one on the status pipe; data has a pipe for
each direction. At SuperSpeed each command has a bulk stream, whose number is its tag: its status and its data travel
there. At lower speeds there are no streams, and the device says with a READY IU whose data comes next.

Where the guest has queued data transfers for a command that moves less (or has failed), they are ended before the
command is: Linux would take them back, and QEMU then loses those of all other commands on that endpoint.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections import deque
from collections.abc import Sequence
from enum import IntEnum
from functools import partial

from farplug.scsi.sense import Sense, SenseKey
from farplug.usb.transfer import Status, Transfer
from farplug.usb.types import Buffer, Direction
from farplug.virtual.task import Task
from farplug.virtual.unit import LogicalUnit, absent_unit

log = logging.getLogger(__name__)

STREAMS_EXPONENT = 5
"""Log2 of the bulk streams of each endpoint. Windows wants 16 streams at least."""

MAX_COMMANDS = 256
"""Commands at work; a further one ends with TASK SET FULL."""

MAX_RESPONSES = 256
"""Responses that wait because the guest does not ask for status; further ones are dropped."""

MAX_UNREAD = 16 << 20
"""Bytes of reads under way that nobody waits for any more; above it, further reads wait."""

DATA_PHASE_ERROR = Sense(SenseKey.ABORTED_COMMAND, 0x4B, 0x00)
"""The host sent less data than the command needs."""

COMMAND_SIZE = 32
"""Bytes of a command IU without additional CDB bytes (UAS-2, table 16)."""

_COMMAND = struct.Struct(">BxHBxBx8s16s")
"""IU ID, tag, priority and attribute, additional CDB length in words (bits 7..2), LUN, CDB."""

_TASK_MANAGEMENT = struct.Struct(">BxHBxH8s")
"""IU ID, tag, function, tag of the task to manage, LUN (table 20)."""

_SENSE = struct.Struct(">BxHHB7xH")
"""IU ID, tag, status qualifier, status, length of the sense data (table 17)."""

_RESPONSE = struct.Struct(">BxHxxxB")
"""IU ID, tag, response code (table 18)."""

_READY = struct.Struct(">BxH")
"""IU ID, tag (tables 21 and 22)."""

_GOOD, _CHECK_CONDITION, _TASK_SET_FULL = 0x00, 0x02, 0x28
"""SAM-5, table 35."""


class IuId(IntEnum):
    """What an information unit is (UAS-2, table 14)."""

    COMMAND = 0x01
    SENSE = 0x03
    RESPONSE = 0x04
    TASK_MANAGEMENT = 0x05
    READ_READY = 0x06
    WRITE_READY = 0x07


class TaskFunction(IntEnum):
    """What a task management IU asks for (UAS-2, table 20)."""

    ABORT_TASK = 0x01
    ABORT_TASK_SET = 0x02
    CLEAR_TASK_SET = 0x04
    LOGICAL_UNIT_RESET = 0x08
    I_T_NEXUS_RESET = 0x10
    CLEAR_ACA = 0x40
    QUERY_TASK = 0x80
    QUERY_TASK_SET = 0x81


class ResponseCode(IntEnum):
    """How it ended (UAS-2, table 19)."""

    COMPLETE = 0x00
    INVALID_IU = 0x02
    NOT_SUPPORTED = 0x04
    FAILED = 0x05
    SUCCEEDED = 0x08
    INCORRECT_LUN = 0x09
    OVERLAPPED_TAG = 0x0A


class _Command:
    """A command from its IU to its sense.

    Attributes:
        tag: its own.
        lun: the number of its unit; None if there is no such unit.
        task: what it does.
        moved: how much data has been handed over.
        reading: the transfer that is being filled.
        ready: it may move data: there are streams, or its READY IU was sent.
        ended: its status waits for a transfer.
    """

    __slots__ = ("ended", "lun", "moved", "reading", "ready", "tag", "task")

    def __init__(self, tag: int, lun: int | None, *, ready: bool) -> None:
        self.tag = tag
        self.lun = lun
        self.task: Task
        self.moved = 0
        self.reading: Transfer | None = None
        self.ready = ready
        self.ended = False


class _Pipe:
    """The transfers that wait on one endpoint, by stream; without streams all have the number 0."""

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: dict[int, deque[Transfer]] = {}

    def put(self, transfer: Transfer) -> None:
        self._waiting.setdefault(transfer.stream_id, deque()).append(transfer)

    def take(self, stream: int) -> Transfer | None:
        """The oldest of a stream; None if there is none."""
        queue = self._waiting.get(stream)
        if queue is None:
            return None
        transfer = queue.popleft()
        if not queue:
            del self._waiting[stream]
        return transfer

    def remove(self, transfer: Transfer) -> Sequence[Transfer]:
        """Take this one out, if it waits here, and all behind it in its stream, which are returned."""
        queue = self._waiting.get(transfer.stream_id)
        if queue is None or transfer not in queue:
            return ()
        index = queue.index(transfer)
        followers = [queue.pop() for _ in range(len(queue) - index - 1)][::-1]
        queue.pop()
        if not queue:
            del self._waiting[transfer.stream_id]
        return followers

    def clear(self) -> list[Transfer]:
        """Take all of them out."""
        waiting = [transfer for queue in self._waiting.values() for transfer in queue]
        self._waiting.clear()
        return waiting


class AttachedScsi:
    """The state machine of one USB Attached SCSI interface.

    Args:
        units: by logical unit number.
        command: the function's own address of the command pipe (OUT).
        status: of the status pipe (IN).
        data_in: of the data-in pipe.
        data_out: of the data-out pipe.
    """

    def __init__(self, units: Sequence[LogicalUnit], *, command: int, status: int, data_in: int, data_out: int) -> None:
        self._units = units
        self._absent = absent_unit(len(units))
        self._command_pipe = command
        self._status, self._data_in, self._data_out = _Pipe(), _Pipe(), _Pipe()
        self._pipes = {status: self._status, data_in: self._data_in, data_out: self._data_out}
        self._streams = False
        self._packet_size = 0
        self._commands: dict[int, _Command] = {}
        """At work, or with a status that waits, by tag."""
        self._ius: dict[int, deque[tuple[bytes, _Command | None]]] = {}
        """What waits for a transfer of the status pipe, by stream; with the command that it is about."""
        self._responses = 0
        self._turns: dict[Direction, deque[_Command]] = {Direction.IN: deque(), Direction.OUT: deque()}
        """Without streams: who moves data, one after the other."""
        self._unread = 0
        self._serving: deque[_Command] | None = None

    def start(self, packet_size: int, *, streams: bool) -> None:
        """Begin afresh, after a :meth:`reset`. ``packet_size`` is wMaxPacketSize of the data pipes."""
        self._packet_size = packet_size
        self._streams = streams

    def submit(self, transfer: Transfer) -> None:
        """Take a transfer on one of the four endpoints."""
        if transfer.endpoint == self._command_pipe:
            self._take_iu(transfer)
            return
        pipe = self._pipes[transfer.endpoint]
        pipe.put(transfer)
        if pipe is self._status:
            self._give_ius(transfer.stream_id)
        elif self._streams:
            self._serve(self._commands.get(transfer.stream_id))
        else:
            turns = self._turns[transfer.direction]
            self._serve(turns[0] if turns else None)

    def cancel(self, transfer: Transfer) -> None:
        """Complete a pending transfer as cancelled.

        Of data-in nothing has moved: the next transfer takes its place. Data-out that waits for its command takes what
        came after it along, which would be written in its place; what is being written is written.
        """
        pipe = self._pipes.get(transfer.endpoint)
        followers = () if pipe is None else pipe.remove(transfer)
        for command in self._commands.values():
            if command.reading is transfer:
                command.reading = None
        if pipe is not None and pipe is not self._data_out:
            for other in followers:
                pipe.put(other)
            followers = ()
        for one in (transfer, *followers):
            if one.status is None:
                one.complete(Status.CANCELLED)

    def reset(self) -> None:
        """Drop everything. Writes under way go on: the store keeps their order."""
        reading = [command.reading for command in self._commands.values() if command.reading is not None]
        self._drop(list(self._commands.values()))
        self._ius.clear()
        self._responses = 0
        for transfer in [*reading, *(one for pipe in self._pipes.values() for one in pipe.clear())]:
            if transfer.status is None:
                transfer.complete(Status.CANCELLED)

    # Information units that arrive

    def _take_iu(self, transfer: Transfer) -> None:
        data = transfer.data
        transfer.complete()
        if len(data) >= COMMAND_SIZE and data[0] == IuId.COMMAND:
            self._take_command(data)
        elif len(data) >= _TASK_MANAGEMENT.size and data[0] == IuId.TASK_MANAGEMENT:
            self._manage(data)
        elif len(data) >= _READY.size:
            log.debug("the guest sent %d bytes that are no information unit known here", len(data))
            self._respond(int.from_bytes(data[2:4]), ResponseCode.INVALID_IU)
        # else it has no tag that an answer could go to

    def _take_command(self, data: Buffer) -> None:
        _, tag, _, additional, address, cdb = _COMMAND.unpack_from(data)
        overlapped = self._commands.get(tag)
        if overlapped is not None:
            self._drop([overlapped])
            self._respond(tag, ResponseCode.OVERLAPPED_TAG)
            return
        if not tag:
            self._respond(tag, ResponseCode.INVALID_IU)
            return
        lun = self._lun(address)
        if len(self._commands) >= MAX_COMMANDS:
            if self._streams:
                self._end_surplus(tag, self._data_in, self._data_out)
            self._say(tag, _SENSE.pack(IuId.SENSE, tag, 0, _TASK_SET_FULL, 0))
            return
        command = self._commands[tag] = _Command(tag, lun, ready=self._streams)
        unit = self._absent if lun is None else self._units[lun]
        size = COMMAND_SIZE + (additional & 0xFC)
        task = command.task = Task(unit, bytes(cdb) + bytes(data[COMMAND_SIZE:size]), partial(self._progress, command))
        if not self._streams and task.direction is not None:
            self._turns[task.direction].append(command)
        task.start()
        self._serve(command)

    def _lun(self, address: bytes) -> int | None:
        """Which unit an 8-byte LUN names: single level, peripheral or flat addressing (SAM-5, chapter 4.7)."""
        method, lun = address[0], address[1]
        if method not in (0x00, 0x40) or any(address[2:]) or lun >= len(self._units):
            return None
        return lun

    def _manage(self, data: Buffer) -> None:
        _, tag, function, managed, address = _TASK_MANAGEMENT.unpack_from(data)
        lun = self._lun(address)
        if tag in self._commands:
            self._drop([self._commands[tag]])
            self._respond(tag, ResponseCode.OVERLAPPED_TAG)
        elif lun is None and function != TaskFunction.I_T_NEXUS_RESET:
            self._respond(tag, ResponseCode.INCORRECT_LUN)
        else:
            of_unit = [one for one in self._commands.values() if one.lun == lun]
            named = [one for one in of_unit if one.tag == managed]
            code = ResponseCode.COMPLETE
            match function:
                case TaskFunction.ABORT_TASK:
                    self._drop(named)
                case TaskFunction.ABORT_TASK_SET | TaskFunction.CLEAR_TASK_SET:
                    self._drop(of_unit)
                case TaskFunction.LOGICAL_UNIT_RESET:
                    assert lun is not None
                    self._drop(of_unit)
                    self._units[lun].scsi.reset()
                case TaskFunction.I_T_NEXUS_RESET:
                    self._drop(list(self._commands.values()))
                    for unit in self._units:
                        unit.scsi.reset()
                case TaskFunction.QUERY_TASK:
                    code = ResponseCode.SUCCEEDED if named else ResponseCode.COMPLETE
                case TaskFunction.QUERY_TASK_SET:
                    code = ResponseCode.SUCCEEDED if of_unit else ResponseCode.COMPLETE
                case _:
                    code = ResponseCode.NOT_SUPPORTED
            self._respond(tag, code)

    def _drop(self, commands: Sequence[_Command]) -> None:
        """These commands are gone: no status, and what they wait for is for others."""
        for command in commands:
            command.task.drop()
            del self._commands[command.tag]
            self._leave_turn(command)
            stream = self._stream(command.tag)
            self._ius[stream] = deque(entry for entry in self._ius.get(stream, ()) if entry[1] is not command)
            if command.reading is not None:
                reading, command.reading = command.reading, None
                self._data_in.put(reading)

    # Data

    def _serve(self, command: _Command | None) -> None:
        """Move data and end commands, until all have to wait. Calls from inside of it are taken up by the outermost."""
        if command is None:
            return
        if self._serving is not None:
            self._serving.append(command)
            return
        self._serving = deque((command,))
        try:
            while self._serving:
                command = self._serving.popleft()
                while self._commands.get(command.tag) is command and not command.ended and self._step(command):
                    pass
        finally:
            self._serving = None

    def _progress(self, command: _Command) -> None:
        self._serve(command)

    def _step(self, command: _Command) -> bool:
        """Do the next thing that a command needs; False if it has to wait."""
        task = command.task
        if task.sense is None and command.moved < task.demand:
            if not command.ready and not self._claim_turn(command):
                return False
            return self._give(command) if task.direction is Direction.IN else self._take(command)
        if command.reading is not None or not task.finish():
            return False
        self._end(command)
        return True

    def _claim_turn(self, command: _Command) -> bool:
        """Without streams the data pipes are taken in turns: tell the host whose turn it is."""
        direction = command.task.direction
        assert direction is not None
        if self._turns[direction][0] is not command or command.task.busy:
            return False
        command.ready = True
        iu = IuId.READ_READY if direction is Direction.IN else IuId.WRITE_READY
        self._say(command.tag, _READY.pack(iu, command.tag), command)
        return True

    def _give(self, command: _Command) -> bool:
        task = command.task
        if task.busy or command.reading is not None or (task.reads_store and self._unread > MAX_UNREAD):
            return False
        transfer = self._data_in.take(self._stream(command.tag))
        if transfer is None:
            return False
        length = min(transfer.length, task.demand - command.moved)
        command.reading = transfer
        self._unread += length
        task.read(command.moved, length, partial(self._given, command, transfer, length))
        return True

    def _given(self, command: _Command, transfer: Transfer, length: int, data: Buffer | None) -> None:
        if self._unread > MAX_UNREAD >= self._unread - length:
            for other in list(self._commands.values()):
                asyncio.get_running_loop().call_soon(self._serve, other)
        self._unread -= length
        if command.reading is transfer:
            command.reading = None
            if data is not None:
                command.moved += length
                command.task.delivered(length)
            transfer.complete(Status.SUCCESS, b"" if data is None else data)
        self._serve(command)

    def _take(self, command: _Command) -> bool:
        task = command.task
        transfer = self._data_out.take(self._stream(command.tag))
        if transfer is None:
            return False
        begin = command.moved
        useful = min(transfer.length, task.demand - begin)
        command.moved += useful
        if command.moved < task.demand and (not useful or useful % self._packet_size):
            task.fail(DATA_PHASE_ERROR)  # a short packet ends the data: there is less than the command needs
        # It is answered when its data is written: what the guest may send meanwhile has a bound above us.
        task.put(begin, memoryview(transfer.data)[:useful], partial(_complete, transfer))
        return True

    # The end

    def _end(self, command: _Command) -> None:
        command.ended = True
        task, tag = command.task, command.tag
        if self._streams:
            self._end_surplus(tag, self._data_in, self._data_out)
        elif command.ready:
            self._end_surplus(0, self._data_in if task.direction is Direction.IN else self._data_out)
        sense = b"" if task.sense is None else bytes(task.sense)
        status = _GOOD if task.sense is None else _CHECK_CONDITION
        self._leave_turn(command)
        self._say(tag, _SENSE.pack(IuId.SENSE, tag, 0, status, len(sense)) + sense, command)

    def _end_surplus(self, stream: int, *pipes: _Pipe) -> None:
        """End the data transfers that the guest has queued for a command, and that nothing uses."""
        for pipe in pipes:
            while (transfer := pipe.take(stream)) is not None:
                transfer.complete()

    def _leave_turn(self, command: _Command) -> None:
        for turns in self._turns.values():
            if command in turns:
                turns.remove(command)
                if turns:
                    self._serve(turns[0])

    def _respond(self, tag: int, code: ResponseCode) -> None:
        self._say(tag, _RESPONSE.pack(IuId.RESPONSE, tag, code))

    def _say(self, tag: int, iu: bytes, command: _Command | None = None) -> None:
        """Send an IU on the status pipe, when the guest asks for one."""
        if command is None:
            if self._responses >= MAX_RESPONSES:
                return
            self._responses += 1
        stream = self._stream(tag)
        self._ius.setdefault(stream, deque()).append((iu, command))
        self._give_ius(stream)

    def _give_ius(self, stream: int) -> None:
        while waiting := self._ius.get(stream):
            transfer = self._status.take(stream)
            if transfer is None:
                return
            iu, command = waiting.popleft()
            if not waiting:
                del self._ius[stream]
            if command is None:
                self._responses -= 1
            elif iu[0] == IuId.SENSE:
                del self._commands[command.tag]
            transfer.complete(Status.SUCCESS, iu)

    def _stream(self, tag: int) -> int:
        return tag if self._streams else 0


def _complete(transfer: Transfer) -> None:
    if transfer.status is None:  # else it was cancelled meanwhile
        transfer.complete()
