"""Frames of a browser: what is a request, and what is refused."""

from __future__ import annotations

import json

import pytest

from farplug.control.messages import Request
from farplug.errors import RemoteProtocolError
from farplug.web.messages import MAX_BINARY, MAX_BINARY_OF_SESSION, MAX_TEXT, FrameReceiver, payload_size


def test_a_request_without_a_payload() -> None:
    call = FrameReceiver().receive_text('{\n "id": 1,\n "method": "status", "params": {"ä": "\\ud800"}, "x": 1}\n')
    assert call is not None
    assert call.request == Request(1, "status", {"ä": "\ud800"})
    assert call.encode() == b'{"id": 1, "method": "status", "params": {"\\u00e4": "\\ud800"}}\n'


@pytest.mark.parametrize("size", [0, 1, MAX_BINARY])
def test_a_request_with_a_payload(size: int) -> None:
    receiver = FrameReceiver()
    assert receiver.receive_text(json.dumps({"id": "a", "method": "media-data", "bytes": size})) is None
    assert receiver.waiting
    call = receiver.receive_binary(b"\n" * size)
    assert not receiver.waiting
    line = f'{{"id": "a", "method": "media-data", "params": {{}}, "bytes": {size}}}\n'.encode()
    assert call.encode() == line + b"\n" * size
    again = receiver.receive_text('{"id": 1, "method": "status"}')
    assert again is not None
    assert again.payload is None


def test_other_parameters_keep_the_payload() -> None:
    receiver = FrameReceiver()
    receiver.receive_text('{"id": 1, "method": "x", "bytes": 1}')
    assert receiver.receive_binary(b"a").with_params({"b": 2}).encode().endswith(b'"bytes": 1}\na')


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "nonsense", "{", "[]", "3", "null", '"text"', '{"id": 1}', '{"method": "x"}', "{}{}", "\x00"),
        *('{"id": null, "method": "x"}', '{"id": 1.5, "method": "x"}', '{"id": [], "method": "x"}'),
        *('{"id": true, "method": "x"}', '{"id": 9007199254740992, "method": "x"}', '{"id": 1, "method": ""}'),
        *('{"id": 1, "method": 3}', '{"id": 1, "method": "x", "params": []}', f'{{"id": {"9" * 5000}}}'),
        *('{"id": 1, "method": "x", "params": null}', '{"id": 1, "method": "' + "x" * 65 + '"}', "[" * 100_000),
        *(f'{{"id": 1, "method": "x", "bytes": {size}}}' for size in ("-1", "null", "true", "1.0", '"1"', "1048577")),
        json.dumps({"id": "i" * 65, "method": "x"}),
        " " * (MAX_TEXT + 1),
        "ä" * (MAX_TEXT // 2 + 1),
    ],
)
def test_what_is_not_a_request(text: str) -> None:
    with pytest.raises(RemoteProtocolError):
        FrameReceiver().receive_text(text)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_json_does_not_have(value: str) -> None:
    call = FrameReceiver().receive_text(f'{{"id": 1, "method": "x", "params": {{"a": {value}}}}}')
    assert call is not None
    with pytest.raises(RemoteProtocolError):
        call.encode()


def test_text_that_is_too_long_as_ascii() -> None:
    receiver = FrameReceiver()
    receiver.max_text = MAX_TEXT
    call = receiver.receive_text(
        json.dumps({"id": 1, "method": "x", "params": {"a": "ä" * 400_000}}, ensure_ascii=False)
    )
    assert call is not None
    with pytest.raises(RemoteProtocolError, match="escaped"):
        call.encode()


def test_frames_in_a_wrong_order() -> None:
    with pytest.raises(RemoteProtocolError, match="without a message"):
        FrameReceiver().receive_binary(b"")
    receiver = FrameReceiver()
    receiver.receive_text('{"id": 1, "method": "x", "bytes": 2}')
    with pytest.raises(RemoteProtocolError, match="in place of a binary frame"):
        receiver.receive_text('{"id": 2, "method": "x"}')


@pytest.mark.parametrize("size", [0, 1, 3])
def test_a_payload_of_another_size(size: int) -> None:
    receiver = FrameReceiver()
    receiver.receive_text('{"id": 1, "method": "x", "bytes": 2}')
    with pytest.raises(RemoteProtocolError, match="its message has bytes: 2"):
        receiver.receive_binary(bytes(size))


def test_payloads_of_a_session() -> None:
    assert payload_size({}) is None
    assert payload_size({"bytes": 0}) == 0
    assert payload_size({"bytes": MAX_BINARY_OF_SESSION}) == MAX_BINARY_OF_SESSION
    for size in (-1, None, True, 1.0, "1", MAX_BINARY_OF_SESSION + 1):
        with pytest.raises(RemoteProtocolError):
            payload_size({"bytes": size})
