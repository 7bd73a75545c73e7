from __future__ import annotations

import pytest

from farplug.image import build
from farplug.image.tools import ImageBuild
from farplug.image.volume import Volume


@pytest.fixture(autouse=True)
def no_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests boot no guest: an image that would be filled in one fails."""

    def fail(build: ImageBuild, volume: Volume) -> None:
        raise AssertionError(f"{volume.format} was to be filled in a guest")

    monkeypatch.setattr(build, "fill_in_guest", fail)
