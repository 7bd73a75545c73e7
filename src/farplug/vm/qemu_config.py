"""What a throw-away guest is made of, and the QEMU command line that makes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import assert_never
from urllib.parse import quote

from farplug.errors import Reason, UsageError

LOOPBACK = "127.0.0.1"

GATEWAY = "10.0.2.2"
"""This machine, as a guest with a network sees it; its loopback address answers there (QEMU, "-netdev user")."""

MACHINE_MODULES = ("9p", "9pnet_virtio", "overlay")
NETWORK_MODULES = ("virtio_net",)


class Controller(StrEnum):
    """The USB host controller that all devices of the guest are plugged into; its id in QEMU is ``usb``."""

    XHCI = "xhci"
    """SuperSpeed and below, 15 ports."""
    EHCI = "ehci"
    """High Speed only, 6 ports."""
    UHCI = "uhci"
    """Full Speed, 2 ports."""


_PORTS = {Controller.XHCI: 15, Controller.EHCI: 6, Controller.UHCI: 2}


class Boot(StrEnum):
    """What the guest boots."""

    KERNEL = "kernel"
    """The distribution's kernel and our initramfs, directly: the only one that runs commands."""
    BIOS = "bios"
    """SeaBIOS, and then the device with the lowest ``bootindex``."""
    UEFI = "uefi"
    """OVMF, likewise."""


class SpiceTransport(StrEnum):
    """How the SPICE server is reached."""

    TCP = "tcp"
    TLS = "tls"
    TLS_REQUIRED = "tls-required"
    """A plain port too, which answers every link with error 5, "need secured"."""
    UNIX = "unix"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spice:
    """The guest's SPICE server.

    Attributes:
        transport: how it is reached.
        ticket: the password; empty: none is asked for.
        host_names: what its certificate is good for.
    """

    transport: SpiceTransport = SpiceTransport.TCP
    ticket: str = ""
    host_names: tuple[str, ...] = ("localhost", LOOPBACK)


@dataclass(frozen=True, slots=True, kw_only=True)
class UsbPort:
    """A usb-redir device, made to take one USB device from outside. Its id in QEMU is ``redir<index>``.

    Attributes:
        filter: QEMU's filter rules; empty: all devices are welcome.
        bootindex: place in the firmware's boot order.
        properties: more properties of the usb-redir device, such as ``streams=off`` or ``debug=4``.
    """

    filter: str = ""
    bootindex: int | None = None
    properties: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SpicePort(UsbPort):
    """Fed by a usbredir channel of the guest's SPICE server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpPort(UsbPort):
    """Fed by a connection to a TCP port on the loopback address, which QEMU listens on.

    Attributes:
        nodelay: whether QEMU sends small messages at once (TCP_NODELAY). Its own default is that it does not.
    """

    nodelay: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class UnixPort(UsbPort):
    """Fed by a connection to a UNIX socket, which QEMU listens on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpClientPort(UsbPort):
    """Fed by a connection that QEMU makes to us, again every second until it succeeds.

    Attributes:
        port: the TCP port that we listen on.
        host: the address.
    """

    port: int
    host: str = LOOPBACK


@dataclass(frozen=True, slots=True, kw_only=True)
class UsbDisk:
    """QEMU's own usb-storage on the same controller. Its id in QEMU is ``disk<index>``.

    Attributes:
        image: a raw image.
        read_only: whether the guest may not write.
        cache: QEMU's cache mode.
        bootindex: place in the firmware's boot order.
    """

    image: Path
    read_only: bool = False
    cache: str = "writeback"
    bootindex: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestConfig:
    """A throw-away guest.

    Attributes:
        ports: its usb-redir devices.
        spice: its SPICE server; without one, a :class:`SpicePort` brings one with the defaults.
        disks: disks that QEMU itself gives it.
        controller: its USB controller.
        boot: what it boots.
        paused: whether its processors stand still until the ``cont`` command of QMP.
        memory: in MiB.
        processors: how many.
        accelerator: ``tcg`` works everywhere; ``kvm`` is faster where the machine really has it.
        modules: kernel modules to load at boot besides those for USB storage.
        programs: programs of this machine to put into the guest besides ``mke2fs``, ``lsusb`` and the like.
        python: whether to put the distribution's ``python3`` and its standard library (50 MB) into the guest.
        files: more files to put into the guest: its path there, the file here.
        machine: whether its commands run on this machine's file system, with all its programs: as far as this process
            may read it, and what they write stays in the guest's memory.
        network: whether it has a network, in which this machine's loopback address is :data:`GATEWAY`.
        kernel_arguments: more words on the kernel's command line.
        extra_arguments: more arguments of QEMU.
    """

    ports: tuple[UsbPort, ...] = ()
    spice: Spice | None = None
    disks: tuple[UsbDisk, ...] = ()
    controller: Controller = Controller.XHCI
    boot: Boot = Boot.KERNEL
    paused: bool = False
    memory: int = 256
    processors: int = 1
    accelerator: str = "tcg"
    modules: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()
    python: bool = False
    files: tuple[tuple[str, Path], ...] = ()
    machine: bool = False
    network: bool = False
    kernel_arguments: tuple[str, ...] = ()
    extra_arguments: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check that it fits.

        Raises:
            UsageError: more devices than the controller has ports.
        """
        devices, ports = len(self.ports) + len(self.disks), _PORTS[self.controller]
        if devices > ports:
            raise UsageError(
                f"{devices} devices do not fit on the {ports} ports of {self.controller}", reason=Reason.BAD_OPTION
            )

    @property
    def boot_modules(self) -> tuple[str, ...]:
        """Kernel modules to load at boot besides those for USB storage."""
        return (
            *(MACHINE_MODULES if self.machine else ()),
            *(NETWORK_MODULES if self.network else ()),
            *self.modules,
        )

    @property
    def spice_server(self) -> Spice | None:
        """The SPICE server that it gets."""
        if self.spice is None and any(isinstance(port, SpicePort) for port in self.ports):
            return Spice()
        return self.spice


@dataclass(frozen=True, slots=True, kw_only=True)
class SpiceAddress:
    """Where a guest's SPICE server listens.

    Attributes:
        port: plain TCP port, if it has one.
        tls_port: TLS port, if it has one.
        socket: UNIX socket, if it has one.
        ticket: the password; empty: none.
        ca_file: the authority of its certificate, in PEM form, if it has a TLS port.
        host_subject: the certificate's subject.
    """

    host: str = LOOPBACK
    port: int | None = None
    tls_port: int | None = None
    socket: Path | None = None
    ticket: str = ""
    ca_file: Path | None = None
    host_subject: str = ""

    @property
    def target(self) -> str:
        """The target string, ticket included."""
        if self.socket is not None:
            return f"spice+unix://{self.socket}"
        secret = f":{quote(self.ticket, safe='')}@" if self.ticket else ""
        if self.port is not None:
            return f"spice://{secret}{self.host}:{self.port}"
        return f"spice+tls://{secret}{self.host}:{self.tls_port}"

    @property
    def vv(self) -> str:
        """The text of a ``.vv`` file for it."""
        values: dict[str, object] = {"type": "spice", "host": self.host}
        if self.port is not None:
            values["port"] = self.port
        if self.tls_port is not None and self.ca_file is not None:
            values["tls-port"] = self.tls_port
            values["host-subject"] = self.host_subject
            values["ca"] = self.ca_file.read_text().replace("\n", "\\n")
        if self.ticket:
            values["password"] = self.ticket
        return "".join(["[virt-viewer]\n", *(f"{name}={value}\n" for name, value in values.items())])


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What this run of a guest got: file descriptors that QEMU inherits, files, addresses.

    Attributes:
        folder: private to this guest.
        monitor: descriptor of the monitor's socket.
        channels: descriptors of the agent's channels.
        listeners: descriptor of the listening socket, by index of a :class:`TcpPort`.
        kernel: the kernel's image (boot from the kernel only).
        initramfs: descriptor of the initramfs (likewise).
        spice: where the SPICE server shall listen, if there is one.
        firmware: OVMF's code, and a private copy of its variables (UEFI only).
        qemu_version: major and minor.
    """

    folder: Path
    monitor: int
    channels: tuple[int, ...] = ()
    listeners: Mapping[int, int] = field(default_factory=dict)
    kernel: Path | None = None
    initramfs: int | None = None
    spice: SpiceAddress | None = None
    firmware: tuple[Path, Path] | None = None
    qemu_version: tuple[int, int] = (7, 2)

    @property
    def console(self) -> Path:
        return self.folder / "console"

    @property
    def firmware_log(self) -> Path:
        return self.folder / "firmware"

    @property
    def ticket_file(self) -> Path:
        return self.folder / "ticket"

    def port_socket(self, index: int) -> Path:
        """The UNIX socket of a :class:`UnixPort`."""
        return self.folder / f"port{index}"


def option(name: str = "", /, **properties: object) -> str:
    """An argument of QEMU in its "name,key=value" form: commas doubled, underscores as hyphens, None left out."""
    words = [name] if name else []
    for key, value in properties.items():
        if value is not None:
            text = {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
            words.append(f"{key.replace('_', '-')}={text.replace(',', ',,')}")
    return ",".join(words)


def command_line(config: GuestConfig, resources: Resources) -> list[str]:
    """QEMU's arguments, its program's name not included."""
    arguments = ["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-machine", "pc,usb=off"]
    arguments += ["-accel", config.accelerator, "-m", str(config.memory), "-smp", str(config.processors)]
    if config.accelerator.startswith("kvm"):
        arguments += ["-cpu", "host"]
    arguments += [
        "-chardev",
        option("socket", id="monitor", fd=resources.monitor),
        "-mon",
        "chardev=monitor,mode=control",
    ]
    arguments += ["-chardev", option("file", id="console", path=resources.console), "-serial", "chardev:console"]
    if config.paused:
        arguments.append("-S")
    arguments += _boot_arguments(config, resources)
    if (server := config.spice_server) is not None and resources.spice is not None:
        arguments += _spice_arguments(server, resources.spice, resources)
    arguments += ["-device", _controller(config)]
    for index, port in enumerate(config.ports):
        arguments += ["-chardev", _port_chardev(index, port, resources)]
        device = option("usb-redir", id=f"redir{index}", chardev=f"port{index}", bus="usb.0", bootindex=port.bootindex)
        device += f",{option(filter=port.filter)}" if port.filter else ""
        arguments += ["-device", ",".join([device, *port.properties])]
    for index, disk in enumerate(config.disks):
        drive = option(id=f"drive{index}", file=disk.image, format="raw", cache=disk.cache, readonly=disk.read_only)
        arguments += ["-drive", f"if=none,{drive}"]
        arguments += [
            "-device",
            option("usb-storage", id=f"disk{index}", drive=f"drive{index}", bus="usb.0", bootindex=disk.bootindex),
        ]
    if config.machine:
        arguments += ["-fsdev", "local,id=machine,path=/,security_model=none,readonly=on,multidevs=remap"]
        arguments += ["-device", "virtio-9p-pci,fsdev=machine,mount_tag=machine"]
    if config.network:
        arguments += ["-netdev", "user,id=network", "-device", "virtio-net-pci,netdev=network"]
    return [*arguments, *config.extra_arguments]


def _boot_arguments(config: GuestConfig, resources: Resources) -> list[str]:
    match config.boot:
        case Boot.KERNEL:
            words = ["console=ttyS0", "panic=-1", "rdinit=/init", "cryptomgr.notests", *config.kernel_arguments]
            arguments = ["-kernel", str(resources.kernel), "-initrd", f"/proc/self/fd/{resources.initramfs}"]
            arguments += [
                "-append",
                " ".join(words),
                "-device",
                f"virtio-serial-pci,max_ports={len(resources.channels) + 1}",
            ]
            for number, descriptor in enumerate(resources.channels, start=1):
                arguments += ["-chardev", option("socket", id=f"agent{number}", fd=descriptor)]
                arguments += ["-device", option("virtserialport", chardev=f"agent{number}", nr=number)]
            return arguments
        case Boot.BIOS:
            arguments = []
        case Boot.UEFI:
            assert resources.firmware is not None
            code, variables = resources.firmware
            arguments = ["-drive", option(file=code, **{"if": "pflash"}, format="raw", unit=0, readonly=True)]
            arguments += ["-drive", option(file=variables, **{"if": "pflash"}, format="raw", unit=1)]
        case _:
            assert_never(config.boot)
    arguments += ["-chardev", option("file", id="firmware", path=resources.firmware_log)]
    return [*arguments, "-device", "isa-debugcon,iobase=0x402,chardev=firmware"]


def _spice_arguments(server: Spice, address: SpiceAddress, resources: Resources) -> list[str]:
    words: dict[str, object] = {}
    arguments = []
    if address.socket is not None:
        words |= {"unix": True, "addr": address.socket}
    else:
        words |= {"addr": address.host, "port": address.port, "tls-port": address.tls_port}
    if address.tls_port is not None:
        words["x509-dir"] = resources.folder
    if server.transport is SpiceTransport.TLS_REQUIRED:
        words["tls-channel"] = "default"
    if server.ticket:
        arguments += ["-object", option("secret", id="ticket", file=resources.ticket_file)]
        words["password-secret"] = "ticket"
    else:
        words["disable-ticketing"] = True
    return [*arguments, "-spice", option(**words)]


def _controller(config: GuestConfig) -> str:
    match config.controller:
        case Controller.XHCI:
            return option("qemu-xhci", id="usb", p2=_PORTS[Controller.XHCI], p3=_PORTS[Controller.XHCI])
        case Controller.EHCI:
            return option("usb-ehci", id="usb")
        case Controller.UHCI:
            return option("piix3-usb-uhci", id="usb")
        case _:
            assert_never(config.controller)


def _port_chardev(index: int, port: UsbPort, resources: Resources) -> str:
    name = f"port{index}"
    match port:
        case SpicePort():
            return option("spicevmc", id=name, name="usbredir")
        case TcpPort():
            return option(
                "socket", id=name, fd=resources.listeners[index], server=True, wait=False, nodelay=port.nodelay
            )
        case UnixPort():
            return option("socket", id=name, path=resources.port_socket(index), server=True, wait=False)
        case TcpClientPort():
            # QEMU 9.2 renamed it.
            again = {"reconnect_ms": 1000} if resources.qemu_version >= (9, 2) else {"reconnect": 1}
            return option("socket", id=name, host=port.host, port=port.port, nodelay=True, **again)
        case _:
            raise UsageError(f"{type(port).__name__} is not a kind of port", reason=Reason.BAD_OPTION)
