"""``.vv`` files as GLib's GKeyFile parses them, through Debian's python3-gi.

What GKeyFile takes, we take, and read the same in it.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
from typing import Any

import pytest

from farplug.errors import UsageError
from farplug.spice.host import plain_host
from farplug.spice.types import CHANNEL_NAMES
from farplug.spice.vv import VvFile

PYTHON = "/usr/bin/python3"
"""Debian's: python3-gi is built for it."""

ORACLE = """
import json, sys
from gi.repository import GLib
def value(file, getter, key):
    try:
        return getattr(file, getter)("virt-viewer", key)
    except GLib.Error:
        return None
answers = []
for text in json.load(sys.stdin):
    file = GLib.KeyFile()
    try:
        file.load_from_bytes(GLib.Bytes.new(text.encode("latin-1")), GLib.KeyFileFlags.NONE)
    except GLib.Error:
        answers.append(None)
        continue
    answers.append({
        **{key: value(file, "get_string", key) for key in ("type", "host", "password", "host-subject", "proxy")},
        "title": value(file, "get_string", "title"),
        **{key: value(file, "get_integer", key) for key in ("port", "tls-port", "delete-this-file")},
        "secure-channels": value(file, "get_string_list", "secure-channels"),
    })
json.dump(answers, sys.stdout)
"""


def gkeyfile(texts: list[bytes]) -> list[dict[str, Any] | None]:
    """Return the values that GKeyFile reads in each file, by key; None for a file that it refuses."""
    wanted = json.dumps([text.decode("latin-1") for text in texts])
    try:
        found = subprocess.run([PYTHON, "-c", ORACLE], input=wanted, capture_output=True, text=True)
    except OSError as error:
        found = subprocess.CompletedProcess((), 1, "", str(error))
    if found.returncode:
        if os.environ.get("FARPLUG_REQUIRE_ALL") == "1":
            raise AssertionError(found.stderr)
        pytest.skip("GLib is not there for Debian's Python (Debian: python3-gi)")
    answers: list[dict[str, Any] | None] = json.loads(found.stdout)
    return answers


LINES = [
    *("type=spice", "type=SPICE", " type = spice", "\ttype=spice\r"),
    *("host=vmhost", "host=2001:db8::1", "host=[2001:db8::1]", "host=fe80::1%eth0", "host = vmhost", "host[de]=other"),
    *("port=5900", "port=5900 ", "port=+5900", "port=05900", "port=5900 # plain", "port=0", "port=-1", "port="),
    *("port=None", "port=5900x", "port=0x170c", "port=1_0", "port=\u0665", "port[de]=7", "port=\t5900\t"),
    *("tls-port=5901", "tls-port=none", "tls-port=-1", "tls-port", "tls-port = 5901", "tls-port=5 901"),
    *(
        "password=secret",
        "password=a=b;c#d",
        "password= \\sa\\s ",
        "password=ab \t",
        "password=\\\\\\n\\r\\t",
        "password=",
    ),
    *("password=p\u00e4ss", "password=\\q", "password=a\\"),
    *("host-subject=O=a,CN=b", "host-subject=O=a\\\\,b", "proxy=http://p:3128", "proxy=p "),
    *("title=a:%d", "title=b", "title=Fen\udceatre", "title[de]=c"),
    *("delete-this-file=1", "delete-this-file=0", "delete-this-file=true", "delete-this-file=2"),
    *("secure-channels=main;usbredir", "secure-channels=main;smardcard;", "secure-channels=Main", "secure-channels="),
    *(
        "# comment",
        "  # comment",
        "; comment=1",
        ";secure-channels=all",
        "",
        " \t",
        "fullscreen=1",
        "unknown key=\udcff",
    ),
    *("[virt-viewer]", "[virt-viewer] ", "[ovirt]", "[ovirt", "host", "=x"),
]


def files() -> list[bytes]:
    texts = [["[virt-viewer]", "type=spice", "host=h", "port=1", "tls-port=2", line] for line in LINES]
    texts += [["[virt-viewer]", "type=spice", "host=h", line] for line in LINES]
    rng = random.Random(1)
    texts += [["[virt-viewer]", *rng.choices(LINES, k=rng.randint(5, 20))] for _ in range(3000)]
    return ["\n".join([*text, ""]).encode("utf-8", "surrogateescape") for text in texts]


def test_files_that_gkeyfile_accepts_have_its_values() -> None:
    texts = files()
    taken = 0
    for text, theirs in zip(texts, gkeyfile(texts), strict=True):
        if theirs is None:
            continue  # the whole file: what we make of it is ours
        ports = [port if port is not None and port > 0 else None for port in (theirs["port"], theirs["tls-port"])]
        usable = (theirs["type"] or "").lower() == "spice" and theirs["host"] and any(ports)
        if not usable:
            with pytest.raises(UsageError):
                raise AssertionError((text, theirs, VvFile.parse(text, path="x.vv")))
            continue
        taken += 1
        vv = VvFile.parse(text, path="x.vv")
        assert [vv.port, vv.tls_port] == ports, text
        assert vv.host == plain_host(theirs["host"]), text
        assert vv.delete_this_file == bool(theirs["delete-this-file"]), text
        for key in ("password", "host-subject", "proxy", "title"):
            if theirs[key] is not None:  # an escape that GKeyFile does not know: we keep it
                ours = getattr(vv, key.replace("-", "_"))
                assert ours == (theirs[key] if key in ("password", "title") else theirs[key].rstrip()), text
        channels = {channel.lower() for channel in theirs["secure-channels"] or []}
        assert vv.secure_channels - {"all"} == channels & CHANNEL_NAMES, text
        assert ("all" in vv.secure_channels) == bool(channels - CHANNEL_NAMES and vv.tls_port), text
    assert taken > len(texts) // 20
