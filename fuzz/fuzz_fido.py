"""Fuzz the security key: its CBOR, its framing, both protocols, its file, and the whole key in a guest in memory.

CborError for messages and ImageError for files are expected. Any other exception is a bug. Each request must get one
reply that fits a message, and the key must work afterwards.
"""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from farplug.errors import ImageError
from farplug.testing.memory import MemoryGuest
from farplug.usb import Speed
from farplug.virtual import VirtualDevice
from farplug.virtual.fido import Answer, KeyState, MemoryKeyStore, Presence, Question, SecurityKey, cbor, ctaphid
from farplug.virtual.fido import key as fido_key
from farplug.virtual.fido.authenticator import Authenticator, Command, Permission, Status, _Token
from farplug.virtual.fido.cbor import CborError, Value
from farplug.virtual.fido.credentials import MAX_CREDENTIALS, Algorithm, Credential, Pin, PrivateKey, User
from farplug.virtual.fido.ctaphid import MAX_MESSAGE, CtapHid, HidCommand, Request
from farplug.virtual.fido.key_file import parse, serialize
from farplug.virtual.fido.pin_protocol import PinProtocol, PinProtocolTwo
from farplug.virtual.fido.u2f import U2f
from harness import check, counts, raise_logged, run

STATE = KeyState.new()
SECRET = PrivateKey.generate(Algorithm.ES256)
CREDENTIAL = Credential(b"c" * 32, "example.com", User(b"alice", "alice", "Alice"), SECRET)
SEALED = STATE.seal(SECRET, CREDENTIAL.protection, CREDENTIAL.rp_hash)
POINT: dict[cbor.Key, Value] = SECRET.cose | {3: -25}
INIT = bytes.fromhex("ffffffff860008") + b"fuzzfuzz"


class Trusting(PinProtocol):
    """Protocol one, to which each authentication code is valid."""

    def verify(self, key: bytes, message: bytes, code: bytes) -> bool:
        return True


class TrustingTwo(PinProtocolTwo, Trusting):
    """Protocol two, likewise."""


def value(rng: random.Random, depth: int = 0) -> Value:
    """Return a value, often one of those that the commands have."""
    choices: tuple[Any, ...] = (
        *(0, 1, 2, 7, 23, 24, 255, 256, 1 << 63, (1 << 64) - 1, -1, -7, -8, -(1 << 64)),
        *(
            True,
            False,
            b"",
            b"x" * 16,
            b"x" * 32,
            b"x" * 64,
            CREDENTIAL.id,
            SEALED,
            CREDENTIAL.rp_hash,
            rng.randbytes(65),
        ),
        *("", "example.com", "public-key", "é" * 90, "x" * 300, "\0\x1b[2J"),
        *(POINT, {"id": CREDENTIAL.id, "type": "public-key"}, {"type": "public-key", "alg": -7}, {"id": "example.com"}),
        *({"rk": True}, {"up": False}, {"uv": True}, {"hmac-secret": {1: POINT, 2: b"x" * 32, 3: b"x" * 16}}),
        *({"credProtect": 3, "hmac-secret": True}, {"id": b"alice", "name": "alice", "displayName": "A"}),
    )
    match rng.randrange(8 if depth < 3 else 5):
        case 5:
            return [value(rng, depth + 1) for _ in range(rng.choice((0, 1, 2, 70)))]
        case 6 | 7:
            return fields(rng, depth)
    chosen: Value = rng.choice(choices)
    return chosen


def fields(rng: random.Random, depth: int = 0) -> dict[cbor.Key, Value]:
    keys: tuple[cbor.Key, ...] = (*range(1, 11), "id", "type", "alg", "name", "rk", "hmac-secret", -2, -3)
    return {rng.choice(keys): value(rng, depth + 1) for _ in range(rng.randrange(8))}


def valid(rng: random.Random) -> tuple[Command, dict[cbor.Key, Value]]:
    """Return a command that succeeds, if the PIN is not in its way."""
    listed: Value = [{"id": rng.choice((CREDENTIAL.id, SEALED, b"x")), "type": "public-key"}]
    rp: Value = {"id": "example.com", "name": "Example"}
    user: Value = {"id": rng.randbytes(3), "name": "bob"}
    hash = b"h" * 32
    algorithms: Value = [{"alg": rng.choice((-7, -8)), "type": "public-key"}]
    choices: tuple[tuple[Command, dict[cbor.Key, Value]], ...] = (
        (Command.MAKE_CREDENTIAL, {1: hash, 2: rp, 3: user, 4: algorithms, 7: {"rk": rng.random() < 0.5}}),
        (Command.GET_ASSERTION, {1: "example.com", 2: hash, 3: listed}),
        (Command.GET_ASSERTION, {1: "example.com", 2: hash}),
        (Command.GET_NEXT_ASSERTION, {}),
        (Command.CLIENT_PIN, {1: rng.choice((1, 2)), 2: rng.choice((1, 2))}),
        (Command.CLIENT_PIN, {1: 2, 2: 3, 3: POINT, 4: b"x" * 32, 5: b"x" * 80}),
        (Command.CLIENT_PIN, {1: 1, 2: rng.choice((5, 9)), 3: POINT, 6: b"x" * 16, 9: 4, 10: "example.com"}),
        (Command.CREDENTIAL_MANAGEMENT, {1: rng.randrange(9), 2: {1: CREDENTIAL.rp_hash}, 3: 2, 4: b"x" * 32}),
        (Command.GET_INFO, {}),
        (Command.SELECTION, {}),
    )
    return rng.choice(choices)


def command(rng: random.Random) -> bytes:
    """Return the message of a command, valid, with other parameters, or damaged."""
    chosen, parameters = valid(rng)
    match rng.randrange(4):
        case 0:
            parameters |= fields(rng)
        case 1:
            chosen, parameters = rng.choice(list(Command)), fields(rng)
    message = bytes((chosen,)) + cbor.encode(parameters)
    return damage(rng, message) if rng.random() < 0.3 else message[:MAX_MESSAGE]


def damage(rng: random.Random, data: bytes) -> bytes:
    damaged = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(damaged) + 1)
        bomb = rng.choice((b"\x81", b"\xa1\x00", b"\x9b" + b"\xff" * 8, b"\xbb" + b"\xff" * 8, b"\x5b" + b"\xff" * 8))
        match rng.randrange(4):
            case 0:
                damaged[at : at + 1] = rng.randbytes(1)
            case 1:
                del damaged[at : at + rng.randrange(20)]
            case 2:
                damaged[at:at] = rng.randbytes(rng.randrange(20))
            case _:
                damaged[at:at] = bomb * rng.choice((1, 10, 3000))
    return bytes(damaged[:MAX_MESSAGE])


def fuzz_cbor(rng: random.Random) -> None:
    data = cbor.encode(value(rng))
    damaged = damage(rng, data) if rng.random() < 0.9 else data
    try:
        decoded = cbor.decode(damaged)
    except CborError as refused:
        check(damaged != data and len(str(refused)) < 200)
    else:
        assert cbor.encode(decoded) == damaged
        counts["values"] += 1


def report(rng: random.Random, channels: int) -> bytes:
    """Return a report that begins or continues a message, or is damaged."""
    channel: int = rng.choice((0, *range(1, channels + 2), ctaphid.BROADCAST, rng.getrandbits(32)))
    if rng.random() < 0.4:
        return channel.to_bytes(4, "big") + bytes((rng.choice((0, 0, 1, 2, 127)),)) + rng.randbytes(rng.randrange(70))
    kind: int = rng.choice((*HidCommand, rng.randrange(128)))
    size = rng.choice((0, 1, 8, 57, 58, 116, 200, MAX_MESSAGE, MAX_MESSAGE + 1, 0xFFFF))
    return channel.to_bytes(4, "big") + bytes((0x80 | kind,)) + size.to_bytes(2, "big") + command(rng)[:57]


def fuzz_framing(rng: random.Random) -> None:
    hid, now, channels = CtapHid(5), 0.0, 0
    waiting: list[Request] = []
    for _ in range(rng.randrange(100)):
        now += rng.choice((0.0, 0.0, 0.1, 4.0))
        raw = INIT if rng.random() < 0.1 else report(rng, channels)
        found = hid.receive(raw, now)
        channels += raw is INIT
        if isinstance(found, Request):
            assert not any(map(hid.is_current, waiting))
            assert 0 < len(found.data) <= MAX_MESSAGE or found.command is HidCommand.WINK
            waiting.append(found)
        if waiting and rng.random() < 0.3:
            hid.reply(rng.choice(waiting), rng.randbytes(rng.choice((0, 57, 58, 500))))
        reports = hid.take_reports()
        assert len(reports) <= 129 * 2
        assert all(len(one) == ctaphid.REPORT_SIZE for one in reports)
    hid.receive(INIT, now)
    assert hid.take_reports()[-1][4] == 0x80 | HidCommand.INIT


def state(rng: random.Random) -> KeyState:
    full = tuple(replace(CREDENTIAL, id=bytes((n,)) * 32, user=User(bytes((n,)))) for n in range(MAX_CREDENTIALS))
    pin = rng.choice((None, None, Pin(b"p" * 16, rng.randrange(9))))
    return replace(STATE, pin=pin, credentials=rng.choice(((), (CREDENTIAL,), full)))


async def protocols(rng: random.Random) -> None:
    store, now = MemoryKeyStore(state(rng)), 0.0
    answers = (Answer.ALLOW, *Answer)

    async def ask(question: Question) -> Answer:
        assert len(str(question)) < 700
        assert str(question).isprintable()
        answer: Answer = rng.choice(answers)
        return answer

    def used(question: Question, status: Status) -> None:
        assert str(question).isprintable()
        counts[f"{question.use} {status.name.lower()}"] += 1

    authenticator = Authenticator(store, ask, used, lambda: now)
    trusting = rng.random() < 0.5
    u2f = U2f(store, lambda question, request: rng.choice((None, *answers)), used)
    for _ in range(rng.randrange(1, 20)):
        now += rng.choice((0.0, 1.0, 40.0))
        if trusting:  # what follows a PIN is reached, too
            authenticator._protocols = {one.number: one for one in (TrustingTwo(), Trusting())}
            authenticator._token = _Token(Permission(7), rng.choice((None, "example.com")), now + 1)
        if rng.random() < 0.7:
            reply = await authenticator.execute(command(rng))
            status = Status(reply[0])
            assert status is Status.SUCCESS or len(reply) == 1
            if reply[1:]:
                cbor.decode(reply[1:])
        else:
            reply = await u2f.execute(apdu(rng))
            assert len(reply) >= 2
        assert len(reply) <= MAX_MESSAGE
        assert len(store.state.credentials) <= MAX_CREDENTIALS
        assert parse(serialize(store.state), Path("x")) == store.state
    assert (await authenticator.execute(b"\4"))[0] == Status.SUCCESS


def apdu(rng: random.Random) -> bytes:
    handle = rng.choice((SEALED, CREDENTIAL.id, b"", b"x" * 200))
    data = rng.choice((b"c" * 32 + CREDENTIAL.rp_hash + bytes((len(handle),)) + handle, b"x" * 64, b""))
    head = bytes((0, rng.choice((1, 2, 3)), rng.choice((3, 7, 8)), 0))
    length = rng.choice((bytes((len(data) & 255,)), b"\0" + len(data).to_bytes(2, "big")))
    raw = head + length + data + rng.choice((b"", b"\0", b"\0\0"))
    return damage(rng, raw) if rng.random() < 0.3 else raw


def fuzz_protocols(rng: random.Random) -> None:
    asyncio.run(protocols(rng))


def fuzz_file(rng: random.Random) -> None:
    raw = serialize(state(rng))
    if rng.random() < 0.5:
        data: dict[str, Any] = json.loads(raw)
        target = rng.choice((data, *data["credentials"]))
        target[rng.choice(list(target))] = rng.choice((None, -1, 1 << 70, 1.5, "", "00", "zz", [], {}, [[]], "\ud800"))
        raw = json.dumps(data).encode()
    else:
        raw = damage(rng, raw) if len(raw) < MAX_MESSAGE else raw[: rng.randrange(len(raw))]
    try:
        parsed = parse(raw, Path("x"))
    except ImageError as refused:
        check(str(refused).isprintable() and len(str(refused)) < 500)
    else:
        assert parse(serialize(parsed), Path("x")) == parsed
        counts["files"] += 1


async def whole_key(rng: random.Random) -> None:
    presence = rng.choice(list(Presence))
    key = SecurityKey(MemoryKeyStore(state(rng)), presence, timeout=rng.choice((0.0, 0.01)))
    async with MemoryGuest(VirtualDevice(key, speeds=(Speed.HIGH,))) as guest:
        await guest.enumerate()
        await guest.start_receiving(0x81)
        for _ in range(rng.randrange(40)):
            await guest.interrupt_out(0x01, INIT if rng.random() < 0.2 else report(rng, 3)[: ctaphid.REPORT_SIZE])
            if key.question is not None and rng.random() < 0.5:
                key.answer(rng.random() < 0.5)
            if rng.random() < 0.05:
                await guest.set_configuration(1)
                await guest.start_receiving(0x81)
        nonce = rng.randbytes(8)
        await guest.interrupt_out(0x01, INIT[:7] + nonce)
        while (await guest.interrupt_in(0x81))[7:15] != nonce:
            pass
    assert key.question is None


def fuzz_key(rng: random.Random) -> None:
    fido_key.KEEPALIVE_INTERVAL = 0.001  # type: ignore[misc]
    asyncio.run(whole_key(rng))


def one_case(rng: random.Random) -> None:
    rng.choice((*[fuzz_cbor] * 20, *[fuzz_framing] * 10, *[fuzz_protocols] * 3, *[fuzz_file] * 5, fuzz_key))(rng)


if __name__ == "__main__":
    raise_logged()
    run("fido", one_case)
