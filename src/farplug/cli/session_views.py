"""What commands print of running sessions: tables for people, objects for programs. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from farplug.cli.output import size
from farplug.control.messages import Hello
from farplug.control.names import SessionEntry, SessionState
from farplug.text import printable

_FIGURES: Final = ("read", "written", "commands", "rate", "memory")


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table: columns as wide as their widest cell, two spaces between them."""
    cells = [list(headings), *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headings))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def status_of(hello: Hello, snapshot: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``farplug status --json`` prints of a session.

    Args:
        hello: what the session is.
        snapshot: of its application.
    """
    guest: Mapping[str, Any] = next(iter(snapshot["guests"].values()), {})
    attachments = list(guest.get("attachments", {}).values())
    devices = [_device(attachment) for attachment in attachments]
    in_ports = {device["port"]: device["label"] for device in devices if device["state"] != "lost"}
    ports = [
        {
            "number": number,
            "name": port["name"],
            "state": port["state"],
            "device": in_ports.get(port["name"]),
            "reason": port["error"]["reason"] if port["error"] else None,
        }
        for number, port in enumerate(guest.get("ports", ()))
    ]
    return {
        "name": hello.session,
        "target": hello.target,
        "vm": guest.get("name", ""),
        "uuid": guest.get("uuid", ""),
        "state": guest.get("state", "ending"),
        "attempt": guest.get("attempt"),
        "ports": ports,
        "devices": devices,
        "pid": hello.pid,
        "started": hello.started,
        "log": hello.log,
        "version": hello.farplug_version,
    }


def _device(attachment: Mapping[str, Any]) -> dict[str, Any]:
    error = attachment.get("error")
    figures = attachment.get("figures", {})
    return {
        "id": attachment["id"],
        "label": attachment["label"],
        "state": attachment["state"],
        "reason": error["reason"] if error else None,
        "message": error["message"] if error else None,
        "units": attachment["units"],
        "details": attachment.get("details", [""] * len(attachment["units"])),
        "port": attachment["port"],
        "identity": attachment["identity"],
        "speed": attachment["speed"],
        **{name: figures.get(name, 0) for name in _FIGURES},
    }


def list_json(entry: SessionEntry) -> dict[str, Any]:
    """Return the object of a session in ``farplug ls --json``."""
    if entry.hello is None or entry.snapshot is None:
        reason, message = (None, None) if entry.error is None else (str(entry.error.reason), entry.error.message)
        return {"name": entry.name, "state": str(entry.state), "reason": reason, "message": message}
    return status_of(entry.hello, entry.snapshot)


def list_lines(entries: Sequence[SessionEntry]) -> list[str]:
    """Return the lines of ``farplug ls``."""
    if not entries:
        return ["no session is running"]
    rows = []
    for entry in entries:
        if entry.hello is None or entry.snapshot is None:
            rows.append((entry.name, "", "", str(entry.state), "", ""))
            continue
        status = status_of(entry.hello, entry.snapshot)
        used = sum(port["device"] is not None for port in status["ports"])
        labels = ", ".join(device["label"] for device in status["devices"])
        ports = f"{used} of {len(status['ports'])}"
        rows.append((entry.name, status["target"], status["vm"], status["state"], ports, labels))
    lines = table(("NAME", "TARGET", "VM", "STATE", "PORTS", "DEVICES"), rows)
    silent = [entry.name for entry in entries if entry.state is SessionState.NOT_RESPONDING]
    return [*lines, *(f"{name} does not respond: it may be stopped, or busy" for name in silent)]


def status_lines(status: Mapping[str, Any]) -> list[str]:
    """Return the lines of ``farplug status``.

    Args:
        status: the result of :func:`status_of`.
    """
    vm = f"{status['vm']} at {status['target']}" if status["vm"] else status["target"]
    lines = [f"{status['name']}: {vm}, {status['state']}", f"process {status['pid']}"]
    if status["log"]:
        lines[-1] += f", log {status['log']}"
    rows = []
    for port in status["ports"]:
        here = [device for device in status["devices"] if device["port"] == port["name"] and device["state"] != "lost"]
        rows += [_row(device) for device in here] or [(port["name"], "free", *[""] * (len(_HEADINGS) - 2))]
    rows += [_row(device) for device in status["devices"] if device["state"] == "lost"]
    lines += ["", *table(_HEADINGS, rows)] if rows else ["", "the ports of the VM are not known yet"]
    for device in status["devices"]:
        if device["message"]:
            lines.append(f"{device['label']}: {device['message']}")
    return [printable(line) for line in lines]


def _name(device: Mapping[str, Any]) -> str:
    """Return the label of a device, with its parts and what a user must know of them."""
    label = device["label"]
    units, details = device["units"], device["details"]
    if units in ([label], []):
        parts = [detail for detail in details if detail]
    else:
        parts = [f"{unit}: {detail}" if detail else unit for unit, detail in zip(units, details, strict=False)]
    return f"{label} ({', '.join(parts)})" if parts else label


_HEADINGS: Final = ("PORT", "DEVICE", "STATE", "SPEED", "READ", "WRITTEN", "RATE", "COMMANDS")


def _row(device: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        "" if device["state"] == "lost" else device["port"],
        _name(device),
        device["state"],
        device["speed"],
        size(device["read"]),
        size(device["written"]),
        f"{size(device['rate'])}/s",
        str(device["commands"]),
    )
