"""Offer a file to a session, and insert it into its CD-ROM drive: a client without farplug.

Usage: offerer.py SOCKET FILE METHOD [LAST]

METHOD is ``attach`` or ``insert``. Writes ``ready`` when the medium is in the drive, and ``silent`` when LAST questions
were answered: the client then reads no more, and answers nothing.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from typing import Any


def main(path: str, file: str, method: str, last: str = "1000000") -> None:
    session = socket.socket(socket.AF_UNIX)
    session.connect(path)
    stream = session.makefile("rwb")

    def send(id: int, method: str, payload: bytes | None = None, **params: Any) -> None:
        message: dict[str, Any] = {"id": id, "method": method, "params": params}
        if payload is not None:
            message["bytes"] = len(payload)
        stream.write(json.dumps(message).encode() + b"\n" + (payload or b""))
        stream.flush()

    send(1, "hello", protocol_version="1.1", client_name="offerer")
    send(2, "media-offer", file=os.path.basename(file), size=os.path.getsize(file))
    answered = 0
    for line in stream:
        message = json.loads(line)
        if message.get("ok") is False:
            sys.exit(line.decode())
        if message.get("id") == 2:
            medium = f"client:{message['result']['media']}"
            if method == "attach":
                send(3, "attach", sources=[{"kind": "cdrom", "path": medium}])
            else:
                send(3, "insert", path=medium, force=True)
        elif message.get("id") == 3:
            os.write(1, b"ready\n")
        elif message.get("event") == "media-read":
            if answered >= int(last):
                os.write(1, b"silent\n")
                time.sleep(1000)
            question = message["data"]
            with open(file, "rb") as opened:
                opened.seek(question["offset"])
                data = opened.read(question["length"])
            answered += 1
            send(100 + question["read"], "media-data", data, media=question["media"], read=question["read"])


if __name__ == "__main__":
    main(*sys.argv[1:])
