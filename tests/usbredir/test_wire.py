import pytest

from farplug.usbredir.caps import ALL_CAPS, Cap
from farplug.usbredir.wire import PACKET_FORMATS, Flow, PacketType, header

TO_GUEST = {1, 2, 4, 5, 8, 11, 14, 17, 20, 27, 104}
BOTH = {0, 23, 100, 101, 102, 103}
SIZES = {
    **dict.fromkeys((2, 3, 7, 21, 22, 23, 24), 0),
    **dict.fromkeys((6, 10, 13, 15, 16), 1),
    **dict.fromkeys((8, 9, 14, 17), 2),
    **dict.fromkeys((11, 12), 3),
    **dict.fromkeys((19, 102, 103), 4),
    **dict.fromkeys((1, 100, 101, 104, 25), 10),
    0: 64,
    4: 132,
    5: 288,
    18: 8,
    20: 9,
    26: 5,
    27: 6,
}


def test_every_type_has_its_size_and_flow() -> None:
    assert {int(code) for code in PACKET_FORMATS} == {int(code) for code in PacketType} == set(SIZES)
    assert {
        int(code): packet_format.type_header(ALL_CAPS).size for code, packet_format in PACKET_FORMATS.items()
    } == SIZES
    assert {
        int(code) for code, packet_format in PACKET_FORMATS.items() if packet_format.flow is Flow.TO_GUEST
    } == TO_GUEST
    assert {int(code) for code, packet_format in PACKET_FORMATS.items() if packet_format.flow is Flow.BOTH} == BOTH


@pytest.mark.parametrize(
    ("type", "caps", "size"),
    [
        (PacketType.DEVICE_CONNECT, ALL_CAPS & ~Cap.CONNECT_DEVICE_VERSION, 8),
        (PacketType.EP_INFO, ALL_CAPS & ~Cap.BULK_STREAMS, 160),
        (PacketType.EP_INFO, Cap.NONE, 96),
        (PacketType.BULK_PACKET, ALL_CAPS & ~Cap.BULK_LENGTH_32_BITS, 8),
    ],
)
def test_layouts_without_capabilities(type: PacketType, caps: Cap, size: int) -> None:
    assert PACKET_FORMATS[type].type_header(caps).size == size
    assert PACKET_FORMATS[type].packet(caps).size == header(caps).size + size


def test_header_grows_with_64_bit_ids() -> None:
    assert header(ALL_CAPS & ~Cap.IDS_64_BITS).size == 12
    assert header(Cap.IDS_64_BITS).size == 16


def test_types_and_flows_print_as_the_specification_writes_them() -> None:
    assert str(PacketType.EP_INFO) == "ep_info"
    assert str(Flow.TO_HOST) == "to the usb-host"
