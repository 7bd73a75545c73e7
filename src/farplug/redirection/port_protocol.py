"""What is said over a port: the guest's packets, one after the other, and answers, which leave together.

The guest is not listened to while the port takes no output, while an operation on the whole device is under way, and
while too many of its requests are not answered: then its output backs up in the transport, and memory is bounded.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from typing import Any

from farplug.errors import FarplugError, LocalProtocolError
from farplug.redirection.reminder import Reminder
from farplug.transport.port import Port
from farplug.usb.transfer import Status
from farplug.usbredir import envelope
from farplug.usbredir import packets as p
from farplug.usbredir.caps import Cap
from farplug.usbredir.protocol import Connection, Role

MAX_PENDING = 4096
"""Pending transfers; with more than that nothing further is read from the guest until some are answered."""
PACKETS_AT_ONCE = 64
"""Packets of the guest that are looked at before the event loop has its turn: what the device has done meanwhile, and
other devices, must not wait for all that a guest can send at once."""
FLUSH_ABOVE = 64 << 10
"""Bytes of answers that leave at once; fewer leave together, when all that was received is looked at."""
MAX_UNREQUESTED = 1000
"""Packets that nobody asked for and that are queued while the port takes no output; more are dropped. QEMU's own queue
has the same target."""
MAX_UNREQUESTED_BYTES = 4 * 2**20
"""Their bytes, likewise."""

log = logging.getLogger("farplug.usbredir")

_STATUS = re.compile(r" status=\S+")
"""In the log of requests: QEMU leaves the status of what it asks for uninitialised."""


class PortProtocol:
    """The packets of one port, from :meth:`open` until it is closed. It is the port's listener.

    Args:
        port: it must be closed, :meth:`open` opens it.
        closed: called once the port is closed, with the reason if it was not us.
        fault: called with what a device does that it must not.
        caps: what we announce.
        max_transfer: bytes of payload that are stored.

    Attributes:
        handlers: who takes what the guest says, by its type; the rest is dropped.
        fault: as above.
        pending: requests of the guest that are not answered yet; the ledger counts them.
        busy: an operation on the whole device is under way: set it, and call :meth:`resume` when it has ended.
        writing_paused: the port takes no output now.
        reminder: speaks up in a guest's silence, from its ``start`` on.
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
        self.reminder = Reminder(self._send_reminder)
        self._port = port
        self._closed = closed
        self._caps = caps
        self._max_transfer = max_transfer
        self._connection = Connection(Role.HOST, caps=caps, max_payload=max_transfer)
        self._is_open = False
        self._enclosing = False
        """Whether messages are made harmless to the next connection's parser."""
        self._unrequested = self._unrequested_bytes = 0
        self._pumping = False
        self._pump_scheduled = False
        self._flush_scheduled = False
        """Soon, on the event loop."""
        self._reading_paused = False
        self._debug = log.isEnabledFor(logging.DEBUG)

    async def open(self) -> None:
        """Open the port, and send our hello where it does no harm that the guest may not read it.

        Raises what :meth:`Port.open` raises.
        """
        self._connection = Connection(Role.HOST, caps=self._caps, max_payload=self._max_transfer)
        self._enclosing = False
        self.writing_paused = self._reading_paused = False
        self._unrequested = self._unrequested_bytes = 0
        self._is_open = True
        try:
            await self._port.open(self)
        except BaseException:
            self._is_open = False
            raise
        if not self._port.keeps_unread:
            self._send_hello()

    def hello_received(self) -> None:
        """Send our hello, if it was held back: the VM runs, and reads it.

        A hello is the one packet that cannot be enclosed: in a pause it would be the first one that the parser of the
        next connection reads.
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
        """Whether the guest's side has a capability."""
        return bool((self._connection.peer_caps or Cap(0)) & cap)

    # The port's voice (PortListener) ------------------------------------------------------------------------------

    def data_received(self, data: memoryview) -> None:
        """Bytes from the guest."""
        self.reminder.received = True
        self._connection.receive_data(data)
        self.pump()

    def pause_writing(self) -> None:
        """The port takes no more output: stop pulling requests."""
        self.writing_paused = True

    def resume_writing(self) -> None:
        """The port takes output again."""
        self.writing_paused = False
        self._unrequested = self._unrequested_bytes = 0
        self.pump()

    def port_closed(self, error: FarplugError | None) -> None:
        """The port is closed: nothing can be answered any more."""
        if self._is_open:
            self._is_open = False
            self._closed(error)

    # Listening ----------------------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Look at what the guest said, as far as nothing holds it back."""
        if self._pumping:
            return
        self._pumping = True
        connection, handlers = self._connection, self.handlers
        next_event = connection.next_event
        try:
            for _ in range(PACKETS_AT_ONCE):
                if held := self.writing_paused or self.busy or self.pending >= MAX_PENDING:
                    break
                event = next_event()
                if event is None:
                    break
                if self._debug:
                    log.debug("%s < %s", self._port.name, _STATUS.sub("", str(event)))
                handler = handlers.get(type(event))
                if handler is not None:
                    handler(event)
                if connection.unsent > FLUSH_ABOVE:
                    self.flush()
            else:
                held = True
                if not self._pump_scheduled:
                    self._pump_scheduled = True
                    asyncio.get_running_loop().call_soon(self._pump_again)
            self.flush()
        finally:
            self._pumping = False
        if held is not self._reading_paused:
            self._reading_paused = held
            if held:
                self._port.pause_reading()
            else:
                self._port.resume_reading()

    def resume(self) -> None:
        """An operation has ended: its answer leaves before the guest is listened to again."""
        self.busy = False
        self.flush()
        self.pump()

    def _pump_again(self) -> None:
        self._pump_scheduled = False
        if self._is_open:
            self.pump()

    # Speaking -----------------------------------------------------------------------------------------------------

    def send(self, packet: p.Packet) -> bool:
        """Queue a packet; False if it cannot be said in this protocol: what a device gave is at fault."""
        if not self._is_open:
            return True
        if self._debug:
            log.debug("%s > %s", self._port.name, packet)
        try:
            self._connection.send(packet)
        except (LocalProtocolError, TypeError) as error:
            self.fault(error)
            return False
        return True

    def admit(self, size: int) -> bool:
        """Count a packet that comes although the port takes no output: whether it may be queued all the same."""
        self._unrequested += 1
        self._unrequested_bytes += size
        return self._unrequested <= MAX_UNREQUESTED and self._unrequested_bytes <= MAX_UNREQUESTED_BYTES

    def flush(self) -> None:
        """Hand to the port what is queued."""
        self._flush_scheduled = False
        size = self._connection.unsent
        if size:
            buffers = self._connection.data_to_send()
            self._port.write(envelope.enclose(buffers, size) if self._enclosing else buffers)

    def answered(self) -> None:
        """A request was answered. After the last one no other can go along: it is sent at once."""
        if not self.pending and not self._pumping:
            self.flush()
        self.said()

    def said(self) -> None:
        """Something was said outside of the pump: by the device, later. The next thing that it says goes along."""
        if self._pumping:
            return
        unsent = self._connection.unsent
        if unsent > FLUSH_ABOVE:
            self.flush()
        elif unsent and not self._flush_scheduled:
            self._flush_scheduled = True
            asyncio.get_running_loop().call_soon(self.flush)
        if self._reading_paused and not self._pump_scheduled:
            self.pump()

    def _send_reminder(self) -> None:
        """Say something that changes nothing: endpoint 0 does not receive."""
        if not self.writing_paused:
            self.send(p.InterruptReceivingStatus(endpoint=0x80, status=Status.SUCCESS))
            self.flush()
