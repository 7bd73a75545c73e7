from __future__ import annotations

import struct

import pytest

from farplug.errors import LocalProtocolError, Reason, RemoteProtocolError, UsageError
from farplug.keymap import find_layout
from farplug.spice.inputs import Button, InputsChannel, Locks
from farplug.spice.keys import chord_codes, key_code, stroke, text_strokes
from farplug.spice.link import LinkResult


def channel(capabilities: int = 1) -> InputsChannel:
    return InputsChannel("inputs 0", LinkResult(True, (), (capabilities,), b""))


def sent(channel: InputsChannel) -> list[tuple[int, str]]:
    """Return the queued messages: types, and bodies in hexadecimal."""
    data = b"".join(map(bytes, channel.data_to_send()))
    found = []
    while data:
        kind, size = struct.unpack_from("<HI", data)
        found.append((kind, data[6 : 6 + size].hex()))
        data = data[6 + size :]
    return found


def receive(channel: InputsChannel, kind: int, body: bytes = b"") -> None:
    channel.receive_data(memoryview(struct.pack("<HI", kind, len(body)) + body))
    assert channel.next_event() is None


@pytest.mark.parametrize(
    ("keys", "scancodes"),
    [
        ("a", "1e9e"),
        ("A", "1e9e"),
        ("Left", "e04be0cb"),
        ("ctrl+alt+Delete", "1d38e053e0d3b89d"),
        ("CTRL+c", "1d2eae9d"),
        ("Page_Up", "e049e0c9"),
        ("alt+F4", "383ebeb8"),
        ("F12", "58d8"),
        ("super+l", "e05b26a6e0db"),
        ("shift+/", "2a35b5aa"),
    ],
)
def test_chords(keys: str, scancodes: str) -> None:
    codes = chord_codes(keys)
    assert stroke(codes).hex() == scancodes
    assert len(stroke(codes)) <= 16, "QEMU's PS/2 queue"


@pytest.mark.parametrize("keys", ["", "ctrl+", "+", "ctrl+nokey", "é", "a+b+c+d+e", "\x00", "ß"])
def test_keys_that_do_not_exist(keys: str) -> None:
    with pytest.raises(UsageError) as caught:
        chord_codes(keys)
    assert caught.value.reason is Reason.BAD_KEY
    assert caught.value.remedy


def test_text() -> None:
    us = find_layout("us")
    assert [one.hex() for one in text_strokes("aA!\n", us)] == ["1e9e", "2a1e9eaa", "2a0282aa", "1c9c"]
    assert [one.hex() for one in text_strokes("@é<", find_layout("de"))] == ["e0381090e0b8", "0d8d1292", "56d6"]
    printable = "".join(map(chr, range(32, 127)))
    assert len({*text_strokes(printable, us)}) == 95, "each printable character is typed in a way of its own"
    with pytest.raises(UsageError, match="no key for 'ü'"):
        text_strokes("grüß dich", us)


def test_a_stroke_is_one_message() -> None:
    inputs = channel()
    inputs.stroke(stroke([key_code("shift"), key_code("a")]))
    assert sent(inputs) == [(104, "2a1e9eaa")]
    old = channel(0)  # a server without KEY_SCANCODE
    old.stroke(stroke([key_code("Left")]))
    assert sent(old) == [(101, "e04b0000"), (102, "e0cb0000")]


def test_what_is_held_is_released() -> None:
    inputs = channel()
    for name in ("ctrl", "Left", "ctrl"):
        inputs.press(key_code(name))
    inputs.press_button(Button.RIGHT)
    inputs.release(key_code("a"))
    inputs.release_button(Button.LEFT)
    assert sent(inputs) == [(104, "1d"), (104, "e04b"), (104, "1d"), (113, "030400")]
    inputs.release_all()
    assert sent(inputs) == [(104, "e0cb"), (104, "9d"), (114, "030000")]
    inputs.release_all()
    assert sent(inputs) == []


def test_positions_wait_for_acknowledgements_and_only_the_newest_is_sent() -> None:
    inputs = channel()
    for x in range(20):
        inputs.move_to(x, 0, 0)
    assert [struct.unpack("<I", bytes.fromhex(body)[:4])[0] for _, body in sent(inputs)] == [*range(8)]
    receive(inputs, 111)
    assert sent(inputs) == [(112, struct.pack("<IIHB", 19, 0, 0, 0).hex())]
    receive(inputs, 111)
    inputs.move_to(30, 40, 1)
    inputs.press_button(Button.LEFT)
    inputs.release_button(Button.LEFT)
    assert [kind for kind, _ in sent(inputs)] == [112, 113, 114]
    with pytest.raises(LocalProtocolError):
        inputs.move_to(-1, 0, 0)


def test_a_button_is_pressed_at_the_newest_position() -> None:
    inputs = channel()
    for x in range(9):
        inputs.move_to(x, 0, 0)
    inputs.press_button(Button.LEFT)
    assert [kind for kind, _ in sent(inputs)][-2:] == [112, 113]


def test_distances() -> None:
    inputs = channel()
    for _ in range(8):
        assert inputs.ready_for_motion
        inputs.move_by(-3, 4)
    assert not inputs.ready_for_motion
    assert sent(inputs)[0] == (111, struct.pack("<iiH", -3, 4, 0).hex())
    receive(inputs, 111)
    assert inputs.ready_for_motion


def test_lock_keys() -> None:
    inputs = channel()
    assert inputs.locks is None
    receive(inputs, 101, struct.pack("<H", 2))
    assert inputs.locks == Locks.NUM
    receive(inputs, 102, struct.pack("<H", 0xFFFF))
    assert inputs.locks == Locks.CAPS | Locks.NUM | Locks.SCROLL
    inputs.set_locks(Locks.CAPS)
    assert sent(inputs) == [(103, "0400")]
    inputs.receive_data(memoryview(struct.pack("<HI", 102, 1) + b"\0"))
    with pytest.raises(RemoteProtocolError, match="of 1 bytes"):
        inputs.next_event()
