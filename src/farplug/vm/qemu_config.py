"""Describe a throw-away guest, and make the QEMU command line for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import assert_never
from urllib.parse import quote

LOOPBACK = "127.0.0.1"

GATEWAY = "10.0.2.2"
"""This machine's address in the network of a guest: leads to its loopback address (QEMU, "-netdev user")."""

MACHINE_MODULES = ("9p", "9pnet_virtio", "overlay")
NETWORK_MODULES = ("virtio_net",)


class Controller(StrEnum):
    """The USB host controller for all devices of the guest. Its id in QEMU is ``usb``."""

    XHCI = "xhci"
    """SuperSpeed and below, 15 ports."""
    EHCI = "ehci"
    """High Speed only, 6 ports."""
    UHCI = "uhci"
    """Full Speed, 2 ports."""


_PORTS = {Controller.XHCI: 15, Controller.EHCI: 6, Controller.UHCI: 2}


class Boot(StrEnum):
    """The kernel or firmware that the guest boots."""

    KERNEL = "kernel"
    """The distribution's kernel and farplug's initramfs, directly. Only such a guest can run commands."""
    BIOS = "bios"
    """SeaBIOS, which boots the device with the lowest ``bootindex``."""
    UEFI = "uefi"
    """OVMF, which boots the device with the lowest ``bootindex``."""


class SpiceTransport(StrEnum):
    """Sockets of the SPICE server."""

    TCP = "tcp"
    TLS = "tls"
    TLS_OPTIONAL = "tls-optional"
    """A TLS port and a plain port, which both accept links."""
    TLS_REQUIRED = "tls-required"
    """A TLS port, and a plain port that refuses every link with error 5 (NEED_SECURED)."""
    UNIX = "unix"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spice:
    """The guest's SPICE server.

    Attributes:
        transport: its sockets.
        ticket: the password; empty: no password.
        port: the plain TCP port; 0: any free one.
        host_names: host names and addresses that its certificate is valid for.
    """

    transport: SpiceTransport = SpiceTransport.TCP
    ticket: str = ""
    port: int = 0
    host_names: tuple[str, ...] = ("localhost", LOOPBACK)


@dataclass(frozen=True, slots=True, kw_only=True)
class UsbPort:
    """A usb-redir device: one USB device can be redirected to it. Its id in QEMU is ``redir<index>``.

    Attributes:
        filter: QEMU's filter rules; empty: all devices are allowed.
        bootindex: place in the firmware's boot order.
        properties: more properties of the usb-redir device, such as ``streams=off`` or ``debug=4``.
    """

    filter: str = ""
    bootindex: int | None = None
    properties: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SpicePort(UsbPort):
    """Connected to a usbredir channel of the guest's SPICE server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpPort(UsbPort):
    """Connected to a TCP port of the loopback address that QEMU listens on.

    Attributes:
        nodelay: whether QEMU sets TCP_NODELAY, which is not its default.
    """

    nodelay: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class UnixPort(UsbPort):
    """Connected to a UNIX socket that QEMU listens on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpClientPort(UsbPort):
    """Connected to a TCP port of this machine. QEMU is the client, and retries every second until it succeeds.

    Attributes:
        port: the TCP port that QEMU connects to.
        host: the address that QEMU connects to.
    """

    port: int
    host: str = LOOPBACK


@dataclass(frozen=True, slots=True, kw_only=True)
class UsbDisk:
    """A usb-storage device of QEMU on the same controller. Its id in QEMU is ``disk<index>``.

    Attributes:
        image: a raw image.
        read_only: write-protect the disk.
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
        ports: the usb-redir devices.
        spice: the SPICE server; None: a default one if there is a :class:`SpicePort`.
        disks: disks that QEMU emulates.
        controller: the USB controller.
        boot: the kernel or firmware to boot.
        paused: start with stopped processors; the ``cont`` command of QMP starts them.
        memory: size of the memory, in MiB.
        processors: number of processors.
        accelerator: ``tcg`` works everywhere; ``kvm`` is faster where the machine supports it.
        modules: kernel modules to load at boot, in addition to those for USB storage.
        programs: programs of this machine to copy into the guest, in addition to ``mke2fs``, ``lsusb`` and others.
        python: copy the distribution's ``python3`` and its standard library (50 MB) into the guest.
        files: more files to copy into the guest: pairs of a path in the guest and a file on this machine.
        machine: run commands on this machine's filesystem, with all its programs. They read what this process may
            read; what they write stays in the guest's memory.
        network: add a network, in which this machine's loopback address is :data:`GATEWAY`.
        kernel_arguments: more words for the kernel's command line.
        extra_arguments: more arguments for QEMU.
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
        """Check the number of devices.

        Raises:
            ValueError: more devices than the controller has ports.
        """
        devices, ports = len(self.ports) + len(self.disks), _PORTS[self.controller]
        if devices > ports:
            raise ValueError(f"{devices} devices do not fit on the {ports} ports of {self.controller}")

    @property
    def boot_modules(self) -> tuple[str, ...]:
        """Return the kernel modules to load at boot, in addition to those for USB storage."""
        return (
            *(MACHINE_MODULES if self.machine else ()),
            *(NETWORK_MODULES if self.network else ()),
            *self.modules,
        )

    @property
    def spice_server(self) -> Spice | None:
        """Return the SPICE server, the default one included."""
        if self.spice is None and any(isinstance(port, SpicePort) for port in self.ports):
            return Spice()
        return self.spice


@dataclass(frozen=True, slots=True, kw_only=True)
class SpiceAddress:
    """The address of a guest's SPICE server.

    Attributes:
        host: the address of the TCP ports.
        port: the plain TCP port, if there is one.
        tls_port: the TLS port, if there is one.
        socket: the UNIX socket, if there is one.
        ticket: the password; empty: no password.
        ca_file: the certificate of the authority, in PEM form, if there is a TLS port.
        host_subject: the subject of the server's certificate.
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
        """Return the target, including the ticket."""
        if self.socket is not None:
            return f"spice+unix://{self.socket}"
        secret = f":{quote(self.ticket, safe='')}@" if self.ticket else ""
        if self.port is not None:
            return f"spice://{secret}{self.host}:{self.port}"
        return f"spice+tls://{secret}{self.host}:{self.tls_port}"

    @property
    def vv(self) -> str:
        """Return the text of a ``.vv`` file for this server."""
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
    """Resources of one run of a guest: file descriptors that QEMU inherits, files, addresses.

    Attributes:
        folder: a folder that is private to this guest.
        monitor: descriptor of the monitor's socket.
        channels: descriptors of the agent's channels.
        listeners: descriptor of the listening socket, by index of a :class:`TcpPort`.
        kernel: the kernel's image (:attr:`Boot.KERNEL` only).
        initramfs: descriptor of the initramfs (:attr:`Boot.KERNEL` only).
        spice: the address for the SPICE server, if there is one.
        firmware: OVMF's code, and a private copy of its variables (:attr:`Boot.UEFI` only).
        qemu_version: major and minor version.
        memory: the file of the memory, for a guest that is saved or restored (:mod:`farplug.vm.snapshots`).
        restores: the guest starts from a snapshot: it maps the file privately, and waits for ``migrate-incoming``.
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
    memory: Path | None = None
    restores: bool = False

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
        """Return the path of the UNIX socket of a :class:`UnixPort`."""
        return self.folder / f"port{index}"


def option(name: str = "", /, **properties: object) -> str:
    """Return an argument of QEMU, ``name,key=value``: commas are doubled, ``_`` becomes ``-``, and None is omitted."""
    words = [name] if name else []
    for key, value in properties.items():
        if value is not None:
            text = {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
            words.append(f"{key.replace('_', '-')}={text.replace(',', ',,')}")
    return ",".join(words)


def command_line(config: GuestConfig, resources: Resources) -> list[str]:
    """Return QEMU's arguments, without the name of the program."""
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
    console = option("file", id="console", path=resources.console, append=True)
    arguments += ["-chardev", console, "-serial", "chardev:console"]
    if resources.memory is not None:
        file = {"size": f"{config.memory}M", "mem-path": resources.memory, "share": not resources.restores}
        arguments += ["-object", option("memory-backend-file", id="memory", **file)]
        arguments += ["-machine", "memory-backend=memory"]
    if resources.restores:
        arguments += ["-incoming", "defer"]
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
            # norandmaps: QEMU translates the code of a program again for each new address. At the same addresses the
            # shell starts in a quarter of the time.
            words = ["console=ttyS0", "panic=-1", "rdinit=/init", "cryptomgr.notests", "norandmaps"]
            words += config.kernel_arguments
            arguments = [
                "-kernel",
                str(resources.kernel),
                "-initrd",
                f"/proc/self/fd/{resources.initramfs}",
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
            # QEMU 9.2 renamed the option.
            retry = {"reconnect_ms": 1000} if resources.qemu_version >= (9, 2) else {"reconnect": 1}
            return option("socket", id=name, host=port.host, port=port.port, nodelay=True, **retry)
        case _:
            raise ValueError(f"{type(port).__name__} is not a kind of port")
