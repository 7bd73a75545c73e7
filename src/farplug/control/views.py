"""What clients show of running sessions, as JSON's types. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from farplug.control.messages import Hello
from farplug.control.names import SessionEntry, SessionState
from farplug.errors import RemoteProtocolError
from farplug.text import shown

_FIGURES: Final = ("read", "written", "commands", "errors", "rate", "memory")


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
        "questions": attachment.get("questions", []),
        "port": attachment["port"],
        "identity": attachment["identity"],
        "speed": attachment["speed"],
        **{name: figures.get(name, 0) for name in _FIGURES},
    }


def list_json(entry: SessionEntry) -> dict[str, Any]:
    """Return the object of a session in ``farplug ls --json``."""
    state, error = entry.state, entry.error
    if entry.hello is not None and entry.snapshot is not None:
        try:
            return status_of(entry.hello, entry.snapshot)
        except (AttributeError, KeyError, TypeError):
            state = SessionState.NOT_RESPONDING
            error = RemoteProtocolError(f"{shown(entry.snapshot)} is not a status")
    reason, message = (None, None) if error is None else (str(error.reason), error.message)
    return {"name": entry.name, "state": str(state), "reason": reason, "message": message}
