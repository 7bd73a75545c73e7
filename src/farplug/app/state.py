"""The state of the application in a client: a snapshot, and what each event changes in it.

Pure: JSON's types in, JSON's types out. A page does the same in its own language.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from farplug.app.events import DROPPED

_OF_CONNECTION = ("state", "attempt", "name", "uuid", "ports")
_OF_ATTACHMENT = (
    *("label", "units", "details", "sources", "port", "state", "error", "identity", "speed", "figures", "questions"),
)
_OF_QUESTION = ("interface", "request", "use", "site", "user", "seconds", "until")
_OF_FIGURES = ("read", "written", "commands", "errors", "rate", "memory")


def apply(snapshot: Mapping[str, Any], event: Mapping[str, Any]) -> dict[str, Any]:
    """Return the snapshot after an event.

    Args:
        snapshot: :meth:`farplug.app.app.App.snapshot`; it is not changed.
        event: the JSON of the next event: that of :meth:`farplug.app.events.Event.to_json`. An event that the snapshot
            holds already changes nothing.

    Raises:
        ValueError: events were dropped: a new snapshot is needed.
    """
    if event["id"] <= snapshot["last_event"]:
        return dict(snapshot)
    if event["event"] == DROPPED:
        raise ValueError(f"{event['message']}; take a new snapshot")
    guests = dict(snapshot["guests"])
    id = event.get("guest")
    if id in guests or event["event"] == "guest":
        guest = _guest(guests.get(id, {}), event)
        if guest is None:
            guests.pop(id, None)
        else:
            guests[id] = guest
    return {"last_event": event["id"], "guests": guests}


def _guest(guest: Mapping[str, Any], event: Mapping[str, Any]) -> dict[str, Any] | None:
    match event["event"]:
        case "guest":
            return {
                "id": event["guest"],
                "target": event["target"],
                "state": "connecting",
                "attempt": None,
                "name": "",
                "uuid": "",
                "ports": [],
                "capture": None,
                "attachments": {},
            }
        case "connected":
            return {**guest, **{name: event[name] for name in _OF_CONNECTION}}
        case "lost" | "reconnecting" | "closed":
            return {**guest, "state": event["state"], "attempt": event["attempt"]}
        case "port":
            port = {name: event[name] for name in ("name", "state", "error")}
            ports = [port if number == event["number"] else one for number, one in enumerate(guest["ports"])]
            return {**guest, "ports": ports}
        case "capture-started":
            return {**guest, "capture": event["path"]}
        case "capture-ended":
            return {**guest, "capture": None}
        case "guest-removed":
            return None
    id = event.get("attachment")
    if id is None:
        return dict(guest)
    attachments = dict(guest["attachments"])
    match event["event"]:
        case "attaching":
            attachments[id] = {"id": id, **{name: event[name] for name in _OF_ATTACHMENT}}
        case "removed":
            attachments.pop(id, None)
        case _ if id in attachments:
            attachments[id] = _attachment(attachments[id], event)
    return {**guest, "attachments": attachments}


def _attachment(attachment: Mapping[str, Any], event: Mapping[str, Any]) -> dict[str, Any]:
    changed = {**attachment, "state": event["state"]}
    match event["event"]:
        case "attached":
            changed |= {"identity": event["device_name"], "speed": event["speed"], "error": None}
        case "opened":
            changed |= {"port": event["port"], "error": None}
        case "refused" | "detached":
            changed["error"] = changed["error"] or event["error"]
            changed["questions"] = []
        case "presence-asked" | "presence-answered":
            others = [one for one in changed["questions"] if one["interface"] != event["interface"]]
            asked = event["event"] == "presence-asked"
            changed["questions"] = [*others, {name: event[name] for name in _OF_QUESTION}] if asked else others
        case "figures":
            changed["figures"] = {name: event[name] for name in _OF_FIGURES}
    return changed
