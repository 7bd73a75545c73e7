from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farplug import errors
from farplug.control.messages import (
    MAX_CLIENT_PAYLOAD,
    MAX_ID,
    MAX_LINE,
    MAX_METHOD,
    MAX_PAYLOAD,
    ErrorData,
    Failure,
    Hello,
    Message,
    Notification,
    Receiver,
    Reply,
    Request,
    encode,
    parse_reply,
    parse_request,
)
from farplug.errors import Reason, Remedy, RemoteProtocolError, SessionError
from farplug.exit_codes import ExitCode, exit_code

ERROR = ErrorData("not-found", "no such device", 2, Remedy("devices: a", setting="x", value=1, command="ls"))
LINES: list[tuple[Message, bytes]] = [
    (Request(1, "status"), b'{"id": 1, "method": "status", "params": {}}\n'),
    (Request("a", "detach", {"device": "é"}), b'{"id": "a", "method": "detach", "params": {"device": "\\u00e9"}}\n'),
    (Reply(1, {"a": [None, True]}), b'{"id": 1, "ok": true, "result": {"a": [null, true]}}\n'),
    (
        Failure(2, ERROR),
        b'{"id": 2, "ok": false, "error": {"code": "not-found", "message": "no such device", "remedy": "devices: a", '
        b'"setting": "x", "value": 1, "command": "ls", "exit_code": 2}}\n',
    ),
    (
        Failure(None, ErrorData("protocol", "x", 10)),
        b'{"id": null, "ok": false, "error": {"code": "protocol", "message": "x", "remedy": "", "exit_code": 10}}\n',
    ),
    (Notification("note", {"id": 1}), b'{"event": "note", "data": {"id": 1}}\n'),
    (Notification("screen", {}, b"a\n{"), b'{"event": "screen", "data": {}, "bytes": 3}\na\n{'),
    (Reply(1, None, b""), b'{"id": 1, "ok": true, "result": null, "bytes": 0}\n'),
    (Request(1, "x", {}, b"\n\n"), b'{"id": 1, "method": "x", "params": {}, "bytes": 2}\n\n\n'),
]


@pytest.mark.parametrize(("message", "line"), LINES, ids=lambda value: type(value).__name__)
def test_bytes(message: Message, line: bytes) -> None:
    assert encode(message) == line
    receiver: Receiver[Any] = Receiver(parse_request if isinstance(message, Request) else parse_reply, MAX_PAYLOAD)
    receiver.receive_data(line)
    received = receiver.next_message()
    assert received == message
    assert receiver.next_message() is None
    receiver.receive_eof()
    if isinstance(message, Failure):
        assert isinstance(received, Failure)
        assert received.error.remedy.as_dict() == message.error.remedy.as_dict()  # == compares only the text


def receive(data: bytes, step: int = 1 << 16) -> list[Request]:
    receiver = Receiver(parse_request, MAX_CLIENT_PAYLOAD)
    messages = []
    for at in range(0, len(data), step):
        receiver.receive_data(data[at : at + step])
        while (message := receiver.next_message()) is not None:
            messages.append(message)
    receiver.receive_eof()
    return messages


@pytest.mark.parametrize("step", [1, 2, 7, 1000])
def test_a_stream_may_be_cut_anywhere(step: int) -> None:
    requests = [Request(number, "status", {"a": "é" * number}) for number in range(20)]
    assert receive(b"".join(map(encode, requests)), step) == requests


@pytest.mark.parametrize("step", [1, 2, 7, 1000])
def test_payloads_may_be_cut_anywhere(step: int) -> None:
    requests = [Request(number, "x", {}, None if number % 3 == 2 else b"\n{}" * number) for number in range(20)]
    assert receive(b"".join(map(encode, requests)), step) == requests


def test_payloads_are_bounded() -> None:
    encode(Request(1, "x", {}, bytes(MAX_CLIENT_PAYLOAD)))
    encode(Notification("x", {}, bytes(MAX_PAYLOAD)))
    with pytest.raises(ValueError, match="a payload of 1048577 bytes is longer than 1048576 bytes"):
        encode(Request(1, "x", {}, bytes(MAX_CLIENT_PAYLOAD + 1)))
    with pytest.raises(ValueError, match="a payload of 4194305 bytes"):
        encode(Notification("x", {}, bytes(MAX_PAYLOAD + 1)))
    for line, text in (
        (b'{"event": "x", "bytes": 4194305}\n', "bytes: 4194305 is not an integer from 0 to 4194304"),
        (b'{"event": "x", "bytes": false}\n', "bytes: False is not an integer"),
        (
            b'{"id": 1, "ok": false, "error": {"code": "x", "message": "y"}, "bytes": 1}\n',
            "an error has no payload",
        ),
    ):
        receiver = Receiver(parse_reply, MAX_PAYLOAD)
        receiver.receive_data(line)
        for _ in range(2):
            with pytest.raises(RemoteProtocolError, match=text):
                receiver.next_message()


def test_what_is_ignored() -> None:
    assert receive(b'\n\r\n  \n{"method":"status","id":-5,"x":1,"jsonrpc":"2.0"}\r\n\n') == [Request(-5, "status")]


@pytest.mark.parametrize("empty", [b"\n", b" \r\n", b"\t\n\n"])
def test_many_empty_lines_take_no_time(empty: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    searches = 0
    search = Receiver._next_line

    def counted(self: Receiver[Any]) -> bytes | None:
        nonlocal searches
        searches += 1
        return search(self)

    monkeypatch.setattr(Receiver, "_next_line", counted)
    flood = empty * 50_000
    assert receive(flood + b'{"id":1,"method":"status"}' + flood + b"\n", len(flood)) == [Request(1, "status")]
    assert searches < 10


def test_the_longest_line() -> None:
    head = b'{"id":1,"method":"status","params":{"a":"'
    line = head + b"x" * (MAX_LINE - len(head) - 3) + b'"}}'
    assert len(line) == MAX_LINE
    assert len(receive(line + b"\n" + line + b"\n")) == 2
    with pytest.raises(RemoteProtocolError, match="a line is longer than 1048576 bytes"):
        receive(line + b" \n")


def test_bytes_without_a_newline_are_bounded() -> None:
    receiver = Receiver(parse_request, MAX_CLIENT_PAYLOAD)
    for _ in range(MAX_LINE // 4096):
        receiver.receive_data(bytes(4096))
        assert receiver.next_message() is None
    receiver.receive_data(b"x")
    with pytest.raises(RemoteProtocolError, match="longer than 1048576 bytes"):
        receiver.next_message()
    assert not receiver._buffer
    receiver.receive_data(b'{"id":1,"method":"status"}\n')  # nothing of it is kept
    assert not receiver._buffer
    with pytest.raises(RemoteProtocolError, match="longer than 1048576 bytes"):
        receiver.next_message()
    receiver.receive_eof()  # the error was reported


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"GET / HTTP/1.1", "is not JSON"),
        (b"\x80\x04\x95", "is not JSON"),
        (b'"\xff"', "is not JSON"),
        ('{"id":1}'.encode("utf-16"), "is not JSON"),
        (b'\xef\xbb\xbf{"id":1,"method":"status"}', "is not JSON"),
        (b'{"id":1,"method":"status"', "is not JSON"),
        (b'{"id":1,"method":"status"}{}', "is not JSON"),
        (b"[" * 100_000, "it is nested too deeply"),
        (b'{"a":' * 100_000, "it is nested too deeply"),
        (b'{"id":1,"method":"status","params":{"a":NaN}}', "NaN is not a number of JSON"),
        (b'{"id":1,"method":"status","params":{"a":-Infinity}}', "-Infinity is not a number of JSON"),
        (b'{"id":1,"method":"status","params":{"a":1e999}}', "a number is too large"),
        (b'{"id":1,"method":"status","params":{"a":' + b"9" * 10_000 + b"}}", "is not JSON"),
        (b"null", "a request is an object, not None"),
        (b"[]", "a request is an object, not []"),
        (b'"status"', "a request is an object, not 'status'"),
        (b"{}", "id: None is neither an integer below 2^53 nor a string of at most 64 characters"),
        (b'{"id":null,"method":"status"}', "id: None is neither"),
        (b'{"id":true,"method":"status"}', "id: True is neither"),
        (b'{"id":1.0,"method":"status"}', "id: 1.0 is neither"),
        (b'{"id":[1],"method":"status"}', "id: [1] is neither"),
        (b'{"id":{},"method":"status"}', "id: {} is neither"),
        (b'{"id":9007199254740992,"method":"status"}', "id: 9007199254740992 is neither"),
        (b'{"id":"' + b"x" * (MAX_ID + 1) + b'","method":"status"}', "is neither"),
        (b'{"id":1}', "method: None is not a string of 1 to 64 characters"),
        (b'{"id":1,"method":""}', "method: '' is not a string of 1 to 64 characters"),
        (b'{"id":1,"method":5}', "method: 5 is not a string of 1 to 64 characters"),
        (b'{"id":1,"method":["status"]}', "method: ['status'] is not a string"),
        (b'{"id":1,"method":"' + b"x" * (MAX_METHOD + 1) + b'"}', "is not a string of 1 to 64 characters"),
        (b'{"id":1,"method":"status","params":[]}', "params: [] is not an object"),
        (b'{"id":1,"method":"status","params":null}', "params: None is not an object"),
        (b'{"id":1,"method":"status","params":"x"}', "params: 'x' is not an object"),
        (b'{"event":"note","data":{}}', "id: None is neither"),
    ],
)
def test_what_is_not_a_request(line: bytes, problem: str) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        receive(line + b"\n")
    assert problem in caught.value.message
    assert len(caught.value.message) < 400
    assert caught.value.message.isprintable()
    assert (caught.value.reason, exit_code(caught.value)) == (Reason.PROTOCOL, ExitCode.PROTOCOL)


def test_half_a_line() -> None:
    with pytest.raises(RemoteProtocolError, match="the stream ends within a line, after 3 bytes"):
        receive(b'{"id":1,"method":"status"}\n{"i')


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"[]", "a message is an object, not []"),
        (b"{}", "{} is neither a reply nor an event"),
        (b'{"id":1,"ok":1}', "is neither a reply nor an event"),
        (b'{"id":null,"ok":true}', "id: None is neither"),
        (b'{"event":"","data":{}}', "event: '' is not"),
        (b'{"event":5,"data":{}}', "event: 5 is not"),
        (b'{"event":"note","data":5}', "data: 5 is not an object"),
        (b'{"id":1,"ok":false}', "error: None is not an object"),
        (b'{"id":1,"ok":false,"error":{"code":1,"message":"x"}}', "has no valid code, message and exit_code"),
        (b'{"id":1,"ok":false,"error":{"code":"x"}}', "has no valid code, message and exit_code"),
        (b'{"id":1,"ok":false,"error":{"code":"x","message":"y","exit_code":true}}', "has no valid code"),
        (b'{"id":[],"ok":false,"error":{"code":"x","message":"y"}}', "id: [] is neither"),
    ],
)
def test_what_is_not_from_a_server(line: bytes, problem: str) -> None:
    receiver = Receiver(parse_reply, MAX_PAYLOAD)
    receiver.receive_data(line + b"\n")
    with pytest.raises(RemoteProtocolError) as caught:
        receiver.next_message()
    assert problem in caught.value.message


def failure(**fields: Any) -> ErrorData:
    line = json.dumps({"id": 1, "ok": False, "error": {"code": "not-found", "message": "m", **fields}})
    receiver = Receiver(parse_reply, MAX_PAYLOAD)
    receiver.receive_data(line.encode() + b"\n")
    message = receiver.next_message()
    assert isinstance(message, Failure)
    return message.error


def test_an_error_arrives_as_it_was_raised() -> None:
    alternative = Remedy("or", setting="storage.force", value=True)
    remedy = Remedy("do this", command="a b", alternative=alternative)
    raised = errors.ImageError("a.raw is in use", reason=Reason.IN_USE, remedy=remedy)
    receiver = Receiver(parse_reply, MAX_PAYLOAD)
    receiver.receive_data(encode(Failure(1, ErrorData.of(raised))))
    message = receiver.next_message()
    assert isinstance(message, Failure)
    error = message.error.error()
    assert isinstance(error, SessionError)
    assert error.as_dict() == raised.as_dict()
    assert (exit_code(error), error.exit_code) == (ExitCode.IMAGE, 3)


def test_an_error_of_a_later_version() -> None:
    error = failure(code="flux", exit_code=99).error()
    assert (error.reason, error.exit_code, exit_code(error)) == (Reason.SESSION_ERROR, 99, ExitCode.INTERNAL_ERROR)
    assert exit_code(failure().error()) is ExitCode.INTERNAL_ERROR


def test_fields_of_an_error_are_hostile_too() -> None:
    deep: dict[str, Any] = {"remedy": "x"}
    for _ in range(50):
        deep = {"remedy": "x", "alternative": deep}
    error = failure(code="a\x1b", message="\x1b[2J" + "x" * 100_000, **deep).error()
    assert error.message.isprintable()
    assert len(error.message) == 8192
    depth, remedy = 0, error.remedy.alternative
    while remedy is not None:
        depth, remedy = depth + 1, remedy.alternative
    assert depth == 3
    wrong = failure(remedy=5, setting=[], value={}, command=None, alternative="x").error()
    assert wrong.remedy.as_dict() == {"remedy": ""}


HELLO = Hello("web", "spice://h", 5, 1.5, None, "0.1", "1.0", ("hello", "status"), ("note",))


def test_hello() -> None:
    data = HELLO.to_json()
    assert Hello.parse({**data, "later": 1}) == HELLO
    assert Hello.parse({**data, "protocol_version": "1.7"}).protocol_version == "1.7"
    assert Hello.parse({**data, "supported_methods": 5}).supported_methods == ()
    assert Hello.parse({**data, "supported_events": ["note", 5]}).supported_events == ("note",)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"server_name": "ryll"}, "the peer is not a farplug session"),
        ({"protocol_version": "2.0"}, "the session has version '2.0' of the control protocol, not 1.1"),
        ({"protocol_version": 1}, "the session has version 1 of the control protocol, not 1.1"),
        *(({field: []}, "is not a valid hello") for field in ("session", "target", "pid", "started", "log")),
        ({"farplug_version": None}, "is not a valid hello"),
        ({"pid": True}, "is not a valid hello"),
        ({"started": 10**400}, "is not a valid hello"),
    ],
)
def test_a_hello_that_is_not_valid(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        Hello.parse({**HELLO.to_json(), **change})
    assert problem in caught.value.message
    others: list[object] = [None, [], "x", 1]
    for data in others:
        with pytest.raises(RemoteProtocolError, match="the peer is not a farplug session"):
            Hello.parse(data)


def test_a_message_that_is_too_long_or_not_json_is_not_sent() -> None:
    with pytest.raises(ValueError, match="longer than 1048576 bytes"):
        encode(Reply(1, "x" * MAX_LINE))
    with pytest.raises(ValueError, match="not JSON compliant"):
        encode(Reply(1, float("nan")))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from(["id", "method", "params", "event", "data", "ok", "result", "error"]), JSON))
def test_any_json_is_a_message_or_refused(data: dict[str, Any]) -> None:
    for parse in (parse_request, parse_reply):
        try:
            message = parse(data)
        except RemoteProtocolError:
            continue
        assert parse(message.to_json()) == message
