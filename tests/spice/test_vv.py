from __future__ import annotations

import pytest

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
        (MINIMAL + "[ovirt]\nhost=other\nadmin=1\ngarbage\n", BASE),
        ("[other]\na=b\n" + MINIMAL, BASE),
        (MINIMAL + "tls-port=5901\n", VvFile("vmhost", 5900, 5901)),
        (MINIMAL.replace("port=", "tls-port="), VvFile("vmhost", None, 5900)),
        (MINIMAL.replace("port=5900", "port=-1\ntls-port=5901"), VvFile("vmhost", None, 5901)),
        (MINIMAL + "tls-port=0\n", BASE),
        (MINIMAL + "tls-port=\n", BASE),
        (MINIMAL + "password=100%\\\\a=b;\\s# \n", VvFile("vmhost", 5900, password="100%\\a=b; #")),
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
    ("data", "said"),
    [
        (b"", r"x.vv: it has no group \[virt-viewer\]"),
        (b"[other]\nhost=x\n", "no group"),
        (b"hello\n", "line 1: a line before the first group"),
        (b"[virt-viewer\n", "line 1: a group without"),
        (MINIMAL.encode() + b"oops\n", "line 5: a line without '='"),
        (b"[virt-viewer]\nhost=x\nport=1\n", "it has no type=spice"),
        (b"[virt-viewer]\ntype=vnc\nhost=x\nport=1\n", "type=vnc is not supported"),
        (b"[virt-viewer]\ntype=spice\nport=1\n", "it has no host"),
        (b"[virt-viewer]\ntype=spice\nhost=x\n", "neither port nor tls-port"),
        (b"[virt-viewer]\ntype=spice\nhost=x\nport=0\n", "neither port nor tls-port"),
        (b"[virt-viewer]\ntype=spice\nhost=x\nport=65536\n", "line 4: port=65536 is no port"),
        (b"[virt-viewer]\ntype=spice\nhost=x\nport=99999999999999999999\n", "line 4: port="),
        (b"[virt-viewer]\ntype=spice\nhost=x\ntls-port=+1\n", "line 4: tls-port=.1 is no port"),
        ("[virt-viewer]\ntype=spice\nhost=x\nport=\u0665\n".encode(), "line 4: port=\u0665 is no port"),
        (MINIMAL.encode() + b"delete-this-file=yes\n", "line 5: delete-this-file=yes is neither 0 nor 1"),
        (MINIMAL.encode() + b"secure-channels=main;usb-redir\n", "line 5: secure-channels has a channel 'usb-redir'"),
        (MINIMAL.replace("vmhost", "vm\\n\x1b[31m").encode(), "line 3: host holds control characters"),
        (MINIMAL.replace("=spice", "=\x1b]0;x\x07").encode(), "line 2: type holds control characters"),
        (MINIMAL.encode() + b"host=other\n", "line 5: host again, with another value than in line 3"),
        (MINIMAL.encode() + b"\xff", "byte 47 is not UTF-8"),
        (MINIMAL.encode() + b"a=\0", "NUL"),
        (MINIMAL.encode() + b"#" * MAX_VV_FILE, f"larger than {MAX_VV_FILE} bytes"),
    ],
)
def test_refused(data: bytes, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        VvFile.parse(data, path="x.vv")
    assert caught.value.reason is Reason.BAD_VV_FILE
    assert str(caught.value).startswith("x.vv")


def test_errors_do_not_name_the_password() -> None:
    with pytest.raises(UsageError) as caught:
        VvFile.parse((MINIMAL + "password=hush\npassword=other\n").encode(), path="x.vv")
    assert "hush" not in str(caught.value)
    assert "other" not in str(caught.value).replace("another", "")
