"""libusb without USB: the objects of python-libusb1 that farplug uses.

A transfer that is submitted stays in flight until the test ends it (:meth:`FakeTransfer.finish`), or a rule
of its handle does. Events are handled when the context's file descriptor is readable, as with the real one.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import usb1

from farplug.libusb.binding import UsbDevice
from farplug.libusb.bulk_streams import BulkStreams
from farplug.libusb.library import Library
from farplug.usb.descriptors import ConfigurationDescriptor


class FakeTransfer:
    """``usb1.USBTransfer``."""

    def __init__(self, handle: FakeHandle, iso_packets: int) -> None:
        self.handle = handle
        self.iso_packets = iso_packets
        self.kind = ""
        self.endpoint = 0
        self.setup: tuple[int, int, int, int] | None = None
        self.buffer: Any = b""
        self.stream_id = 0
        self.lengths: list[int] = []
        self.results: list[tuple[int, int]] = []
        self.status = self.actual = 0
        self.submitted = self.closed = self.cancelling = False
        self.refusals: list[Exception] = []
        handle.transfers.append(self)

    # called by farplug

    def setControl(
        self, request_type: int, request: int, value: int, index: int, stage: Any, callback: Any, user_data: Any
    ) -> None:
        self._set("control", request_type & 0x80, bytearray(stage), callback, user_data)
        self.setup = (request_type, request, value, index)

    def setBulk(self, endpoint: int, buffer: Any, callback: Any, user_data: Any) -> None:
        self._set("bulk", endpoint, buffer, callback, user_data)

    def setInterrupt(self, endpoint: int, buffer: Any, callback: Any, user_data: Any) -> None:
        self._set("interrupt", endpoint, buffer, callback, user_data)

    def setIsochronous(
        self, endpoint: int, buffer: Any, callback: Any, user_data: Any, *, iso_transfer_length_list: Sequence[int]
    ) -> None:
        assert len(iso_transfer_length_list) == self.iso_packets
        assert sum(iso_transfer_length_list) == len(buffer)
        assert all(iso_transfer_length_list)
        self._set("isochronous", endpoint, buffer, callback, user_data)
        self.lengths = list(iso_transfer_length_list)

    def _set(self, kind: str, endpoint: int, buffer: Any, callback: Any, user_data: Any) -> None:
        assert not self.submitted, "a transfer in flight was changed"
        assert not self.closed
        self.kind, self.endpoint, self.buffer = kind, endpoint, buffer
        self._callback, self._user_data = callback, user_data
        self.stream_id, self.setup = 0, None

    def set_buffer(self, buffer: Any) -> None:
        assert not self.submitted, "a transfer in flight was changed"
        assert not self.closed
        assert self.kind in ("bulk", "interrupt")
        self.buffer = buffer

    def setUserData(self, user_data: Any) -> None:
        self._user_data = user_data

    def submit(self) -> None:
        assert not self.submitted, "a transfer in flight was submitted again"
        assert not self.closed
        handle = self.handle
        handle.device.request(f"submit {self.endpoint:02x}")
        if handle.refusals:
            refusal = handle.refusals.pop(0)
            if refusal is not None:
                raise refusal
        if handle.unplugged:
            raise usb1.USBErrorNoDevice
        self.submitted, self.cancelling = True, False
        handle.in_flight.append(self)
        handle.submissions.append((self.kind, self.endpoint, len(self.buffer)))
        if handle.rule is not None:
            handle.rule(self)

    def cancel(self) -> None:
        if self not in self.handle.in_flight:
            raise usb1.USBErrorNotFound
        self.handle.device.request(f"cancel {self.endpoint:02x}")
        if not self.cancelling:
            self.cancelling = True
            if not self.handle.keeps_cancelled:
                self.finish(status=usb1.TRANSFER_CANCELLED)

    def close(self) -> None:
        assert not self.submitted, "a transfer in flight was closed"
        self.closed = True

    def isSubmitted(self) -> bool:
        return self.submitted

    def getStatus(self) -> int:
        return self.status

    def getActualLength(self) -> int:
        return self.actual

    def getBuffer(self) -> Any:
        return self.buffer

    def getUserData(self) -> Any:
        return self._user_data

    def getISOSetupList(self) -> list[dict[str, int]]:
        return [
            {"length": length, "actual_length": actual, "status": status}
            for length, (status, actual) in zip(self.lengths, self.results, strict=True)
        ]

    # called by tests

    def finish(
        self,
        data: bytes = b"",
        status: int = usb1.TRANSFER_COMPLETED,
        *,
        actual: int | None = None,
        packets: Sequence[tuple[int, bytes | int]] = (),
    ) -> None:
        """End the transfer: its callback is called when events are handled next."""
        assert self.submitted
        self.status = status
        self.actual = len(data) if actual is None else actual
        if data:
            memoryview(self.buffer)[: len(data)] = data
        if self.kind == "isochronous":
            self.results, position = [], 0
            given = list(packets) or [(usb1.TRANSFER_COMPLETED, 0)] * len(self.lengths)
            for length, (code, part) in zip(self.lengths, given, strict=True):
                if isinstance(part, bytes):
                    memoryview(self.buffer)[position : position + len(part)] = part
                self.results.append((code, part if isinstance(part, int) else len(part)))
                position += length
        if self in self.handle.in_flight:
            self.handle.in_flight.remove(self)
        self.handle.context.complete(self)

    def call_back(self) -> None:
        self.submitted = False
        self._callback(self)


class FakeHandle:
    """``usb1.USBDeviceHandle``."""

    def __init__(self, device: FakeDevice, context: FakeContext) -> None:
        self.device = device
        self.context = context
        self.transfers: list[FakeTransfer] = []
        self.in_flight: list[FakeTransfer] = []
        self.submissions: list[tuple[str, int, int]] = []
        self.refusals: list[Exception | None] = []
        """Exceptions of the next submissions; None: none."""
        self.rule: Callable[[FakeTransfer], None] | None = None
        self.no_more_transfers = False
        self.keeps_cancelled = False
        """Cancelled transfers are complete when the test ends them."""
        self.claimed: set[int] = set()
        self.closed = False
        device.handles.append(self)

    @property
    def unplugged(self) -> bool:
        return self.device.unplugged

    def _call(self, name: str, *arguments: int) -> None:
        assert not self.closed
        device = self.device
        device.calls.append(" ".join(map(str, (name, *arguments))))
        device.caller = threading.get_ident()
        try:
            if name in device.hang:
                device.hanging.set()
                assert device.hang[name].wait(100)
        finally:
            device.caller = None
        if device.unplugged:
            raise usb1.USBErrorNoDevice
        failures = device.failures.get(device.calls[-1], device.failures.get(name))
        if failures is not None:
            device.failed.add(name)
            raise failures

    def getConfiguration(self) -> int:
        self._call("get_configuration")
        return self.device.configuration

    def setConfiguration(self, configuration: int) -> None:
        assert not self.claimed, "Linux refuses a configuration while interfaces are claimed"
        self._call("set_configuration", configuration)
        self.device.configuration = max(0, configuration)
        self.device.drivers = dict(self.device.bound_by_kernel.get(self.device.configuration, {}))

    def setInterfaceAltSetting(self, interface: int, alt_setting: int) -> None:
        if interface not in self.claimed:  # a claim failed
            assert "claim" in self.device.failed
            raise usb1.USBErrorNotFound
        self._call("set_interface", interface, alt_setting)

    def claimInterface(self, interface: int) -> None:
        self._call("claim", interface)
        if interface in self.device.drivers:
            raise usb1.USBErrorBusy
        self.claimed.add(interface)

    def releaseInterface(self, interface: int) -> None:
        self._call("release", interface)
        self.claimed.remove(interface)

    def detachKernelDriver(self, interface: int) -> None:
        self._call("detach", interface)
        if self.device.drivers.get(interface, "program") == "program":
            raise usb1.USBErrorNotFound
        driver = self.device.drivers.pop(interface)
        self.device.drivers = {n: d for n, d in self.device.drivers.items() if d != driver}

    def attachKernelDriver(self, interface: int) -> None:
        self._call("attach", interface)
        if interface in self.claimed or interface in self.device.drivers:
            raise usb1.USBErrorBusy
        bound = self.device.bound_by_kernel[self.device.configuration]
        if interface not in bound:
            raise usb1.USBErrorNotFound
        wanted = [number for number, driver in bound.items() if driver == bound[interface]]
        if self.claimed & set(wanted):
            raise usb1.USBErrorBusy  # its driver wants an interface that is not free
        self.device.drivers |= dict.fromkeys(wanted, bound[interface])

    def clearHalt(self, endpoint: int) -> None:
        self._call("clear_halt", endpoint)

    def resetDevice(self) -> None:
        self._call("reset")

    def getTransfer(self, iso_packets: int = 0) -> FakeTransfer:
        assert not self.closed
        if self.no_more_transfers:
            raise usb1.USBErrorNoMem
        return FakeTransfer(self, iso_packets)

    def close(self) -> None:
        assert not self.in_flight, "a handle was closed with transfers in flight"
        assert not any(transfer.submitted for transfer in self.transfers)
        self.device.calls.append("close")
        self.closed = True


class FakeContext:
    """``usb1.USBContext``."""

    def __init__(self, library: FakeLibrary) -> None:
        self.library = library
        self.read, self.write = os.pipe()
        self.finished: list[FakeTransfer] = []
        self.lock = threading.Lock()
        self.closed = False
        self.watched = True
        library.contexts.append(self)

    def getDeviceIterator(self, skip_on_error: bool = False) -> Iterator[UsbDevice]:
        assert skip_on_error
        for device in self.library.hardware:
            if not device.unplugged:
                yield device.seen_by(self)

    def getPollFDList(self) -> list[tuple[int, int]]:
        if self.library.polls_nothing:
            raise NotImplementedError
        return [(self.read, select.POLLIN)] if self.watched else []

    def handleEventsTimeout(self, tv: float = 0) -> None:
        assert not self.closed
        if self.library.event_errors:
            raise self.library.event_errors.pop()
        if not self.library.polls_nothing:
            for device in self.library.hardware:
                if device.context is self:
                    device.request("reap")
        if select.select([self.read], [], [], tv)[0]:
            os.read(self.read, 4096)
        with self.lock:
            finished, self.finished = self.finished, []
        for transfer in finished:
            transfer.call_back()

    def interruptEventHandler(self) -> None:
        os.write(self.write, b"!")

    def close(self) -> None:
        assert not self.closed
        self.closed = True
        os.close(self.read)
        os.close(self.write)

    def complete(self, transfer: FakeTransfer) -> None:
        with self.lock:  # the thread that takes it may close the pipe
            self.finished.append(transfer)
            os.write(self.write, b"!")

    def stop_watching(self) -> None:
        """Stop watching the device, as libusb does when it is unplugged."""
        self.watched = False
        os.write(self.write, b"!")


class FakeDevice:
    """``usb1.USBDevice``, and the hardware behind it."""

    def __init__(
        self,
        *configurations: ConfigurationDescriptor,
        ids: tuple[int, int] = (0x1234, 0x5678),
        place: tuple[int, int] = (1, 2),
        speed: int = usb1.SPEED_HIGH,
        drivers: dict[int, str] | None = None,
    ) -> None:
        self.configurations = configurations
        self.ids = ids
        self.place = place
        self.speed = speed
        self.configuration = configurations[0].value if configurations else 0
        self.bound_by_kernel = {self.configuration: drivers or {}}
        self.drivers = dict(drivers or {})
        self.unplugged = False
        self.calls: list[str] = []
        self.failures: dict[str, Exception] = {}
        self.failed: set[str] = set()
        """Names of calls that have failed."""
        self.hang: dict[str, threading.Event] = {}
        self.hanging = threading.Event()
        self.caller: int | None = None
        """The thread that holds the kernel's lock of the device, because it makes a blocking call."""
        self.waits: list[str] = []
        """Requests of other threads meanwhile: they would have blocked."""
        self.handles: list[FakeHandle] = []
        self.context: FakeContext | None = None

    def request(self, what: str) -> None:
        if self.caller not in (None, threading.get_ident()):
            self.waits.append(what)

    def seen_by(self, context: FakeContext) -> FakeDevice:
        self.context = context
        return self

    @property
    def handle(self) -> FakeHandle:
        """Return the handle that was opened last."""
        return self.handles[-1]

    def unplug(self) -> None:
        """Unplug the device: its transfers end, its file descriptor is not watched any more."""
        self.unplugged = True
        for transfer in list(self.handle.in_flight):
            transfer.finish(status=usb1.TRANSFER_NO_DEVICE)
        self.handle.context.stop_watching()

    def getBusNumber(self) -> int:
        return self.place[0]

    def getDeviceAddress(self) -> int:
        return self.place[1]

    def getPortNumberList(self) -> list[int]:
        return [self.place[1] - 1] if self.place[1] > 1 else []

    def getVendorID(self) -> int:
        return self.ids[0]

    def getProductID(self) -> int:
        return self.ids[1]

    def getbcdDevice(self) -> int:
        return 0x0102

    def getDeviceClass(self) -> int:
        return 0xEF

    def getDeviceSubClass(self) -> int:
        return 2

    def getDeviceProtocol(self) -> int:
        return 1

    def getDeviceSpeed(self) -> int:
        return self.speed

    def iterConfigurations(self) -> Iterator[FakeConfiguration]:
        return (FakeConfiguration(one) for one in self.configurations)

    def open(self) -> FakeHandle:
        self.calls.append("open")
        if "open" in self.failures:
            raise self.failures["open"]
        assert self.context is not None
        return FakeHandle(self, self.context)


class FakeConfiguration:
    """``usb1.USBConfiguration``."""

    def __init__(self, descriptor: ConfigurationDescriptor) -> None:
        self.descriptor = descriptor

    def getConfigurationValue(self) -> int:
        return self.descriptor.value

    def getAttributes(self) -> int:
        return self.descriptor.attributes

    def getMaxPower(self) -> int:
        return self.descriptor.max_power * 2

    def getExtra(self) -> list[bytes]:
        return [self.descriptor.extra] if self.descriptor.extra else []

    def __iter__(self) -> Iterator[list[FakeSetting]]:
        for number in sorted({one.number for one in self.descriptor.interfaces}):
            yield [FakeSetting(one) for one in self.descriptor.interfaces if one.number == number]


class FakeSetting:
    """``usb1.USBInterfaceSetting``."""

    def __init__(self, descriptor: Any) -> None:
        self.descriptor = descriptor

    def getNumber(self) -> int:
        return int(self.descriptor.number)

    def getAlternateSetting(self) -> int:
        return int(self.descriptor.alternate)

    def getClass(self) -> int:
        return int(self.descriptor.interface_class)

    def getSubClass(self) -> int:
        return int(self.descriptor.interface_subclass)

    def getProtocol(self) -> int:
        return int(self.descriptor.interface_protocol)

    def getExtra(self) -> list[bytes]:
        if self.descriptor.extra == b"broken":
            raise ValueError("an extra descriptor is incomplete")
        return [self.descriptor.extra] if self.descriptor.extra else []

    def __iter__(self) -> Iterator[FakeEndpoint]:
        return (FakeEndpoint(one) for one in self.descriptor.endpoints)


class FakeEndpoint:
    """``usb1.USBEndpoint``."""

    def __init__(self, descriptor: Any) -> None:
        self.descriptor = descriptor

    def getAddress(self) -> int:
        return int(self.descriptor.address)

    def getAttributes(self) -> int:
        return int(self.descriptor.attributes)

    def getMaxPacketSize(self) -> int:
        return int(self.descriptor.max_packet_size)

    def getInterval(self) -> int:
        return int(self.descriptor.interval)

    def getExtra(self) -> list[bytes]:
        return [] if self.descriptor.companion is None else [bytes(self.descriptor.companion)]


class FakeStreams:
    """:class:`farplug.libusb.bulk_streams.BulkStreams`."""

    def __init__(self) -> None:
        self.allocated: dict[int, int] = {}
        self.limit = 65533

    def allocate(self, handle: Any, count: int, endpoints: Sequence[int]) -> int:
        count = min(count, self.limit)
        self.allocated |= dict.fromkeys(endpoints, count)
        return count

    def free(self, handle: Any, endpoints: Sequence[int]) -> None:
        for endpoint in endpoints:
            if self.allocated.pop(endpoint, None) is None:
                raise usb1.USBErrorInvalidParam

    def assign(self, transfer: Any, stream_id: int) -> None:
        transfer.stream_id = stream_id


def set_buffer(transfer: Any, buffer: Any) -> None:
    """:func:`farplug.libusb.direct.set_buffer`."""
    transfer.set_buffer(buffer)


class FakeLibrary(Library):
    """:class:`farplug.libusb.library.Library` for a machine with these devices."""

    def __init__(self, *hardware: FakeDevice) -> None:
        self.hardware = hardware
        self.contexts: list[FakeContext] = []
        self.fake_streams = FakeStreams()
        self.bulk_streams = cast(BulkStreams, self.fake_streams)
        self.set_buffer = set_buffer
        self.polls_nothing = False
        self.event_errors: list[Exception] = []

    def open_context(self) -> FakeContext:
        return FakeContext(self)
