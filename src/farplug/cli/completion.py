"""Words that the shell completes: names of sessions, of their devices and drives, of layouts. Nothing here raises."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from typing import Any, Final

import typer

from farplug.cli.options import SESSION_VARIABLE

TIMEOUT: Final = 0.3
"""Seconds in which a session answers; the user waits for the completion."""


def sessions(incomplete: str) -> list[str]:
    """Return the names of sessions that may run, without contacting them."""
    from farplug.control.names import folder

    return _quietly(lambda: [name for path in folder().glob("*.sock") if (name := path.stem).startswith(incomplete)])


def devices(context: typer.Context, incomplete: str) -> list[str]:
    """Return the labels of the devices in a session, and ``all``."""
    labels = [*_quietly(lambda: list(_labels(_snapshot(context)))), "all"]
    return [label for label in dict.fromkeys(labels) if label.startswith(incomplete)]


def drives(context: typer.Context, incomplete: str) -> list[str]:
    """Return the labels of the CD-ROM drives in a session; the shell completes paths itself."""
    labels = _quietly(lambda: [unit for unit in _labels(_snapshot(context)) if unit.startswith("cdrom")])
    return [label for label in dict.fromkeys(labels) if label.startswith(incomplete)]


def layouts(incomplete: str) -> list[str]:
    """Return the names of the keyboard layouts that farplug has."""
    from farplug.keymap.layout import packaged_layouts

    return _quietly(lambda: [name for name in packaged_layouts() if name.startswith(incomplete)])


def _quietly(find: Callable[[], list[str]]) -> list[str]:
    try:
        return sorted(find())
    except Exception:  # an error would stand in the middle of the command line
        return []


def _labels(snapshot: dict[str, Any]) -> Iterator[str]:
    for guest in snapshot["guests"].values():
        for attachment in guest["attachments"].values():
            yield from (attachment["label"], *attachment["units"])


def _snapshot(context: typer.Context) -> dict[str, Any]:
    from farplug.control.names import open_session

    name = context.params.get("session") or os.environ.get(SESSION_VARIABLE) or None

    async def ask() -> dict[str, Any]:
        async with asyncio.timeout(TIMEOUT), open_session(name) as client:
            snapshot: dict[str, Any] = await client.call("status")
            return snapshot

    return asyncio.run(ask())
