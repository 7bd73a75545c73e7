from __future__ import annotations

from pathlib import Path

import pytest

from farplug.vm.qemu_config import (
    Boot,
    Controller,
    GuestConfig,
    Resources,
    Spice,
    SpiceAddress,
    SpicePort,
    SpiceTransport,
    TcpClientPort,
    TcpPort,
    UnixPort,
    UsbDisk,
    UsbPort,
    command_line,
    option,
)

FOLDER = Path("/tmp/guest")


def arguments(config: GuestConfig, **resources: object) -> str:
    return " ".join(command_line(config, Resources(folder=FOLDER, monitor=3, **resources)))  # type: ignore[arg-type]


def test_option() -> None:
    assert option("x", a_b=1, c=True, d=False, e=None, f="p,q") == "x,a-b=1,c=on,d=off,f=p,,q"
    assert option(id="x") == "id=x"


@pytest.mark.parametrize(
    ("port", "chardev"),
    [
        (SpicePort(), "-chardev spicevmc,id=port0,name=usbredir"),
        (TcpPort(), "-chardev socket,id=port0,fd=7,server=on,wait=off,nodelay=on"),
        (TcpPort(nodelay=False), "-chardev socket,id=port0,fd=7,server=on,wait=off,nodelay=off"),
        (UnixPort(), "-chardev socket,id=port0,path=/tmp/guest/port0,server=on,wait=off"),
        (TcpClientPort(port=99), "-chardev socket,id=port0,host=127.0.0.1,port=99,nodelay=on,reconnect=1"),
    ],
)
def test_ports(port: UsbPort, chardev: str) -> None:
    line = arguments(GuestConfig(ports=(port,)), listeners={0: 7})
    assert f"{chardev} -device usb-redir,id=redir0,chardev=port0,bus=usb.0" in line


def test_reconnecting_in_newer_qemu() -> None:
    config = GuestConfig(ports=(TcpClientPort(port=99),))
    assert "reconnect-ms=1000" in arguments(config, qemu_version=(9, 2))
    assert "reconnect-ms=1000" in arguments(config, qemu_version=(10, 0))


def test_unknown_kind_of_port() -> None:
    with pytest.raises(ValueError, match="UsbPort is not a kind of port"):
        arguments(GuestConfig(ports=(UsbPort(),)))


def test_properties_of_a_port() -> None:
    port = UnixPort(filter="8:-1:-1:-1:1|-1:-1:-1:-1:0", bootindex=1, properties=("debug=4", "streams=off"))
    expected = "bus=usb.0,bootindex=1,filter=8:-1:-1:-1:1|-1:-1:-1:-1:0,debug=4,streams=off"
    assert expected in arguments(GuestConfig(ports=(port,)))


def test_disk() -> None:
    line = arguments(GuestConfig(disks=(UsbDisk(image=Path("/a,b"), read_only=True, cache="none"),)))
    assert "-drive if=none,id=drive0,file=/a,,b,format=raw,cache=none,readonly=on" in line
    assert "-device usb-storage,id=disk0,drive=drive0,bus=usb.0" in line


@pytest.mark.parametrize(
    ("controller", "expected", "ports"),
    [
        (Controller.XHCI, "qemu-xhci,id=usb,p2=15,p3=15", 15),
        (Controller.EHCI, "usb-ehci,id=usb", 6),
        (Controller.UHCI, "piix3-usb-uhci,id=usb", 2),
    ],
)
def test_controllers(controller: Controller, expected: str, ports: int) -> None:
    config = GuestConfig(ports=(UnixPort(),) * ports, controller=controller)
    assert f"-device {expected} " in arguments(config)
    with pytest.raises(ValueError, match=f"{ports + 1} devices do not fit on the {ports} ports of {controller}"):
        GuestConfig(ports=(UnixPort(),) * ports, disks=(UsbDisk(image=Path("x")),), controller=controller)


def test_kernel_boot() -> None:
    config = GuestConfig(paused=True, memory=99, kernel_arguments=("quiet",), extra_arguments=("-device", "x"))
    line = arguments(config, kernel=Path("/k"), initramfs=9, channels=(5, 6))
    assert "-kernel /k -initrd /proc/self/fd/9 -append console=ttyS0" in line
    assert " quiet -device virtio-serial-pci,max_ports=3 " in line
    assert "-chardev socket,id=agent2,fd=6 -device virtserialport,chardev=agent2,nr=2" in line
    assert " -S " in line
    assert " -m 99 " in line
    assert line.endswith("-device x")
    assert "-cpu host" not in line
    assert "-accel kvm -m 256 -smp 1 -cpu host" in arguments(GuestConfig(accelerator="kvm"))


def test_snapshot() -> None:
    saved = arguments(GuestConfig(), kernel=Path("/k"), initramfs=9, memory=Path("/m"))
    assert "-object memory-backend-file,id=memory,size=256M,mem-path=/m,share=on" in saved
    assert "-machine memory-backend=memory" in saved
    assert "-incoming" not in saved
    restored = arguments(GuestConfig(), kernel=Path("/k"), initramfs=9, memory=Path("/m"), restores=True)
    assert "mem-path=/m,share=off -machine memory-backend=memory -incoming defer" in restored
    assert "-initrd /proc/self/fd/9" in restored, "for a reset"


def test_machine_and_network() -> None:
    plain = GuestConfig(modules=("evdev",))
    assert plain.boot_modules == ("evdev",)
    assert "virtio-9p" not in arguments(plain)
    assert "-netdev" not in arguments(plain)
    config = GuestConfig(modules=("evdev",), machine=True, network=True)
    assert config.boot_modules == ("9p", "9pnet_virtio", "overlay", "virtio_net", "evdev")
    line = arguments(config)
    assert "-fsdev local,id=machine,path=/,security_model=none,readonly=on" in line
    assert "-device virtio-9p-pci,fsdev=machine,mount_tag=machine" in line
    assert "-netdev user,id=network -device virtio-net-pci,netdev=network" in line


def test_firmware_boots() -> None:
    bios = arguments(GuestConfig(boot=Boot.BIOS))
    assert "-device isa-debugcon,iobase=0x402,chardev=firmware" in bios
    assert "-kernel" not in bios
    uefi = arguments(GuestConfig(boot=Boot.UEFI), firmware=(Path("/code"), Path("/vars")))
    assert "-drive file=/code,if=pflash,format=raw,unit=0,readonly=on -drive file=/vars,if=pflash," in uefi


@pytest.mark.parametrize(
    ("server", "address", "expected", "target"),
    [
        (
            Spice(),
            SpiceAddress(port=59),
            "-spice addr=127.0.0.1,port=59,disable-ticketing=on",
            "spice://127.0.0.1:59",
        ),
        (
            Spice(transport=SpiceTransport.TLS, ticket="a/b"),
            SpiceAddress(tls_port=60, ticket="a/b"),
            "-object secret,id=ticket,file=/tmp/guest/ticket"
            " -spice addr=127.0.0.1,tls-port=60,x509-dir=/tmp/guest,password-secret=ticket",
            "spice+tls://:a%2Fb@127.0.0.1:60",
        ),
        (
            Spice(transport=SpiceTransport.TLS_OPTIONAL),
            SpiceAddress(port=59, tls_port=60),
            "port=59,tls-port=60,x509-dir=/tmp/guest,disable-ticketing=on",
            "spice://127.0.0.1:59",
        ),
        (
            Spice(transport=SpiceTransport.TLS_REQUIRED),
            SpiceAddress(port=59, tls_port=60),
            "port=59,tls-port=60,x509-dir=/tmp/guest,tls-channel=default,disable-ticketing=on",
            "spice://127.0.0.1:59",
        ),
        (
            Spice(transport=SpiceTransport.UNIX),
            SpiceAddress(socket=FOLDER / "spice"),
            "-spice unix=on,addr=/tmp/guest/spice,disable-ticketing=on",
            "spice+unix:///tmp/guest/spice",
        ),
    ],
)
def test_spice(server: Spice, address: SpiceAddress, expected: str, target: str) -> None:
    line = arguments(GuestConfig(spice=server), spice=address)
    assert expected in line
    assert "a/b" not in line, "a ticket has no place in a process's title"
    assert address.target == target


def test_spice_comes_with_its_ports() -> None:
    assert GuestConfig().spice_server is None
    assert GuestConfig(ports=(SpicePort(),)).spice_server == Spice()
    assert GuestConfig(spice=Spice(ticket="x")).spice_server == Spice(ticket="x")


def test_vv_file(tmp_path: Path) -> None:
    (tmp_path / "ca").write_text("-----BEGIN\nabc\n")
    address = SpiceAddress(tls_port=60, ticket="s", ca_file=tmp_path / "ca", host_subject="O=farplug,CN=x")
    assert address.vv.splitlines() == [
        "[virt-viewer]",
        "type=spice",
        "host=127.0.0.1",
        "tls-port=60",
        "host-subject=O=farplug,CN=x",
        "ca=-----BEGIN\\nabc\\n",
        "password=s",
    ]
    assert SpiceAddress(port=59).vv == "[virt-viewer]\ntype=spice\nhost=127.0.0.1\nport=59\n"
