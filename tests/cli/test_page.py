"""``farplug page``."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests import starter
from tests.cli.sessions import background, vm
from tests.cli.support import Cli, wait_for

from farplug.control.names import folder

pytestmark = pytest.mark.usefixtures("quick_start")

COMMAND = (sys.executable, "-c", "from farplug.cli.script import main; main()", "page")


@contextmanager
def page(*options: object) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """Run a page; the process, and what it printed."""
    words = [*COMMAND, "--json", *map(str, options)]
    with starter.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, process.stderr and process.stderr.read()
            yield process, json.loads(line)
        finally:
            if process.poll() is None:
                process.kill()


def end(process: subprocess.Popen[str], number: signal.Signals = signal.SIGINT) -> str:
    """Interrupt a page; return its standard error."""
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "")
    return err


def status(port: int) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=100)
    try:
        connection.request("GET", "/nothing")
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_session_that_is_joined_continues(cli: Cli, number: signal.Signals) -> None:
    with vm() as target, background(cli, target) as session, page("-s", "web1") as (process, printed):
        assert printed["session"] == "web1"
        assert printed["view_url"] is None
        assert printed["url"].startswith(f"http://127.0.0.1:{printed['port']}/#token=")
        assert status(printed["port"]) == 404
        assert end(process, number) == ""
        assert session.status["state"] == "connected"


def test_an_mcp_server_below_the_page(cli: Cli, tmp_path: Path) -> None:
    audit = tmp_path / "audit"
    with vm() as target, page("-s", target, "--mcp", "--audit", audit) as (process, printed):
        assert printed["mcp_url"] == f"http://127.0.0.1:{printed['port']}/mcp"
        connection = http.client.HTTPConnection("127.0.0.1", printed["port"], timeout=60)
        call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "nothing", "arguments": {}}}
        fields = {
            "Authorization": f"Bearer {printed['mcp_token']}",
            "Content-Type": "application/json",
            "Accept": "application/json, text/event-stream",
            "Mcp-Method": "tools/call",
            "Mcp-Name": "nothing",
            "MCP-Protocol-Version": "2026-07-28",
        }
        about = {
            "io.modelcontextprotocol/protocolVersion": "2026-07-28",
            "io.modelcontextprotocol/clientInfo": {"name": "t", "version": "1"},
            "io.modelcontextprotocol/clientCapabilities": {},
        }
        call["params"]["_meta"] = about  # type: ignore[index]
        connection.request("POST", "/mcp", json.dumps(call), fields)
        assert b"nothing" in connection.getresponse().read()
        connection.close()
        end(process)
    assert json.loads(audit.read_text().splitlines()[0])["tool"] == "nothing"


def test_a_session_of_a_target_ends_with_the_page(cli: Cli) -> None:
    with vm() as target, page("-s", target, "--view-only") as (process, printed):
        assert printed["view_url"] not in (None, printed["url"])
        assert json.loads(cli("ls", "--json").out)[0]["name"] == printed["session"] == "testvm"
        err = end(process)
        assert f"note: connected to {target} as the session testvm, which ends with the page\n" in err
        assert "the session testvm has ended" in err
        assert json.loads(cli("ls", "--json").out) == []


def test_the_page_ends_with_the_session_of_its_target(cli: Cli) -> None:
    with vm() as target, page("-s", target) as (process, printed):
        assert cli("stop", "-s", printed["session"]).code == 0
        out, _ = process.communicate(timeout=60)
        assert (process.returncode, out) == (0, "")


def test_a_name_comes_before_a_file(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with vm() as target, background(cli, target, name="vm.vv"):
        Path("vm.vv").write_text("nonsense")
        with page("-s", "vm.vv") as (process, printed):
            assert printed["session"] == "vm.vv"
            end(process)
    assert cli("page", "-s", "vm.vv").code == 2


def test_the_board(cli: Cli) -> None:
    with page() as (process, printed):
        assert printed["session"] is None
        assert end(process) == ""


def test_the_session_of_the_environment(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    with vm() as target, background(cli, target):
        monkeypatch.setenv("FARPLUG_SESSION", "web1")
        with page() as (process, printed):
            assert printed["session"] == "web1"
            end(process)


def test_links_for_people(cli: Cli) -> None:
    words = [*COMMAND, "--view-only"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first, second = process.stdout.readline(), process.stdout.readline()
        process.send_signal(signal.SIGINT)
    assert first.startswith("http://127.0.0.1:")
    assert second.startswith("to watch only: http://127.0.0.1:")
    assert process.returncode == 0


def test_open_passes_the_browser_no_token(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    browser, seen = tmp_path / "browser", tmp_path / "seen"
    browser.write_text(f'#!/bin/sh\necho "$1" >{seen}.new\ncat "${{1#file://}}" >>{seen}.new\nmv {seen}.new {seen}\n')
    browser.chmod(0o755)
    monkeypatch.setenv("BROWSER", f"{browser} %s")
    with page("--open") as (process, printed):
        wait_for(seen.exists)
        argument, _, text = seen.read_text().partition("\n")
        assert argument.startswith("file:///")
        assert printed["url"] in text
        path = Path(argument.removeprefix("file://"))
        assert path.stat().st_mode & 0o777 == 0o600
        end(process)
        assert not path.exists()


def test_a_browser_that_cannot_be_started(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROWSER", "/bin/false %s")
    monkeypatch.setenv("PATH", "/nowhere")
    with page("--open") as (process, printed):
        assert process.stderr is not None
        assert "no browser could be started" in process.stderr.readline()
        assert status(printed["port"]) == 404
        end(process)


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (["-s", "none"], 2, "the session none is not running"),
        (["-s", "a b"], 2, "is not a valid name"),
        (["spice://h:1"], 2, "name a session or a VM with an option:\n    farplug page -s spice://h:1\n"),
        (["-s", "none", "--ca-file", "x"], 2, "--ca-file has no effect without a TARGET"),
        (["--listen", "0.0.0.0"], 5, "without TLS"),
        (
            ["--listen", "127.0.0.1:80"],
            2,
            "'127.0.0.1:80' cannot be resolved\n  name the address alone; the port is a setting "
            "of its own: --port 80\n",
        ),
        (["--listen", "[::1]:80"], 2, "of its own: --port 80\n"),
        (["--tls-cert", "/none"], 2, "the key is missing"),
        (["--tls-cert", "/none", "--tls-key", "/none"], 2, "/none cannot be opened"),
        (["--web-root", "/none"], 2, "/none cannot be opened"),
        (["--mcp"], 2, "--mcp needs a session"),
        (["-s", "none", "--audit", "x"], 2, "--audit has no effect without --mcp"),
        (["-s", "none", "--mcp", "--read-only", "--allow", "/"], 2, "--read-only and --allow contradict each other"),
        (["-s", "none", "--mcp", "--allow-write"], 2, "--allow-write has no effect without --allow"),
        (["--upload-quota", "x"], 2, "is not a valid size"),
        (["--upload-quota", "-1"], 2, "is not a valid size"),
        (["--port", "65536"], 2, "65535"),
        (["-s", "spice://127.0.0.1:1"], 4, "refused"),
    ],
)
def test_what_is_refused(cli: Cli, options: list[str], code: int, text: str) -> None:
    result = cli("page", *options)
    assert (result.code, result.out) == (code, "")
    assert text in result.err
    assert len(result.err.splitlines()) >= 2  # with a remedy
    failed = json.loads(cli("page", *options, "--json").out.splitlines()[-1])
    assert (failed["event"], failed["exit_code"]) == ("failed", code)


def test_a_port_that_is_in_use(cli: Cli) -> None:
    with page() as (process, printed):
        result = cli("page", "--port", printed["port"])
        assert result.code == 11
        assert "another program listens on 127.0.0.1:" in result.err
        end(process)


def test_a_page_that_fails_ends_the_session_of_its_target(cli: Cli) -> None:
    with vm() as target:
        assert cli("page", "-s", target, "--web-root", "/none").code == 2
        assert not list(folder().glob("*.sock"))


@pytest.mark.parametrize(("text", "quota"), [("0", 0), ("500M", 500_000_000), ("1.5T", 1_500_000_000_000), ("7", 7)])
def test_the_quota(cli: Cli, text: str, quota: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from farplug.cli import page_server

    seen: list[int] = []
    monkeypatch.setattr(page_server, "run", lambda options, debug: seen.append(options.upload_quota))
    assert cli("page", "--upload-quota", text).code == 0
    assert seen == [quota]


def test_no_token_is_in_the_arguments_of_a_process(cli: Cli) -> None:
    with vm() as target, page("-s", target) as (process, printed):
        token = printed["url"].partition("token=")[2].partition("&")[0].encode()
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                try:
                    assert token not in Path(entry.path, "cmdline").read_bytes()
                except OSError:
                    pass  # it has ended
        end(process)
