"""A USB device of another machine, which a USB/IP server there exports.

The server's kernel drives the device: a transfer is an URB of the connection. Requests that change the configuration,
an alternate setting or a halt, and a reset, are control URBs, which Linux's usbip-host carries out itself (stub_rx.c).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from farplug.errors import DeviceError, Reason, StateError, UsageError
from farplug.remote.connection import UrbConnection, status_of
from farplug.remote.receptions import IsoOut, Receiver
from farplug.spice.host import split_host_and_port
from farplug.transport.connection import TcpAddress
from farplug.usb.descriptors import ConfigurationDescriptor, DeviceDescriptor, parse_string
from farplug.usb.device import Device, DeviceListener, Identity, Reception
from farplug.usb.transfer import Status, Transfer
from farplug.usb.types import Buffer, DescriptorType, Endpoint, Interface, Setup, StandardRequest, TransferType
from farplug.usbip.messages import PORT, ExportedDevice, Submit, Submitted

DESCRIPTORS_TIMEOUT = 10.0
"""Seconds until all descriptors of a device are read."""
SCHEME: Final = "usbip://"
MAX_CONFIGURATIONS: Final = 16
"""Configurations of a device that are read."""

_PORT_RESET = Setup(0x23, StandardRequest.SET_FEATURE, 4)
"""SET_FEATURE(PORT_RESET) of a hub: what usbip-host takes as a reset of the device."""


def parse_remote(text: str) -> tuple[TcpAddress, str]:
    """Parse ``usbip://HOST[:PORT]/BUSID``; return the server's address and the bus id.

    Raises:
        UsageError: the text is not valid (``BAD_SETTING``).
    """
    authority, _, busid = text.removeprefix(SCHEME).partition("/")
    try:
        if not text.startswith(SCHEME):
            raise ValueError("it does not begin with usbip://")
        if not re.fullmatch(r"[\w.:-]{1,31}", busid, re.ASCII):
            raise ValueError("it has no valid bus id")
        host, port = split_host_and_port(authority, port_required=False)
        if not host or port == 0:
            raise ValueError("it has no valid host or port")
    except ValueError as error:
        raise UsageError(
            f"{text[:200]!r} is not a valid USB/IP device: {error}",
            reason=Reason.BAD_SETTING,
            remedy="write it as usbip://HOST/BUSID or usbip://HOST:PORT/BUSID; 'usbip list -r HOST' lists the devices",
        ) from error
    return TcpAddress(host, port or PORT), busid


@dataclass(frozen=True, slots=True)
class _Description:
    """What the descriptors of a device say."""

    identity: Identity
    configurations: tuple[ConfigurationDescriptor, ...]


class RemoteDevice(Device):
    """A device that a USB/IP server exports. Made by :meth:`connect`.

    While the device is imported, no other client, and not the server's machine, can use it: from :meth:`connect` until
    :meth:`close`, and again from :meth:`open` on.
    """

    def __init__(self, address: TcpAddress, busid: str, connection: UrbConnection, description: _Description) -> None:
        self._address = address
        self._busid = busid
        self._connection: UrbConnection | None = connection
        self._exported = connection.device
        self._description = description
        self._listener: DeviceListener | None = None
        self._configuration = 0
        self._alternates: dict[int, int] = {}
        self._numbers: dict[Transfer, int] = {}
        self._receivers: dict[int, Receiver] = {}
        self._iso_out: dict[int, IsoOut] = {}

    @classmethod
    async def connect(cls, address: TcpAddress, busid: str) -> RemoteDevice:
        """Import a device, and read its descriptors.

        Raises:
            DeviceError: the server cannot be reached, or refuses the device, or the device cannot be read.
        """
        connection = await UrbConnection.open(address, busid)
        try:
            async with asyncio.timeout(DESCRIPTORS_TIMEOUT):
                description = await _describe(connection)
        except TimeoutError:
            await connection.close()
            raise DeviceError(
                f"the descriptors of {busid} at {address} were not read within {DESCRIPTORS_TIMEOUT:g} s",
                reason=Reason.TIMED_OUT,
            ) from None
        except BaseException:
            await connection.close()
            raise
        return cls(address, busid, connection, description)

    @property
    def identity(self) -> Identity:
        return self._description.identity

    @property
    def configuration(self) -> int:
        return self._configuration

    @property
    def interfaces(self) -> Sequence[Interface]:
        for known in self._description.configurations:
            if known.value == self._configuration:
                return known.select(self._alternates)
        return self._description.configurations[0].select()

    @property
    def _endpoints(self) -> dict[int, Endpoint]:
        return {endpoint.address: endpoint for interface in self.interfaces for endpoint in interface.endpoints}

    # Opening and closing

    async def open(self, listener: DeviceListener) -> None:
        if self._listener is not None:
            raise StateError(f"{self.identity} is already plugged")
        self._listener = listener
        try:
            if self._connection is None or not self._connection.is_open:
                self._connection = await UrbConnection.open(self._address, self._busid)
                self._check_is_same(self._connection.device)
            self._connection.on_lost = self._lost
            self._unconfigure()
        except BaseException:
            self._listener = None
            await self.dispose()
            raise

    def _check_is_same(self, found: ExportedDevice) -> None:
        """Raise ``DeviceError`` if the bus id has become that of another device, whose descriptors are not known."""
        known = self._exported
        ids = known.vendor_id, known.product_id, known.device_version, known.speed
        if (found.vendor_id, found.product_id, found.device_version, found.speed) != ids:
            raise DeviceError(
                f"{self._busid} at {self._address} is another device now, {found.vendor_id:04x}:{found.product_id:04x}",
                reason=Reason.DEVICE_LOST,
                remedy="attach it again",
            )

    async def close(self) -> None:
        self._listener = None
        await self.dispose()
        self._unconfigure()

    async def dispose(self) -> None:
        """Let other clients have the device."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._stop_receiving()
            await connection.close()

    def _lost(self, error: Exception | None) -> None:
        listener = self._listener
        if listener is not None:
            listener.lost(error or ConnectionError(f"the USB/IP server at {self._address} closed the connection"))

    def _unconfigure(self) -> None:
        self._configuration = 0
        self._alternates = {}

    # Operations

    async def reset(self) -> Status:
        self._cancel_all()
        self._unconfigure()
        if self._connection is None or not self._connection.is_open:
            return Status.IO_ERROR
        await self._connection.control(_PORT_RESET)  # carried out, and then refused by the device, which is not a hub
        return Status.SUCCESS if self._connection is not None and self._connection.is_open else Status.IO_ERROR

    async def set_configuration(self, value: int) -> Status:
        self._cancel_all()
        status = await self._request(Setup(0x00, StandardRequest.SET_CONFIGURATION, value))
        if status is Status.SUCCESS:
            self._unconfigure()
            self._configuration = value
        return status

    async def set_interface(self, number: int, alternate: int) -> Status:
        current = next((interface for interface in self.interfaces if interface.number == number), None)
        if current is None:
            return Status.INVALID
        self._cancel_all({endpoint.address for endpoint in current.endpoints})
        status = await self._request(Setup(0x01, StandardRequest.SET_INTERFACE, alternate, number))
        if status is Status.SUCCESS:
            self._alternates[number] = alternate
        return status

    async def _request(self, setup: Setup) -> Status:
        if self._connection is None:
            return Status.IO_ERROR
        status, _ = await self._connection.control(setup)
        return status

    def _cancel_all(self, endpoints: set[int] | None = None) -> None:
        self._stop_receiving(endpoints)
        for transfer in [one for one in self._numbers if endpoints is None or one.endpoint in endpoints]:
            self.cancel(transfer)

    def _stop_receiving(self, endpoints: set[int] | None = None) -> None:
        for receptions in (self._receivers, self._iso_out):
            for endpoint in [one for one in receptions if endpoints is None or one in endpoints]:
                receptions.pop(endpoint).stop()

    # Transfers

    def submit(self, transfer: Transfer) -> None:
        connection = self._connection
        if connection is None:
            transfer.complete(Status.IO_ERROR)
        elif transfer.type is TransferType.ISOCHRONOUS:
            stream = self._iso_out.get(transfer.endpoint)
            if stream is None:
                transfer.complete(Status.INVALID)
            else:
                transfer.complete(stream.add(bytes(transfer.data)))
        elif transfer.stream_id or (transfer.type is TransferType.CONTROL and transfer.setup is None):
            transfer.complete(Status.INVALID)
        else:
            setup = bytes(8) if transfer.setup is None else bytes(transfer.setup)
            urb = Submit(0, 0, transfer.endpoint, transfer.length, transfer.data, setup)

            def done(reply: Submitted) -> None:
                self._numbers.pop(transfer, None)
                transfer.complete(status_of(reply.status), reply.data, actual=reply.actual)

            number = connection.submit(urb, done)
            if transfer.status is None:
                self._numbers[transfer] = number

    def cancel(self, transfer: Transfer) -> None:
        number = self._numbers.get(transfer)
        if number is not None and self._connection is not None:
            self._connection.unlink(number)

    # Receptions

    def start_receiving(self, reception: Reception) -> Status:
        address = reception.endpoint
        endpoint, connection = self._endpoints.get(address), self._connection
        if address in self._receivers or address in self._iso_out:
            return Status.INVALID
        if endpoint is None or connection is None or endpoint.type is not reception.type or reception.stream_id:
            return Status.STALL
        if address & 0x80:
            receiver = self._receivers[address] = Receiver(reception, endpoint, connection, self._arrived, self._ended)
            receiver.start()
        elif endpoint.type is TransferType.ISOCHRONOUS:
            self._iso_out[address] = IsoOut(reception, endpoint, connection)
        else:
            return Status.STALL
        return Status.SUCCESS

    def stop_receiving(self, endpoint: int) -> Status:
        self._stop_receiving({endpoint})
        return Status.SUCCESS

    def _arrived(self, endpoint: int, status: Status, data: Buffer) -> None:
        if self._listener is not None:
            self._listener.received(endpoint, status, data)

    def _ended(self, endpoint: int) -> None:
        self._stop_receiving({endpoint})
        if self._listener is not None:
            self._listener.reception_ended(endpoint, Status.STALL)


async def _describe(connection: UrbConnection) -> _Description:
    """Read the descriptors of a device.

    Raises:
        DeviceError: the device has no configuration that can be read (``DEVICE_FAULT``).
    """

    async def read(kind: DescriptorType, index: int, length: int, language: int = 0) -> bytes:
        setup = Setup(0x80, StandardRequest.GET_DESCRIPTOR, kind << 8 | index, language, length)
        status, data = await connection.control(setup)
        return data if status is Status.SUCCESS else b""

    device = DeviceDescriptor.parse(await read(DescriptorType.DEVICE, 0, 18))
    configurations = []
    for index in range(min(device.configuration_count, MAX_CONFIGURATIONS)):
        head = await read(DescriptorType.CONFIGURATION, index, 9)
        if len(head) == 9:
            whole = await read(DescriptorType.CONFIGURATION, index, max(9, int.from_bytes(head[2:4], "little")))
            configurations.append(ConfigurationDescriptor.parse(whole))
    if not configurations:
        raise DeviceError(
            "the device at the USB/IP server has no configuration that can be read", reason=Reason.DEVICE_FAULT
        )
    languages = await read(DescriptorType.STRING, 0, 255)
    language = int.from_bytes(languages[2:4], "little")

    async def text(index: int) -> str:
        return parse_string(await read(DescriptorType.STRING, index, 255, language)) if index and language else ""

    identity = Identity(
        connection.device.speed,
        device.vendor_id,
        device.product_id,
        device.device_version,
        device.device_class,
        device.device_subclass,
        device.device_protocol,
        await text(device.manufacturer_index),
        await text(device.product_index),
        await text(device.serial_number_index),
    )
    return _Description(identity, tuple(configurations))
