"""Return the shell command that does what a request does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from farplug.errors import Reason, UsageError
from farplug.shell import shell_quote
from farplug.text import shown
from farplug.web.methods import BROWSER_FILE

SOURCES: Final = {
    "disk": "--usb-disk",
    "read-only-disk": "--usb-disk-ro",
    "cdrom": "--usb-cdrom",
    "folder": "--usb-folder",
    "usb-device": "--usb-device",
    "keyboard": "--usb-keyboard",
    "tablet": "--usb-tablet",
    "mouse": "--usb-mouse",
    "touchscreen": "--usb-touchscreen",
    "gamepad": "--usb-gamepad",
    "serial": "--usb-serial",
    "fido": "--usb-fido",
    "camera": "--usb-camera",
}
_COMMANDS: Final = {"presence": "touch"}
"""The commands whose names are not those of their methods."""
_STORAGE: Final = {
    "speed": ("--usb-speed", "auto"),
    "transport": ("--usb-storage", "auto"),
    "block_size": ("--block-size", 512),
    "cache": ("--cache", "writeback"),
    "folder_format": ("--folder-format", "auto"),
    "snapshot": ("--snapshot", False),
}
_RULES: Final = {
    "wait": ("--wait", False),
    "follow": ("--follow", "device"),
    "filter": ("--filter", None),
    "auto_connect": ("--auto-connect", None),
    "redirect_on_connect": ("--redirect-on-connect", None),
}
"""Fields of settings: the option, and the value that it has by default."""
_WITHOUT_PARAMETERS: Final = {
    "status": "farplug status",
    "list": "farplug status",
    "subscribe": "farplug watch",
    "quit": "farplug stop",
    "stop-capture": "farplug capture --stop",
    "devices": "farplug devices",
    "sessions": "farplug ls",
}
_WITHOUT_SESSION: Final = ("devices", "sessions")


def command(session: str, method: str, params: Mapping[str, Any]) -> str:
    """Return the shell command that does what a method does, as one line to copy.

    Args:
        session: the name of the session.
        method: of the control protocol.
        params: its parameters, with absolute paths.

    Raises:
        UsageError: ``unknown-command``: there is no such command; ``bad-setting``: a parameter is missing.
    """
    name = [] if method in _WITHOUT_SESSION else ["-s", shell_quote(session)]
    if method in _WITHOUT_PARAMETERS:
        return " ".join((_WITHOUT_PARAMETERS[method], *name))
    if method == "type" and (params.get("hidden") or params.get("text") == "-"):
        source = "" if params.get("hidden") else "printf %s - | "
        return f"{source}farplug type {' '.join(name)} -"
    try:
        options, arguments = _words(method, params)
        dashes = ["--"] if any(argument.startswith("-") for argument in arguments) else []
        words = [shell_quote(word) for word in (*options, *dashes, *arguments)]
    except (
        KeyError,
        TypeError,
        ValueError,
        OverflowError,
        AttributeError,
    ):  # ValueError: also half of a surrogate pair
        raise UsageError(f"{shown(method)} has parameters that are not valid", reason=Reason.BAD_SETTING) from None
    return " ".join(("farplug", _COMMANDS.get(method, method), *name, *words))


def _words(method: str, params: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return the options and the arguments of a command."""
    force = ["--force"] if params.get("force") else []
    match method:
        case "attach":
            return list(_attach(params)), []
        case "detach":
            return [], [str(params["device"])]
        case "insert":
            _check_here(params["path"])
            return force, [*_given(params.get("drive")), params["path"]]
        case "eject":
            return force, _given(params.get("drive"))
        case "capture":
            size = params.get("bytes")
            return [] if size is None else ["--capture-bytes", str(int(size))], [str(params["path"])]
        case "type":
            return _option("--layout", params.get("layout")), [str(params["text"])]
        case "press":
            return [], [str(params["keys"])]
        case "reconnect":
            return ["--give-up"] if params.get("give_up") else [], []
        case "presence":
            return ["--refuse"] if params.get("answer") == "refuse" else [], _given(params.get("attachment"))
        case "click":
            button = params.get("button", "left")
            options = [] if button == "left" else ["--button", str(button)]
            options += ["--relative"] if params.get("relative") else []
            options += _option("--display", params.get("display") or None)
            return options, [str(int(params["x"])), str(int(params["y"]))]
    raise UsageError(f"no shell command does what {shown(method)} does", reason=Reason.UNKNOWN_COMMAND)


def _attach(params: Mapping[str, Any]) -> Iterator[str]:
    for source in params["sources"]:
        option = SOURCES[source["kind"]]
        path = str(source.get("path") or "")
        _check_here(path)
        snapshot = source.get("snapshot")
        yield option
        if path:
            yield path if snapshot is None else f"{path},snapshot={snapshot}"
    presences = {source.get("presence") or "auto" for source in params["sources"] if source["kind"] == "fido"}
    if len(presences) > 1:
        raise UsageError(
            "no shell command plugs in security keys of which only some ask", reason=Reason.UNKNOWN_COMMAND
        )
    if presences - {"auto"}:
        yield from ("--fido-presence", str(*presences))
    storage, rules = params.get("storage") or {}, params.get("rules") or {}
    yield from _settings(storage, _STORAGE)
    yield from _settings(rules, _RULES)
    if storage.get("force") or rules.get("force"):
        yield "--force"
    if params.get("wait") is False:
        yield "--no-wait"


def _settings(values: Mapping[str, Any], options: Mapping[str, tuple[str, Any]]) -> Iterator[str]:
    for field, (option, default) in options.items():
        value = values.get(field, default)
        if value is True:
            yield option
        elif value != default and value is not False:
            yield from (option, str(value))


def _option(option: str, value: object) -> list[str]:
    return [] if value is None else [option, str(value)]


def _given(value: object) -> list[str]:
    return [] if value is None else [str(value)]


def _check_here(path: str) -> None:
    if path.startswith(BROWSER_FILE):
        raise UsageError(
            "no shell command reads a file of the browser",
            reason=Reason.UNKNOWN_COMMAND,
            remedy="copy the file to the machine of the session",
        )
