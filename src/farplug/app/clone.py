"""A device as a program: the skeleton of a device of one's own, made from the descriptors of a real one.

Only descriptors are copied: what the device does with its transfers is left to the reader.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from farplug.errors import DeviceError, Reason
from farplug.text import printable
from farplug.usb.descriptors import ConfigurationDescriptor, DeviceDescriptor, EndpointDescriptor, InterfaceDescriptor
from farplug.usb.endpoints import interval_microseconds
from farplug.usb.types import Speed, TransferType

_DEVICE_SIZE: Final = 18
_MAX_DESCRIPTORS: Final = 1 << 17
"""Bytes that are read of the descriptors of a device."""
_BYTES_OF_A_LINE: Final = 32
_MAX_EXPONENT: Final = 16
"""The largest bInterval that is an exponent (USB 2.0, table 9-13)."""

_KINDS: Final = {
    TransferType.BULK: "bulk",
    TransferType.INTERRUPT: "interrupt",
    TransferType.ISOCHRONOUS: "isochronous",
}


@dataclass(frozen=True, slots=True)
class Original:
    """A device that is copied.

    Attributes:
        descriptors: its device descriptor, and the first configuration with all that follows, raw.
        speed: the speed that it runs at.
        manufacturer: its own string.
        product: its own string.
        reports: the report descriptors of its human interface devices, by the numbers of their interfaces.
    """

    descriptors: bytes
    speed: Speed
    manufacturer: str = ""
    product: str = ""
    reports: Mapping[int, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Part:
    """A function of the device.

    Attributes:
        name: of its class.
        first: the device's number of its interface 0.
        settings: the alternate settings of its interfaces.
        association: class, subclass and protocol; None: it has a single interface.
    """

    name: str
    first: int
    settings: Sequence[InterfaceDescriptor]
    association: tuple[int, int, int] | None


def skeleton(original: Original) -> str:
    """Return a Python module with the function ``make_device``: its device has the same descriptors.

    Addresses of endpoints, and numbers of interfaces, may be others; a guest finds them by the descriptors.

    Raises:
        DeviceError: the descriptors have no interface.
    """
    device = DeviceDescriptor.parse(original.descriptors[:_DEVICE_SIZE])
    configuration = ConfigurationDescriptor.parse(original.descriptors[_DEVICE_SIZE:])
    parts = list(_parts(configuration))
    if not parts:
        raise DeviceError(
            "the device has no interfaces that could be copied",
            reason=Reason.DEVICE_FAULT,
            remedy="unplug it, and plug it in again",
        )
    functions = [line for part in parts for line in _function(part, original)]
    imports = [name for name in _IMPORTS if any(name in line for line in functions)]
    name = printable(f"{original.manufacturer} {original.product}".strip())
    title = f"A skeleton of the USB device {device.vendor_id:04x}:{device.product_id:04x}, from its descriptors."
    lines = [
        f'"""{title}"""',
        "",
        *([f"# {name}", ""] if name else []),
        f"from farplug.usb import {', '.join(['Setup', 'Speed'] if original.reports else ['Speed'])}",
        *(["from farplug.usb.types import Recipient, RequestType"] if original.reports else []),
        f"from farplug.virtual import {', '.join(sorted({*imports, 'VirtualDevice'}))}",
        *functions,
        "",
        "",
        "def make_device() -> VirtualDevice:",
        f'    """Return the device: {len(parts)} function{"s" if len(parts) > 1 else ""}."""',
        "    return VirtualDevice(",
        *(f"        {part.name}()," for part in parts),
        f"        vendor_id=0x{device.vendor_id:04X},",
        f"        product_id=0x{device.product_id:04X},",
        f"        device_version=0x{device.device_version:04X},",
        f"        manufacturer={original.manufacturer!a},",
        f"        product={original.product!a},",
        f"        speeds=(Speed.{_speed(original.speed).name},),",
        "    )",
    ]
    return "\n".join(lines) + "\n"


_IMPORTS: Final = (
    *("AsyncFunction", "Numbers", "Setting", "Stall", "bulk_in", "bulk_out", "control_in", "interrupt_in"),
    *("interrupt_out", "isochronous_in", "isochronous_out"),
)


def _speed(speed: Speed) -> Speed:
    return min(max(speed, Speed.FULL), Speed.SUPER)


def _parts(configuration: ConfigurationDescriptor) -> Iterator[_Part]:
    """Yield the functions: the interfaces of an association, or a single interface."""
    numbers = sorted({interface.number for interface in configuration.interfaces})
    done: set[int] = set()
    for number in numbers:
        if number in done:
            continue
        members, codes = {number}, None
        for one in configuration.associations:
            if one.first_interface == number and one.interface_count > 1:
                members = {n for n in numbers if number <= n < number + one.interface_count} - done
                codes = (one.function_class, one.function_subclass, one.function_protocol)
        done |= members
        settings = [one for one in configuration.interfaces if one.number in members]
        yield _Part(f"Function{number}", number, settings, codes if len(members) > 1 else None)


def _function(part: _Part, original: Original) -> Iterator[str]:
    yield from ("", "", f"class {part.name}(AsyncFunction):")
    numbers = sorted({setting.number for setting in part.settings})
    own = {number: index for index, number in enumerate(numbers)}
    yield f'    """Interface {", ".join(map(str, numbers))} of the original."""'
    yield ""
    yield "    settings = ("
    seen: dict[tuple[int, int], InterfaceDescriptor] = {}
    for setting in part.settings:
        key = own[setting.number], setting.alternate
        if key not in seen:
            seen[key] = setting
            codes = setting.interface_class, setting.interface_subclass, setting.interface_protocol
            yield f"        Setting({key[0]}, {key[1]}, {', '.join(f'0x{code:02X}' for code in codes)}),"
    yield "    )"
    if part.association is not None:
        yield f"    association = ({', '.join(f'0x{code:02X}' for code in part.association)})"
    for (interface, alternate), setting in seen.items():
        for index, endpoint in enumerate(setting.endpoints):
            yield from _endpoint(endpoint, index, interface, alternate, _speed(original.speed))
    extras = {key: setting.extra for key, setting in seen.items() if setting.extra}
    if extras:
        yield from ("", "    extra = {")
        for key, extra in extras.items():
            yield from _bytes(f"        {key}: ", extra, ",")
        yield from (
            "    }",
            "",
            "    def class_descriptors(self, setting: Setting, numbers: Numbers) -> bytes:",
            '        """Return the class-specific descriptors. Numbers in them are those of the original."""',
            '        return self.extra.get((setting.interface, setting.alternate), b"")',
        )
    reports = {own[number]: report for number, report in original.reports.items() if number in own}
    if reports:
        yield from ("", "    reports = {")
        for interface, report in reports.items():
            yield from _bytes(f"        {interface}: ", report, ",")
        yield from (
            "    }",
            "",
            "    @control_in(0x06, RequestType.STANDARD, Recipient.INTERFACE)",
            "    def get_descriptor(self, setup: Setup) -> bytes:",
            '        """Return the report descriptor of a human interface device."""',
            "        if setup.value >> 8 != 0x22 or setup.index not in self.reports:",
            "            raise Stall",
            "        return self.reports[setup.index]",
        )
    yield from (
        "",
        "    async def run(self) -> None:",
        '        """Begin when the guest configures the device; use the endpoints here."""',
    )


def _endpoint(endpoint: EndpointDescriptor, index: int, interface: int, alternate: int, speed: Speed) -> Iterator[str]:
    type = TransferType(endpoint.attributes & 3)
    kind = _KINDS.get(type)
    if kind is None:  # a control endpoint besides endpoint 0: no driver uses one
        return
    direction = "in" if endpoint.address & 0x80 else "out"
    arguments = []
    if type is not TransferType.BULK:
        arguments.append(str(max(1, endpoint.max_packet_size & 0x7FF)))
        exponent = speed > Speed.FULL or type is TransferType.ISOCHRONOUS
        interval = min(max(1, endpoint.interval), _MAX_EXPONENT if exponent else 0xFF)
        arguments.append(f"microseconds={interval_microseconds(interval, type, speed)}")
    arguments += [f"interface={interface}"] if interface else []
    arguments += [f"alternate={alternate}"] if alternate else []
    name = f"{kind}_{direction}_{interface}_{alternate}_{index}"
    yield f"    {name} = {kind}_{direction}({', '.join(arguments)})  # 0x{endpoint.address:02X} in the original"
    if endpoint.extra:
        yield f"    # class-specific descriptors of the original that follow it: {endpoint.extra.hex()}"


def _bytes(head: str, data: bytes, tail: str) -> Iterator[str]:
    """Yield the lines of bytes in hexadecimal."""
    pieces = [data[at : at + _BYTES_OF_A_LINE].hex() for at in range(0, len(data), _BYTES_OF_A_LINE)]
    yield f"{head}bytes.fromhex("
    for piece in pieces:
        yield f'            "{piece}"'
    yield f"        ){tail}"


def read_original(device: str) -> Original:
    """Return the descriptors of a USB device of this machine, as the kernel has read them. The device is not opened.

    A device that hangs blocks the call.

    Args:
        device: how it is chosen: ``1050:0407``, ``1-5``, ``serial:…`` or a part of its name.

    Raises:
        DeviceError: there is no such device, or this system does not show its descriptors.
        UsageError: the text is not valid, or several devices match.
        SetupError: this machine has no USB, or its system is not supported.
    """
    from farplug.machine import sysfs
    from farplug.machine.choose import Choice
    from farplug.machine.listing import list_devices

    found = Choice.parse(device).choose(list_devices())
    raw = sysfs.read_bytes(found.path / "descriptors", _MAX_DESCRIPTORS)
    if len(raw) <= _DEVICE_SIZE:
        raise DeviceError(
            f"{found}: this system does not show the descriptors of the device",
            reason=Reason.UNSUPPORTED_SYSTEM if sysfs.on_windows() else Reason.DEVICE_FAULT,
            remedy="on Linux, plug the device in again",
        )
    reports: dict[int, bytes] = {}
    for interface in found.interfaces:
        folders = [one for one in sysfs.list_folder(found.path) if one.name.endswith(f".{interface.number}")]
        for report in (path for folder in folders for path in sorted(folder.glob("*/report_descriptor"))):
            reports[interface.number] = sysfs.read_bytes(report)
    return Original(
        raw,
        found.speed or Speed.HIGH,
        sysfs.read(found.path / "manufacturer"),
        sysfs.read(found.path / "product"),
        {number: report for number, report in reports.items() if report},
    )
