from __future__ import annotations

from dataclasses import replace

import pytest

from farplug.cli.log import remedy_lines
from farplug.errors import Reason, UsageError
from farplug.spice.vv import MAX_VV_FILE, VvFile

MINIMAL = "[virt-viewer]\ntype=spice\nhost=vmhost\nport=5900\n"

PROXMOX = r"""[virt-viewer]
tls-port=61000
delete-this-file=1
title=VM 100 - test
proxy=http://pve.example.org:3128
toggle-fullscreen=Shift+F11
type=spice
release-cursor=Ctrl+Alt+R
host-subject=OU=PVE Cluster Node,O=Proxmox Virtual Environment,CN=pve.example.org
password=5b1e4e1a
secure-attention=Ctrl+Alt+Ins
host=pvespiceproxy:6567A3D8:100:pve::5ba2e0c0
ca=-----BEGIN CERTIFICATE-----\nMIIF\n-----END CERTIFICATE-----\n
"""


def test_proxmox() -> None:
    vv = VvFile.parse(PROXMOX.encode(), path="x.vv")
    assert vv == VvFile(
        host="pvespiceproxy:6567A3D8:100:pve::5ba2e0c0",
        port=None,
        tls_port=61000,
        password="5b1e4e1a",
        ca="-----BEGIN CERTIFICATE-----\nMIIF\n-----END CERTIFICATE-----\n",
        host_subject="OU=PVE Cluster Node,O=Proxmox Virtual Environment,CN=pve.example.org",
        proxy="http://pve.example.org:3128",
        title="VM 100 - test",
        delete_this_file=True,
    )
    assert "5b1e4e1a" not in repr(vv)


BASE = VvFile(host="vmhost", port=5900)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (MINIMAL, BASE),
        (MINIMAL.replace("\n", "\r\n"), BASE),
        (MINIMAL.replace("\n", "\r"), BASE),
        ("\ufeff" + MINIMAL, BASE),
        (MINIMAL.rstrip("\n"), BASE),
        ("# comment\n\n" + MINIMAL.replace("=", " = "), BASE),
        (MINIMAL + "versions=fedora:2.0\nunknown key=%s %(x)s\n", BASE),
        (MINIMAL + "port=5900\n", BASE),
        (MINIMAL + "port=1\nhost=other\n", VvFile("other", 1)),
        (MINIMAL + "password=a\npassword=b\npassword=\n", BASE),
        (MINIMAL + "[other]\nhost=x\n[virt-viewer] \nport=1\n", VvFile("vmhost", 1)),
        (MINIMAL.replace("spice", "SPICE"), BASE),
        (MINIMAL.replace("\n", " \t\n"), BASE),
        (MINIMAL.replace("5900", "+05900 # plain"), BASE),
        (MINIMAL + "tls-port=-5\n", BASE),
        (MINIMAL + "password=a b \n", VvFile("vmhost", 5900, password="a b ")),
        (
            MINIMAL + "proxy=http://p \nhost-subject=CN=x \n",
            VvFile("vmhost", 5900, proxy="http://p", host_subject="CN=x"),
        ),
        (MINIMAL + "delete-this-file=2\n", VvFile("vmhost", 5900, delete_this_file=True)),
        *(
            (MINIMAL.replace("vmhost", host), VvFile("fe80::1%eth0", 5900))
            for host in ("fe80::1%eth0", "[fe80::1%eth0]", "fe80::1%25eth0", "[fe80::1%25eth0]")
        ),
        (MINIMAL.replace("vmhost", "[2001:db8::10]"), VvFile("2001:db8::10", 5900)),
        (MINIMAL.replace("vmhost", "2001:db8::10"), VvFile("2001:db8::10", 5900)),
        (MINIMAL.replace("vmhost", "[vmhost]"), VvFile("[vmhost]", 5900)),
        (MINIMAL + "[ovirt]\nhost=other\nadmin=1\ngarbage\n", BASE),
        ("[other]\na=b\n" + MINIMAL, BASE),
        (MINIMAL + "tls-port=5901\n", VvFile("vmhost", 5900, 5901)),
        (MINIMAL.replace("port=", "tls-port="), VvFile("vmhost", None, 5900)),
        (MINIMAL.replace("port=5900", "port=-1\ntls-port=5901"), VvFile("vmhost", None, 5901)),
        (MINIMAL + "tls-port=0\n", BASE),
        (MINIMAL + "tls-port=\n", BASE),
        (MINIMAL + "password=100%\\\\a=b;\\s# \n", VvFile("vmhost", 5900, password="100%\\a=b; # ")),
        (MINIMAL + "host-subject=O=A\\, Inc,CN=x\n", VvFile("vmhost", 5900, host_subject="O=A\\, Inc,CN=x")),
        (MINIMAL + "title=Fenêtre\n", VvFile("vmhost", 5900, title="Fenêtre")),
        (
            MINIMAL + "secure-channels=main;usbredir; inputs\n",
            VvFile("vmhost", 5900, secure_channels=frozenset({"main", "usbredir", "inputs"})),
        ),
        (
            MINIMAL + "secure-channels=Main,ALL\n",
            VvFile("vmhost", 5900, secure_channels=frozenset({"main", "all"})),
        ),
        (MINIMAL + "delete-this-file=0\n", BASE),
    ],
)
def test_parse(text: str, expected: VvFile) -> None:
    assert VvFile.parse(text.encode(), path="x.vv") == expected


@pytest.mark.parametrize(
    ("text", "expected", "expected_text"),
    [
        (
            MINIMAL + "tls-port=1\nsecure-channels=main;usbredir;smardcard\n",
            VvFile("vmhost", 5900, 1, secure_channels=frozenset({"main", "usbredir", "all"})),
            "x.vv, line 6: secure-channels has unknown channels ('smardcard'): all channels use TLS",
        ),
        (
            MINIMAL + "secure-channels=smain,Inputs\n",
            VvFile("vmhost", 5900, secure_channels=frozenset({"inputs"})),
            "x.vv, line 5: secure-channels has unknown channels ('smain'): ignored",
        ),
        (
            MINIMAL.replace("port=5900", "port=None\ntls-port=1"),
            VvFile("vmhost", None, 1),
            "x.vv, line 4: port=None is not a port number from 1 to 65535: ignored",
        ),
        (
            MINIMAL + "tls-port=n/a\n",
            BASE,
            "x.vv, line 5: tls-port=n/a is not a port number from 1 to 65535: ignored",
        ),
        (
            MINIMAL + "delete-this-file=\x1b]0;x\n",
            BASE,
            "x.vv, line 5: delete-this-file=\ufffd]0;x is neither 0 nor 1: ignored",
        ),
        (
            MINIMAL + "tls-port=65536\n",
            BASE,
            "x.vv, line 5: tls-port=65536 is not a port number from 1 to 65535: ignored",
        ),
        (
            MINIMAL + "delete-this-file=yes\n",
            BASE,
            "x.vv, line 5: delete-this-file=yes is neither 0 nor 1: ignored",
        ),
    ],
)
def test_warnings(text: str, expected: VvFile, expected_text: str) -> None:
    assert VvFile.parse(text.encode(), path="x.vv") == replace(expected, warnings=(expected_text,))


def test_bytes_of_a_title_that_are_not_text_are_replaced() -> None:
    vv = VvFile.parse(MINIMAL.encode() + b"title=Fen\xeatre\n# \xff\n[\xff]\n", path="x.vv")
    assert vv == replace(BASE, title="Fen\N{REPLACEMENT CHARACTER}tre")


@pytest.mark.parametrize(
    ("data", "expected_text"),
    [
        (b"", "x.vv: it is empty"),
        (b"#\n", r"x.vv: it has no group \[virt-viewer\]: this is not a .vv file"),
        (b"[other]\nhost=x\n", "no group"),
        (b"hello\n", "line 1: text before the first group"),
        (b"[virt-viewer\n", "line 1: the group's name has no closing bracket"),
        (MINIMAL.encode() + b"oops\n", "line 5: the line has no '='"),
        (b"[virt-viewer]\nhost=x\nport=1\n", "it has no type=spice"),
        (b"[virt-viewer]\ntype=vnc\nhost=x\nport=1\n", "line 2: type=vnc is not supported"),
        (b"[virt-viewer]\ntype=spice\nport=1\n", "it has no host"),
        (b"[virt-viewer]\ntype=spice\nhost=x\n", "neither port nor tls-port"),
        (b"[virt-viewer]\ntype=spice\nhost=x\nport=0\n", "neither port nor tls-port"),
        (b"[virt-viewer]\ntype=spice\nhost=x\nport=65536\n", "line 4: port=65536 is not a port number from 1 to 65535"),
        (b"[virt-viewer]\ntype=spice\nhost=x\nport=99999999999999999999\n", "line 4: port="),
        (b"[virt-viewer]\ntype=spice\nhost=x\ntls-port=5901x\n", "line 4: tls-port=5901x is not a port number"),
        ("[virt-viewer]\ntype=spice\nhost=x\nport=\u0665\n".encode(), "line 4: port=\u0665 is not a port number"),
        (b"[virt-viewer]\ntype=spice\nhost=x\nport=1\x1b7\n", "line 4: port=1\ufffd7 is not a port number"),
        (b"[virt-viewer]\ntype=spice\nhost=x\nport=None\ntls-port=-1\n", "line 4: port=None is not a port number"),
        (MINIMAL.replace("vmhost", "vm\\n\x1b[31m").encode(), "line 3: host contains control characters"),
        (MINIMAL.replace("=spice", "=\x1b]0;x\x07").encode(), "line 2: type contains control characters"),
        (MINIMAL.encode() + b"\xff", "line 5: the line has no"),
        (MINIMAL.encode() + b"password=\xff\n", "line 5: password is not text in UTF-8"),
        (MINIMAL.encode("utf-16"), "it is not text in UTF-8"),
        (MINIMAL.encode() + b"a=\0", "NUL"),
        (MINIMAL.encode() + b"#" * MAX_VV_FILE, f"larger than {MAX_VV_FILE} bytes"),
    ],
)
def test_refused(data: bytes, expected_text: str) -> None:
    with pytest.raises(UsageError, match=expected_text) as caught:
        VvFile.parse(data, path="x.vv")
    assert caught.value.reason is Reason.BAD_VV_FILE
    assert str(caught.value).startswith("x.vv")
    assert caught.value.remedy


@pytest.mark.parametrize("data", [b"\0" * 512, b"#" * (MAX_VV_FILE + 1), b"hello\n", b"[other]\nhost=x\n"])
def test_an_image_in_place_of_the_file(data: bytes) -> None:
    for path, remedy in (
        ("a b.raw", "name the VM as the target; to plug this file in: --usb-disk 'a b.raw'"),
        ("x.ISO", "name the VM as the target; to plug this file in: --usb-cdrom x.ISO"),
        ("x.vv", "get a new .vv file where you got this one"),
    ):
        with pytest.raises(UsageError, match=r"this is not a \.vv file") as caught:
            VvFile.parse(data, path=path)
        assert remedy_lines(caught.value.remedy) == [remedy]


def test_errors_do_not_contain_the_password() -> None:
    with pytest.raises(UsageError) as caught:
        VvFile.parse(MINIMAL.encode() + b"password=hush\xff\n", path="x.vv")
    assert "hush" not in str(caught.value) + caught.value.remedy
