from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from farplug.errors import Reason, UsageError
from farplug.target import ListenTarget, StreamTarget, TargetOptions, UsbipTarget, parse_target
from farplug.transport.connection import TcpAddress, UnixAddress
from farplug.transport.kubevirt_target import KubevirtTarget
from farplug.transport.spice_target import SpiceTarget


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("spice://vm:5900", SpiceTarget(host="vm", port=5900)),
        ("spice://vm:5900/", SpiceTarget(host="vm", port=5900)),
        ("spice://[2001:db8::1]:5900", SpiceTarget(host="2001:db8::1", port=5900)),
        *(
            (f"spice://{host}:5900", SpiceTarget(host="fe80::1%eth0", port=5900))
            for host in ("[fe80::1%25eth0]", "[fe80::1%eth0]", "fe80::1%25eth0", "fe80::1%eth0")
        ),
        ("spice://[fe80::1%25]:5900", SpiceTarget(host="fe80::1%25", port=5900)),
        ("spice://2001:db8::1:5900", SpiceTarget(host="2001:db8::1", port=5900)),
        ("spice://:p@2001:db8::1:5900/", SpiceTarget(host="2001:db8::1", port=5900, password="p")),
        ("spice://1:2:3:4:5:6:7:8:5900", SpiceTarget(host="1:2:3:4:5:6:7:8", port=5900)),
        ("spice://1:2:3:4:5:6:7:8?tls-port=2", SpiceTarget(host="1:2:3:4:5:6:7:8", tls_port=2)),
        ("spice://2001:db8::?port=1", SpiceTarget(host="2001:db8::", port=1)),
        ("spice://2001:db8::beef?port=1", SpiceTarget(host="2001:db8::beef", port=1)),
        ("spice://[2001:db8::1]:5900?tls-port=2", SpiceTarget(host="2001:db8::1", port=5900, tls_port=2)),
        ("spice://::ffff:192.0.2.1:5900", SpiceTarget(host="::ffff:192.0.2.1", port=5900)),
        ("spice+tls://[FE80::1%25Eth0]:5901", SpiceTarget(host="FE80::1%Eth0", tls_port=5901)),
        ("spice://:secret@vm:5900", SpiceTarget(host="vm", port=5900, password="secret")),
        ("spice://:a%40b%2Fc@vm:5900", SpiceTarget(host="vm", port=5900, password="a@b/c")),
        ("spice://:a@b/c#d:e@vm:5900", SpiceTarget(host="vm", port=5900, password="a@b/c#d:e")),
        ("spice://:a%3Fb+c@vm:5900", SpiceTarget(host="vm", port=5900, password="a?b+c")),
        ("spice://vm:5900?password=p@ss", SpiceTarget(host="vm", port=5900, password="p@ss")),
        ("spice://vm:5900?password=a+b/c#d=%2B", SpiceTarget(host="vm", port=5900, password="a+b/c#d=+")),
        ("spice://:%ff@vm:5900?", SpiceTarget(host="vm", port=5900, password="\udcff")),
        ("spice://:@vm:5900", SpiceTarget(host="vm", port=5900)),
        ("spice+tls://:s@vm:5901", SpiceTarget(host="vm", tls_port=5901, password="s")),
        ("spice://vm?port=1&tls-port=2", SpiceTarget(host="vm", port=1, tls_port=2)),
        ("spice://vm?tls-port=2&password=a%26b", SpiceTarget(host="vm", tls_port=2, password="a&b")),
        ("spice+unix:///run/vm", SpiceTarget(unix_path="/run/vm")),
        ("tcp://vm:4000", StreamTarget(TcpAddress("vm", 4000))),
        ("tcp://[::1]:4000", StreamTarget(TcpAddress("::1", 4000))),
        ("tcp://[fe80::1%25eth0]:4000", StreamTarget(TcpAddress("fe80::1%eth0", 4000))),
        ("tcp://fe80::1%eth0:4000", StreamTarget(TcpAddress("fe80::1%eth0", 4000))),
        ("tcp://::1:4000", StreamTarget(TcpAddress("::1", 4000))),
        ("usbip-listen://127.0.0.1:3240", UsbipTarget(TcpAddress("127.0.0.1", 3240))),
        ("usbip-listen://:0", UsbipTarget(TcpAddress("127.0.0.1", 0))),
        ("tcp-listen://[::]:0", ListenTarget(TcpAddress("::", 0))),
        ("tcp-listen://:::4000", ListenTarget(TcpAddress("::", 4000))),
        ("tcp-listen://[fe80::1%25eth0]:4000", ListenTarget(TcpAddress("fe80::1%eth0", 4000))),
        ("tcp-listen://:4000", ListenTarget(TcpAddress("127.0.0.1", 4000))),
        ("tcp-listen://0.0.0.0:0", ListenTarget(TcpAddress("0.0.0.0", 0))),
        ("kubevirt://lab/vm1", KubevirtTarget("lab", "vm1")),
        ("kubevirt://lab/vm.1-x", KubevirtTarget("lab", "vm.1-x")),
        ("kubevirt://admin@k:6443/lab/vm1", KubevirtTarget("lab", "vm1", "admin@k:6443")),
        ("kubevirt://default/api:6443/me/lab/vm1", KubevirtTarget("lab", "vm1", "default/api:6443/me")),
        ("kubevirt://a%20b%2f/lab/vm1", KubevirtTarget("lab", "vm1", "a b/")),
        ("unix:/run/vm", StreamTarget(UnixAddress("/run/vm"))),
        ("unix:///run/vm", StreamTarget(UnixAddress("/run/vm"))),
        ("unix:vm", StreamTarget(UnixAddress("vm"))),
    ],
)
def test_targets(text: str, target: object) -> None:
    assert parse_target(text) == target


def test_targets_print_as_they_are_written() -> None:
    assert str(parse_target("tcp://[::1]:4000")) == "[::1]:4000"
    assert str(parse_target("tcp-listen://vm:4000")) == "tcp-listen://vm:4000"
    assert str(parse_target("usbip-listen://vm:3240")) == "usbip-listen://vm:3240"
    assert "secret" not in str(parse_target("spice://:secret@vm:1")) + repr(parse_target("spice://:secret@vm:1"))


@pytest.mark.parametrize(
    ("text", "expected_text"),
    [
        ("", "write it as"),
        ("vm", "write it as"),
        ("vm:5900", "'vm:5900' is not a valid target: write it as spice://vm:5900"),
        ("127.0.0.1", "write it as spice://127.0.0.1:5900"),
        ("[::1]:5901", "write it as spice://[::1]:5901"),
        ("vm:99999", "write it as spice://host:port"),
        ("http://vm", "write it as"),
        ("spice://", "it has no host"),
        ("spice:///x", "it has no host"),
        ("spice:vm:5900", "write it as spice://host:port"),
        ("spice://vm", "it has no port"),
        ("spice://:5900", "it has no host"),
        ("spice://vm:0", "a port is a number from 1 to 65535"),
        ("spice://vm:65536", "a port is a number from 1 to 65535"),
        ("spice://vm:five", "five"),
        ("spice://[::1:5900", "the brackets around its host are malformed"),
        ("spice://[vm]:5900", "its host in brackets is not an IPv6 address"),
        ("spice://[192.0.2.1]:5900", "its host in brackets is not an IPv6 address"),
        ("spice://[fe80::1%]:5900", "its host in brackets is not an IPv6 address"),
        ("spice://[::1]5900", "the brackets around its host are malformed"),
        ("spice://vm]:5900", "the brackets around its host are malformed"),
        ("spice://[::1]:five", "a port is a number"),
        ("spice://2001:db8::1", "it has no port"),
        ("spice://2001:db8::1:70000", "a port is a number from 1 to 65535"),
        ("spice://2001:db8::1:12?port=5900", "its IPv6 address needs brackets, as in [2001:db8::1]:5900"),
        ("spice://vm:5900:5901", "its host contains colons and is not an IPv6 address"),
        ("tcp://a:b:c", "its host contains colons and is not an IPv6 address"),
        ("tcp:vm:4000", "write it as tcp://host:port"),
        ("tcp-listen:4000", "write it as tcp-listen://host:port"),
        ("spice://v\nm:5900", "a space or a control character"),
        ("spice+tls://vm:5901?port=5900", "spice+tls:// means TLS"),
        ("spice://vm:5900&password=secret", "'spice://vm:5900' is not a valid target: a port is a number"),
        ("spice://vm?port=5900;password=secret", "port= is not a number"),
        ("spice://vm:5900?secret", "not other text"),
        ("spice://:se?cret@vm:5900", "'spice:…' is not a valid target"),
        ("spice://:a@se?cret@vm:5900", "'spice:…' is not a valid target"),
        ("spice://:se;cret@vm:five", "'spice:…' is not a valid target"),
        ("spice://:secret?cret@[vm:5900", "'spice:…' is not a valid target"),
        ("spice://secret@vm:5900", "write a password as spice://:password@host:port"),
        ("spice+tls://me:secret@vm:5900", "write a password as spice+tls://:password@host:port"),
        ("spice+tls://vm:5900?x=1", "only tls-port= and password= are valid, not x="),
        ("spice+unix:///run/vm?password=secret", "the path of a socket has no password"),
        ("tcp-listen://:secret@:4000", "write it as tcp-listen://host:port"),
        ("spice://me:secret@vm:5900", "write a password as spice://:password@host:port"),
        ("spice://:se#cret@vm:five", "five"),
        ("spice://vm:5900/display", "nothing may follow the port"),
        ("spice://vm:5900#x", "nothing may follow the port"),
        ("spice://vm?port=0", "port= is not a number from 1 to 65535"),
        ("spice://vm?port=²", "port= is not a number from 1 to 65535"),
        ("spice://vm?tls-port=99999", "tls-port= is not a number from 1 to 65535"),
        ("spice://vm?ticket=secret", "not ticket="),
        ("tcp://vm", "it has no port"),
        ("tcp://:4000", "it has no host"),
        ("tcp://vm:0", "a port is a number from 1 to 65535"),
        ("tcp://:secret@vm:4000", "has no password"),
        ("tcp://vm:4000?x=secret", "nothing may follow the port"),
        ("tcp-listen://vm", "it has no port"),
        *(
            (text, "write it as kubevirt://NAMESPACE/VM")
            for text in (
                "kubevirt:lab/vm",
                "kubevirt://vm",
                "kubevirt:///vm",
                "kubevirt://lab/",
                "kubevirt://Lab/vm",
                "kubevirt://lab/vm/",
                "kubevirt://lab/-vm",
                "kubevirt://lab/vm?x=secret",
                "kubevirt://lab/vm..x",
                "kubevirt://l.b/vm",
                f"kubevirt://{'x' * 64}/vm",
                f"kubevirt://lab/{'x' * 254}",
            )
        ),
        ("kubevirt://a%0ab/lab/vm", "all of them printable"),
        (f"kubevirt://{'x' * 1025}/lab/vm", "at most 1024 characters"),
        ("unix:", "it has no path"),
        ("unix:///", "it has no path"),
        ("unix:/" + "x" * 107, "at most 107 bytes"),
        ("unix:/" + "é" * 60, "at most 107 bytes"),
    ],
)
def test_invalid_targets(text: str, expected_text: str) -> None:
    with pytest.raises(UsageError, match="is not a valid target") as caught:
        parse_target(text)
    assert expected_text in caught.value.message
    assert "secret" not in caught.value.message
    assert "cret" not in caught.value.message
    assert len(caught.value.message) < 500
    assert caught.value.reason is Reason.BAD_TARGET


def test_a_vv_file_needs_no_suffix(tmp_path: Path) -> None:
    for name in ("console.VV", "download"):
        path = tmp_path / name
        path.write_bytes(b"[virt-viewer]\r\ntype=spice\r\nhost=vm\r\nport=1\r\npassword=p\r\n")
        assert parse_target(str(path)) == SpiceTarget(host="vm", port=1, password="p")
    with pytest.raises(UsageError, match="does not exist") as caught:
        parse_target(str(tmp_path / "none.vv"))
    assert caught.value.reason is Reason.BAD_VV_FILE


VV = "[virt-viewer]\ntype=spice\nhost=vm\nport=1\ntls-port=2\ndelete-this-file=1\n"


@pytest.mark.parametrize(
    ("lines", "options", "expected_text"),
    [
        ("", TargetOptions(), ""),
        ("type=vnc\n", TargetOptions(), "type=vnc is not supported"),
        ("password=" + "x" * 61 + "\n", TargetOptions(), "61 bytes"),
        ("", TargetOptions(password="x" * 61), "61 bytes"),
        ("proxy=https://p\n", TargetOptions(), "https proxies are not supported"),
        ("", TargetOptions(proxy="https://p"), "https proxies are not supported"),
        ("host-subject=nonsense\n", TargetOptions(), "'nonsense' is not an attribute"),
        ("ca=nonsense\n", TargetOptions(), "no readable certificate"),
        ("", TargetOptions(ca_file=Path("/absent.pem")), "cannot be read"),
    ],
)
def test_a_vv_file_is_deleted_when_it_is_valid(
    tmp_path: Path, lines: str, options: TargetOptions, expected_text: str
) -> None:
    path = tmp_path / "x.vv"
    path.write_text(VV + lines)
    if expected_text:
        with pytest.raises(UsageError, match=expected_text):
            parse_target(str(path), options)
    else:
        assert parse_target(str(path), options) == SpiceTarget(host="vm", port=1, tls_port=2)
    assert path.exists() == bool(expected_text)


@pytest.mark.parametrize(
    ("text", "options", "expected_text"),
    [
        ("spice://vm:1", TargetOptions(ca_file=Path("ca.pem")), "vm:1: a CA file and a host subject are for TLS"),
        ("spice://vm:1", TargetOptions(host_subject="CN=x"), "the target has no TLS port"),
        ("spice+unix:///x", TargetOptions(host_subject="CN=x"), "the target has no TLS port"),
        ("spice+unix:///x", TargetOptions(proxy="http://p"), "a proxy cannot reach a UNIX socket"),
    ],
)
def test_options_without_effect(text: str, options: TargetOptions, expected_text: str) -> None:
    with pytest.raises(UsageError, match=expected_text) as caught:
        parse_target(text, options)
    assert caught.value.reason is Reason.BAD_OPTION


def test_options_override_the_target(tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_text("PEM")
    options = TargetOptions(password="mine", ca_file=ca, host_subject="CN=x", proxy="http://p:1")
    target = parse_target("spice://:theirs@vm:1?tls-port=2", options)
    assert target == SpiceTarget(
        host="vm", port=1, tls_port=2, password="mine", ca="PEM", host_subject="CN=x", proxy="http://p:1"
    )
    assert "mine" not in repr(options)


def test_the_fallback_password_overrides_nothing() -> None:
    options = TargetOptions(fallback_password="last")
    assert parse_target("spice://vm:1", options) == SpiceTarget(host="vm", port=1, password="last")
    assert parse_target("spice://:own@vm:1", options) == SpiceTarget(host="vm", port=1, password="own")
    assert parse_target("tcp://vm:1", options) == StreamTarget(TcpAddress("vm", 1)), "the environment may have one"


@pytest.mark.parametrize(("line", "own"), [("", ""), ("password=\n", ""), ("password=own\n", "own")])
def test_the_fallback_password_is_not_for_the_server_of_a_file(tmp_path: Path, line: str, own: str) -> None:
    path = tmp_path / "x.vv"
    path.write_text(VV.replace("delete-this-file=1\n", line))
    target = SpiceTarget(host="vm", port=1, tls_port=2, password=own)
    assert parse_target(str(path), TargetOptions(fallback_password="last")) == target
    options = TargetOptions(password="mine", fallback_password="last", allow_plain=True)
    assert parse_target(str(path), options) == replace(target, password="mine", allow_plain=True)


@pytest.mark.parametrize(
    "options",
    [
        TargetOptions(password="x"),
        TargetOptions(ca_file=Path("x")),
        TargetOptions(host_subject="CN=x"),
        TargetOptions(proxy="http://x"),
        TargetOptions(allow_plain=True),
    ],
)
def test_plain_sockets_have_no_options(options: TargetOptions) -> None:
    for text in ("tcp://vm:1", "tcp-listen://:1", "unix:/x"):
        with pytest.raises(UsageError, match="is a plain socket"):
            parse_target(text, options)
    with pytest.raises(UsageError, match=r"^vm:1 is a plain socket"):
        parse_target("tcp://:secret@vm:1", options)
    with pytest.raises(UsageError, match="is a VM of KubeVirt: passwords, proxies and settings of TLS are for SPICE"):
        parse_target("kubevirt://lab/vm1", options)
