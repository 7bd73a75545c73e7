"""Bad input that the command line can meet: the words, the exit code, no traceback, nothing lost."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import shlex
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.support import Cli, FakeGuest, blank, in_thread, interrupt, interrupted_after, saying
from tests.docs import ROOT
from tests.transport.fake_spice import Certificates, Channel, FakeSpice, free_port, running

from farplug.cli.main import run
from farplug.redirection import engine
from farplug.spice.types import ChannelType, LinkError
from farplug.usbredir import packets
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
    assert remedy[0].startswith("  convert it")
    assert remedy[1] == f"    qemu-img convert -O raw {escaped}.qcow2' {escaped}.raw'"
    assert remedy[-2].endswith(": --force")
    result = cli("connect", "tcp://127.0.0.1:1", "--force", *options, path)
    assert result.code == 4, "refused only by the VM that is not there"
    assert (
        f"farplug: warning: {tmp_path}/it's\N{REPLACEMENT CHARACTER}a.qcow2 is {what}: plugged as it is" in result.err
    )
    assert path.read_bytes() == QCOW2


def test_an_image_twice_for_writing(cli: Cli, image: Path) -> None:
    for other in ("--usb-disk", "--usb-disk-ro"):
        result = cli("connect", "tcp://127.0.0.1:1", "--usb-disk", image, other, image)
        assert result.code == 3
        assert f"{image} is named twice" in result.err
        assert "disks with a snapshot share an image" in result.err
    assert cli("connect", "tcp://127.0.0.1:1", "--usb-disk", image).code == 4, "the lock is gone"
    for options in (
        ("--usb-disk-ro", image, "--usb-disk-ro", image),
        ("--usb-disk", image, "--usb-disk", image, "--snapshot"),
    ):
        assert cli("connect", "tcp://127.0.0.1:1", *options).code == 4
    with image.open("r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)  # another program
        result = cli("connect", "tcp://127.0.0.1:1", "--usb-disk", image)
        assert (result.code, f"{image} is in use" in result.err) == (3, True)


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
        ("vmhost:5900", 2, "'vmhost:5900' is not a valid target: write it as spice://vmhost:5900\n  other forms: "),
        ("spice://vmhost", 2, "it has no port\n  write it as spice://vmhost:5900"),
        ("tcp://vmhost", 2, "it has no port\n  write it as tcp://vmhost:4000"),
        ("", 2, "is not a valid target"),
        ("x" * 5000, 2, "is not a valid target"),
        ("x" * 5000 + ".vv", 2, "file name too long"),
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
        f"farplug: warning: {vv}, line 6: secure-channels has unknown channels ('smardcard'): all channels use TLS",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "Missing argument 'TARGET'"),
        (("tcp://h:1",), "nothing to plug in"),
        (("h:1",), "'h:1' is not a valid target: write it as spice://h:1"),
        (("no.vv",), "no.vv does not exist\n  check the path\n"),
        (("~/no.vv",), "~/no.vv does not exist\n  write the path of the home folder in place of ~"),
        (("tcp://h:1", "--usb-disk"), "requires an argument"),
        (("tcp://h:1", "--usb-disk", "x", "--usb-speed", "warp"), "'warp' is not one of 'auto', 'high', 'super'"),
        (("tcp://h:1", "--usb-disk", "x", "--block-size", "520"), "'520' is not one of '512', '4096'"),
        (
            ("tcp://h:1", "--usb-device", "0781:5567", "--snapshot"),
            "--snapshot has no effect without --usb-disk: a USB device of this machine keeps what the VM writes to it",
        ),
        (
            ("tcp://h:1", "--usb-disk-ro", "x", "--snapshot"),
            "--snapshot has no effect without --usb-disk: a --usb-disk-ro never changes",
        ),
        (
            ("tcp://h:1", "--usb-cdrom", "x", "--snapshot-file", "f"),
            "--snapshot-file has no effect without --usb-disk\n",
        ),
        (
            ("tcp://h:1", "--usb-disk", "x", "--snapshot", "--snapshot-file", "f"),
            "--snapshot and --snapshot-file contradict each other",
        ),
        (
            ("tcp://h:1", "--usb-disk", "a/x.raw", "--usb-disk", "y,snapshot=z", "--snapshot-file", "f"),
            "--snapshot-file is for one --usb-disk, not 2\n"
            "  name a file for each disk: --usb-disk a/x.raw,snapshot=x.raw.snap --usb-disk y,snapshot=z\n",
        ),
        (
            ("tcp://h:1", "--usb-disk", "x,snapshot=y", "--snapshot-file", "f"),
            "x has two snapshot files: --snapshot-file f and snapshot=y",
        ),
        (
            ("tcp://h:1", "--usb-disk", "x,snapshot=y", "--snapshot"),
            "--snapshot has no effect: each --usb-disk has a snapshot file",
        ),
        (
            ("tcp://h:1", "--usb-disk", "x,snapshot=s", "--usb-disk", "y,snapshot=./s"),
            "s is the snapshot file of two disks",
        ),
        (("tcp://h:1", "--usb-disk", "x,snapshot="), "the path of the snapshot is missing"),
        (("tcp://h:1", "--usb-disk", ",snapshot=x"), "the path of the image is missing"),
        (("tcp://h:1", "--usb-disk-ro", "x,snapshot=y"), "to let it write to the snapshot: --usb-disk x,snapshot=y"),
        (("tcp://h:1", "--nonsense"), "No such option"),
        (("tcp://h:1", "two words"), "unexpected extra argument"),
        (("tcp://h:1", "x.raw"), "(x.raw)\n  to plug it in: --usb-disk x.raw\n  see: farplug connect --help\n"),
        (("tcp://h:1", "a$b.ISO"), "to plug it in: --usb-cdrom 'a$b.ISO'\n"),
        (("tcp://h:1", "/tmp"), "to plug it in: --usb-folder /tmp\n"),
        (("spice://h:1", "--usb-disk", "x", "--ask-password"), "--ask-password needs a terminal"),
        (
            ("spice://h:1", "--usb-disk", "x", "--password-file", "/no/file"),
            "cannot be read: no such file or directory\n  check the path\n",
        ),
        (("spice://h:1", "--usb-disk", "x", "--password-file", "/"), "cannot be read: is a directory\n  name a file\n"),
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
        ("spice+tls://h:1", ("--ca-file", "/no"), "/no cannot be read: no such file or directory\n  check the path\n"),
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
    assert "does not use the usbredir protocol" in result.err
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
            assert "the password is wrong or has expired" in result.err
            assert "get a new one" in result.err
            assert "wr0ng" not in result.out + result.err
        for options in ((), ("--json",)):
            result = cli("connect", target, "--usb-disk", image, *options)
            assert result.code == 6, "none given, and there is no terminal to ask on"
            assert result.err.startswith("farplug: the VM requires a password, and none was given\n")
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
        assert ": --ca-file FILE\n" in result.err
        assert cli("connect", target, *plug, "--ca-file", other).code == 5
        assert cli("connect", target, *plug, "--ca-file", ca).code == 0
        result = cli("connect", target, *plug, "--ca-file", ca, "--host-subject", "O=Other,CN=x")
        assert result.code == 5
        (option, subject), *_ = re.findall(r": (--host-subject) ('.*')\n", result.err)
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
        assert "if this is the right host, give the certificate's subject" in result.err
        assert r": --host-subject 'O=Test\, Inc.,CN=vmhost'" in result.err


@pytest.fixture
def iso(tmp_path: Path) -> Path:
    """An ISO image, as far as farplug looks."""
    path = tmp_path / "installer.iso"
    content = bytearray(1 << 20)
    content[32768:32775] = b"\x01CD001\x01"
    path.write_bytes(content)
    return path


def _ports(out: str) -> list[str]:
    lines = map(json.loads, out.splitlines())
    return [line["message"] for line in lines if line["event"] == "opened"]


@pytest.mark.parametrize("reverse", [False, True])
def test_ports_follow_the_command_line(cli: Cli, tmp_path: Path, iso: Path, reverse: bool) -> None:
    (tmp_path / "drivers").mkdir()
    pairs = [
        ("--usb-folder", tmp_path / "drivers"),
        ("--usb-cdrom", iso),
        ("--usb-disk", blank(tmp_path / "a.raw")),
        ("--usb-disk-ro", blank(tmp_path / "b.raw")),
        ("--usb-disk", f"{blank(tmp_path / 'c.raw')},snapshot={tmp_path / 'c.snap'}"),
    ]
    names = ["drivers", "cdrom0 (installer.iso)", "a.raw", "b.raw", "c.raw"]
    if reverse:
        pairs.reverse()
        names.reverse()
    waiting = set(range(5))
    offered: list[int] = []

    async def behave(channel: Channel) -> None:
        number = channel.mess.channel_id

        def configured() -> None:
            waiting.discard(number)
            if not waiting:
                interrupt()

        class Noting(FakeGuest):
            def _answer(self, packet: packets.Packet) -> None:
                if isinstance(packet, packets.DeviceConnect):
                    offered.append(number)
                super()._answer(packet)

        await Noting(configured).behave(channel)

    fake = FakeSpice(usbredir=behave, vmc_caps=0, channels=((3, 0), *((9, number) for number in range(5))))
    with in_thread(lambda: running(fake)) as port:
        arguments = [word for pair in pairs for word in pair]
        result = cli("connect", f"spice://127.0.0.1:{port}", "--json", *arguments)
    assert (result.code, result.err) == (0, "")
    assert sorted(_ports(result.out)) == [f"port {number}: {name}" for number, name in enumerate(names)]
    lines = map(json.loads, result.out.splitlines())
    attached = [line["device"] for line in lines if line["event"] == "attached"]
    assert attached == [name.partition(" ")[0] for name in names], "the VM sees them in this order"
    assert (tmp_path / "c.snap").exists()


def test_logical_units_follow_the_command_line(cli: Cli, tmp_path: Path, iso: Path) -> None:
    second = Path(shutil.copy(iso, tmp_path / "drivers.iso"))
    with in_thread(FakeGuest().listening) as target:
        result = cli(
            *("connect", target, "--usb-cdrom", iso, "--usb-disk", blank(tmp_path / "a.raw"), "--usb-cdrom", second)
        )
    assert (result.code, result.err) == (0, "")
    assert " port 0: LUN 0 cdrom0 (installer.iso), LUN 1 a.raw, LUN 2 cdrom1 (drivers.iso)\n" in result.out
    assert " cdrom0, a.raw, cdrom1: attached as " in result.out


def test_a_snapshot_file_for_each_disk(cli: Cli, tmp_path: Path) -> None:
    first, second = blank(tmp_path / "a.raw"), blank(tmp_path / "b,snapshot=b.raw")
    for options in (
        (
            "--usb-disk",
            f"{first},snapshot={tmp_path / 'a=1,2.snap'}",
            "--usb-disk",
            f"{second},snapshot={tmp_path / 'b'}",
        ),
        ("--usb-disk", f"{first},snapshot={tmp_path / 'c'}", "--usb-disk", second, "--snapshot"),
        ("--usb-disk", second, "--snapshot-file", tmp_path / "d"),
    ):
        assert cli("connect", "tcp://127.0.0.1:1", *options).code == 4
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == ["a.raw", "a=1,2.snap", "b", "b,snapshot=b.raw", "c", "d"]
    listed = json.loads(cli("image", "info", tmp_path / "b", "--json").out)
    assert (listed["image"], listed["size"], listed["half_committed"]) == (str(second), 1 << 20, False)


def test_images_that_were_meant_otherwise(cli: Cli, tmp_path: Path, iso: Path) -> None:
    (tmp_path / "drivers").mkdir()
    result = cli("connect", "tcp://127.0.0.1:1", "--usb-disk", tmp_path / "drivers")
    assert (result.code, f"--usb-folder {tmp_path / 'drivers'}" in result.err) == (3, True)
    result = cli("connect", "tcp://127.0.0.1:1", "--usb-disk", iso)
    assert result.code == 4, "it may be meant so"
    lines = [line[9:] for line in result.out.splitlines()]
    assert lines[:2] == ["installer.iso is an ISO image", f"to plug it in as a CD-ROM: --usb-cdrom {iso}"]
    with iso.open("r+b") as file:  # one that boots from a stick, too
        os.pwrite(file.fileno(), b"\x55\xaa", 510)
    assert "is an ISO image" not in cli("connect", "tcp://127.0.0.1:1", "--usb-disk", iso).out


def test_a_bug_in_the_engine_is_not_the_servers_fault(
    cli: Cli, image: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: object, packet: object) -> None:
        raise AttributeError("no such thing")

    monkeypatch.setattr(engine.Redirection, "_on_hello", broken)
    for serve in (
        FakeGuest().listening,
        lambda: running(FakeSpice(usbredir=FakeGuest().behave, vmc_caps=0)),
    ):
        with in_thread(serve) as where:
            target = where if isinstance(where, str) else f"spice://127.0.0.1:{where}"
            assert run(["connect", target, "--usb-disk", str(image), "--json"]) == 1
        out, err = capfd.readouterr()
        assert err == (
            "farplug: internal error: AttributeError: no such thing\n"
            "  please report this bug, with the debug log: --debug\n"
        )
        assert json.loads(out.splitlines()[-1])["reason"] == "internal-error"


def test_a_bug_in_a_callback_of_the_event_loop(
    image: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise ZeroDivisionError("our bug")

    def configured(self: object, configuration: int) -> None:
        asyncio.get_running_loop().call_soon(broken)

    monkeypatch.setattr(engine.Redirection, "_configured", configured)
    guest = FakeGuest(lambda: None)
    with in_thread(guest.listening) as target:
        assert run(["connect", target, "--usb-disk", str(image), "--debug"]) == 1
    err = capfd.readouterr().err
    assert "farplug: internal error: ZeroDivisionError: our bug\n" in err
    assert "in broken" in err, "where it comes from"
    assert any(isinstance(packet, packets.DeviceDisconnect) for packet in guest.seen), "the VM saw the disk leave"


def test_a_spice_server_behind_a_plain_target(cli: Cli, image: Path) -> None:
    with in_thread(lambda: saying(b"REDQ" + bytes(190))) as port:
        result = cli("connect", f"tcp://127.0.0.1:{port}", "--usb-disk", image)
    assert result.code == 10
    assert f"a SPICE server answers at 127.0.0.1:{port}, not a usbredir chardev\n" in result.err
    assert "spice://HOST:PORT" in result.err
    with in_thread(lambda: saying(b"\x15\x03\x01\x00\x02\x02\x28")) as port:  # a TLS port
        result = cli("connect", f"tcp://127.0.0.1:{port}", "--usb-disk", image)
    assert (result.code, "spice+tls://HOST:PORT" in result.err) == (4, True)
    assert f"the peer at 127.0.0.1:{port} " in result.err


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
        (FakeSpice(usbredir=_closes), 1, 7, "the channel is in use"),
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
    with in_thread(FakeGuest().listening) as target:
        result = cli("connect", target, *options)
        assert result.code == 0
        assert "the VM has 1 port for 2 devices: they are plugged as 2 logical units of one device" in result.out
        result = cli("connect", target, *options, "--separate")
        assert (result.code, "2 devices need a port each, but the VM has 1 for them" in result.err) == (7, True)
        options += [word for number in range(15) for word in ("--usb-disk", str(blank(tmp_path / str(number))))]
        result = cli("connect", target, *options)
    assert (result.code, "17 devices, but the VM has 1 port" in result.err) == (7, True)
    assert "give the VM another socket" in result.err


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
    connects = [packet for packet in guest.seen if isinstance(packet, packets.DeviceConnect)]
    assert len(connects) == 1
    assert isinstance(guest.seen[-1], packets.DeviceDisconnect)


def test_plain_lines(cli: Cli, image: Path) -> None:
    with in_thread(FakeGuest().listening) as target:
        result = cli("connect", target, "--usb-disk", image)
    assert (result.code, result.err) == (0, "")
    lines = [line[9:] for line in result.out.splitlines()]
    assert lines[0] == f"reach: {target.removeprefix('tcp://')}"
    assert lines[1] == "port 0: disk.raw"
    assert lines[2].startswith("disk.raw: the guest is ready")
    assert lines[3] == "disk.raw: attached as 1d6b:0104 farplug Virtual Disk at SuperSpeed (5 Gb/s)"
    assert lines[4] == "disk.raw: configured by the guest (configuration 1)"
    assert lines[5] == "detaching; press Ctrl-C again to quit immediately"
    assert lines[6] == "disk.raw: detached (0 B read, 0 B written, 0 commands)"


def test_json(cli: Cli, image: Path) -> None:
    fake = FakeSpice(usbredir=FakeGuest().behave, vmc_caps=0)
    with in_thread(lambda: running(fake)) as port:
        result = cli("connect", f"spice://127.0.0.1:{port}", "--usb-disk", image, "--json")
    assert (result.code, result.err) == (0, "")
    lines = [json.loads(line) for line in result.out.splitlines()]
    stages = [(line["stage"], line["state"]) for line in lines if line["event"] == "stage"]
    assert stages == [(stage, state) for stage in ("reach", "ticket", "channels") for state in ("begun", "reached")]
    names = [line["event"] for line in lines if line["event"] not in ("stage", "figures", "port")]
    assert names == [
        *(
            "guest",
            "connected",
            "note",
            "note",
            "attaching",
            "opened",
            "guest-ready",
            "attached",
            "configured",
            "ready",
        ),
        *("note", "detached", "removed", "closed", "guest-removed"),
    ]
    assert [line["id"] for line in lines] == list(range(1, len(lines) + 1))
    notes = [line["message"] for line in lines if line["event"] == "note"]
    assert "SPICE serves one client at a time" in notes[0]
    assert all(isinstance(line["time"], float) and isinstance(line.get("message", ""), str) for line in lines)
    opened = next(line for line in lines if line["event"] == "opened")
    assert (opened["port"], opened["number"], opened["units"]) == ("usbredir 0", 0, ["disk.raw"])
    assert opened["message"] == "port 0: disk.raw"
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
    stages = [line for line in map(json.loads, result.out.splitlines()) if line["event"] == "stage"]
    assert [(line["stage"], line["state"]) for line in stages] == [("reach", "begun"), ("reach", "failed")]


@pytest.mark.parametrize("position", [0, 1])
def test_debug_shows_the_traffic(cli: Cli, image: Path, position: int) -> None:
    with in_thread(FakeGuest().listening) as target:
        arguments = ["connect", target, "--usb-disk", str(image)]
        arguments.insert(position, "--debug")
        result = cli(*arguments)
    assert result.code == 0
    lines = result.err.splitlines()
    assert any("tcp < hello " in line for line in lines)
    assert any("tcp > device_connect " in line for line in lines)
    assert any("tcp < set_configuration " in line for line in lines)
    assert max(map(len, lines)) < 400, "no payload"


@pytest.mark.parametrize("json_option", [(), ("--json",)])
def test_a_paused_vm_is_waited_for(
    cli: Cli, image: Path, json_option: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "HELLO_TIMEOUT", 0.1)
    with in_thread(FakeGuest(silent=True).listening) as target, interrupted_after(2):
        result = cli("connect", target, "--usb-disk", image, *json_option)
    assert result.code == 130, "no device was plugged in"
    assert result.err == "farplug: interrupted\n"
    assert "its VM may be paused, or the port may serve another client; waiting" in result.out
    if json_option:
        assert json.loads(result.out.splitlines()[-1])["reason"] == "interrupted"


def test_interrupted_while_waiting_for_qemu(cli: Cli, image: Path) -> None:
    with interrupted_after(1.5):
        result = cli("connect", f"tcp-listen://127.0.0.1:{free_port()}", "--usb-disk", image)
    assert (result.code, result.err) == (130, "farplug: interrupted\n")
    assert "waiting for QEMU to connect" in result.out


def test_interrupted_while_connecting(cli: Cli, image: Path) -> None:
    async def silent(channel: Channel) -> None:
        interrupt()
        await channel.reader.read()

    with in_thread(lambda: running(FakeSpice(main=silent))) as port:
        result = cli("connect", f"spice://127.0.0.1:{port}", "--usb-disk", image)
    assert (result.code, result.err) == (130, "farplug: interrupted\n")
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


def test_the_errors_in_the_readme_are_those_of_the_commands(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vm.vv").write_text("[virt-viewer]\ntype=spice\nhost=127.0.0.1\nport=1\n")
    (tmp_path / "scratch.raw").write_bytes(bytes(1 << 20))
    shown = re.findall(
        r"^\$ farplug (.*); echo \$\?\n((?:.*\n)*?)(\d+)\n", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert len(shown) == 2
    for command, expected, code in shown:
        result = cli(*command.split())
        printed = "".join(line for line in result.err.splitlines(keepends=True) if line.startswith(("farplug: ", "  ")))
        assert (printed, result.code) == (expected, int(code))
