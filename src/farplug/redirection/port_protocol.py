"""The usbredir packets of one port: handle the guest's packets in order, and send answers in batches.

Nothing is read from the guest while the port does not accept output, while an operation on the whole device runs, and
while :data:`MAX_PENDING` of the guest's requests are pending: the guest's output then backs up in the transport, and
memory is bounded. Packets are handled until the work of this turn of the event loop is done
(:class:`~farplug.usb.share.Turn`); the device counts its work there too.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from typing import Any, Protocol

from farplug.errors import FarplugError, LocalProtocolError
from farplug.redirection.reminder import Reminder
from farplug.transport.port import Port
from farplug.usb.share import PACKET_WORK, TURN_WORK, Share, Turn
from farplug.usb.transfer import Status
from farplug.usbredir import envelope, packets
from farplug.usbredir.caps import Cap
from farplug.usbredir.protocol import Connection, Role, Violation

MAX_PENDING = 4096
"""Pending requests; at this number nothing more is read from the guest until some are answered."""
_WORK: dict[type, int] = {packets.FilterFilter: TURN_WORK, Violation: TURN_WORK}
"""The work of packets that take longer than others: those with text to parse, and those that are refused."""
FLUSH_ABOVE = 64 << 10
"""Queued bytes above which answers are sent at once. Below, they are sent together when all received packets are
handled."""
MAX_UNREQUESTED = 1000
"""Packets of receptions that are queued while the port does not accept output; further ones are dropped. QEMU's own
queue has the same target."""
MAX_UNREQUESTED_BYTES = 4 * 2**20
"""Bytes of these packets."""
KEPT_BLOCK = 4 << 20
"""Bytes of a block whose memory is kept when it is freed, see :func:`_keep_memory`."""

log = logging.getLogger(__name__)

_STATUS = re.compile(r" status=\S+")
"""In the log of requests: QEMU leaves the status of its requests uninitialised."""


def _keep_memory() -> None:
    """Have the C library keep the memory of freed payloads for later ones.

    Otherwise it returns that of a few large writes to the system, which clears each page again for the next writes: a
    third of their processor time. When a large block is freed, glibc keeps blocks of that size from then on, and
    twice its size at the end of the heap (mallopt(3), M_MMAP_THRESHOLD). The block's own memory is never used.
    """
    bytes(KEPT_BLOCK)


class PacketObserver(Protocol):
    """Sees the packets of a port, in the order in which they are handled, while it is set as the port's observer.

    Its methods must not raise, and must not change a packet.
    """

    def received(self, event: object) -> None:
        """See what is about to be handled: an event of :class:`~farplug.usbredir.protocol.Connection`."""

    def sent(self, packet: packets.Packet) -> None:
        """See a packet that was queued."""


class PortProtocol:
    """The usbredir connection of one port, from :meth:`open` until the port is closed. It is the port's listener.

    Args:
        port: a closed port; :meth:`open` opens it.
        closed: called once the port is closed, with the reason unless we closed it.
        fault: called with an error by which the device broke its contract.
        caps: the capabilities that we announce.
        max_transfer: bytes of payload that are stored.

    Attributes:
        handlers: the handler of each event of :class:`~farplug.usbredir.protocol.Connection`, by type; other events are
            dropped.
        fault: as above.
        pending: the number of the guest's requests that are not answered yet, maintained by
            :class:`~farplug.redirection.pending_requests.PendingRequests`.
        busy: whether an operation on the whole device runs: set it, and call :meth:`resume` when the operation ends.
        writing_paused: whether the port does not accept output now.
        share: what the guest may use: the work of a turn of the event loop, and memory.
        reminder: sends a harmless packet while the guest is silent, after its ``start``.
    """

    def __init__(
        self,
        port: Port,
        closed: Callable[[FarplugError | None], None],
        fault: Callable[[Exception], None],
        caps: Cap,
        max_transfer: int,
    ) -> None:
        self.handlers: dict[type, Callable[[Any], None]] = {}
        self.fault = fault
        self.pending = 0
        self.busy = False
        self.writing_paused = False
        self.share = Share(Turn(lambda callback: asyncio.get_running_loop().call_soon(callback)))
        self.reminder = Reminder(self._send_reminder)
        self._port = port
        self._closed = closed
        self._caps = caps
        self._max_transfer = max_transfer
        self._connection = Connection(Role.HOST, caps=caps, max_payload=max_transfer)
        self._is_open = False
        self._enclosing = False
        """Whether the parser of the port's next connection can skip our messages."""
        self._unrequested = self._unrequested_bytes = 0
        self._unwritten = 0
        """Bytes of answers that were passed to the port since it does not accept output."""
        self._pumping = False
        self._pump_scheduled = False
        self._flush_scheduled = False
        self._reading_paused = False
        self._debug = log.isEnabledFor(logging.DEBUG)
        self._observer: PacketObserver | None = None
        self._watched = self._debug
        """Packets are logged, or observed: one flag for both, because it is checked for each packet."""

    @property
    def observer(self) -> PacketObserver | None:
        """Return what sees the packets; None if nothing does."""
        return self._observer

    @observer.setter
    def observer(self, observer: PacketObserver | None) -> None:
        self._observer = observer
        self._watched = self._debug or observer is not None

    async def open(self) -> None:
        """Open the port, and send our hello unless an unread hello would harm the next connection.

        Raises:
            TargetError: the port cannot be reached.
            PortError: another client uses the port.
        """
        self._connection = Connection(Role.HOST, caps=self._caps, max_payload=self._max_transfer)
        self._enclosing = False
        self.writing_paused = self._reading_paused = False
        self._unrequested = self._unrequested_bytes = 0
        self._forget_unwritten()
        self._is_open = True
        _keep_memory()
        try:
            await self._port.open(self)
        except BaseException:
            self._is_open = False
            raise
        if not self._port.keeps_unread:
            self._send_hello()

    def hello_received(self) -> None:
        """Send our hello if it was not sent by :meth:`open`: the VM runs, and reads the hello.

        A hello is the one packet that cannot be enclosed: sent while the VM is paused, it would be the first packet
        that the parser of the next connection reads.
        """
        if self._port.keeps_unread:
            self._send_hello()
            self._enclosing = envelope.CAPS in self._connection.own_caps & (self._connection.peer_caps or Cap.NONE)

    def _send_hello(self) -> None:
        if self._debug:
            log.debug("%s > hello caps=%s", self._port.name, self._connection.own_caps.names)
        self._connection.start()
        self.flush()

    def guest_has(self, cap: Cap) -> bool:
        """Return whether the guest announced a capability."""
        return bool((self._connection.peer_caps or Cap(0)) & cap)

    # PortListener -------------------------------------------------------------------------------------------------

    def data_received(self, data: memoryview, more: bool = False) -> None:
        """Handle bytes from the guest; if ``more`` follow, together with those."""
        self.reminder.received = True
        self.share.turn.spend(len(data))
        self._connection.receive_data(data)
        if not more:
            self.pump()

    def pause_writing(self) -> None:
        """Stop handling the guest's packets: the port does not accept output."""
        self.writing_paused = True

    def resume_writing(self) -> None:
        """Continue to handle the guest's packets: the port accepts output again."""
        self.writing_paused = False
        self._unrequested = self._unrequested_bytes = 0
        self._forget_unwritten()
        self.pump()

    def port_closed(self, error: FarplugError | None) -> None:
        """Report that the port is closed: nothing can be sent any more."""
        if self._is_open:
            self._is_open = False
            self._forget_unwritten()
            self._closed(error)

    def _forget_unwritten(self) -> None:
        self.share.memory.give(self._unwritten)
        self._unwritten = 0

    # Input --------------------------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Handle the received packets until there are no more, or handling must pause; then send the answers."""
        if self._pumping:
            return
        self._pumping = True
        connection, handlers, turn = self._connection, self.handlers, self.share.turn
        next_event, spend, work_of = connection.next_event, turn.spend, _WORK.get
        try:
            while not (paused := self.writing_paused or self.busy or self.pending >= MAX_PENDING):
                if turn.left <= 0:
                    paused = self._pump_scheduled = True
                    turn.call_next(self._pump_again)
                    break
                event = next_event()
                if event is None:
                    break
                kind = type(event)
                spend(work_of(kind, PACKET_WORK))
                if self._watched:
                    self._show_received(event)
                handler = handlers.get(kind)
                if handler is not None:
                    handler(event)
                if connection.unsent > FLUSH_ABOVE:
                    self.flush()
            self.flush()
        finally:
            self._pumping = False
        if paused is not self._reading_paused:
            self._reading_paused = paused
            if paused:
                self._port.pause_reading()
            else:
                self._port.resume_reading()

    def resume(self) -> None:
        """End an operation: send its answer before the next packet of the guest is handled."""
        self.busy = False
        self.flush()
        self.pump()

    def _pump_again(self) -> None:
        self._pump_scheduled = False
        if self._is_open:
            self.pump()

    # Output -------------------------------------------------------------------------------------------------------

    def send(self, packet: packets.Packet) -> bool:
        """Queue a packet. Return False, and report a fault of the device, if the packet cannot be encoded."""
        if not self._is_open:
            return True
        try:
            self._connection.send(packet)
        except (LocalProtocolError, TypeError) as error:
            self.fault(error)
            return False
        if self._watched:
            self._show_sent(packet)
        return True

    def _show_received(self, event: object) -> None:
        if self._debug:
            log.debug("%s < %s", self._port.name, _STATUS.sub("", str(event)))
        if self._observer is not None:
            self._observer.received(event)

    def _show_sent(self, packet: packets.Packet) -> None:
        if self._debug:
            log.debug("%s > %s", self._port.name, packet)
        if self._observer is not None:
            self._observer.sent(packet)

    def admit(self, size: int) -> bool:
        """Count a packet of a reception while the port does not accept output. Return whether it may be queued."""
        self._unrequested += 1
        self._unrequested_bytes += size
        return self._unrequested <= MAX_UNREQUESTED and self._unrequested_bytes <= MAX_UNREQUESTED_BYTES

    def flush(self) -> None:
        """Write the queued packets to the port."""
        self._flush_scheduled = False
        size = self._connection.unsent
        if size:
            buffers = self._connection.data_to_send()
            self._port.write(envelope.enclose(buffers, size) if self._enclosing else buffers)
            if self.writing_paused:
                self._unwritten += size
                self.share.memory.take(size)

    def schedule_flush(self, *, last: bool = False) -> None:
        """Have packets that the device caused to be queued sent, together with others of this turn of the event loop.

        Within :meth:`pump` there is nothing to do: it sends at its end.

        Args:
            last: no further packet is expected: send at once.
        """
        if self._pumping:
            return
        unsent = self._connection.unsent
        if last or unsent > FLUSH_ABOVE:
            self.flush()
        elif unsent and not self._flush_scheduled:
            self._flush_scheduled = True
            asyncio.get_running_loop().call_soon(self.flush)
        if self._reading_paused and not self._pump_scheduled:
            self.pump()

    def _send_reminder(self) -> None:
        """Send a packet that changes nothing: the status of a reception on endpoint 0, which has none."""
        if not self.writing_paused:
            self.send(packets.InterruptReceivingStatus(endpoint=0x80, status=Status.SUCCESS))
            self.flush()
