"""The shell command of a request does what the request does: the command line itself reads it."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

import pytest

from farplug.app.codec import encode
from farplug.app.settings import DeviceRules, StorageSettings
from farplug.cli import screen_verbs, session_verbs
from farplug.cli.main import run
from farplug.errors import Reason, UsageError
from farplug.web.shell import command

Seen = list[tuple[Any, ...]]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Return what the command line would have done."""
    calls: Seen = []

    def record(name: str) -> Callable[..., Any]:
        def called(*arguments: Any, **named: Any) -> Any:
            calls.append((name, arguments, named))
            return [None]

        return called

    for name in ("attach", "detach", "media", "capture", "stop", "status", "touch", "watch", "ls", "reconnect"):
        monkeypatch.setattr(session_verbs, name, record(name))
    monkeypatch.setattr(screen_verbs, "carry_out", record("screen"))
    return calls


def executed(seen: Seen, line: str) -> tuple[Any, ...]:
    words = shlex.split(line)
    assert words[0] == "farplug"
    assert run(words[1:]) == 0
    return seen.pop()


STORAGE = {"speed": "high", "transport": "uas", "block_size": 4096, "cache": "unsafe", "folder_format": "ntfs"}
RULES = {"wait": True, "follow": "port", "filter": "deny class=hid; allow", "auto_connect": "allow"}


@pytest.mark.parametrize(
    ("storage", "rules", "wait"),
    [
        (None, None, True),
        ({}, {}, True),
        (STORAGE, {**RULES, "redirect_on_connect": "allow vendor=0x1234"}, False),
        ({"force": True}, {"force": True}, True),
        ({"snapshot": True}, None, True),
    ],
)
def test_attach(seen: Seen, storage: dict[str, Any] | None, rules: dict[str, Any] | None, wait: bool) -> None:
    snapshot = None if storage and storage.get("snapshot") else "/srv/it's a 'snap'.img"
    sources = [
        {"kind": "cdrom", "path": "/srv/a b$(c).iso", "snapshot": None},
        {"kind": "disk", "path": "/srv/x;rm -rf.raw", "snapshot": snapshot},
        {"kind": "read-only-disk", "path": "/srv/<img src=x>.raw", "snapshot": None},
        {"kind": "folder", "path": "/srv/folder", "snapshot": None},
        {"kind": "usb-device", "path": "1050:0407", "snapshot": None},
        {"kind": "fido", "path": "/srv/my keys.json", "snapshot": None, "presence": "ask"},
        {"kind": "camera", "path": "pattern", "snapshot": None},
        {"kind": "serial", "path": "pty", "snapshot": None},
    ]
    params = {"sources": sources, "storage": storage, "rules": rules, "wait": wait}
    name, arguments, named = executed(seen, command("web-1", "attach", params))
    assert (name, arguments[0], named["wait"]) == ("attach", "web-1", wait)
    devices = encode(arguments[1])
    assert devices["sources"] == [{"mac": None, "presence": None, **source} for source in sources]
    assert devices["storage"] == {**encode(StorageSettings()), **(storage or {})}
    assert devices["rules"] == {**encode(DeviceRules()), **(rules or {})}


@pytest.mark.parametrize(
    ("method", "params", "expected"),
    [
        ("detach", {"device": "it's mine.raw"}, ("detach", ["it's mine.raw"])),
        ("detach", {"device": "-x"}, ("detach", ["-x"])),
        ("insert", {"path": "/a b.iso", "drive": "cdrom0", "force": True}, ("media", "insert", "cdrom0", True)),
        ("insert", {"path": "/a.iso"}, ("media", "insert", None, False)),
        ("eject", {"drive": None}, ("media", "eject", None, False)),
        ("eject", {"drive": "cdrom1", "force": True}, ("media", "eject", "cdrom1", True)),
        ("capture", {"path": "/c.pcapng", "bytes": 64}, ("capture", "capture", "/c.pcapng", 64)),
        ("stop-capture", {}, ("capture", "stop-capture", None, None)),
        ("type", {"text": "-rf 'x'\n$HOME"}, ("type", "-rf 'x'\n$HOME")),
        ("press", {"keys": "ctrl+alt+Delete"}, ("press", "ctrl+alt+Delete")),
        ("click", {"x": 3, "y": 4}, ("click", 3, 4, "left", False, 0)),
        (
            "click",
            {"x": -3, "y": 4, "button": "right", "relative": True, "display": 1},
            ("click", -3, 4, "right", True, 1),
        ),
        ("presence", {"answer": "refuse", "attachment": "fido0"}, ("touch", "fido0", True)),
        ("presence", {"request": 1}, ("touch", None, False)),
        ("reconnect", {}, ("reconnect", False)),
        ("reconnect", {"give_up": True}, ("reconnect", True)),
        ("quit", {}, ("stop",)),
        ("status", {}, ("status",)),
        ("subscribe", {"events": ["attached"]}, ("watch",)),
    ],
)
def test_other_methods(seen: Seen, method: str, params: dict[str, Any], expected: tuple[Any, ...]) -> None:
    line = command("web1", method, params).replace("$'-rf \\'x\\'\\x0a$HOME'", shlex.quote("-rf 'x'\n$HOME"))
    name, arguments, named = executed(seen, line)
    assert arguments[0] == "web1"
    found: tuple[Any, ...]
    match name:
        case "detach":
            found = (name, arguments[1])
        case "media":
            found = (name, arguments[1], arguments[2]["drive"], arguments[2]["force"])
        case "capture":
            found = (name, arguments[1], arguments[2].get("path"), arguments[2].get("bytes"))
        case "screen":
            (asked,) = arguments[2]
            found = (asked.name, *encode(asked).values())[: len(expected)]
        case "touch":
            found = (name, arguments[1], named["refuse"])
        case "reconnect":
            found = (name, named["give_up"])
        case _:
            found = (name,)
    assert found == expected


def test_the_sessions(seen: Seen) -> None:
    assert executed(seen, command("web1", "sessions", {}))[0] == "ls"
    assert command("web1", "devices", {}) == "farplug devices"


def test_a_hidden_text_is_not_in_the_command() -> None:
    assert command("web1", "type", {"text": "secret", "hidden": True}) == "farplug type -s web1 -"
    assert command("web1", "type", {"text": "-"}) == "printf %s - | farplug type -s web1 -"


@pytest.mark.parametrize("method", ["drive", "key", "pointer", "media-offer", "open", "x"])
def test_what_no_command_does(method: str) -> None:
    with pytest.raises(UsageError) as caught:
        command("web1", method, {})
    assert caught.value.reason is Reason.UNKNOWN_COMMAND


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("attach", {"sources": [{"kind": "cdrom", "path": "client:m1"}]}),
        ("insert", {"path": "client:m1"}),
    ],
)
def test_a_file_of_the_browser_has_no_command(method: str, params: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="file of the browser"):
        command("web1", method, params)


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("attach", {}),
        ("attach", {"sources": [3]}),
        ("attach", {"sources": [{"kind": "x"}]}),
        ("attach", {"sources": [], "storage": 3}),
        ("insert", {"path": 3}),
        ("click", {"x": "a", "y": 1}),
        ("click", {"x": float("inf"), "y": 1}),
        ("detach", {}),
        ("capture", {"path": "/a", "bytes": "x"}),
        ("detach", {"device": "\ud800"}),
    ],
)
def test_parameters_that_are_not_valid(method: str, params: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        command("web1", method, params)
    assert caught.value.reason is Reason.BAD_SETTING


def test_security_keys_of_which_only_some_ask() -> None:
    keys = [{"kind": "fido", "path": "/a", "presence": "ask"}, {"kind": "fido", "path": "/b"}]
    with pytest.raises(UsageError, match="only some ask"):
        command("web1", "attach", {"sources": keys})
