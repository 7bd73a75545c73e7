from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from farplug.errors import Reason, RemoteProtocolError, UsageError
from farplug.exit_codes import ExitCode, exit_code
from farplug.spice.link import MAX_LINK_REPLY, LinkClient, LinkFailure, LinkMess, LinkReply, encrypt_ticket
from farplug.spice.types import ChannelType, LinkError, has_capability

KEY = rsa.generate_private_key(65537, 1024)
PUBLIC_KEY = KEY.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
REPLY = LinkReply(LinkError.OK, PUBLIC_KEY, (0b1011,), (1,))
OK = struct.pack("<I", 0)


def decrypt(ticket: bytes) -> bytes:
    return KEY.decrypt(ticket, padding.OAEP(padding.MGF1(hashes.SHA1()), hashes.SHA1(), None))


def client(password: str = "secret") -> LinkClient:
    return LinkClient.for_channel(
        ChannelType.USBREDIR, 1, connection_id=0x01020304, capabilities=[0], password=password
    )


def test_link_mess_bytes() -> None:
    """The layout is that of spice-protocol."""
    expected = (
        b"REDQ" + bytes.fromhex("02000000 02000000 1a000000")
        + bytes.fromhex("04030201 09 01 01000000 01000000 12000000 0b000000 01000000")
    )  # fmt: skip
    (sent,) = client().data_to_send()
    assert sent == expected
    assert LinkMess.parse(sent[16:]) == LinkMess(0x01020304, ChannelType.USBREDIR, 1, (0b1011,), (1,))


def test_link_reply_of_libspice_server() -> None:
    """The head and tail of a reply of libspice-server 0.15.1, and its capabilities."""
    body = bytes(4) + PUBLIC_KEY + bytes.fromhex("01000000 01000000 b2000000 0b000000 0f000000")
    reply = LinkReply.parse(body)
    assert reply == LinkReply(LinkError.OK, PUBLIC_KEY, (0b1011,), (0b1111,))
    assert bytes(reply) == b"REDQ" + bytes.fromhex("02000000 02000000 ba000000") + body


def pieces(data: bytes, how: str) -> Iterator[bytes]:
    if how == "whole":
        yield data
    else:
        yield from (data[at : at + 1] for at in range(len(data)))


@pytest.mark.parametrize("how", ["whole", "byte by byte"])
@pytest.mark.parametrize("tail", [b"", b"\x04\x00\x0c"])
@pytest.mark.parametrize("password", ["", "secret", "x" * 59, "x" * 60, "ü" * 30])
@pytest.mark.parametrize("caps", [0b1011, 0b0011, 0b1010])
def test_link(how: str, tail: bytes, password: str, caps: int) -> None:
    link = client(password)
    link.data_to_send()
    reply = LinkReply(LinkError.OK, PUBLIC_KEY, (caps,), (1,))
    for piece in pieces(bytes(reply), how):
        assert link.data_to_send() == []
        link.receive_data(piece)
    sent = b"".join(link.data_to_send())
    if has_capability((caps,), 0):
        assert sent[:4] == struct.pack("<I", 1)
        sent = sent[4:]
    assert decrypt(sent) == password.encode()[:59] + b"\0"  # what libspice-server keeps of 60
    assert link.result is None
    if how == "whole":
        link.receive_data(OK + tail)
    else:
        for piece in pieces(OK, how):
            assert link.result is None
            link.receive_data(piece)
        tail = b""
    assert link.result is not None
    assert link.result.trailing == tail
    assert link.result.mini_header == bool(caps & 8)
    assert link.result.channel_caps == (1,)


LINK_ERRORS = [
    (LinkError.ERROR, Reason.LINK_REFUSED),
    (LinkError.INVALID_MAGIC, Reason.NOT_SPICE),
    (LinkError.INVALID_DATA, Reason.LINK_REFUSED),
    (LinkError.VERSION_MISMATCH, Reason.LINK_REFUSED),
    (LinkError.NEED_SECURED, Reason.NEEDS_TLS),
    (LinkError.NEED_UNSECURED, Reason.LINK_REFUSED),
    (LinkError.PERMISSION_DENIED, Reason.CHANNEL_DENIED),
    (LinkError.BAD_CONNECTION_ID, Reason.LINK_REFUSED),
    (LinkError.CHANNEL_NOT_AVAILABLE, Reason.CHANNEL_IN_USE),
    (LinkError(4242), Reason.LINK_REFUSED),
]


@pytest.mark.parametrize("at", ["reply", "bare reply", "ticket"])
@pytest.mark.parametrize(("error", "reason"), LINK_ERRORS)
def test_link_errors_have_a_reason_and_a_remedy(at: str, error: LinkError, reason: Reason) -> None:
    link = client()
    code = struct.pack("<I", error)
    if at == "ticket":
        link.receive_data(bytes(REPLY))
        refusal = code
    elif at == "reply":
        refusal = bytes(LinkReply(error))
    else:
        refusal = b"REDQ" + struct.pack("<III", 2, 2, 4) + code
    with pytest.raises(LinkFailure, match=f"link error {error.value}") as caught:
        link.receive_data(refusal)
    assert (caught.value.reason, caught.value.error) == (reason, error)
    assert caught.value.remedy
    assert "secret" not in str(caught.value) + caught.value.remedy
    link.receive_data(b"more")
    assert link.result is None


def test_a_missing_password_is_not_a_wrong_one() -> None:
    refusals = {}
    for password in ("", "guess"):
        main = LinkClient.for_channel(ChannelType.MAIN, 0, connection_id=0, capabilities=[], password=password)
        main.receive_data(bytes(REPLY))
        with pytest.raises(LinkFailure) as caught:
            main.receive_data(struct.pack("<I", LinkError.PERMISSION_DENIED))
        refusals[password] = caught.value
    missing, wrong = refusals.values()
    assert missing.message == "the VM requires a password, and none was given"
    assert (missing.reason, missing.error) == (Reason.NO_PASSWORD, LinkError.PERMISSION_DENIED)
    assert missing.remedy.setting == "target.password"
    assert wrong.message == "the password is wrong or has expired: link error 7 (PERMISSION_DENIED)"
    assert wrong.reason is Reason.WRONG_PASSWORD
    assert exit_code(missing) is exit_code(wrong) is ExitCode.DENIED


def test_a_refusal_before_the_ticket_does_not_ask_for_a_password() -> None:
    main = LinkClient.for_channel(ChannelType.MAIN, 0, connection_id=0, capabilities=[], password="")
    with pytest.raises(LinkFailure) as caught:
        main.receive_data(bytes(LinkReply(LinkError.PERMISSION_DENIED)))
    assert caught.value.reason is Reason.WRONG_PASSWORD


@pytest.mark.parametrize("password", ["", "ticket"])
def test_a_later_channel_is_denied_although_main_was_linked(password: str) -> None:
    """The ticket expired, or a proxy does not permit the channel: another password would not help."""
    link = client(password)
    link.receive_data(bytes(REPLY))
    with pytest.raises(LinkFailure) as caught:
        link.receive_data(struct.pack("<I", LinkError.PERMISSION_DENIED))
    error = caught.value
    assert error.reason is Reason.CHANNEL_DENIED
    assert exit_code(error) is ExitCode.DENIED
    assert "ticket has expired" in error.message
    assert "proxy does not permit" in error.message
    assert "new ticket" in error.remedy
    assert not error.remedy.setting


@pytest.mark.parametrize("how", ["whole", "byte by byte"])
@pytest.mark.parametrize(
    ("answer", "reason", "expected_text"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", Reason.NOT_SPICE, "an HTTP server"),
        (b"<html>", Reason.NOT_SPICE, "an HTTP server"),
        (b"RFB 003.008\n", Reason.NOT_SPICE, "a VNC server"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", Reason.NOT_SPICE, "an SSH server"),
        (b"\x15\x03\x03\x00\x02\x02\x46", Reason.NEEDS_TLS, "a TLS server"),
        (bytes.fromhex("00000000440000000000000071656d75"), Reason.NOT_SPICE, "a plain usbredir socket"),
        (b"REDX....", Reason.NOT_SPICE, "no SPICE server"),
        (b"* OK IMAP", Reason.NOT_SPICE, "no SPICE server"),
    ],
)
def test_other_servers(how: str, answer: bytes, reason: Reason, expected_text: str) -> None:
    link = client()

    def feed() -> None:
        for piece in pieces(answer, how):
            link.receive_data(piece)

    with pytest.raises(LinkFailure, match=expected_text) as caught:
        feed()
    assert caught.value.reason is reason
    assert caught.value.remedy


def header(size: int, major: int = 2) -> bytes:
    return b"REDQ" + struct.pack("<III", major, 2, size)


@pytest.mark.parametrize(
    ("reply", "expected_text"),
    [
        (header(MAX_LINK_REPLY + 1), f"more than {MAX_LINK_REPLY}"),
        (header(177) + bytes(177), "fewer than 178"),
        (header(0), "fewer than 178"),
        (header(178) + struct.pack("<I162sIII", 0, PUBLIC_KEY, 257, 0, 178), "257 capability words"),
        (header(178) + struct.pack("<I162sIII", 0, PUBLIC_KEY, 1, 0, 178), "outside"),
        (header(182) + struct.pack("<I162sIIII", 0, PUBLIC_KEY, 1, 0, 177, 1), "outside"),
        (header(182) + struct.pack("<I162sIIII", 0, PUBLIC_KEY, 1, 0, 2**32 - 1, 1), "outside"),
        (bytes(LinkReply(LinkError.OK, bytes(162), (0b1011,))), "key cannot be read"),
    ],
)
def test_hostile_replies(reply: bytes, expected_text: str) -> None:
    link = client()
    with pytest.raises(RemoteProtocolError, match=expected_text):
        link.receive_data(reply)


def test_other_version() -> None:
    with pytest.raises(LinkFailure, match=r"the server has version 1 of SPICE, farplug has 2\.2"):
        client().receive_data(header(178, major=1))


def test_sasl_only() -> None:
    with pytest.raises(LinkFailure, match="SASL"):
        client().receive_data(bytes(LinkReply(LinkError.OK, PUBLIC_KEY, (0b1101,))))


@pytest.mark.parametrize("mess", [b"", bytes(17), struct.pack("<IBBIII", 0, 1, 0, 300, 0, 18)])
def test_hostile_link_mess(mess: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        LinkMess.parse(mess)


@pytest.mark.parametrize("kind", ["2048 bits", "elliptic curve"])
def test_only_rsa_1024(kind: str) -> None:
    key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
    if kind == "2048 bits":
        key = rsa.generate_private_key(65537, 2048)
    else:
        key = ec.generate_private_key(ec.SECP256R1())
    public = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    with pytest.raises(RemoteProtocolError, match="not an RSA key of 1024 bits"):
        encrypt_ticket(public, b"")


@pytest.mark.parametrize(
    ("password", "expected_text"), [("x" * 61, "61 bytes"), ("ü" * 31, "62 bytes"), ("a\0b", "NUL")]
)
def test_invalid_passwords(password: str, expected_text: str) -> None:
    with pytest.raises(UsageError, match=expected_text) as caught:
        client(password)
    assert password not in str(caught.value)


@pytest.mark.parametrize(
    ("received", "expected_text"),
    [
        (b"", "without a link reply"),
        (b"REDQ", "after 4 bytes of a link reply"),
        (bytes(REPLY), "after it received the ticket"),
    ],
)
def test_end_of_stream(received: bytes, expected_text: str) -> None:
    link = client()
    link.receive_data(received)
    error = link.receive_eof()
    assert expected_text in str(error)
    assert (error.error, error.reason) == (None, Reason.LINK_REFUSED)


def test_a_connection_with_tls_does_not_suggest_tls() -> None:
    link = client()
    assert "use spice+tls" in link.receive_eof().remedy
    link.tls = True
    assert "use spice+tls" not in link.receive_eof().remedy
    assert "SPICE proxy" in link.receive_eof().remedy


def test_no_repr_contains_the_password() -> None:
    assert "secret" not in repr(client())


def test_key_that_cannot_encrypt() -> None:
    """RSA-1024 in form, but its modulus is even."""
    damaged = bytearray(PUBLIC_KEY)
    damaged[-6] &= 0xFE  # the modulus' last byte: 5 bytes of exponent follow
    with pytest.raises(RemoteProtocolError, match="the server's ticket key cannot be"):
        encrypt_ticket(bytes(damaged), b"")
