import pytest

from farplug.usbredir.caps import ALL_CAPS, Cap


@pytest.mark.parametrize(
    ("caps", "usable"),
    [
        (Cap.NONE, Cap.NONE),
        (ALL_CAPS, ALL_CAPS),
        (Cap.BULK_STREAMS, Cap.NONE),
        (Cap.BULK_STREAMS | Cap.EP_INFO_MAX_PACKET_SIZE, Cap.BULK_STREAMS | Cap.EP_INFO_MAX_PACKET_SIZE),
        (ALL_CAPS & ~Cap.EP_INFO_MAX_PACKET_SIZE, ALL_CAPS & ~(Cap.EP_INFO_MAX_PACKET_SIZE | Cap.BULK_STREAMS)),
        (Cap(0x8000_0001), Cap(0x8000_0000)),
    ],
)
def test_bulk_streams_needs_max_packet_size(caps: Cap, usable: Cap) -> None:
    assert caps.usable() == usable


def test_bits_are_those_of_the_specification() -> None:
    assert [cap.bit_length() - 1 for cap in Cap] == list(range(8))
    assert ALL_CAPS == 0xFF


def test_names() -> None:
    assert (Cap.FILTER | Cap.IDS_64_BITS | Cap(1 << 20)).names == ("filter", "ids_64_bits")
    assert Cap.NONE.names == ()
