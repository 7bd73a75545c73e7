"""USB Attached SCSI: many commands side by side over four bulk endpoints (UAS-2, T10/2276-D; USB UASP 1.0).

Commands arrive as information units (IU) on the command pipe and end with an IU on the status pipe; data has a pipe for
each direction. At SuperSpeed each command has a bulk stream, whose number is its tag, for its status and its data. At
lower speeds there are no streams: a READY IU names the command whose data comes next.

Data transfers that a command does not use, because it moves less data or has failed, are completed before the command
ends. Otherwise Linux cancels them, and QEMU then loses the transfers of all other commands on that endpoint. So data
never reaches the wrong command: with streams, data that the guest submits before a command belongs to that command;
without streams, no data may come before the READY IU.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from enum import Enum, auto
from functools import partial

from farplug.scsi.sense import ABORTED_COMMAND, Sense, SenseKey
from farplug.usb.share import NO_PORT
from farplug.usb.transfer import Status, Transfer
from farplug.usb.types import Buffer, Direction
from farplug.virtual.iu import (
    COMMAND,
    COMMAND_IU,
    TAGGED,
    TASK_MANAGEMENT,
    TASK_MANAGEMENT_IU,
    IuId,
    ResponseCode,
    TaskAttribute,
    TaskFunction,
    ready_iu,
    response_iu,
    sense_iu,
    task_set_full_iu,
)
from farplug.virtual.pipe import Pipe, StatusPipe
from farplug.virtual.task import Task
from farplug.virtual.unit import LogicalUnit, absent_unit

log = logging.getLogger(__name__)

STREAMS_EXPONENT = 5
"""Log2 of the number of bulk streams of each endpoint, and of tags with streams. Windows requires 16 streams."""

MAX_STREAM = 1 << STREAMS_EXPONENT

MAX_COMMANDS = 256
"""Commands that have not ended; a further one ends with TASK SET FULL."""

MAX_UNREAD = 16 << 20
"""Bytes of reads in flight, also of aborted commands; above it, further reads wait."""

MAX_UNWRITTEN = 16 << 20
"""Bytes passed to the store and not yet written, also of aborted commands; above it, further data waits."""

DATA_PHASE_ERROR = Sense(SenseKey.ABORTED_COMMAND, 0x4B, 0x00)
"""The host sent less data than the command needs."""


class _State(Enum):
    """State of a command between its IU and its SENSE IU."""

    WAITING = auto()
    """Not started: an ORDERED command has to end first, or the commands before this ORDERED one."""
    RUNNING = auto()
    ENDED = auto()
    """The SENSE IU waits for a transfer, or the command was aborted."""


_WAITING, _RUNNING, _ENDED = _State


class _Command:
    """A command from its IU to its SENSE IU.

    Attributes:
        tag: the tag of the command.
        lun: the logical unit number; None if there is no such unit.
        cdb: the command descriptor block.
        ordered: the command starts when all commands before it have ended, and later commands wait for its end.
        state: see :class:`_State`.
        task: executes the command; set when the command starts.
        moved: bytes of data that have moved, including data-out that is being written.
        reading: the transfer that is being filled with data-in.
        claimed: the READY IU was queued (without streams only).
        ready: the command may move data: there are streams, or its READY IU was sent.
        data_lost: the host cancelled data-out of the command before the command started.
    """

    __slots__ = ("cdb", "claimed", "data_lost", "lun", "moved", "ordered", "reading", "ready", "state", "tag", "task")

    def __init__(self, tag: int, lun: int | None, cdb: bytes, *, ready: bool) -> None:
        self.tag = tag
        self.lun = lun
        self.cdb = cdb
        self.ordered = False
        self.state = _WAITING
        self.task: Task
        self.moved = 0
        self.reading: Transfer | None = None
        self.claimed = False
        self.ready = ready
        self.data_lost = False


class Uas:
    """The state machine of one USB Attached SCSI interface.

    Args:
        units: the logical units, by number.
        command: the function's own endpoint address of the command pipe (OUT).
        status: the address of the status pipe (IN).
        data_in: the address of the data-in pipe.
        data_out: the address of the data-out pipe.

    Attributes:
        share: what the guest may use.
    """

    def __init__(self, units: Sequence[LogicalUnit], *, command: int, status: int, data_in: int, data_out: int) -> None:
        self.share = NO_PORT
        self._units = units
        self._absent = absent_unit(len(units))
        self._luns = {bytes((method, lun, *bytes(6))): lun for method in (0x00, 0x40) for lun in range(len(units))}
        """Logical unit numbers by their 8 bytes: peripheral (single level) or flat addressing (SAM-5, chapter 4.7)."""
        self._command_pipe = command
        self._status: StatusPipe[_Command] = StatusPipe(self._on_iu_sent)
        self._data_in, self._data_out = Pipe(), Pipe()
        self._pipes: dict[int, Pipe] = {status: self._status, data_in: self._data_in, data_out: self._data_out}
        self._streams = False
        self._packet_size = 0
        self._commands: dict[int, _Command] = {}
        """Commands whose SENSE IU was not sent yet, by tag."""
        self._waiting: deque[_Command] = deque()
        """An ORDERED command until it has ended, and the commands after it."""
        self._turns: dict[Direction, deque[_Command]] = {Direction.IN: deque(), Direction.OUT: deque()}
        """Without streams: the commands that move data, one after the other."""
        self._writing: dict[Transfer, tuple[_Command, int]] = {}
        """Data-out that is being written: its command, and the number of bytes that the command uses."""
        self._unwritten = 0
        self._unread = 0
        self._data_lost: set[int] = set()
        """Streams on which the guest cancelled data-out of a command that has not arrived."""
        self._to_serve: OrderedDict[_Command, None] = OrderedDict()
        self._serving = False

    def start(self, packet_size: int, *, streams: bool) -> None:
        """Start from the initial state, after a :meth:`reset`. ``packet_size`` is wMaxPacketSize of the data pipes."""
        self._packet_size = packet_size
        self._streams = streams

    def submit(self, transfer: Transfer) -> None:
        """Take a transfer on one of the four endpoints."""
        if transfer.endpoint == self._command_pipe:
            self._receive_iu(transfer)
            return
        pipe = self._pipes[transfer.endpoint]
        if pipe is self._status:
            self._status.read(transfer)
            return
        command = self._command_for(transfer)
        if command is None and self._streams:
            pipe.put(transfer)  # the command follows
        elif command is None or command.state is _ENDED:
            transfer.complete()
        else:
            pipe.put(transfer)
            self._serve(command)

    def _command_for(self, transfer: Transfer) -> _Command | None:
        """Return the command that a data transfer belongs to; None if there is none."""
        if self._streams:
            return self._commands.get(transfer.stream_id)
        turns = self._turns[transfer.direction]
        return turns[0] if turns and turns[0].ready else None

    def cancel(self, transfer: Transfer) -> None:
        """Complete a pending transfer as cancelled; ignore a completed one.

        No data-in has moved: the next transfer moves that data. Data-out may already be written; the transfers that
        wait behind it are cancelled too and the command fails, so that no later data is written in its place.
        """
        if transfer.status is not None:
            return
        pipe = self._pipes[transfer.endpoint]
        cancelled = [transfer]
        if transfer in self._writing:
            self._data_out_cancelled(*self._writing.pop(transfer))
        elif pipe is self._data_out:
            cancelled = pipe.remove(transfer, followers=True)
            command = self._command_for(transfer)
            if command is not None:
                self._data_out_cancelled(command, 0)
            elif self._streams:
                self._data_lost.add(transfer.stream_id)
        elif not pipe.remove(transfer):
            for command in self._commands.values():
                if command.reading is transfer:
                    command.reading = None
        for pending in cancelled:
            pending.complete(Status.CANCELLED)

    def _data_out_cancelled(self, command: _Command, length: int) -> None:
        """Fail the command once its data is complete: the host cancelled ``length`` bytes of accepted data-out.

        QEMU cancels transfers in order to submit them again.
        """
        if command.state is _RUNNING:
            command.moved -= length
            command.task.fail(ABORTED_COMMAND)
        elif command.state is _WAITING:
            command.data_lost = True

    def reset(self) -> None:
        """Cancel all transfers and abort all commands. Writes in flight go on: the store keeps their order."""
        pending = [transfer for pipe in self._pipes.values() for transfer in pipe.clear()]
        for command in self._commands.values():
            self._abort_task(command)
            if command.reading is not None:
                pending.append(command.reading)
                command.reading = None
        pending += self._writing
        self._commands.clear()
        self._waiting.clear()
        self._data_lost.clear()
        self._writing.clear()
        for turns in self._turns.values():
            turns.clear()
        for transfer in pending:
            transfer.complete(Status.CANCELLED)

    # Received information units

    def _receive_iu(self, transfer: Transfer) -> None:
        data = transfer.data
        transfer.complete()
        if len(data) < TAGGED.size:
            return  # there is no tag to respond to
        tag = int.from_bytes(data[2:4])
        if self._streams and not 1 <= tag <= MAX_STREAM:
            return  # there is no such stream
        if tag and data[0] == COMMAND_IU and len(data) >= COMMAND.size:
            self._receive_command(tag, data)
        elif tag and data[0] == TASK_MANAGEMENT_IU and len(data) >= TASK_MANAGEMENT.size:
            self._manage(tag, data)
        else:
            log.debug("invalid information unit of %d bytes", len(data))
            self._respond(tag, ResponseCode.INVALID_IU)

    def _receive_command(self, tag: int, data: Buffer) -> None:
        if tag in self._commands:
            self._reject_overlapped_tag(tag)
            return
        if len(self._commands) >= MAX_COMMANDS:
            self._refuse(tag, task_set_full_iu(tag))
            return
        _, _, attribute, additional, address, cdb = COMMAND.unpack_from(data)
        if len(data) > COMMAND.size:
            cdb += bytes(data[COMMAND.size : COMMAND.size + (additional & 0xFC)])
        attribute &= 0x07
        command = self._commands[tag] = _Command(tag, self._luns.get(address), cdb, ready=self._streams)
        if tag in self._data_lost:
            self._data_lost.remove(tag)
            command.data_lost = True
        if not attribute and not self._waiting:
            self._start(command)
            return
        command.ordered = attribute == TaskAttribute.ORDERED
        if attribute != TaskAttribute.HEAD_OF_QUEUE and (command.ordered or self._waiting):
            self._waiting.append(command)
            self._start_waiting()
        else:
            self._start(command)

    def _start_waiting(self) -> None:
        """Start the commands that wait, up to an ORDERED one that has not ended."""
        while self._waiting:
            command = self._waiting[0]
            if command.state is _RUNNING:
                return
            if command.state is _ENDED:
                self._waiting.popleft()
            elif not command.ordered:
                self._start(self._waiting.popleft())
            elif any(other.state is _RUNNING for other in self._commands.values()):
                return
            else:
                self._start(command)

    def _start(self, command: _Command) -> None:
        unit = self._absent if command.lun is None else self._units[command.lun]
        task = command.task = Task(unit, command.cdb, partial(self._serve, command))
        command.state = _RUNNING
        if command.data_lost and task.direction is Direction.OUT:
            task.fail(ABORTED_COMMAND)
        if not self._streams and task.direction is not None:
            self._turns[task.direction].append(command)
        task.start()
        self._serve(command)

    def _manage(self, tag: int, data: Buffer) -> None:
        _, _, function, managed, address = TASK_MANAGEMENT.unpack_from(data)
        lun = self._luns.get(address)
        if tag in self._commands:
            self._reject_overlapped_tag(tag)
        elif lun is None and function != TaskFunction.I_T_NEXUS_RESET:
            self._respond(tag, ResponseCode.INCORRECT_LUN)
        else:
            of_unit = [command for command in self._commands.values() if command.lun == lun]
            named = [command for command in of_unit if command.tag == managed]
            code = ResponseCode.COMPLETE
            match function:
                case TaskFunction.ABORT_TASK:
                    self._abort(named)
                case TaskFunction.ABORT_TASK_SET | TaskFunction.CLEAR_TASK_SET:
                    self._abort(of_unit)
                case TaskFunction.LOGICAL_UNIT_RESET:
                    assert lun is not None
                    self._abort(of_unit)
                    self._units[lun].scsi.reset()
                case TaskFunction.I_T_NEXUS_RESET:
                    self._abort(list(self._commands.values()))
                    for unit in self._units:
                        unit.scsi.reset()
                case TaskFunction.QUERY_TASK:
                    code = ResponseCode.SUCCEEDED if named else ResponseCode.COMPLETE
                case TaskFunction.QUERY_TASK_SET:
                    code = ResponseCode.SUCCEEDED if of_unit else ResponseCode.COMPLETE
                case _:
                    code = ResponseCode.NOT_SUPPORTED
            self._respond(tag, code)

    def _reject_overlapped_tag(self, tag: int) -> None:
        """Abort the command that already has this tag, and reject the new one (UAS-2, chapter 6.2.2)."""
        self._abort([self._commands[tag]])
        self._respond(tag, ResponseCode.OVERLAPPED_TAG)

    def _abort(self, commands: Iterable[_Command]) -> None:
        """Abort commands without a SENSE IU, and complete the data transfers that the guest has queued for them."""
        for command in commands:
            if self._commands.get(command.tag) is not command:
                continue  # aborted from inside a completion of another command
            self._abort_task(command)
            del self._commands[command.tag]
            if command in self._waiting:
                self._waiting.remove(command)
            self._release_turn(command)
            self._status.discard(self._stream(command.tag), command)
            if command.reading is not None:
                reading, command.reading = command.reading, None
                reading.complete()
            self._end_unused_data(command)
        self._resume()

    def _abort_task(self, command: _Command) -> None:
        if command.state is not _WAITING:
            command.task.abort()
        command.state = _ENDED

    # Data

    def _serve(self, command: _Command) -> None:
        """Move data and end the command, or wait. Nested calls only add the command to the loop of the outermost."""
        self._to_serve[command] = None
        if not self._serving:
            self._serve_queued()

    def _serve_queued(self) -> None:
        """Serve the queued commands, until the work of this turn of the event loop is done."""
        turn = self.share.turn
        self._serving = True
        try:
            while self._to_serve:
                command, _ = self._to_serve.popitem(last=False)
                while command.state is _RUNNING:
                    if turn.left <= 0:
                        self._to_serve[command] = None
                        turn.call_next(self._serve_queued)
                        return
                    if not self._step(command):
                        break
        finally:
            self._serving = False

    def _serve_all(self) -> None:
        for command in list(self._commands.values()):
            self._serve(command)

    def _step(self, command: _Command) -> bool:
        """Do the next step of a command. Returns False if the command has to wait."""
        task = command.task
        if command.moved < task.transfer_length:
            # A failed command still takes its data-out: later transfers would go to another command.
            if task.direction is Direction.OUT:
                return self._receive_data(command) if command.ready else self._claim_turn(command)
            if task.sense is None:
                return self._send_data(command) if command.ready else self._claim_turn(command)
        if command.reading is not None or not task.finish():
            return False
        self._end(command)
        return True

    def _claim_turn(self, command: _Command) -> bool:
        """Send the READY IU if it is this command's turn: without streams the data pipes are used in turn."""
        direction = command.task.direction
        assert direction is not None
        if command.claimed or self._turns[direction][0] is not command or command.task.busy:
            return False
        command.claimed = True
        iu = IuId.READ_READY if direction is Direction.IN else IuId.WRITE_READY
        self._send_iu(command.tag, ready_iu(iu, command.tag), command)
        return True

    def _send_data(self, command: _Command) -> bool:
        task = command.task
        if task.busy or command.reading is not None or self._unread > MAX_UNREAD:
            return False
        transfer = self._data_in.take(self._stream(command.tag))
        if transfer is None:
            return False
        length = min(transfer.length, task.transfer_length - command.moved)
        command.reading = transfer
        transfer.hold()
        self._unread += length
        task.read(command.moved, length, partial(self._data_read, command, transfer, length))
        return True

    def _data_read(self, command: _Command, transfer: Transfer, length: int, data: Buffer | None) -> None:
        resumes = self._unread > MAX_UNREAD >= self._unread - length
        self._unread -= length
        if command.reading is transfer:
            command.reading = None
            if data is not None:
                command.moved += length
                command.task.delivered(length)
            transfer.complete(Status.SUCCESS, b"" if data is None else data)
        transfer.release()
        self._serve(command)
        if resumes:
            self._serve_all()

    def _receive_data(self, command: _Command) -> bool:
        if self._unwritten > MAX_UNWRITTEN:
            return False
        transfer = self._data_out.take(self._stream(command.tag))
        if transfer is None:
            return False
        task, position = command.task, command.moved
        useful = min(transfer.length, task.transfer_length - position)
        command.moved += useful
        if command.moved < task.transfer_length and (not useful or useful % self._packet_size):
            task.fail(DATA_PHASE_ERROR)  # a short packet ends the data too early
            command.moved = task.transfer_length
        self._unwritten += useful
        self._writing[transfer] = command, useful
        transfer.hold()
        task.put(position, memoryview(transfer.data)[:useful], partial(self._data_written, transfer, useful))
        return True

    def _data_written(self, transfer: Transfer, length: int) -> None:
        """Complete a transfer whose data is written. Not earlier, so that the guest does not send without bound."""
        resumes = self._unwritten > MAX_UNWRITTEN >= self._unwritten - length
        self._unwritten -= length
        if self._writing.pop(transfer, None) is not None:
            transfer.complete()
        transfer.release()
        if resumes:
            self._serve_all()

    # The end

    def _end(self, command: _Command) -> None:
        command.state = _ENDED
        self._end_unused_data(command)
        if self._commands.get(command.tag) is not command:
            return  # the guest has aborted the command from inside a completion
        self._send_iu(command.tag, sense_iu(command.tag, command.task.sense), command)
        if not self._streams:
            self._release_turn(command)
        self._resume()

    def _end_unused_data(self, command: _Command) -> None:
        """Complete the data transfers that the guest has queued for a command and that the command does not use."""
        if self._streams:
            self._end_data(command.tag)
        elif command.ready:
            self._end_data(0, (self._data_in if command.task.direction is Direction.IN else self._data_out,))

    def _end_data(self, stream: int, pipes: Iterable[Pipe] = ()) -> None:
        for pipe in pipes or (self._data_in, self._data_out):
            while (transfer := pipe.take(stream)) is not None:
                transfer.complete()

    def _release_turn(self, command: _Command) -> None:
        for turns in self._turns.values():
            if command in turns:
                turns.remove(command)

    def _resume(self) -> None:
        """Continue with the commands that waited for a command which has ended."""
        if not self._streams:
            for turns in self._turns.values():
                if turns:
                    self._serve(turns[0])
        if self._waiting:
            self._start_waiting()

    def _respond(self, tag: int, code: ResponseCode) -> None:
        self._refuse(tag, response_iu(tag, code))

    def _refuse(self, tag: int, iu: bytes) -> None:
        """Send an IU about a tag. If no command has the tag, data transfers for it are completed."""
        if self._streams and tag not in self._commands:
            self._end_data(tag)
        self._send_iu(tag, iu)

    def _send_iu(self, tag: int, iu: bytes, command: _Command | None = None) -> None:
        self._status.send(self._stream(tag), iu, command)

    def _on_iu_sent(self, command: _Command) -> None:
        """Note that an IU of a command was sent."""
        if command.state is _ENDED:
            del self._commands[command.tag]
        else:
            command.ready = True

    def _stream(self, tag: int) -> int:
        return tag if self._streams else 0
