"""A real device through the real SPICE proxy kerbside."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.guest.kerbside import Kerbside, require_kerbside
from tests.guest.nested import FAR, Plugger
from tests.guest.test_nested_storage import BOT, LIFE_CYCLE, SIZE, UAS, disk, far_disk
from tests.long import in_full

from farplug.testing import GATEWAY

if TYPE_CHECKING:
    from tests.guest.conftest import Guests


@pytest.mark.parametrize("kind", [BOT, *in_full(UAS)])  # a virtual disk has the other
async def test_a_real_disk(kind: str, plugger: Plugger, guests: Guests, tmp_path: Path) -> None:
    require_kerbside()
    image = tmp_path / "disk.raw"
    image.write_bytes(os.urandom(SIZE))
    far = await guests.get(FAR)
    async with Kerbside() as kerbside:
        vv = await kerbside.allow(far.spice, host=GATEWAY)
        async with disk(plugger, kind, image) as real, plugger.plugged(str(vv), real):
            digest = (await far.check(LIFE_CYCLE.format(disk=await far_disk(far, kind)))).split()[0]
        assert (["usbredir", 0], True) in kerbside.authorized()
    assert digest == hashlib.sha256(image.read_bytes()).hexdigest()
