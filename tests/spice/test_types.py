from __future__ import annotations

import pytest

from farplug.spice.types import ChannelType, LinkError, has_capability, pack_capabilities


def test_capabilities() -> None:
    assert pack_capabilities([]) == ()
    assert pack_capabilities([0, 3, 33]) == (9, 2)
    assert has_capability((9, 2), 33)
    assert not has_capability((9, 2), 34)
    assert not has_capability((9, 2), 64)


def test_unknown_codes_print() -> None:
    assert str(ChannelType(42)) == "unknown_42"
    assert str(LinkError(42)) == "link error 42 (UNKNOWN_42)"
    with pytest.raises(ValueError, match="256"):
        ChannelType(256)
    with pytest.raises(ValueError, match="-1"):
        LinkError(-1)
