"""Functions whose behaviour is one coroutine, and whose endpoints are attributes that it awaits.

::

    class Loopback(AsyncFunction):
        received = bulk_out()
        sent = bulk_in()

        async def run(self) -> None:
            async for data in self.received:
                await self.sent.write(data)

Such a function is a :class:`~farplug.virtual.function.Function` like others, and can be one of several in a device.
Where speed matters, as in a disk, a function implements :class:`~farplug.virtual.function.Function` itself.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Self, TypeAlias, TypeVar, cast

from farplug.rate_limit import limited_logger
from farplug.usb.descriptors import InterfaceDescriptor
from farplug.usb.device import Reception
from farplug.usb.transfer import Status, Transfer
from farplug.usb.types import Direction, Recipient, RequestType, Setup, Speed
from farplug.virtual.endpoints import (
    AwaitedEndpoint,
    BulkIn,
    BulkOut,
    Declaration,
    Detached,
    EndpointOwner,
    InterruptIn,
    InterruptOut,
    IsochronousIn,
    IsochronousOut,
)
from farplug.virtual.function import Function, FunctionHost, Numbers

END_TIMEOUT: Final = 5.0
"""Seconds that unplugging waits for a cancelled ``run()``, and for the handlers of requests, to end."""

log = limited_logger(__name__)

_E = TypeVar("_E", bound=AwaitedEndpoint)

InHandler: TypeAlias = Callable[[Any, Setup], bytes | Awaitable[bytes]]
"""A method that returns the data stage of a control transfer."""
OutHandler: TypeAlias = Callable[[Any, Setup, bytes], Awaitable[None] | None]
"""A method that takes the data stage of a control transfer."""
_InHandler = TypeVar("_InHandler", bound=InHandler)
_OutHandler = TypeVar("_OutHandler", bound=OutHandler)
Handler: TypeAlias = Callable[[Setup, bytes], bytes | Awaitable[bytes | None] | None]


class Stall(Exception):
    """Raised by the handler of a control request: the request stalls."""


@dataclass(frozen=True, slots=True)
class Setting:
    """An alternate setting of an interface of a function.

    Attributes:
        interface: the function's interface, from 0.
        alternate: bAlternateSetting.
        interface_class: bInterfaceClass; by default that of vendors.
        subclass: bInterfaceSubClass.
        protocol: bInterfaceProtocol.
        name: the text of iInterface.
    """

    interface: int = 0
    alternate: int = 0
    interface_class: int = 0xFF
    subclass: int = 0
    protocol: int = 0
    name: str = ""


@dataclass(frozen=True, slots=True)
class _Declared:
    """An endpoint in the body of a class; instances of the class have the endpoint itself."""

    kind: type[AwaitedEndpoint]
    declaration: Declaration


def _declare(kind: type[_E], declaration: Declaration) -> _E:
    return cast(_E, _Declared(kind, declaration))


def bulk_in(*, interface: int = 0, alternate: int = 0) -> BulkIn:
    """Declare a bulk IN endpoint of a function."""
    return _declare(BulkIn, Declaration(interface, alternate))


def bulk_out(*, interface: int = 0, alternate: int = 0) -> BulkOut:
    """Declare a bulk OUT endpoint of a function."""
    return _declare(BulkOut, Declaration(interface, alternate))


def interrupt_in(
    packet_size: int = 64, *, microseconds: int = 1000, keep: bool = False, interface: int = 0, alternate: int = 0
) -> InterruptIn:
    """Declare an interrupt IN endpoint of a function.

    Args:
        packet_size: wMaxPacketSize in bytes; less where the speed does not allow it.
        microseconds: the interval; the device has the next shorter one that its speed allows.
        keep: send the last packet again whenever the guest starts to receive again.
        interface: the function's interface, from 0.
        alternate: the alternate setting that has the endpoint.
    """
    return _declare(InterruptIn, Declaration(interface, alternate, packet_size, microseconds, keep=keep))


def interrupt_out(
    packet_size: int = 64, *, microseconds: int = 1000, interface: int = 0, alternate: int = 0
) -> InterruptOut:
    """Declare an interrupt OUT endpoint of a function. Its parameters are those of :func:`interrupt_in`."""
    return _declare(InterruptOut, Declaration(interface, alternate, packet_size, microseconds))


def isochronous_in(
    packet_size: int, *, microseconds: int = 1000, attributes: int = 0, interface: int = 0, alternate: int = 0
) -> IsochronousIn:
    """Declare an isochronous IN endpoint of a function.

    Args:
        packet_size: wMaxPacketSize in bytes; less where the speed does not allow it.
        microseconds: the interval. QEMU assumes 1 ms at Full Speed.
        attributes: synchronization (bits 3..2) and usage (bits 5..4) of bmAttributes (USB 2.0, table 9-13).
        interface: the function's interface, from 0.
        alternate: the alternate setting that has the endpoint.
    """
    return _declare(IsochronousIn, Declaration(interface, alternate, packet_size, microseconds, attributes))


def isochronous_out(
    packet_size: int, *, microseconds: int = 1000, attributes: int = 0, interface: int = 0, alternate: int = 0
) -> IsochronousOut:
    """Declare an isochronous OUT endpoint of a function. Its parameters are those of :func:`isochronous_in`."""
    return _declare(IsochronousOut, Declaration(interface, alternate, packet_size, microseconds, attributes))


_REQUESTS = "_farplug_requests"


def control_in(
    request: int, type: RequestType = RequestType.VENDOR, recipient: Recipient = Recipient.DEVICE
) -> Callable[[_InHandler], _InHandler]:
    """Make a method the handler of a control request with an IN data stage.

    The method receives the setup packet, and returns the data, of which the guest receives at most wLength bytes. It
    may be a coroutine. It raises :class:`Stall` to refuse the request.

    Args:
        request: bRequest.
        type: class or vendor.
        recipient: the device, an interface or an endpoint. wIndex has the function's own numbers.
    """

    def decorate(method: _InHandler) -> _InHandler:
        return _mark(method, Direction.IN, request, type, recipient)

    return decorate


def control_out(
    request: int, type: RequestType = RequestType.VENDOR, recipient: Recipient = Recipient.DEVICE
) -> Callable[[_OutHandler], _OutHandler]:
    """Make a method the handler of a control request with an OUT data stage, or none.

    The method receives the setup packet and the data, and may be a coroutine. The request is complete when the method
    returns. It raises :class:`Stall` to refuse the request. The parameters are those of :func:`control_in`.
    """

    def decorate(method: _OutHandler) -> _OutHandler:
        return _mark(method, Direction.OUT, request, type, recipient)

    return decorate


_Method = TypeVar("_Method", bound=Callable[..., Any])


def _mark(method: _Method, direction: Direction, request: int, type: RequestType, recipient: Recipient) -> _Method:
    key = direction | type << 5 | recipient, request
    setattr(method, _REQUESTS, (*getattr(method, _REQUESTS, ()), key))
    return method


class _Run:
    """The time from a configuration to the next reset, in which one call of ``run()`` is alive."""

    def __init__(self, function: AsyncFunction) -> None:
        self.function = function
        self.cancelled = False


_RUN: ContextVar[_Run | None] = ContextVar("farplug_run", default=None)
"""The run that a task belongs to; tasks inherit it from the task that creates them."""


class AsyncFunction(Function, EndpointOwner):
    """A function whose behaviour is the coroutine :meth:`run`, with endpoints that are attributes.

    Endpoints are declared in the body of the class with :func:`bulk_in`, :func:`bulk_out`, :func:`interrupt_in`,
    :func:`interrupt_out`, :func:`isochronous_in` and :func:`isochronous_out`, requests with :func:`control_in` and
    :func:`control_out`. Addresses are computed.

    * :meth:`run` begins when the guest sets the configuration, and is cancelled when the guest resets or unplugs the
      device. The next one begins when the cancelled one has ended: at most one is alive.
    * Methods of endpoints raise :class:`~farplug.virtual.endpoints.Detached` while the guest has not configured the
      device, and when it resets or unplugs the device; in a cancelled :meth:`run` and in its tasks always.
    * An exception in :meth:`run`, or in the handler of a request, is logged with its traceback, and reported as a
      :class:`~farplug.virtual.events.FunctionRaised`; the guest in memory raises it. The device stays usable.

    Attributes:
        settings: the alternate settings of all interfaces; by default one interface with the class of vendors.
        requests: the handlers of control requests by bmRequestType and bRequest, with the decorated methods. A handler
            receives the setup packet and the data of the guest, and may be added at any time.
    """

    settings: ClassVar[Sequence[Setting]] = (Setting(),)
    requests: dict[tuple[int, int], Handler]
    _endpoints: dict[int, AwaitedEndpoint]
    _alternates: dict[int, int]
    _current: _Run | None
    _task: asyncio.Task[None] | None
    _answering: dict[Transfer, asyncio.Future[bytes | None]]
    _running: _Run
    _notified: asyncio.Event
    _host: FunctionHost
    _speed: Speed

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        # Not in __init__: a subclass does not have to call it.
        self = super().__new__(cls)
        self._endpoints = {}
        self.requests = {}
        self._speed = Speed.HIGH
        self._alternates = {}
        self._current = None
        self._task = None
        self._answering = {}
        self._notified = asyncio.Event()
        counts = {Direction.IN: 0, Direction.OUT: 0}
        for name in {name: None for base in reversed(cls.__mro__) for name in vars(base)}:
            value = inspect.getattr_static(cls, name)
            if isinstance(value, _Declared):
                direction = Direction(value.kind.direction)
                counts[direction] += 1
                endpoint = value.kind(self, direction | counts[direction], value.declaration)
                self._endpoints[endpoint.address] = endpoint
                setattr(self, name, endpoint)
            for base in cls.__mro__:  # an override of a handler stays one
                for key in getattr(vars(base).get(name), _REQUESTS, ()):
                    self.requests.setdefault(key, _handler(getattr(self, name), Direction(key[0] & 0x80)))
        return self

    # What a subclass implements

    async def run(self) -> None:
        """Behave, until the guest resets or unplugs the device, which cancels the coroutine. It may return before."""

    def class_descriptors(self, setting: Setting, numbers: Numbers) -> bytes:
        """Return the class-specific descriptors of an alternate setting, raw.

        They are placed between the interface descriptor and the first endpoint descriptor.
        """
        return b""

    # State

    @property
    def host(self) -> FunctionHost:
        """Return the device that the function is a part of."""
        return self._host

    @property
    def is_configured(self) -> bool:
        """Return whether the guest has set the configuration."""
        return self._current is not None

    def alternate(self, interface: int) -> int:
        """Return the current alternate setting of one of the function's interfaces."""
        return self._alternates.get(interface, 0)

    def check(self) -> None:
        run = _RUN.get()
        stale = run is not None and run.function is self and run is not self._current
        if self._current is None or stale:
            raise Detached(f"the guest has not configured the {type(self).__name__}, or has reset it")

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition is true that depends on what the guest does; :meth:`notify` checks it.

        Raises:
            Detached: the guest has not configured the device, or resets or unplugs it.
        """
        self.check()
        current = self._current
        while not condition():
            self._notified.clear()
            await self._notified.wait()
            self.check()
            if self._current is not current:
                raise Detached(f"the guest has reset the {type(self).__name__}")

    def notify(self) -> None:
        """Check the conditions of :meth:`until`: a handler of a request has changed the state of the function."""
        self._notified.set()

    # Function

    def interfaces(self, speed: Speed, numbers: Numbers) -> Sequence[InterfaceDescriptor]:
        """Return the descriptors of the settings and endpoints.

        Raises:
            ValueError: an endpoint belongs to no setting.
        """
        settings = {(setting.interface, setting.alternate) for setting in self.settings}
        for endpoint in self._endpoints.values():
            place = endpoint.declaration.interface, endpoint.declaration.alternate
            if place not in settings:
                raise ValueError(f"{type(self).__name__} has no setting {place[1]} of interface {place[0]}")
        return tuple(
            InterfaceDescriptor(
                setting.interface,
                setting.alternate,
                setting.interface_class,
                setting.subclass,
                setting.protocol,
                tuple(
                    endpoint.descriptor(speed) for endpoint in self._endpoints_of(setting.interface, setting.alternate)
                ),
                numbers.string(setting.name),
                self.class_descriptors(setting, numbers),
            )
            for setting in self.settings
        )

    def _endpoints_of(self, interface: int, alternate: int | None = None) -> list[AwaitedEndpoint]:
        return [
            endpoint
            for endpoint in self._endpoints.values()
            if endpoint.declaration.interface == interface and alternate in (None, endpoint.declaration.alternate)
        ]

    def bind(self, host: FunctionHost) -> None:
        self._host = host

    def configured(self, speed: Speed) -> None:
        self._speed = speed
        self._current = _Run(self)
        for endpoint in self._endpoints.values():
            if not endpoint.declaration.alternate:
                endpoint.enable(speed)
        if self._task is None:
            self._begin(self._current)

    def set_alternate(self, interface: int, alternate: int) -> None:
        """Select an alternate setting. What runs on other interfaces goes on.

        Methods of endpoints that the setting does not have wait until the guest selects one that has them.
        """
        for endpoint in reversed(self._endpoints_of(interface)):
            endpoint.disable()
        self._alternates[interface] = alternate
        for endpoint in self._endpoints_of(interface, alternate):
            endpoint.enable(self._speed)

    def reset(self, *, port_reset: bool) -> None:
        self._current = None
        self.notify()
        self._alternates.clear()
        for transfer in reversed(tuple(self._answering)):
            self.cancel(transfer)
        for endpoint in reversed(self._endpoints.values()):
            endpoint.detach()
        if self._task is not None and not self._running.cancelled:  # a second cancellation would interrupt a cleanup
            self._running.cancelled = True
            self._task.cancel()

    async def close(self) -> None:
        tasks = {*self._answering.values(), *(() if self._task is None else (self._task,))}
        if tasks:
            _, alive = await asyncio.wait(tasks, timeout=END_TIMEOUT)
            if alive:
                log.warning("%s did not end %g s after it was cancelled", type(self).__name__, END_TIMEOUT)
                self._task = None

    # run()

    def _begin(self, run: _Run) -> None:
        self._running = run
        self._task = asyncio.get_running_loop().create_task(self._execute(run))
        self._task.add_done_callback(self._ended)

    async def _execute(self, run: _Run) -> None:
        _RUN.set(run)
        try:
            await self.run()
        except Detached:
            if run is self._current:
                raise  # of another function, perhaps
        except ExceptionGroup as group:  # of the tasks of a TaskGroup
            _, rest = group.split(Detached)
            if run is self._current or rest is not None:
                raise

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self._host.raised(error)
        if task is self._task:
            self._task = None
            if self._current is not None and self._current is not self._running:
                self._begin(self._current)

    # Transfers

    def submit(self, transfer: Transfer) -> None:
        self._endpoints[transfer.endpoint].submit(transfer)

    def cancel(self, transfer: Transfer) -> None:
        if transfer.setup is None:
            self._endpoints[transfer.endpoint].cancel(transfer)
        elif transfer.status is None and transfer in self._answering:
            transfer.complete(Status.CANCELLED)
            self._answering[transfer].cancel()

    def receiving(self, endpoint: int, reception: Reception) -> Status:
        return self._endpoints[endpoint].start()

    def stopped(self, endpoint: int) -> None:
        self._endpoints[endpoint].stop()

    # Requests

    def control(self, transfer: Transfer) -> bool:
        setup = transfer.setup
        assert setup is not None
        handler = self.requests.get((setup.request_type, setup.request))
        if handler is None:
            return False
        try:
            reply = handler(setup, bytes(transfer.data))
        except Stall:
            transfer.complete(Status.STALL)
            return True
        if inspect.isawaitable(reply):
            task = self._answering[transfer] = asyncio.ensure_future(reply)
            task.add_done_callback(lambda task: self._answered(transfer, task))
        else:
            self._complete(transfer, reply)
        return True

    def _answered(self, transfer: Transfer, reply: asyncio.Future[bytes | None]) -> None:
        del self._answering[transfer]
        error = None if reply.cancelled() else reply.exception()
        if transfer.status is None:  # otherwise the guest cancelled it
            if reply.cancelled() or error is not None:
                transfer.complete(Status.STALL)
            else:
                self._complete(transfer, reply.result())
        if isinstance(error, Exception) and not isinstance(error, Stall):
            self._host.raised(error)

    def _complete(self, transfer: Transfer, reply: bytes | None) -> None:
        transfer.complete(Status.SUCCESS, (reply or b"")[: transfer.length] if transfer.endpoint & 0x80 else b"")


def _handler(method: Callable[..., Any], direction: Direction) -> Handler:
    return method if direction is Direction.OUT else lambda setup, data: method(setup)
