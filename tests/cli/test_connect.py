"""Bad input that the command line can meet: the words, the exit code, no traceback, nothing lost."""

from __future__ import annotations

import json
import re
import shlex
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.support import Cli, FakeGuest, blank, in_thread, interrupt, interrupted_after, saying
from tests.transport.fake_spice import Certificates, Channel, FakeSpice, free_port, running

from farplug.redirection import engine
from farplug.spice.types import ChannelType, LinkError
from farplug.usbredir import packets as p
from farplug.usbredir.caps import Cap

Make = Callable[[Path], object]


def _link(path: Path) -> Path:
    path.symlink_to(path)
    return path


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path, "disk cannot be opened: no such file"),
        (lambda path: path.mkdir(), "disk is a folder, not an image"),
        (lambda path: blank(path, 0), "disk is empty"),
        (lambda path: blank(path, 511), "disk has 511 bytes, less than a block of 512"),
        (_link, "disk cannot be opened"),  # unreadable for everybody, root included
        (lambda path: socket.socket(socket.AF_UNIX).bind(str(path)), "disk is a device or a pipe, not an image"),
    ],
)
@pytest.mark.parametrize("option", ["--usb-disk", "--usb-disk-ro"])
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_images_that_cannot_be_used(cli: Cli, tmp_path: Path, make: Make, said: str, option: str) -> None:
    image = tmp_path / "disk"
    make(image)
    result = cli("connect", "tcp://127.0.0.1:1", option, image)
    assert result.code == 3
    assert said in result.err
    assert result.err.startswith("farplug: ")


QCOW2 = b"QFI\xfb\0\0\0\3".ljust(100_000, b"\0")


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--usb-disk"], "a qcow2 image, not a RAW disk image"),
        (["--usb-disk-ro"], "a qcow2 image, not a RAW disk image"),
        (["--snapshot", "--usb-disk"], "a qcow2 image, not a RAW disk image"),
        (["--usb-cdrom"], "a qcow2 image, not an ISO image"),
    ],
)
def test_a_file_of_another_format(cli: Cli, tmp_path: Path, options: list[str], what: str) -> None:
    path = tmp_path / "it's\na.qcow2"
    path.write_bytes(QCOW2)
    result = cli("connect", "tcp://127.0.0.1:1", *options, path)
    assert result.code == 3
    message, *remedy = result.err.split("\n")
    assert message.endswith(f"it's\N{REPLACEMENT CHARACTER}a.qcow2 is {what}")
    escaped = f"$'{tmp_path}/it\\'s\\x0aa"
    assert remedy[0] == f"  convert it: qemu-img convert -O raw {escaped}.qcow2' {escaped}.raw'"
    assert remedy[-2].endswith(": --force")
    result = cli("connect", "tcp://127.0.0.1:1", "--force", *options, path)
    assert result.code == 4, "refused by nobody but the VM that is not there"
    assert (
        f"farplug: warning: {tmp_path}/it's\N{REPLACEMENT CHARACTER}a.qcow2 is {what}: plugged as it is" in result.err
    )
    assert path.read_bytes() == QCOW2


def test_an_image_twice_for_writing(cli: Cli, image: Path) -> None:
    for other in ("--usb-disk", "--usb-disk-ro"):
        result = cli("connect", "tcp://127.0.0.1:1", "--usb-disk", image, other, image)
        assert result.code == 3
        assert "is in use" in result.err
    assert cli("connect", "tcp://127.0.0.1:1", "--usb-disk", image).code == 4, "the lock is gone"


def test_an_image_that_is_unusable_costs_no_ticket(cli: Cli, tmp_path: Path) -> None:
    vv = tmp_path / "vm.vv"
    vv.write_text("[virt-viewer]\ntype=spice\nhost=127.0.0.1\nport=1\npassword=once\ndelete-this-file=1\n")
    assert cli("connect", vv, "--usb-disk", tmp_path / "none").code == 3
    assert cli("connect", vv, "--usb-disk", blank(tmp_path / "a"), "--ca-file", tmp_path / "none").code == 2
    assert vv.exists()
    assert cli("connect", vv, "--usb-disk", tmp_path / "a").code == 4
    assert not vv.exists()


@pytest.mark.parametrize(
    ("target", "code", "said"),
    [
        ("tcp://127.0.0.1:1", 4, "cannot connect to 127.0.0.1:1: Connection refused"),
        ("spice://127.0.0.1:1", 4, "cannot connect to 127.0.0.1:1: Connection refused"),
        ("spice+tls://127.0.0.1:1", 4, "cannot connect to 127.0.0.1:1: Connection refused"),
        ("spice://no-such-host.invalid:5900", 4, "the name cannot be resolved"),
        ("unix:/no/such/socket", 4, "there is no such socket"),
        ("tcp-listen://203.0.113.1:4000", 4, "cannot listen on 203.0.113.1:4000"),
        ("vmhost:5900", 2, "'vmhost:5900' is not a valid target: write it as spice://host:port"),
        ("", 2, "is not a valid target"),
        ("x" * 5000, 2, "is not a valid target"),
        ("x" * 5000 + ".vv", 2, "File name too long"),
        ("missing.vv", 2, "missing.vv does not exist"),
        ("spice://:se#cret@host:port", 2, "host:port"),
    ],
)
def test_targets(cli: Cli, image: Path, target: str, code: int, said: str) -> None:
    result = cli("connect", target, "--usb-disk", image)
    assert result.code == code
    assert said in result.err
    assert "se#cret" not in result.err
    assert "cret" not in result.err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("type=spice\nport=1", "it has no host"),
        ("type=spice\nhost=h", "neither port nor tls-port"),
        ("type=vnc\nhost=h\nport=1", "type=vnc is not supported"),
        ("type=spice\nhost=h\nport=70000", "line 4: port=70000 is not a port number"),
        ("#" * (1 << 20), "it is larger than 1048576 bytes"),
    ],
)
def test_vv_files(cli: Cli, image: Path, tmp_path: Path, text: str, said: str) -> None:
    vv = tmp_path / "vm.vv"
    vv.write_text(f"[virt-viewer]\n{text}\ndelete-this-file=1\n")
    result = cli("connect", vv, "--usb-disk", image)
    assert result.code == 2
    assert said in result.err
    assert vv.exists()


@pytest.mark.parametrize(
    "target", ["unix:{}/a\nb", "spice+unix://{}/a\nb", "{}/a\nb.vv", "unix:{}/\n" + "x" * 107, "tcp://a\nb:1"]
)
def test_line_ends_in_a_target_do_not_end_a_line(cli: Cli, image: Path, tmp_path: Path, target: str) -> None:
    lines = cli("connect", target.format(tmp_path), "--usb-disk", image).err.splitlines()
    assert lines[0].startswith("farplug: ")
    assert all(line.startswith("  ") for line in lines[1:])
    assert len(lines) <= 2


def test_what_is_ignored_in_a_vv_file_is_reported(cli: Cli, image: Path, tmp_path: Path) -> None:
    vv = tmp_path / "vm.vv"
    vv.write_text("[virt-viewer]\ntype=spice\nhost=127.0.0.1\nport=None\ntls-port=1\nsecure-channels=main;smardcard\n")
    result = cli("connect", vv, "--usb-disk", image)
    assert result.code == 4
    assert result.err.splitlines()[:2] == [
        f"farplug: warning: {vv}, line 4: port=None is not a port number from 1 to 65535: ignored",
        f"farplug: warning: {vv}, line 6: secure-channels names unknown channels ('smardcard'): all channels use TLS",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "Missing argument 'TARGET'"),
        (("tcp://h:1",), "nothing to plug in"),
        (("tcp://h:1", "--usb-disk"), "requires an argument"),
        (("tcp://h:1", "--usb-disk", "x", "--usb-speed", "warp"), "'warp' is not one of 'auto', 'high', 'super'"),
        (("tcp://h:1", "--usb-disk", "x", "--block-size", "520"), "'520' is not one of '512', '4096'"),
        (("tcp://h:1", "--usb-device", "0781:5567", "--snapshot"), "--snapshot says nothing without --usb-disk"),
        (("tcp://h:1", "--nonsense"), "No such option"),
        (("tcp://h:1", "more"), "unexpected extra argument"),
        (("spice://h:1", "--usb-disk", "x", "--ask-password"), "--ask-password needs a terminal"),
        (("spice://h:1", "--usb-disk", "x", "--password-file", "/no/file"), "cannot be read: No such file"),
        (("spice://h:1", "--usb-disk", "x", "--password-file", "/"), "cannot be read: Is a directory"),
        (("spice://h:1", "--usb-disk", "x", "--password-file", "/dev/null"), "its first line is empty"),
    ],
)
def test_options(cli: Cli, arguments: tuple[str, ...], said: str) -> None:
    result = cli("connect", *arguments)
    assert result.code == 2
    assert said in result.err
    assert result.out == ""


@pytest.mark.parametrize(
    ("target", "options", "said"),
    [
        ("tcp://h:1", ("--proxy", "http://p"), "is a plain socket"),
        ("unix:/x", ("--ca-file", "/no"), "is a plain socket"),
        ("spice://h:1", ("--proxy", "ftp://p"), "ftp"),
        ("spice+tls://h:1", ("--host-subject", "nonsense"), "host"),
        ("spice+tls://h:1", ("--ca-file", "/no"), "--ca-file /no cannot be read: No such file"),
        ("spice+tls://h:1", ("--ca-file", "/bin/sh"), "is not PEM"),
        ("spice+tls://h:1", ("--ca-file", "/dev/zero"), "larger than"),
    ],
)
def test_options_of_targets(cli: Cli, image: Path, target: str, options: tuple[str, ...], said: str) -> None:
    result = cli("connect", target, "--usb-disk", image, *options)
    assert result.code == 2
    assert said in result.err


@pytest.mark.parametrize(
    ("greeting", "code", "said"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", 10, "an HTTP server"),
        (b"RFB 003.008\n", 10, "a VNC server"),
        (b"\x15\x03\x01\x00\x02\x02\x28", 5, "use spice+tls://HOST:PORT"),
        (b"", 4, "closed the connection"),
        (b"garbage of all kinds, more than a header", 10, "there is no SPICE server on this port"),
    ],
)
def test_servers_that_are_not_spice(cli: Cli, image: Path, greeting: bytes, code: int, said: str) -> None:
    with in_thread(lambda: saying(greeting)) as port:
        result = cli("connect", f"spice://127.0.0.1:{port}", "--usb-disk", image)
    assert said in result.err
    assert result.code == code


def test_a_server_that_is_not_usbredir(cli: Cli, image: Path) -> None:
    with in_thread(lambda: saying(b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(100))) as port:
        result = cli("connect", f"tcp://127.0.0.1:{port}", "--usb-disk", image)
    assert "does not speak usbredir" in result.err
    assert result.code == 10


def test_wrong_password(cli: Cli, image: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = FakeSpice(password="s3cret/of#mine", usbredir=FakeGuest().behave, vmc_caps=0)
    secrets = tmp_path / "password"
    with in_thread(lambda: running(fake)) as port:
        target = f"spice://127.0.0.1:{port}"
        for options in ((), ("--json",), ("--debug",)):
            secrets.write_text("wr0ng\n")
            result = cli("connect", target, "--usb-disk", image, "--password-file", secrets, *options)
            assert result.code == 6
            assert "wrong password, or an expired one" in result.err
            assert "fetch a new one" in result.err
            assert "wr0ng" not in result.out + result.err
        for options in ((), ("--json",)):
            result = cli("connect", target, "--usb-disk", image, *options)
            assert result.code == 6, "none given, and there is no terminal to ask on"
            assert result.err.startswith("farplug: the VM wants a password and none was given\n")
            assert "--password-file FILE, --ask-password, or FARPLUG_PASSWORD" in result.err
        assert json.loads(result.out.splitlines()[-1])["reason"] == "no-password"
        for mark, more in (("", []), ("\ufeff", ["--debug", "--json"])):
            secrets.write_text(f"{mark}s3cret/of#mine\r\nsecond line\n")
            result = cli("connect", target, "--usb-disk", image, "--password-file", secrets, *more)
            assert result.code == 0, result.err
            assert "s3cret" not in result.out + result.err
        assert cli("connect", f"spice://:s3cret%2fof%23mine@127.0.0.1:{port}", "--usb-disk", image).code == 0
        monkeypatch.setenv("FARPLUG_PASSWORD", "s3cret/of#mine")
        assert cli("connect", target, "--usb-disk", image).code == 0
        assert cli("connect", f"spice://:other@127.0.0.1:{port}", "--usb-disk", image).code == 6


def test_tls(cli: Cli, image: Path, tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)
    ca = tmp_path / "ca.pem"
    ca.write_text(certificates.ca)
    other = tmp_path / "other.pem"
    other.write_text(Certificates(tmp_path).ca)
    fake = FakeSpice(usbredir=FakeGuest().behave, vmc_caps=0)
    context = certificates.server_context()
    with in_thread(lambda: running(fake, tls=context)) as port:
        target = f"spice+tls://127.0.0.1:{port}"
        plug = ("--usb-disk", image)
        result = cli("connect", target, *plug)
        assert (result.code, "certificate" in result.err) == (5, True)
        assert "--ca-file FILE (ca= in the .vv file)" in result.err
        assert cli("connect", target, *plug, "--ca-file", other).code == 5
        assert cli("connect", target, *plug, "--ca-file", ca).code == 0
        result = cli("connect", target, *plug, "--ca-file", ca, "--host-subject", "O=Other,CN=x")
        assert result.code == 5
        (option, subject), *_ = re.findall(r"give (--host-subject) ('.*?') \(host-subject= in the \.vv", result.err)
        result = cli("connect", target, *plug, "--ca-file", ca, option, *shlex.split(subject))
        assert result.code == 0, "the remedy can be pasted"
        vv = tmp_path / "vm.vv"
        pem = certificates.ca.replace("\n", "\\n")
        vv.write_bytes(
            f"[virt-viewer]\r\ntype=spice\r\nhost=127.0.0.1\r\ntls-port={port}\r\nca={pem}\r\n"
            "host-subject=O=Test\\, Inc.,CN=vmhost\r\n".encode()
        )
        result = cli("connect", vv, *plug)
        assert result.code == 0, result.err
        assert "tls: 127.0.0.1" in result.out
    with in_thread(lambda: running(FakeSpice(), tls=certificates.server_context(("elsewhere",), ()))) as port:
        result = cli("connect", f"spice+tls://127.0.0.1:{port}", *plug, "--ca-file", ca)
        assert (result.code, "elsewhere" in result.err) == (5, True)
        assert r"if this is the right host, give --host-subject 'O=Test\, Inc.,CN=vmhost'" in result.err


def test_tls_needed(cli: Cli, image: Path) -> None:
    with in_thread(lambda: running(FakeSpice(secured=frozenset({ChannelType.MAIN})))) as port:
        result = cli("connect", f"spice://127.0.0.1:{port}", "--usb-disk", image)
    assert result.code == 5
    assert "TLS" in result.err


async def _closes(channel: Channel) -> None:
    await channel.close()


@pytest.mark.parametrize(
    ("fake", "disks", "code", "said"),
    [
        (FakeSpice(channels=((3, 0),)), 1, 7, "the VM has no usbredir channel"),
        (FakeSpice(channels=((3, 0),)), 1, 7, "-device usb-redir,chardev=usb0"),
        (FakeSpice(channels=((3, 0),)), 1, 7, "<redirdev bus='usb' type='spicevmc'/>"),
        (FakeSpice(), 17, 7, "17 devices, but the VM has 2 ports for them"),
        (FakeSpice(usbredir=_closes), 1, 7, "it is in use"),
        (FakeSpice(link_error=LinkError.ERROR), 1, 4, "refused the link"),
    ],
)
def test_ports(cli: Cli, tmp_path: Path, fake: FakeSpice, disks: int, code: int, said: str) -> None:
    images = [blank(tmp_path / f"{number}.raw") for number in range(disks)]
    with in_thread(lambda: running(fake)) as port:
        options = [word for image in images for word in ("--usb-disk", str(image))]
        result = cli("connect", f"spice://127.0.0.1:{port}", *options)
    assert said in result.err
    assert result.code == code


def test_two_disks_for_one_socket(cli: Cli, tmp_path: Path) -> None:
    options = [word for name in "ab" for word in ("--usb-disk", str(blank(tmp_path / name)))]
    result = cli("connect", "tcp://127.0.0.1:1", *options)
    assert result.code == 4
    assert "the VM has 1 port for 2 devices: they are plugged as 2 logical units of one device" in result.out
    options += [word for number in range(15) for word in ("--usb-disk", str(blank(tmp_path / str(number))))]
    result = cli("connect", "tcp://127.0.0.1:1", *options)
    assert (result.code, "17 devices, but the VM has 1 port" in result.err) == (7, True)
    assert "once for each" in result.err


def test_a_channel_in_use_is_passed_over(cli: Cli, image: Path) -> None:
    guest = FakeGuest()

    async def behave(channel: Channel) -> None:
        await (guest.behave(channel) if channel.mess.channel_id == 1 else channel.close())

    with in_thread(lambda: running(FakeSpice(usbredir=behave, vmc_caps=0))) as port:
        assert cli("connect", f"spice://127.0.0.1:{port}", "--usb-disk", image).code == 0


@pytest.mark.parametrize(
    ("guest", "said"),
    [
        (FakeGuest(filter="0x08,-1,-1,-1,0|-1,-1,-1,-1,1"), "the guest's filter does not allow"),
        (FakeGuest(rejects=True), "the guest refused"),
    ],
)
def test_refused(cli: Cli, image: Path, guest: FakeGuest, said: str) -> None:
    with in_thread(guest.listening) as target:
        result = cli("connect", target, "--usb-disk", image, "--usb-speed", "high", "--json")
    assert said in result.err
    assert result.code == 8
    names = [json.loads(line)["event"] for line in result.out.splitlines()]
    assert "refused" in names
    assert names[-1] == "failed"


def test_block_size(cli: Cli, tmp_path: Path) -> None:
    small = tmp_path / "small.raw"
    small.write_bytes(bytes(4095))
    result = cli("connect", "tcp://h:1", "--usb-disk", small, "--block-size", "4096")
    assert result.code == 3
    assert "has 4095 bytes, less than a block of 4096" in result.err


def test_a_guest_without_capabilities(cli: Cli, image: Path) -> None:
    guest = FakeGuest(caps=Cap(0))
    with in_thread(guest.listening) as target:
        result = cli("connect", target, "--usb-disk", image)
    assert (result.code, result.err) == (0, "")
    connects = [packet for packet in guest.seen if isinstance(packet, p.DeviceConnect)]
    assert len(connects) == 1
    assert isinstance(guest.seen[-1], p.DeviceDisconnect)


def test_plain_lines(cli: Cli, image: Path) -> None:
    with in_thread(FakeGuest().listening) as target:
        result = cli("connect", target, "--usb-disk", image)
    assert (result.code, result.err) == (0, "")
    lines = [line[9:] for line in result.out.splitlines()]
    assert lines[0] == f"reach: {target.removeprefix('tcp://')}"
    assert lines[1].startswith("disk.raw: the guest is ready")
    assert lines[2] == "disk.raw: attached as 1d6b:0104 farplug Virtual Disk at SuperSpeed (5 Gb/s)"
    assert lines[3] == "disk.raw: configured by the guest (configuration 1)"
    assert lines[4] == "leaving; interrupt again to leave at once"
    assert lines[5] == "disk.raw: detached (0 B read, 0 B written, 0 commands)"


def test_json(cli: Cli, image: Path) -> None:
    fake = FakeSpice(usbredir=FakeGuest().behave, vmc_caps=0)
    with in_thread(lambda: running(fake)) as port:
        result = cli("connect", f"spice://127.0.0.1:{port}", "--usb-disk", image, "--json")
    assert (result.code, result.err) == (0, "")
    lines = [json.loads(line) for line in result.out.splitlines()]
    assert [line["stage"] for line in lines if line["event"] == "stage"] == ["reach", "ticket", "channels"]
    names = [line["event"] for line in lines if line["event"] not in ("stage", "figures")]
    assert names == ["note", "note", "opened", "guest-ready", "attached", "configured", "note", "detached"]
    notes = [line["message"] for line in lines if line["event"] == "note"]
    assert "SPICE serves one client at a time" in notes[0]
    assert all(isinstance(line["time"], float) and isinstance(line.get("message", ""), str) for line in lines)
    attached = next(line for line in lines if line["event"] == "attached")
    assert attached["device"] == "disk.raw"
    assert attached["identity"]["vendor_id"] == 0x1D6B
    assert attached["speed"] == "super"


def test_json_of_a_failure(cli: Cli, image: Path) -> None:
    result = cli("connect", "tcp://127.0.0.1:1", "--usb-disk", image, "--json")
    last = json.loads(result.out.splitlines()[-1])
    del last["time"]
    assert last.pop("remedy")
    assert last == {
        "event": "failed",
        "reason": "connection-refused",
        "message": "cannot connect to 127.0.0.1:1: Connection refused",
        "exit_code": 4,
    }
    assert '"stage"' not in result.out, "a stage that was not reached"


@pytest.mark.parametrize("position", [0, 1])
def test_debug_shows_the_traffic(cli: Cli, image: Path, position: int) -> None:
    with in_thread(FakeGuest().listening) as target:
        arguments = ["connect", target, "--usb-disk", str(image)]
        arguments.insert(position, "--debug")
        result = cli(*arguments)
    assert result.code == 0
    lines = result.err.splitlines()
    assert any("usbredir tcp < hello " in line for line in lines)
    assert any("usbredir tcp > device_connect " in line for line in lines)
    assert any("usbredir tcp < set_configuration " in line for line in lines)
    assert max(map(len, lines)) < 400, "no payload"


@pytest.mark.parametrize("json_option", [(), ("--json",)])
def test_a_paused_vm_is_waited_for(
    cli: Cli, image: Path, json_option: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "HELLO_PATIENCE", 0.1)
    with in_thread(FakeGuest(silent=True).listening) as target, interrupted_after(2):
        result = cli("connect", target, "--usb-disk", image, *json_option)
    assert result.code == 0
    assert "its VM may be paused, or the port may serve another client; waiting" in result.out


def test_interrupted_while_waiting_for_qemu(cli: Cli, image: Path) -> None:
    with interrupted_after(1.5):
        result = cli("connect", f"tcp-listen://127.0.0.1:{free_port()}", "--usb-disk", image)
    assert (result.code, result.err) == (0, "")
    assert "waiting for QEMU to connect" in result.out


def test_interrupted_while_connecting(cli: Cli, image: Path) -> None:
    async def silent(channel: Channel) -> None:
        interrupt()
        await channel.reader.read()

    with in_thread(lambda: running(FakeSpice(main=silent))) as port:
        result = cli("connect", f"spice://127.0.0.1:{port}", "--usb-disk", image)
    assert (result.code, result.err) == (0, "")
    assert "channels" not in result.out, "a stage that was not reached"


def test_the_guest_goes_away(cli: Cli, image: Path) -> None:
    fake = FakeSpice(vmc_caps=0)

    def vanish() -> None:
        for channel in fake.linked:
            channel.writer.transport.abort()

    fake.usbredir = FakeGuest(vanish).behave
    with in_thread(lambda: running(fake)) as port:
        result = cli("connect", f"spice://127.0.0.1:{port}", "--usb-disk", image)
    assert result.code == 9
    assert "the SPICE server" in result.err


def test_names_that_steer_a_terminal(cli: Cli, tmp_path: Path) -> None:
    image = blank(tmp_path / "[red]\x1b]0;x\x07.raw")
    with in_thread(FakeGuest().listening) as target:
        result = cli("connect", target, "--usb-disk", image)
    assert result.code == 0
    assert "\x1b" not in result.out
    assert "[red]\N{REPLACEMENT CHARACTER}]0;x\N{REPLACEMENT CHARACTER}.raw: attached" in result.out
