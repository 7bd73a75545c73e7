"""The U2F protocol, for clients older than CTAP2: APDUs in, APDUs out.

Source: FIDO U2F Raw Message Formats 1.2; CTAP 2.1, chapter 7. A credential of one protocol works with the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Final, TypeAlias

from farplug.virtual.fido.authenticator import Report, Status
from farplug.virtual.fido.credentials import Algorithm, KeyStore, PrivateKey, Protection
from farplug.virtual.fido.presence import Answer, Question, Use

Touched: TypeAlias = Callable[[Question, bytes], Answer | None]
"""Returns what a user answered; None: nothing yet. The bytes identify the request that the client repeats."""

_VERSION: Final = b"U2F_V2"
_HASH_SIZE = 32


class StatusWord(IntEnum):
    """The status word at the end of a reply."""

    NO_ERROR = 0x9000
    WRONG_LENGTH = 0x6700
    CONDITIONS_NOT_SATISFIED = 0x6985
    """A user must touch the key; the client repeats the request."""
    WRONG_DATA = 0x6A80
    """The key has no such credential."""
    INS_NOT_SUPPORTED = 0x6D00
    CLA_NOT_SUPPORTED = 0x6E00
    INTERNAL_ERROR = 0x6F00


class _ApduError(Exception):
    def __init__(self, word: StatusWord) -> None:
        super().__init__(word.name)
        self.word = word


@dataclass(frozen=True, slots=True)
class _Apdu:
    """A command APDU (ISO 7816-4), short or extended."""

    instruction: int
    parameter: int
    data: bytes

    @classmethod
    def parse(cls, raw: bytes) -> _Apdu:
        if len(raw) < 4:
            raise _ApduError(StatusWord.WRONG_LENGTH)
        if raw[0]:
            raise _ApduError(StatusWord.CLA_NOT_SUPPORTED)
        body = raw[4:]
        if len(body) >= 3 and body[0] == 0:  # extended: Lc of 3 bytes, or only Le
            size, start = int.from_bytes(body[1:3], "big"), 3
            if len(body) == 3:
                size = 0
            longest = start + size + 2
        else:  # short: Lc of 1 byte, or only Le
            size, start = (body[0], 1) if len(body) > 1 else (0, len(body))
            longest = start + size + 1
        if not start + size <= len(body) <= longest:
            raise _ApduError(StatusWord.WRONG_LENGTH)
        return cls(raw[1], raw[2], body[start : start + size])


class U2f:
    """The U2F side of a key.

    Args:
        store: where it keeps its state, as the :class:`~.authenticator.Authenticator`.
        touched: returns what a user answered.
        report: called after each request that a user may want to know of.
    """

    def __init__(self, store: KeyStore, touched: Touched, report: Report) -> None:
        self._store = store
        self._touched = touched
        self._report = report

    async def execute(self, raw: bytes) -> bytes:
        """Execute a command, and return its reply.

        Raises:
            ImageError: the state could not be saved. The command has had no effect.
        """
        try:
            apdu = _Apdu.parse(raw)
            match apdu.instruction:
                case 1:
                    data = await self._register(apdu.data)
                case 2:
                    data = await self._authenticate(apdu.parameter, apdu.data)
                case 3 if not apdu.data:
                    data = _VERSION
                case 3:
                    raise _ApduError(StatusWord.WRONG_LENGTH)
                case _:
                    raise _ApduError(StatusWord.INS_NOT_SUPPORTED)
        except _ApduError as error:
            return error.word.to_bytes(2, "big")
        return data + StatusWord.NO_ERROR.to_bytes(2, "big")

    def _check_touched(self, question: Question, request: bytes) -> None:
        """Raise :class:`_ApduError` unless a user allowed the request."""
        if self._touched(question, request) is not Answer.ALLOW:
            raise _ApduError(StatusWord.CONDITIONS_NOT_SATISFIED)

    async def _register(self, data: bytes) -> bytes:
        if len(data) != 2 * _HASH_SIZE:
            raise _ApduError(StatusWord.WRONG_LENGTH)
        challenge, application = data[:_HASH_SIZE], data[_HASH_SIZE:]
        question = Question(Use.REGISTER, self._site(application))
        self._check_touched(question, b"\1" + data)
        state = self._store.state
        key = PrivateKey.generate(Algorithm.ES256)
        handle = state.seal(key, Protection.OPTIONAL, application)
        signed = b"\0" + application + challenge + handle + key.point
        signature = PrivateKey(Algorithm.ES256, state.attestation).sign(signed)
        self._report(question, Status.SUCCESS)
        return b"\5" + key.point + bytes((len(handle),)) + handle + state.certificate + signature

    async def _authenticate(self, control: int, data: bytes) -> bytes:
        head = 2 * _HASH_SIZE + 1
        if len(data) < head or len(data) != head + data[head - 1]:
            raise _ApduError(StatusWord.WRONG_LENGTH)
        challenge, application, handle = data[:_HASH_SIZE], data[_HASH_SIZE : 2 * _HASH_SIZE], data[head:]
        state = self._store.state
        found = state.find(handle, application)
        if found is None or found.key.algorithm is not Algorithm.ES256 or found.protection is Protection.REQUIRED:
            raise _ApduError(StatusWord.WRONG_DATA)
        if control == 7:  # check only: this is the reply of a key that has the credential
            raise _ApduError(StatusWord.CONDITIONS_NOT_SATISFIED)
        if control not in (3, 8):
            raise _ApduError(StatusWord.WRONG_DATA)
        question = Question(Use.SIGN_IN if control == 3 else Use.LOOK_UP, self._site(application))
        if control == 3:
            self._check_touched(question, b"\2" + data)
        state = replace(state, counter=state.counter + 1)
        await self._store.save(state)
        proof = bytes((control == 3,)) + (state.counter & 0xFFFFFFFF).to_bytes(4, "big")
        self._report(question, Status.SUCCESS)
        return proof + found.key.sign(application + proof + challenge)

    def _site(self, application: bytes) -> str:
        """Return the name of a site of which only the hash is known."""
        for credential in self._store.state.credentials:
            if credential.rp_hash == application:
                return credential.rp_id
        return f"the site with the hash {application.hex()[:16]}"
