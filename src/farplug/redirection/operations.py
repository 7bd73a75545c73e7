"""Operations on a whole device, one at a time: reset, configurations, alternate settings, bulk streams.

With real hardware they take long. While an operation runs, no further packet of the guest is handled: the device gets
requests in the guest's order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from typing import Any

from farplug.redirection.current_device import CurrentDevice
from farplug.redirection.describe import device_infos
from farplug.redirection.pending_requests import PendingRequests
from farplug.redirection.port_protocol import PortProtocol
from farplug.redirection.receptions import Receptions
from farplug.usb.device import Device
from farplug.usb.transfer import Status
from farplug.usb.types import Endpoint, Interface
from farplug.usbredir import packets

OPERATION_TIMEOUT = 5.0
"""Seconds after which an operation is cancelled, and answered with an I/O error."""
NO_SETTING = 255
"""The alternate setting in the answer for an interface that does not exist."""


class Operations:
    """Runs operations, and sends the answers.

    Args:
        protocol: sends the answers; pauses while an operation runs.
        current: the device; while there is none every answer is an I/O error.
        requests: the pending requests, which operations cancel.
        receptions: the running receptions, which operations end.
        described: called with the endpoints that were sent to the guest (ep_info).
    """

    def __init__(
        self,
        protocol: PortProtocol,
        current: CurrentDevice,
        requests: PendingRequests,
        receptions: Receptions,
        described: Callable[[Collection[Endpoint]], None],
    ) -> None:
        self._protocol = protocol
        self._current = current
        self._send = protocol.send
        self._fault = protocol.fault
        self._requests = requests
        self._receptions = receptions
        self._described = described
        self._task: asyncio.Task[None] | None = None

    async def finished(self) -> None:
        """Wait until no operation runs."""
        if self._task is not None:
            await asyncio.wait([self._task])

    def describe(self, device: Device) -> None:
        """Send the interfaces and endpoints of the current settings; send nothing if the device raises."""
        endpoints = {e.address: e for interface in device.interfaces for e in interface.endpoints}
        infos = list(device_infos(device))
        self._current.endpoints = endpoints
        for packet in infos:
            self._send(packet)
        self._described(endpoints.values())

    def reset(self, device: Device, then: Callable[[], None]) -> None:
        """Reset the device for a port reset, which has no answer, then call ``then``."""

        async def operation() -> None:
            self._requests.cancel_all()
            await self._status(device.reset())
            self._receptions.end_all()
            then()

        self._run(operation())

    def set_configuration(self, packet: packets.SetConfiguration, then: Callable[[int], None]) -> None:
        """Set a configuration, send new infos and then the status; on success call ``then`` with the configuration."""
        device = self._current.usable
        if device is None:
            self._send(packets.ConfigurationStatus(id=packet.id, status=Status.IO_ERROR, configuration=0))
            return

        async def operation() -> None:
            self._requests.cancel_all()
            self._receptions.drop()
            status = await self._status(device.set_configuration(packet.configuration))
            chosen = 0
            try:
                chosen = device.configuration
                self.describe(device)
            except Exception as error:  # the device is being unplugged, for example
                self._fault(error)
                status = Status.IO_ERROR
            self._send(
                packets.ConfigurationStatus(id=packet.id, status=_operation_status(status), configuration=chosen)
            )
            if status is Status.SUCCESS:
                then(chosen)

        self._run(operation())

    def get_configuration(self, packet: packets.GetConfiguration) -> None:
        """Send the current configuration."""
        device = self._current.usable
        status, value = Status.IO_ERROR, 0
        try:
            if device is not None:
                status, value = Status.SUCCESS, device.configuration
        except Exception as error:
            self._fault(error)
            status = Status.IO_ERROR
        self._send(packets.ConfigurationStatus(id=packet.id, status=status, configuration=value))

    def set_alt_setting(self, packet: packets.SetAltSetting) -> None:
        """Set an alternate setting, send new infos if that succeeds, and then the status."""
        device = self._current.usable
        number = packet.interface
        interface = self._interface(number)
        if isinstance(interface, Status):
            self._answer_setting(packet.id, interface, number, NO_SETTING)
            return
        assert device is not None
        endpoints = {endpoint.address: endpoint for endpoint in interface.endpoints}

        async def operation() -> None:
            self._requests.cancel_all(endpoints)
            self._receptions.drop(endpoints)
            status = await self._status(device.set_interface(number, packet.alt))
            if status is Status.SUCCESS:
                try:
                    self.describe(device)
                except Exception as error:
                    self._fault(error)
                    status = Status.IO_ERROR
            current = self._interface(number)
            alternate = current.alternate if isinstance(current, Interface) else NO_SETTING
            self._answer_setting(packet.id, status, number, alternate)

        self._run(operation())

    def get_alt_setting(self, packet: packets.GetAltSetting) -> None:
        """Send the current alternate setting of an interface."""
        interface = self._interface(packet.interface)
        if isinstance(interface, Interface):
            self._answer_setting(packet.id, Status.SUCCESS, packet.interface, interface.alternate)
        else:
            self._answer_setting(packet.id, interface, packet.interface, NO_SETTING)

    def alloc_bulk_streams(self, packet: packets.AllocBulkStreams) -> None:
        """Allocate bulk streams on all endpoints of the packet, or on none."""
        count = packet.streams
        self._streams(packet, count, lambda device, endpoints: device.allocate_streams(endpoints, count))

    def free_bulk_streams(self, packet: packets.FreeBulkStreams) -> None:
        """Free the bulk streams of the endpoints of the packet, and send a count of 0."""
        self._streams(packet, 0, lambda device, endpoints: device.free_streams(endpoints))

    def _streams(
        self,
        packet: packets.AllocBulkStreams | packets.FreeBulkStreams,
        count: int,
        call: Callable[[Device, Sequence[int]], Awaitable[Status]],
    ) -> None:
        device, known = self._current.usable, self._current.endpoints
        addresses = [packets.endpoint_address(index) for index in range(32) if packet.endpoints >> index & 1]

        def answer(status: Status) -> None:
            self._send(
                packets.BulkStreamsStatus(
                    id=packet.id, endpoints=packet.endpoints, streams=count, status=_operation_status(status)
                )
            )

        async def operation(device: Device) -> None:
            answer(await self._status(call(device, addresses)))

        if device is None:
            answer(Status.IO_ERROR)
        elif not all(a in known and known[a].max_streams >= count for a in addresses):
            answer(Status.INVALID)
        else:
            self._run(operation(device))

    def _interface(self, number: int) -> Interface | Status:
        """Return an interface in its current setting, or the status of the answer if there is none."""
        device = self._current.usable
        if device is None:
            return Status.IO_ERROR
        try:
            found = [interface for interface in device.interfaces if interface.number == number]
        except Exception as error:
            self._fault(error)
            return Status.IO_ERROR
        return found[0] if found else Status.INVALID

    def _answer_setting(self, id: int, status: Status, number: int, alternate: int) -> None:
        self._send(packets.AltSettingStatus(id=id, status=_operation_status(status), interface=number, alt=alternate))

    def _run(self, operation: Coroutine[Any, Any, None]) -> None:
        async def run() -> None:
            try:
                await operation
            finally:
                self._task = None
                self._protocol.resume()

        self._protocol.busy = True
        self._task = asyncio.get_running_loop().create_task(run())

    async def _status(self, call: Awaitable[Status]) -> Status:
        try:
            async with asyncio.timeout(OPERATION_TIMEOUT):
                return await call
        except Exception as error:
            self._fault(error)
            return Status.IO_ERROR


def _operation_status(status: Status) -> Status:
    """Return a status that usbredir allows for an operation: a stall becomes an I/O error."""
    return Status.IO_ERROR if status is Status.STALL else status
