"""Fuzz what the page takes from browsers and from sessions' pictures: frames, parameters, headers, paths.

Only the documented errors are expected, with a short printable message. A path that is accepted is below the web root.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
from pathlib import Path

from farplug.app.png import encode_png
from farplug.errors import FarplugError, RemoteProtocolError, UsageError
from farplug.web import methods, shell
from farplug.web.files import WebRoot
from farplug.web.messages import FrameReceiver
from farplug.web.security import Origins, Role, Tokens
from farplug.web.thumbnail import scaled
from farplug.web.uploads import Piece, check_name
from fuzz_control import damage, value
from harness import check, run

PARTS = (
    "a",
    "b.iso",
    "..",
    ".",
    "",
    "out",
    "in",
    "%2e%2e",
    "..\\",
    "\0",
    "\ud800",
    "ä",
    "x" * 300,
    "C:",
    "~",
    "|",
    "-",
)


def refused(error: FarplugError) -> None:
    check(len(error.message) < 1000 and error.message.isprintable())


def fuzz_frames(rng: random.Random) -> None:
    receiver = FrameReceiver()
    try:
        for _ in range(rng.randrange(1, 5)):
            message = {"id": 1, "method": rng.choice(("attach", "key")), "params": value(rng), "bytes": value(rng)}
            for name in rng.sample(list(message), rng.randrange(3)):
                del message[name]
            text = damage(rng, json.dumps(message).encode()).decode(errors="replace")
            call = receiver.receive_text(text)
            if call is None:
                check(receiver.waiting)
                call = receiver.receive_binary(bytes(rng.choice((0, 1, len(text)))))
            line = call.encode()
            check(json.loads(line[: line.index(b"\n")])["method"] == call.request.method)
    except RemoteProtocolError as error:
        refused(error)


def path(rng: random.Random) -> str:
    return rng.choice(("", "/", "client:", "upload:")) + rng.choice("//\\").join(
        rng.choice(PARTS) for _ in range(rng.randrange(1, 6))
    )


def fuzz_paths(rng: random.Random) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(os.path.realpath(folder), "root")
        (root / "a" / "a").mkdir(parents=True)
        (root / "b.iso").write_bytes(bytes(512))
        (root / "a" / "b.iso").write_bytes(bytes(512))
        (root / "out").symlink_to("..")
        (root / "in").symlink_to("a")
        web = WebRoot.of(root)
        for _ in range(20):
            text = path(rng)
            for take in (web.existing, web.new):
                try:
                    found = take(text)
                except UsageError as error:
                    refused(error)
                else:
                    check(os.path.realpath(found).startswith(str(root)))
            kind = rng.choice((*methods.OF_FILES, *methods.WITHOUT_FILES, "x"))
            source = {"kind": kind, "path": rng.choice((text, value(rng))), "snapshot": rng.choice((None, path(rng)))}
            params = {"sources": [rng.choice((source, value(rng)))], "storage": value(rng), "rules": value(rng)}
            try:
                shell.command("web1", "attach", params)
            except UsageError as error:
                refused(error)
            try:
                methods.with_absolute_paths("attach", params, web)
            except UsageError as error:
                refused(error)
            method = rng.choice((*methods.OWN, *methods.RELAYED, text))
            try:
                methods.check(rng.choice(list(Role)), method)
                shell.command("web1", method, {"path": text, "keys": text, "x": value(rng), "device": value(rng)})
            except UsageError as error:
                refused(error)


def fuzz_headers(rng: random.Random) -> None:
    host = damage(rng, b"127.0.0.1:8000").decode("latin-1")[:9000]
    check(not Origins.of(["*.example"], 8000).allows_host(host) or host.endswith(":8000"))
    tokens = Tokens("full", "view")
    check(tokens.role(value(rng)) is None and tokens.bearer(host) is None)
    try:
        piece = Piece.parse(damage(rng, b"bytes 0-9/10").decode("latin-1"), rng.choice((None, "10", "0", host)))
        check(piece.first is None or piece.first + piece.size <= piece.total)
    except UsageError as error:
        refused(error)
    try:
        name = check_name(path(rng))
        check("/" not in name and not name.startswith("."))
    except UsageError as error:
        refused(error)


def fuzz_pictures(rng: random.Random) -> None:
    width, height = rng.randrange(1, 300), rng.randrange(1, 200)
    whole = encode_png(width, height, rng.randbytes(4 * width * height))
    damaged = damage(rng, whole)
    try:
        scaled(damaged, rng.choice((1, 100, 320)))
    except ValueError:
        check(damaged != whole)


def one_case(rng: random.Random) -> None:
    rng.choice((fuzz_frames, fuzz_frames, fuzz_paths, fuzz_headers, fuzz_pictures))(rng)


if __name__ == "__main__":
    run("page", one_case)
