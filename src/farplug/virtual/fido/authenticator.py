"""A CTAP2 authenticator: commands in, replies out. It knows neither USB nor an event loop.

Source: Client to Authenticator Protocol (CTAP) 2.1, chapters 6 (commands), 8 (encoding) and 12 (extensions).
"""

from __future__ import annotations

import hmac
import secrets
import unicodedata
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum, IntFlag
from hashlib import sha256
from typing import Final, TypeAlias, TypeVar

from farplug.virtual.fido import cbor
from farplug.virtual.fido.cbor import CborError, Key, Value
from farplug.virtual.fido.credentials import (
    DISCOVERABLE_ID_SIZE,
    MAX_CREDENTIALS,
    MAX_NAME,
    MAX_RETRIES,
    MAX_RP_ID,
    MAX_USER_ID,
    Algorithm,
    Credential,
    KeyState,
    KeyStore,
    Pin,
    PrivateKey,
    Protection,
    User,
)
from farplug.virtual.fido.ctaphid import MAX_MESSAGE
from farplug.virtual.fido.pin_protocol import PinProtocol, PinProtocolTwo
from farplug.virtual.fido.presence import MAX_SITE, Answer, Question, Use

AAGUID: Final = bytes.fromhex("6f1d3a52c0b74e0d9b6efa9d1a7c5e21")
"""The model of the key. The value is random, and in no registry."""
VERSIONS: Final = ("U2F_V2", "FIDO_2_0", "FIDO_2_1")
MAX_LIST: Final = 64
"""Credentials in an allow list or an exclude list."""
MAX_ID: Final = 128
"""Bytes of a credential id."""
MIN_PIN: Final = 4
MAX_PIN: Final = 63
MAX_MISMATCHES: Final = 3
"""Wrong PINs in a row before the key must be plugged in again."""
TOKEN_LIFETIME: Final = 600.0
"""Seconds for which a pinUvAuthToken is valid."""
NEXT_LIFETIME: Final = 30.0
"""Seconds for which the next assertion can be fetched (CTAP 2.1, chapter 6.3)."""


class Status(IntEnum):
    """The status of a reply (CTAP 2.1, chapter 8.2)."""

    SUCCESS = 0x00
    INVALID_COMMAND = 0x01
    INVALID_PARAMETER = 0x02
    INVALID_LENGTH = 0x03
    CBOR_UNEXPECTED_TYPE = 0x11
    INVALID_CBOR = 0x12
    MISSING_PARAMETER = 0x14
    LIMIT_EXCEEDED = 0x15
    CREDENTIAL_EXCLUDED = 0x19
    UNSUPPORTED_ALGORITHM = 0x26
    OPERATION_DENIED = 0x27
    KEY_STORE_FULL = 0x28
    UNSUPPORTED_OPTION = 0x2B
    INVALID_OPTION = 0x2C
    KEEPALIVE_CANCEL = 0x2D
    NO_CREDENTIALS = 0x2E
    USER_ACTION_TIMEOUT = 0x2F
    NOT_ALLOWED = 0x30
    PIN_INVALID = 0x31
    PIN_BLOCKED = 0x32
    PIN_AUTH_INVALID = 0x33
    PIN_AUTH_BLOCKED = 0x34
    PIN_NOT_SET = 0x35
    PUAT_REQUIRED = 0x36
    PIN_POLICY_VIOLATION = 0x37
    INVALID_SUBCOMMAND = 0x3E
    UNAUTHORIZED_PERMISSION = 0x40
    OTHER = 0x7F


class Command(IntEnum):
    """A command of CTAP2 that the key supports."""

    MAKE_CREDENTIAL = 0x01
    GET_ASSERTION = 0x02
    GET_INFO = 0x04
    CLIENT_PIN = 0x06
    RESET = 0x07
    GET_NEXT_ASSERTION = 0x08
    CREDENTIAL_MANAGEMENT = 0x0A
    SELECTION = 0x0B
    CREDENTIAL_MANAGEMENT_PREVIEW = 0x41
    """CREDENTIAL_MANAGEMENT before CTAP 2.1; clients use it that know only that number."""


class Flags(IntFlag):
    """Flags of authenticator data (WebAuthn, chapter 6.1)."""

    USER_PRESENT = 0x01
    USER_VERIFIED = 0x04
    ATTESTED = 0x40
    EXTENSIONS = 0x80


class Permission(IntFlag):
    """What a pinUvAuthToken is for (CTAP 2.1, chapter 6.5.5.7)."""

    MAKE_CREDENTIAL = 0x01
    GET_ASSERTION = 0x02
    CREDENTIAL_MANAGEMENT = 0x04


_ALL_PERMISSIONS: Final = Permission.MAKE_CREDENTIAL | Permission.GET_ASSERTION | Permission.CREDENTIAL_MANAGEMENT


class CtapError(Exception):
    """A request fails with a status."""

    def __init__(self, status: Status) -> None:
        super().__init__(status.name)
        self.status = status


_PRESENCE_STATUS = {
    Answer.REFUSE: Status.OPERATION_DENIED,
    Answer.TIMED_OUT: Status.USER_ACTION_TIMEOUT,
    Answer.CANCELLED: Status.KEEPALIVE_CANCEL,
}

Ask: TypeAlias = Callable[[Question], Awaitable[Answer]]
"""Asks a user."""
Report: TypeAlias = Callable[[Question, Status], None]
"""Called after each request that a user may want to know of."""

_Reply: TypeAlias = dict[Key, Value]
_T = TypeVar("_T", int, bytes, str, list[Value], dict[Key, Value])


class Parameters:
    """The parameters of a command, or another map of a client, with their types checked."""

    def __init__(self, values: Mapping[Key, Value]) -> None:
        self.values = values

    def get(self, key: Key, kind: type[_T]) -> _T | None:
        """Return a value of a type; None if it is not there.

        Raises:
            CtapError: the value has another type.
        """
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise CtapError(Status.CBOR_UNEXPECTED_TYPE)
        return value

    def need(self, key: Key, kind: type[_T]) -> _T:
        """Return a value of a type. Raise :class:`CtapError` if it is not there, or has another type."""
        value = self.get(key, kind)
        if value is None:
            raise CtapError(Status.MISSING_PARAMETER)
        return value

    def option(self, key: Key) -> bool | None:
        """Return a boolean; None if it is not there."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise CtapError(Status.CBOR_UNEXPECTED_TYPE)
        return value

    def inner(self, key: Key) -> Parameters:
        """Return a map; an empty one if it is not there."""
        values: dict[Key, Value] | None = self.get(key, dict)
        return Parameters(values or {})


@dataclass(slots=True)
class _Token:
    """What the present pinUvAuthTokens are good for; both protocols share it."""

    permissions: Permission
    rp_id: str | None
    expires: float


@dataclass(slots=True)
class _Next:
    """What the command for the next item of a list continues."""

    command: Command
    subcommand: int
    replies: list[Callable[[], Awaitable[_Reply]]]
    expires: float


class Authenticator:
    """The key, as clients see it.

    One command is executed at a time.

    Args:
        store: where it keeps its state.
        ask: asks a user.
        report: called after each request that a user may want to know of.
        clock: the time in seconds, which does not go back.
    """

    def __init__(self, store: KeyStore, ask: Ask, report: Report, clock: Callable[[], float]) -> None:
        self._store = store
        self._ask = ask
        self._report = report
        self._clock = clock
        self._question: Question | None = None
        self.power_up()

    def power_up(self) -> None:
        """Forget what a key forgets without power: shared secrets, tokens, lists that clients iterate over."""
        self._protocols: dict[int, PinProtocol] = {one.number: one for one in (PinProtocolTwo(), PinProtocol())}
        self._token: _Token | None = None
        self._mismatches = 0
        self._next: _Next | None = None

    async def execute(self, message: bytes) -> bytes:
        """Execute a command, and return its reply: a status, and the data of a successful one.

        Args:
            message: a command byte, and its parameters in CBOR.

        Raises:
            ImageError: the state could not be saved. The command has had no effect.
        """
        self._question = None
        status = Status.OTHER
        try:
            command = _command(message[:1])
            if self._next is not None and command is not self._next.command:
                self._next = None
            reply = await self._dispatch(command, _parameters(message[1:]))
            status = Status.SUCCESS
        except CtapError as error:
            status = error.status
            return bytes((status,))
        finally:
            if self._question is not None:
                self._report(self._question, status)
        return bytes((status,)) + (cbor.encode(reply) if reply else b"")

    async def _dispatch(self, command: Command, parameters: Parameters) -> _Reply:
        match command:
            case Command.MAKE_CREDENTIAL:
                return await self._make_credential(parameters)
            case Command.GET_ASSERTION:
                return await self._get_assertion(parameters)
            case Command.GET_NEXT_ASSERTION:
                return await self._continue(command, 0)
            case Command.GET_INFO:
                return self._get_info()
            case Command.CLIENT_PIN:
                return await self._client_pin(parameters)
            case Command.RESET:
                return await self._reset()
            case Command.SELECTION:
                self._question = Question(Use.SELECT)
                await self._present()
                return {}
            case Command.CREDENTIAL_MANAGEMENT | Command.CREDENTIAL_MANAGEMENT_PREVIEW:
                return await self._credential_management(command, parameters)

    async def _present(self) -> None:
        """Ask the user. Raise :class:`CtapError` unless the request is allowed."""
        assert self._question is not None
        answer = await self._ask(self._question)
        if answer is not Answer.ALLOW:
            raise CtapError(_PRESENCE_STATUS[answer])

    # authenticatorGetInfo (6.4)

    def _get_info(self) -> _Reply:
        state = self._store.state
        return {
            1: VERSIONS,
            2: ("credProtect", "hmac-secret"),
            3: AAGUID,
            4: {
                "rk": True,
                "up": True,
                "plat": False,
                "credMgmt": True,
                "clientPin": state.pin is not None,
                "pinUvAuthToken": True,
                "makeCredUvNotRqd": True,
                "credentialMgmtPreview": True,
            },
            5: MAX_MESSAGE,
            6: list(self._protocols),
            7: MAX_LIST,
            8: MAX_ID,
            9: ("usb",),
            10: [{"alg": int(algorithm), "type": "public-key"} for algorithm in Algorithm],
            13: MIN_PIN,
            14: 1,
            20: MAX_CREDENTIALS - len(state.credentials),
        }

    # authenticatorMakeCredential (6.1)

    async def _make_credential(self, parameters: Parameters) -> _Reply:
        client_data = _hash(parameters.need(1, bytes))
        rp = Parameters(parameters.need(2, dict))
        rp_id = rp.need("id", str)
        user = _user(Parameters(parameters.need(3, dict)))
        self._question = Question(Use.REGISTER, rp_id[:MAX_SITE], str(user)[:MAX_SITE])
        if not rp_id or len(rp_id) > MAX_RP_ID or len(user.id) > MAX_USER_ID:
            raise CtapError(Status.INVALID_LENGTH)
        algorithm = _algorithm(parameters.need(4, list))
        excluded = _ids(parameters.get(5, list))
        extensions, options = parameters.inner(6), parameters.inner(7)
        protection = _protection(extensions.get("credProtect", int))
        hmac_secret = extensions.option("hmac-secret")
        code = await self._code(parameters, 8)
        _check_uv(options, code)
        if options.option("up") is False:
            raise CtapError(Status.INVALID_OPTION)
        if parameters.get(0x0A, int) is not None:
            raise CtapError(Status.INVALID_PARAMETER)  # enterprise attestation
        discoverable = bool(options.option("rk"))
        verified = self._verified(parameters.get(9, int), code, client_data, Permission.MAKE_CREDENTIAL, rp_id)
        if not verified and discoverable and self._store.state.pin is not None:
            raise CtapError(Status.PUAT_REQUIRED)
        rp_hash = sha256(rp_id.encode()).digest()
        existing = [self._store.state.find(id, rp_hash) for id in excluded]
        if any(one is not None and (verified or one.protection is not Protection.REQUIRED) for one in existing):
            await self._present()
            raise CtapError(Status.CREDENTIAL_EXCLUDED)
        await self._present()
        self._used()
        state = self._store.state
        key = PrivateKey.generate(algorithm)
        if discoverable:
            id = secrets.token_bytes(DISCOVERABLE_ID_SIZE)
            name = _cut(rp.get("name", str) or "")
            credential = Credential(id, rp_id, user, key, protection or Protection.OPTIONAL, rp_name=name)
            if state.is_full(credential):
                raise CtapError(Status.KEY_STORE_FULL)
            state = state.with_credential(credential)
        else:
            id = state.seal(key, protection or Protection.OPTIONAL, rp_hash)
        state = replace(state, counter=state.counter + 1)
        await self._store.save(state)
        outputs: dict[Key, Value] = {}
        if protection is not None:
            outputs["credProtect"] = int(protection)
        if hmac_secret:
            outputs["hmac-secret"] = True
        attested = AAGUID + len(id).to_bytes(2, "big") + id + cbor.encode(key.cose)
        flags = Flags.USER_PRESENT | Flags.ATTESTED | (Flags.USER_VERIFIED if verified else 0)
        data = _authenticator_data(rp_hash, flags, state.counter, attested, outputs)
        statement: dict[Key, Value] = {"alg": int(algorithm), "sig": key.sign(data + client_data)}
        return {1: "packed", 2: data, 3: statement}

    # authenticatorGetAssertion (6.2), authenticatorGetNextAssertion (6.3)

    async def _get_assertion(self, parameters: Parameters) -> _Reply:
        rp_id = parameters.need(1, str)
        self._question = Question(Use.SIGN_IN, rp_id[:MAX_SITE])
        client_data = _hash(parameters.need(2, bytes))
        listed: list[Value] | None = parameters.get(3, list)
        allowed = _ids(listed)
        extensions, options = parameters.inner(4), parameters.inner(5)
        code = await self._code(parameters, 6)
        if options.option("rk") is not None:
            raise CtapError(Status.UNSUPPORTED_OPTION)
        _check_uv(options, code)
        present = options.option("up") is not False
        if not present:
            self._question = replace(self._question, use=Use.LOOK_UP)
        verified = self._verified(parameters.get(7, int), code, client_data, Permission.GET_ASSERTION, rp_id)
        rp_hash = sha256(rp_id.encode()).digest()
        salts = self._salts(extensions) if "hmac-secret" in extensions.values else None
        if salts is not None and not present:
            raise CtapError(Status.UNSUPPORTED_OPTION)
        found = self._applicable(rp_hash, allowed if listed else None, verified)
        if not found:
            raise CtapError(Status.NO_CREDENTIALS)
        self._question = replace(self._question, user=_user_name(found[0]))
        if present:
            await self._present()
            self._used()
        flags = (Flags.USER_PRESENT if present else Flags(0)) | (Flags.USER_VERIFIED if verified else 0)

        def reply(credential: Credential, total: int) -> Callable[[], Awaitable[_Reply]]:
            named = verified and len(found) > 1
            return lambda: self._assert(credential, rp_hash, client_data, flags, salts, named, total)

        if len(found) > 1:
            rest = [reply(credential, 0) for credential in found[1:]]
            self._next = _Next(Command.GET_NEXT_ASSERTION, 0, rest, self._clock() + NEXT_LIFETIME)
        return await reply(found[0], len(found))()

    def _applicable(self, rp_hash: bytes, allowed: Sequence[bytes] | None, verified: bool) -> list[Credential]:
        """Return the credentials that a request may use: one of its list, or the discoverable ones of the site."""
        state = self._store.state
        if allowed is None:
            need_verification = (Protection.OPTIONAL_WITH_ID, Protection.REQUIRED)
            return [one for one in state.of(rp_hash) if verified or one.protection not in need_verification]
        for id in allowed:
            credential = state.find(id, rp_hash)
            if credential is not None and (verified or credential.protection is not Protection.REQUIRED):
                return [credential]
        return []

    async def _assert(
        self,
        credential: Credential,
        rp_hash: bytes,
        client_data: bytes,
        flags: Flags,
        salts: _Salts | None,
        named: bool,
        total: int,
    ) -> _Reply:
        """Return the reply with the assertion of one credential."""
        state = replace(self._store.state, counter=self._store.state.counter + 1)
        outputs: dict[Key, Value] = {}
        if salts is not None:
            secret = hmac_secret(state, credential, verified=bool(flags & Flags.USER_VERIFIED))
            outputs["hmac-secret"] = salts.output(secret)
        await self._store.save(state)
        data = _authenticator_data(rp_hash, flags, state.counter, b"", outputs)
        reply: _Reply = {
            1: {"id": credential.id, "type": "public-key"},
            2: data,
            3: credential.key.sign(data + client_data),
        }
        if credential.discoverable:
            user: dict[Key, Value] = {"id": credential.user.id}
            if named:
                user |= _names(credential.user)
            reply[4] = user
        if total > 1:
            reply[5] = total
        return reply

    def _salts(self, extensions: Parameters) -> _Salts:
        """Return the decrypted input of the extension hmac-secret (12.5)."""
        parameters = Parameters(extensions.need("hmac-secret", dict))
        protocol = self._protocol(parameters.get(4, int) or PinProtocol.number)
        secret = _shared_secret(protocol, Parameters(parameters.need(1, dict)))
        encrypted = parameters.need(2, bytes)
        if not protocol.verify(secret, encrypted, parameters.need(3, bytes)):
            raise CtapError(Status.PIN_AUTH_INVALID)
        salts = _decrypt(protocol, secret, encrypted)
        if len(salts) not in (32, 64):
            raise CtapError(Status.INVALID_LENGTH)
        return _Salts(protocol, secret, salts)

    async def _continue(self, command: Command, subcommand: int) -> _Reply:
        """Return the next item of the list that a client iterates over."""
        pending, self._next = self._next, None
        if (
            pending is None
            or (pending.command, pending.subcommand) != (command, subcommand)
            or self._clock() >= pending.expires
        ):
            raise CtapError(Status.NOT_ALLOWED)
        reply = await pending.replies[0]()
        if pending.replies[1:]:
            expires = self._clock() + NEXT_LIFETIME
            self._next = replace(pending, replies=pending.replies[1:], expires=expires)
        return reply

    # User verification (6.5)

    async def _code(self, parameters: Parameters, key: int) -> bytes | None:
        """Return pinUvAuthParam. An empty one asks which of several keys the user means (6.1.2, step 1)."""
        code = parameters.get(key, bytes)
        if code == b"":
            await self._present()
            raise CtapError(Status.PIN_NOT_SET if self._store.state.pin is None else Status.PIN_INVALID)
        return code

    def _protocol(self, number: int | None) -> PinProtocol:
        if number is None:
            raise CtapError(Status.MISSING_PARAMETER)
        if number not in self._protocols:
            raise CtapError(Status.INVALID_PARAMETER)
        return self._protocols[number]

    def _verified(
        self, protocol: int | None, code: bytes | None, message: bytes, permission: Permission, rp_id: str | None
    ) -> bool:
        """Return whether a request has the permission of a user who entered the PIN; False if it does not claim so.

        Raises:
            CtapError: the request claims to have the permission, and does not have it.
        """
        if code is None:
            return False
        used = self._protocol(protocol)
        token = self._token
        if token is None or not used.verify(used.token, message, code):
            raise CtapError(Status.PIN_AUTH_INVALID)
        if self._clock() >= token.expires:
            self._token = None
            raise CtapError(Status.PIN_AUTH_INVALID)
        if permission not in token.permissions or (token.rp_id is not None and token.rp_id != rp_id):
            raise CtapError(Status.PIN_AUTH_INVALID)
        if token.rp_id is None and permission is not Permission.CREDENTIAL_MANAGEMENT:
            token.rp_id = rp_id
        return True

    def _used(self) -> None:
        """End the permissions of the tokens after a request with user presence (6.5.5.7)."""
        self._token = None

    async def _client_pin(self, parameters: Parameters) -> _Reply:
        subcommand = parameters.need(2, int)
        match subcommand:
            case 1:  # getPINRetries
                pin = self._store.state.pin
                retries = MAX_RETRIES if pin is None else pin.retries
                return {3: retries, 4: self._mismatches >= MAX_MISMATCHES}
            case 2:  # getKeyAgreement
                return {1: self._protocol(parameters.get(1, int)).public_key}
            case 3:
                return await self._set_pin(parameters)
            case 4:
                return await self._change_pin(parameters)
            case 5:  # getPinToken: that of CTAP 2.0
                if 9 in parameters.values or 10 in parameters.values:
                    raise CtapError(Status.INVALID_PARAMETER)
                return await self._get_token(parameters, Permission.MAKE_CREDENTIAL | Permission.GET_ASSERTION, None)
            case 9:  # getPinUvAuthTokenUsingPinWithPermissions
                permissions, rp_id = parameters.need(9, int), parameters.get(10, str)
                if permissions <= 0:
                    raise CtapError(Status.INVALID_PARAMETER)
                if permissions & ~int(_ALL_PERMISSIONS):
                    raise CtapError(Status.UNAUTHORIZED_PERMISSION)
                granted = Permission(permissions)
                if granted & (Permission.MAKE_CREDENTIAL | Permission.GET_ASSERTION) and rp_id is None:
                    raise CtapError(Status.MISSING_PARAMETER)
                return await self._get_token(parameters, granted, rp_id)
        raise CtapError(Status.INVALID_SUBCOMMAND)

    async def _set_pin(self, parameters: Parameters) -> _Reply:
        self._question = Question(Use.SET_PIN)
        protocol = self._protocol(parameters.get(1, int))
        code, encrypted = parameters.need(4, bytes), parameters.need(5, bytes)
        if self._store.state.pin is not None:
            raise CtapError(Status.PIN_AUTH_INVALID)
        secret = _shared_secret(protocol, Parameters(parameters.need(3, dict)))
        if not protocol.verify(secret, encrypted, code):
            raise CtapError(Status.PIN_AUTH_INVALID)
        await self._store.save(replace(self._store.state, pin=Pin(_new_pin(protocol, secret, encrypted))))
        return {}

    async def _change_pin(self, parameters: Parameters) -> _Reply:
        self._question = Question(Use.CHANGE_PIN)
        protocol = self._protocol(parameters.get(1, int))
        code, new = parameters.need(4, bytes), parameters.need(5, bytes)
        old = parameters.need(6, bytes)
        self._check_pin_allowed()
        secret = _shared_secret(protocol, Parameters(parameters.need(3, dict)))
        if not protocol.verify(secret, new + old, code):
            raise CtapError(Status.PIN_AUTH_INVALID)
        await self._check_pin(protocol, secret, old)
        await self._store.save(replace(self._store.state, pin=Pin(_new_pin(protocol, secret, new))))
        self._token = None
        for one in self._protocols.values():
            one.reset_token()
        return {}

    async def _get_token(self, parameters: Parameters, permissions: Permission, rp_id: str | None) -> _Reply:
        self._question = Question(Use.ENTER_PIN, (rp_id or "")[:MAX_SITE])
        protocol = self._protocol(parameters.get(1, int))
        agreed, encrypted = Parameters(parameters.need(3, dict)), parameters.need(6, bytes)
        self._check_pin_allowed()
        secret = _shared_secret(protocol, agreed)
        await self._check_pin(protocol, secret, encrypted)
        for one in self._protocols.values():
            one.reset_token()
        self._token = _Token(permissions, rp_id, self._clock() + TOKEN_LIFETIME)
        return {2: protocol.encrypt(secret, protocol.token)}

    def _check_pin_allowed(self) -> None:
        pin = self._store.state.pin
        if pin is None:
            raise CtapError(Status.PIN_NOT_SET)
        if not pin.retries:
            raise CtapError(Status.PIN_BLOCKED)
        if self._mismatches >= MAX_MISMATCHES:
            raise CtapError(Status.PIN_AUTH_BLOCKED)

    async def _check_pin(self, protocol: PinProtocol, secret: bytes, encrypted: bytes) -> None:
        """Compare the PIN that a client sends. The try is counted, and saved, before."""
        state = self._store.state
        pin = state.pin
        assert pin is not None
        pin = replace(pin, retries=pin.retries - 1)
        await self._store.save(replace(state, pin=pin))
        if not hmac.compare_digest(_decrypt(protocol, secret, encrypted), pin.hash):
            protocol.regenerate()
            self._mismatches += 1
            if not pin.retries:
                raise CtapError(Status.PIN_BLOCKED)
            raise CtapError(Status.PIN_AUTH_BLOCKED if self._mismatches >= MAX_MISMATCHES else Status.PIN_INVALID)
        self._mismatches = 0
        await self._store.save(replace(self._store.state, pin=Pin(pin.hash)))

    # authenticatorReset (6.6)

    async def _reset(self) -> _Reply:
        self._question = Question(Use.RESET)
        await self._present()
        await self._store.save(replace(KeyState.new(), counter=self._store.state.counter))
        self.power_up()
        return {}

    # authenticatorCredentialManagement (6.8)

    async def _credential_management(self, command: Command, parameters: Parameters) -> _Reply:
        subcommand = parameters.need(1, int)
        if subcommand in (3, 5):
            return await self._continue(command, subcommand)
        inner = parameters.inner(2)
        match subcommand:
            case 1 | 2 | 4:
                self._question = Question(Use.LIST)
            case 6 | 7:
                self._question = Question(Use.DELETE if subcommand == 6 else Use.UPDATE)
            case _:
                raise CtapError(Status.INVALID_SUBCOMMAND)
        code = parameters.get(4, bytes)
        if code is None:
            raise CtapError(Status.PUAT_REQUIRED)
        self._next = None
        message = bytes((subcommand,)) + (cbor.encode(inner.values) if subcommand in (4, 6, 7) else b"")
        # A token for one site manages the credentials of that site only.
        rp_id = None if self._token is None else self._rp_id_of(subcommand, inner)
        self._verified(parameters.get(3, int), code, message, Permission.CREDENTIAL_MANAGEMENT, rp_id)
        credentials = self._store.state.credentials
        match subcommand:
            case 1:
                return {1: len(credentials), 2: MAX_CREDENTIALS - len(credentials)}
            case 2:
                return await self._list_sites(command)
            case 4:
                return await self._list_credentials(command, inner.need(1, bytes))
        return await self._change(subcommand, inner)

    def _rp_id_of(self, subcommand: int, inner: Parameters) -> str | None:
        """Return the site that a subcommand is about; None: all, or none."""
        for one in self._store.state.credentials:
            if subcommand == 4 and one.rp_hash == inner.values.get(1):
                return one.rp_id
            if subcommand in (6, 7) and one.id == inner.inner(2).values.get("id"):
                return one.rp_id
        return None

    async def _list_sites(self, command: Command) -> _Reply:
        sites = {one.rp_id: one for one in self._store.state.credentials}

        async def reply(credential: Credential, total: int) -> _Reply:
            rp: dict[Key, Value] = {"id": credential.rp_id}
            if credential.rp_name:
                rp["name"] = credential.rp_name
            found: _Reply = {3: rp, 4: credential.rp_hash}
            return {**found, 5: total} if total else found

        return await self._list(command, 3, list(sites.values()), reply)

    async def _list_credentials(self, command: Command, rp_hash: bytes) -> _Reply:
        async def reply(credential: Credential, total: int) -> _Reply:
            user: dict[Key, Value] = {"id": credential.user.id, **_names(credential.user)}
            found: _Reply = {
                6: user,
                7: {"id": credential.id, "type": "public-key"},
                8: credential.key.cose,
                10: int(credential.protection),
            }
            return {**found, 9: total} if total else found

        return await self._list(command, 5, self._store.state.of(rp_hash), reply)

    async def _list(
        self,
        command: Command,
        subcommand: int,
        found: Sequence[Credential],
        reply: Callable[[Credential, int], Awaitable[_Reply]],
    ) -> _Reply:
        """Return the first item of a list, and keep the others for the subcommand that continues."""
        if not found:
            raise CtapError(Status.NO_CREDENTIALS)

        def later(credential: Credential) -> Callable[[], Awaitable[_Reply]]:
            return lambda: reply(credential, 0)

        if found[1:]:
            expires = self._clock() + NEXT_LIFETIME
            self._next = _Next(command, subcommand, [later(one) for one in found[1:]], expires)
        return await reply(found[0], len(found))

    async def _change(self, subcommand: int, inner: Parameters) -> _Reply:
        """Delete a credential, or rename the user of one."""
        id = Parameters(inner.need(2, dict)).need("id", bytes)
        state = self._store.state
        found = next((one for one in state.credentials if one.id == id), None)
        assert self._question is not None
        if found is None:
            raise CtapError(Status.NO_CREDENTIALS)
        self._question = replace(self._question, site=found.rp_id, user=str(found.user)[:MAX_SITE])
        if subcommand == 6:
            kept = tuple(one for one in state.credentials if one is not found)
        else:
            user = _user(Parameters(inner.need(3, dict)))
            if user.id != found.user.id:
                raise CtapError(Status.INVALID_PARAMETER)
            kept = tuple(replace(one, user=user) if one is found else one for one in state.credentials)
        await self._store.save(replace(state, credentials=kept))
        return {}


@dataclass(frozen=True, slots=True)
class _Salts:
    """The input of the extension hmac-secret."""

    protocol: PinProtocol
    secret: bytes
    salts: bytes

    def output(self, secret: bytes) -> bytes:
        """Return the encrypted output for a credential's secret."""
        salts = (self.salts[at : at + 32] for at in range(0, len(self.salts), 32))
        return self.protocol.encrypt(self.secret, b"".join(hmac.digest(secret, salt, sha256) for salt in salts))


def hmac_secret(state: KeyState, credential: Credential, *, verified: bool) -> bytes:
    """Return the secret of a credential for the extension hmac-secret: one with user verification, one without."""
    return state.derive((b"hmac-secret verified" if verified else b"hmac-secret") + credential.key.secret)


def _command(data: bytes) -> Command:
    try:
        return Command(data[0])
    except (ValueError, IndexError):
        raise CtapError(Status.INVALID_COMMAND) from None


def _parameters(data: bytes) -> Parameters:
    try:
        values = cbor.decode(data) if data else {}
    except CborError:
        raise CtapError(Status.INVALID_CBOR) from None
    if not isinstance(values, dict):
        raise CtapError(Status.CBOR_UNEXPECTED_TYPE)
    return Parameters(values)


def _hash(data: bytes) -> bytes:
    if len(data) != 32:
        raise CtapError(Status.INVALID_LENGTH)
    return data


def _cut(text: str) -> str:
    return text.encode()[:MAX_NAME].decode(errors="ignore")


def _user(parameters: Parameters) -> User:
    name, display_name = parameters.get("name", str) or "", parameters.get("displayName", str) or ""
    return User(parameters.need("id", bytes), _cut(name), _cut(display_name))


def _names(user: User) -> dict[Key, Value]:
    names: dict[Key, Value] = {"name": user.name, "displayName": user.display_name}
    return {key: value for key, value in names.items() if value}


def _user_name(credential: Credential) -> str:
    return str(credential.user)[:MAX_SITE]


def _algorithm(offered: Sequence[Value]) -> Algorithm:
    """Return the first algorithm of a list that the key has."""
    chosen: Algorithm | None = None
    for one in offered:
        parameters = _entry(one)
        kind, number = parameters.need("type", str), parameters.need("alg", int)
        if chosen is None and kind == "public-key" and number in list(Algorithm):
            chosen = Algorithm(number)
    if chosen is None:
        raise CtapError(Status.UNSUPPORTED_ALGORITHM)
    return chosen


def _check_uv(options: Parameters, code: bytes | None) -> None:
    """Refuse the option ``uv``, which the key does not have, unless pinUvAuthParam makes it false (6.1.2, step 5)."""
    if options.option("uv") and code is None:
        raise CtapError(Status.INVALID_OPTION)


def _ids(listed: Sequence[Value] | None) -> list[bytes]:
    """Return the ids of a list of credential descriptors."""
    if listed is not None and len(listed) > MAX_LIST:
        raise CtapError(Status.LIMIT_EXCEEDED)
    descriptors = [_entry(one) for one in listed or ()]
    return [one.need("id", bytes) for one in descriptors if one.need("type", str) == "public-key"]


def _entry(value: Value) -> Parameters:
    if not isinstance(value, dict):
        raise CtapError(Status.CBOR_UNEXPECTED_TYPE)
    return Parameters(value)


def _protection(value: int | None) -> Protection | None:
    if value is None:
        return None
    if value not in list(Protection):
        raise CtapError(Status.INVALID_OPTION)
    return Protection(value)


def _authenticator_data(
    rp_hash: bytes, flags: Flags, counter: int, attested: bytes, outputs: Mapping[Key, Value]
) -> bytes:
    """Return authenticator data (WebAuthn, chapter 6.1)."""
    if outputs:
        flags |= Flags.EXTENSIONS
    head = rp_hash + bytes((flags,)) + (counter & 0xFFFFFFFF).to_bytes(4, "big")
    return head + attested + (cbor.encode(outputs) if outputs else b"")


def _shared_secret(protocol: PinProtocol, key: Parameters) -> bytes:
    """Return the secret that the key shares with the client that has a COSE_Key."""
    try:
        return protocol.shared_secret(key.need(-2, bytes), key.need(-3, bytes))
    except ValueError:
        raise CtapError(Status.INVALID_PARAMETER) from None


def _decrypt(protocol: PinProtocol, secret: bytes, data: bytes) -> bytes:
    try:
        return protocol.decrypt(secret, data)
    except ValueError:
        raise CtapError(Status.INVALID_LENGTH) from None


def _new_pin(protocol: PinProtocol, secret: bytes, encrypted: bytes) -> bytes:
    """Return the hash of a new PIN."""
    padded = _decrypt(protocol, secret, encrypted)
    if len(padded) != MAX_PIN + 1:
        raise CtapError(Status.INVALID_PARAMETER)
    pin = padded.rstrip(b"\0")
    try:
        characters = len(unicodedata.normalize("NFC", pin.decode()))
    except UnicodeDecodeError:
        raise CtapError(Status.PIN_POLICY_VIOLATION) from None
    if characters < MIN_PIN or len(pin) > MAX_PIN:
        raise CtapError(Status.PIN_POLICY_VIOLATION)
    return sha256(pin).digest()[:16]
