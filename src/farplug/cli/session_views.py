"""What commands print of running sessions for people: tables. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from farplug.cli.output import size
from farplug.control.names import SessionEntry, SessionState
from farplug.control.views import list_json
from farplug.text import printable
from farplug.virtual.fido.presence import Question, Use


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table: columns as wide as their widest cell, two spaces between them."""
    cells = [list(headings), *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headings))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def list_lines(entries: Sequence[SessionEntry]) -> list[str]:
    """Return the lines of ``farplug ls``."""
    if not entries:
        return ["no session is running"]
    rows = []
    for entry in entries:
        status = list_json(entry)
        if "ports" not in status:
            rows.append((entry.name, "", "", status["state"], "", ""))
            continue
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
        status: the result of :func:`farplug.control.views.status_of`.
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
        lines += (f"{device['label']} asks: {question_text(question)}" for question in device["questions"])
    return [printable(line) for line in lines]


def question_text(question: Mapping[str, Any]) -> str:
    """Return what a program in the VM asks a security key for.

    Args:
        question: its ``use``, ``site`` and ``user``.
    """
    try:
        return str(Question(Use(question["use"]), question["site"], question["user"]))
    except ValueError:  # of a later farplug
        return " ".join(filter(None, (question["use"], question["site"], question["user"])))


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
