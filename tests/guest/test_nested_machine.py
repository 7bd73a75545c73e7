"""The near guest: commands run in it on this machine's file system, and what they write stays there."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from tests.guest.nested import Plugger

from farplug.testing import GATEWAY
from farplug.vm.qemu_config import LOOPBACK


async def test_commands_on_this_machine_s_file_system(plugger: Plugger, tmp_path: Path) -> None:
    (tmp_path / "note").write_text("kept\n")
    server = await asyncio.start_server(lambda _, writer: writer.close(), LOOPBACK, 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        output = await plugger.machine.check(
            f"""
            echo changed >>{tmp_path}/note
            cat {tmp_path}/note
            cat /proc/version
            {sys.executable} -c 'import socket, farplug; print(socket.create_connection(("{GATEWAY}", {port})).recv(1))'
            """,
        )
    kept, changed, version, received = output.splitlines()
    assert (kept, changed, received) == ("kept", "changed", "b''")
    assert version != Path("/proc/version").read_text().strip()
    assert (tmp_path / "note").read_text() == "kept\n"
