"""Devices made of software that come and go a hundred times leave nothing behind."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
from tests.app.test_link import running
from tests.app.test_run import vm
from tests.leaks import Left, no_more_than

from farplug.app.attachment import Attachment
from farplug.app.commands import Attach, Detach
from farplug.app.settings import Source
from farplug.usb import Transfer
from farplug.virtual import Function, VirtualDevice

ROUNDS, WARM_UP = 100, 5


def objects() -> int:
    """Return the number of objects that belong to devices."""
    gc.collect()
    return sum(isinstance(one, (Attachment, Function, Transfer, VirtualDevice)) for one in gc.get_objects())


@pytest.mark.parametrize("is_composite", [False, True])
async def test_rounds_of_attach_and_detach(tmp_path: Path, *, is_composite: bool) -> None:
    sources = [Source.keyboard()]
    if is_composite:
        sources += [
            Source.serial("pty"),
            Source.network(f"unix-listen:{tmp_path}/frames"),
            Source.fido(tmp_path / "keys.json"),
            Source.camera(),
        ]
    others = objects()  # of other tests
    async with vm(1) as one, running(one.target) as session:
        await session.named("ready")
        for number in range(ROUNDS):
            (attached,) = (await session.app.do(Attach(tuple(sources))))["attachments"]
            assert len(attached["units"]) == len(sources)
            await session.app.do(Detach("all"))
            if number == WARM_UP:
                before = Left.now()
        await no_more_than(before)
        assert objects() <= others + 2 + len(sources), (
            "more than the last device, its functions and its attachment are left"
        )
        (port,) = next(iter(session.app.snapshot()["guests"].values()))["ports"]
        assert port["state"] == "ready"
