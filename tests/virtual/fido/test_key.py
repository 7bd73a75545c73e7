"""A security key in a guest in memory, used by Yubico's client library."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Mapping
from typing import Any

import pytest
from fido2.client import DefaultClientDataCollector, Fido2Client
from fido2.cose import ES256, EdDSA
from fido2.ctap import CtapError
from fido2.ctap1 import APDU, ApduError, Ctap1, SignatureData
from fido2.ctap2 import ClientPin, CredentialManagement, Ctap2
from fido2.ctap2.extensions import HmacSecretExtension
from fido2.ctap2.pin import PinProtocol, PinProtocolV1, PinProtocolV2
from fido2.hid import CTAPHID, CtapHidDevice
from fido2.server import Fido2Server
from fido2.utils import websafe_decode
from fido2.webauthn import (
    PublicKeyCredentialRpEntity,
    PublicKeyCredentialUserEntity,
    ResidentKeyRequirement,
    UserVerificationRequirement,
)
from tests.virtual.fido.client import PIN, Typist, client, events_of, plugged

from farplug.errors import Reason, UsageError
from farplug.virtual.fido import Answer, KeyState, MemoryKeyStore, Presence, SecurityKey
from farplug.virtual.fido import key as fido_key
from farplug.virtual.fido.credentials import MAX_CREDENTIALS, Algorithm, Credential, PrivateKey, User
from farplug.virtual.fido.events import KeyUsed, PresenceAnswered, PresenceAsked

RP = {"id": "example.com", "name": "Example"}
ALICE = {"id": b"alice", "name": "alice@example.com", "displayName": "Alice"}
BOB = {"id": b"bob", "name": "bob@example.com", "displayName": "Bob"}
HASH = hashlib.sha256(b"client data").digest()
ES, ED = {"type": "public-key", "alg": -7}, {"type": "public-key", "alg": -8}
PROTOCOLS = [PinProtocolV1, PinProtocolV2]


def make(ctap: Ctap2, user: Mapping[str, Any] = ALICE, *, rp: Mapping[str, Any] = RP, **more: Any) -> Any:
    more.setdefault("options", {"rk": True})
    return ctap.make_credential(HASH, rp, user, more.pop("algorithms", [ES]), **more)


def descriptor(credential_id: bytes) -> dict[str, Any]:
    return {"type": "public-key", "id": credential_id}


def pin_token(
    ctap: Ctap2, permission: ClientPin.PERMISSION, pin: str = PIN, kind: type[PinProtocol] = PinProtocolV2
) -> bytes:
    token: bytes = ClientPin(ctap, kind()).get_pin_token(pin, permission, "example.com")
    return token


def failure(call: Any, *arguments: Any, **named: Any) -> str:
    """Return the name of the status that a call fails with."""
    with pytest.raises(CtapError) as caught:
        call(*arguments, **named)
    return str(caught.value.code.name)


async def test_what_the_key_is() -> None:
    async with plugged(SecurityKey()) as guest:
        info = await client(guest, lambda device: Ctap2(device).info)
    assert info.versions == ["U2F_V2", "FIDO_2_0", "FIDO_2_1"]
    assert info.options["rk"]
    assert info.options["clientPin"] is False
    assert info.pin_uv_protocols == [2, 1]
    assert info.max_msg_size == 7609
    assert info.transports == ["usb"]
    assert [one["alg"] for one in info.algorithms] == [-7, -8]
    assert info.remaining_disc_creds == MAX_CREDENTIALS
    assert ClientPin.is_token_supported(info)
    assert CredentialManagement.is_update_supported(info)


@pytest.mark.parametrize("discoverable", [True, False])
@pytest.mark.parametrize("algorithm", [ES256, EdDSA])
async def test_register_and_sign_in(algorithm: Any, discoverable: bool) -> None:
    """As a browser and a server do it: the server verifies the attestation and the signature."""
    server = Fido2Server(PublicKeyCredentialRpEntity(name="Example", id="example.com"), attestation="direct")
    server.allowed_algorithms = [one for one in server.allowed_algorithms if one.alg == algorithm.ALGORITHM]
    user = PublicKeyCredentialUserEntity(id=b"alice", name="alice", display_name="Alice")

    def use(device: CtapHidDevice) -> None:
        browser: Any = Fido2Client(device, DefaultClientDataCollector("https://example.com"), user_interaction=Typist())
        requirement = ResidentKeyRequirement.REQUIRED if discoverable else ResidentKeyRequirement.DISCOURAGED
        options, state = server.register_begin(
            user, resident_key_requirement=requirement, user_verification=UserVerificationRequirement.DISCOURAGED
        )
        result = browser.make_credential(options["publicKey"])
        data = server.register_complete(state, result)
        assert result.response.attestation_object.fmt == "packed"
        assert data.credential_data is not None
        assert isinstance(data.credential_data.public_key, algorithm)
        known = [data.credential_data]
        counters = []
        for _ in range(2):
            options, state = server.authenticate_begin(
                None if discoverable else known, user_verification=UserVerificationRequirement.DISCOURAGED
            )
            answer = browser.get_assertion(options["publicKey"]).get_response(0)
            server.authenticate_complete(state, known, answer)
            counters.append(answer.response.authenticator_data.counter)
        assert counters[0] < counters[1]

    key = SecurityKey()
    async with plugged(key) as guest:
        await client(guest, use)
        used = [
            (event.use, event.site, event.user, event.status)
            for event in events_of(guest)
            if isinstance(event, KeyUsed)
        ]
    assert ("register", "example.com", "alice", "success") in used
    assert ("sign-in", "example.com", "alice" if discoverable else "", "success") in used
    assert len(key.store.state.credentials) == discoverable


async def test_several_accounts_and_sites() -> None:
    def use(device: CtapHidDevice) -> None:
        ctap: Any = Ctap2(device)
        first, second = make(ctap), make(ctap, BOB)
        make(ctap, rp={"id": "other.example"})
        found = ctap.get_assertions("example.com", HASH)
        assert [one.user["id"] for one in found] == [b"bob", b"alice"]  # the newest first
        assert [one.user.get("name") for one in found] == [None, None]  # without a PIN no name leaves the key
        for made, one in zip((second, first), found, strict=True):
            one.verify(HASH, made.auth_data.credential_data.public_key)
        with pytest.raises(CtapError, match="NOT_ALLOWED"):
            ctap.get_next_assertion()
        assert failure(ctap.get_assertion, "nowhere.example", HASH) == "NO_CREDENTIALS"
        assert (
            failure(
                ctap.get_assertion, "other.example", HASH, [descriptor(second.auth_data.credential_data.credential_id)]
            )
            == "NO_CREDENTIALS"
        )
        again = make(ctap)  # of the same user: in place of the first
        assert len(ctap.get_assertions("example.com", HASH)) == 2
        old = first.auth_data.credential_data.credential_id
        assert failure(ctap.get_assertion, "example.com", HASH, [descriptor(old)]) == "NO_CREDENTIALS"
        allowed = [descriptor(old), descriptor(again.auth_data.credential_data.credential_id)]
        ctap.get_assertion("example.com", HASH, allowed).verify(HASH, again.auth_data.credential_data.public_key)
        assert failure(make, ctap, exclude_list=allowed) == "CREDENTIAL_EXCLUDED"
        silent = ctap.get_assertion("example.com", HASH, allowed, options={"up": False})
        assert not silent.auth_data.flags & 1

    async with plugged(SecurityKey()) as guest:
        await client(guest, use)


async def test_what_a_client_may_not_ask() -> None:
    def use(device: CtapHidDevice) -> None:
        ctap: Any = Ctap2(device)
        assert failure(make, ctap, algorithms=[{"type": "public-key", "alg": -257}]) == "UNSUPPORTED_ALGORITHM"
        assert failure(make, ctap, options={"uv": True}) == "INVALID_OPTION"
        assert failure(make, ctap, options={"up": False}) == "INVALID_OPTION"
        assert failure(make, ctap, enterprise_attestation=1) == "INVALID_PARAMETER"
        assert failure(make, ctap, rp={"id": "x" * 300}) == "INVALID_LENGTH"
        assert failure(make, ctap, rp={"name": "no id"}) == "MISSING_PARAMETER"
        assert failure(make, ctap, user={"id": b"x" * 65, "name": "x"}) == "INVALID_LENGTH"
        assert failure(make, ctap, user={"id": "text"}) == "CBOR_UNEXPECTED_TYPE"
        assert failure(make, ctap, extensions={"credProtect": 4}) == "INVALID_OPTION"
        assert failure(make, ctap, exclude_list=[descriptor(b"x")] * 65) == "LIMIT_EXCEEDED"
        assert failure(make, ctap, pin_uv_param=b"x" * 16, pin_uv_protocol=1) == "PIN_AUTH_INVALID"
        assert failure(make, ctap, pin_uv_param=b"x" * 16, pin_uv_protocol=3) == "INVALID_PARAMETER"
        assert failure(make, ctap, pin_uv_param=b"x" * 16) == "MISSING_PARAMETER"
        assert failure(make, ctap, pin_uv_param=b"", pin_uv_protocol=1) == "PIN_NOT_SET"
        assert failure(ctap.get_assertion, "example.com", b"short") == "INVALID_LENGTH"
        assert failure(ctap.get_assertion, "example.com", HASH, options={"rk": True}) == "UNSUPPORTED_OPTION"
        assert failure(ctap.get_assertion, "example.com", HASH, options={"uv": True}) == "INVALID_OPTION"
        assert failure(ctap.client_pin, 1, 99) == "INVALID_SUBCOMMAND"
        assert failure(ctap.credential_mgmt, 99) == "INVALID_SUBCOMMAND"
        assert failure(ctap.credential_mgmt, 1) == "PUAT_REQUIRED"
        for raw, status in (
            (b"\x01", "MISSING_PARAMETER"),
            (b"\x01\xa1", "INVALID_CBOR"),
            (b"\x01\x00", "CBOR_UNEXPECTED_TYPE"),
            (b"\x99", "INVALID_COMMAND"),
            (b"\x03", "INVALID_COMMAND"),
        ):
            assert device.call(CTAPHID.CBOR, raw) == bytes((CtapError.ERR[status],))

    async with plugged(SecurityKey()) as guest:
        await client(guest, use)


@pytest.mark.parametrize("kind", PROTOCOLS)
async def test_the_pin(kind: type[PinProtocol]) -> None:
    def use(device: CtapHidDevice) -> None:
        ctap: Any = Ctap2(device)
        pin = ClientPin(ctap, kind())
        assert pin.get_pin_retries() == (8, 0)
        assert failure(pin.get_pin_token, PIN) == "PIN_NOT_SET"
        assert failure(pin.change_pin, PIN, "5678") == "PIN_NOT_SET"
        pin.set_pin(PIN)
        assert failure(pin.set_pin, PIN) == "PIN_AUTH_INVALID"
        assert ctap.get_info().options["clientPin"]
        assert failure(make, ctap) == "PUAT_REQUIRED"
        make(ctap, options={"rk": False})  # makeCredUvNotRqd
        assert failure(pin.get_pin_token, "wrong") == "PIN_INVALID"
        assert pin.get_pin_retries()[0] == 7
        pin.change_pin(PIN, "pässwörd")
        assert pin.get_pin_retries()[0] == 8
        permissions = ClientPin.PERMISSION
        token = pin.get_pin_token("pässwörd", permissions.MAKE_CREDENTIAL, "example.com")
        code = pin.protocol.authenticate(token, HASH)
        options = {"rk": True, "uv": True}  # uv has no effect together with a code
        made = make(ctap, options=options, pin_uv_param=code, pin_uv_protocol=kind.VERSION)
        assert made.auth_data.flags & 4  # user verified
        assert failure(make, ctap, BOB, pin_uv_param=code, pin_uv_protocol=kind.VERSION) == "PIN_AUTH_INVALID"
        token = pin.get_pin_token("pässwörd", permissions.MAKE_CREDENTIAL, "other.example")
        code = pin.protocol.authenticate(token, HASH)
        assert failure(make, ctap, BOB, pin_uv_param=code, pin_uv_protocol=kind.VERSION) == "PIN_AUTH_INVALID"
        assert (
            failure(ctap.get_assertion, "other.example", HASH, pin_uv_param=code, pin_uv_protocol=kind.VERSION)
            == "PIN_AUTH_INVALID"
        )
        token = pin.get_pin_token("pässwörd")  # that of CTAP 2.0
        code = pin.protocol.authenticate(token, HASH)
        options = {"uv": True}
        found = ctap.get_assertion(
            "example.com", HASH, options=options, pin_uv_param=code, pin_uv_protocol=kind.VERSION
        )
        assert found.auth_data.flags & 4
        assert failure(pin.get_pin_token, "pässwörd", permissions.BIO_ENROLL) == "UNAUTHORIZED_PERMISSION"
        assert failure(pin.get_pin_token, "pässwörd", permissions.MAKE_CREDENTIAL) == "MISSING_PARAMETER"
        assert failure(make, ctap, pin_uv_param=b"", pin_uv_protocol=1) == "PIN_INVALID"

    async with plugged(SecurityKey()) as guest:
        await client(guest, use)


async def test_wrong_pins_block_the_key() -> None:
    key = SecurityKey()

    def wrong(device: CtapHidDevice) -> list[str]:
        pin = ClientPin(Ctap2(device))
        return [failure(pin.get_pin_token, "wrong") for _ in range(4)]

    async with plugged(key) as guest:
        await client(guest, lambda device: ClientPin(Ctap2(device)).set_pin(PIN))
        assert await client(guest, wrong) == ["PIN_INVALID", "PIN_INVALID", "PIN_AUTH_BLOCKED", "PIN_AUTH_BLOCKED"]
        assert await client(guest, lambda device: ClientPin(Ctap2(device)).get_pin_retries()) == (5, 1)
        await guest.set_configuration(1)  # it has power again
        await guest.start_receiving(0x81)
        assert (await client(guest, wrong))[2] == "PIN_AUTH_BLOCKED"
        await guest.set_configuration(1)
        await guest.start_receiving(0x81)
        assert await client(guest, wrong) == ["PIN_INVALID", "PIN_BLOCKED", "PIN_BLOCKED", "PIN_BLOCKED"]
        await guest.set_configuration(1)
        await guest.start_receiving(0x81)
        pin = await client(guest, lambda device: failure(ClientPin(Ctap2(device)).get_pin_token, PIN))
        assert pin == "PIN_BLOCKED"
        counter = key.store.state.counter
        await client(guest, lambda device: Ctap2(device).reset())
        assert await client(guest, lambda device: ClientPin(Ctap2(device)).get_pin_retries()) == (8, 0)
        assert (key.store.state.pin, key.store.state.counter) == (None, counter)


@pytest.mark.parametrize("kind", PROTOCOLS)
async def test_credential_management(kind: type[PinProtocol]) -> None:
    def use(device: CtapHidDevice) -> None:
        ctap: Any = Ctap2(device)
        for user in (ALICE, BOB):
            make(ctap, user)
        make(ctap, rp={"id": "other.example"})
        pin = ClientPin(ctap, kind())
        pin.set_pin(PIN)

        def management() -> CredentialManagement:
            token = pin.get_pin_token(PIN, ClientPin.PERMISSION.CREDENTIAL_MGMT)
            return CredentialManagement(ctap, pin.protocol, token)

        result = CredentialManagement.RESULT
        manager = management()
        metadata = manager.get_metadata()
        assert metadata[result.EXISTING_CRED_COUNT] == 3
        assert metadata[result.MAX_REMAINING_COUNT] == MAX_CREDENTIALS - 3
        sites = manager.enumerate_rps()
        assert [site[result.RP] for site in sites] == [RP, {"id": "other.example"}]
        found = manager.enumerate_creds(sites[0][result.RP_ID_HASH])
        assert [one[result.USER] for one in found] == [BOB, ALICE]
        assert [one[result.CRED_PROTECT] for one in found] == [1, 1]
        ids = [one[result.CREDENTIAL_ID] for one in found]
        manager.update_user_info(ids[1], {**ALICE, "displayName": "Alicia"})
        assert failure(manager.update_user_info, ids[1], BOB) == "INVALID_PARAMETER"
        manager.delete_cred(ids[0])
        assert failure(manager.delete_cred, ids[0]) == "NO_CREDENTIALS"
        (left,) = management().enumerate_creds(sites[0][result.RP_ID_HASH])
        assert left[result.USER]["displayName"] == "Alicia"
        manager = management()
        assert failure(manager.enumerate_creds_begin, b"x" * 32) == "NO_CREDENTIALS"
        assert failure(manager.enumerate_creds_next) == "NOT_ALLOWED"
        # a token for one site
        token = pin.get_pin_token(PIN, ClientPin.PERMISSION.CREDENTIAL_MGMT, "other.example")
        limited = CredentialManagement(ctap, pin.protocol, token)
        assert failure(limited.get_metadata) == "PIN_AUTH_INVALID"
        assert failure(limited.delete_cred, ids[1]) == "PIN_AUTH_INVALID"
        assert len(limited.enumerate_creds(sites[1][result.RP_ID_HASH])) == 1

    key = SecurityKey()
    async with plugged(key) as guest:
        await client(guest, use)
        used = [(event.use, event.site) for event in events_of(guest) if isinstance(event, KeyUsed)]
    assert ("delete", "example.com") in used
    assert len(key.store.state.credentials) == 2


async def test_a_full_key() -> None:
    state = KeyState.new()
    secret = PrivateKey.generate(Algorithm.ES256)
    full = [Credential(bytes((n,)) * 32, "example.com", User(bytes((n,))), secret) for n in range(MAX_CREDENTIALS)]
    store = MemoryKeyStore(KeyState(state.master, state.attestation, state.certificate, credentials=tuple(full)))

    def use(device: CtapHidDevice) -> None:
        ctap: Any = Ctap2(device)
        assert failure(make, ctap) == "KEY_STORE_FULL"
        make(ctap, {"id": b"\5", "name": "replaced"})
        make(ctap, options={"rk": False})
        assert len(ctap.get_assertions("example.com", HASH)) == MAX_CREDENTIALS

    async with plugged(SecurityKey(store)) as guest:
        await client(guest, use)


async def test_protected_credentials() -> None:
    def use(device: CtapHidDevice) -> None:
        ctap: Any = Ctap2(device)
        ids = {}
        for level in (1, 2, 3):
            made = make(ctap, {"id": bytes((level,)), "name": "x"}, extensions={"credProtect": level})
            assert made.auth_data.extensions == {"credProtect": level}
            ids[level] = made.auth_data.credential_data.credential_id
        assert [one.user["id"] for one in ctap.get_assertions("example.com", HASH)] == [b"\1"]
        ctap.get_assertion("example.com", HASH, [descriptor(ids[2])])
        assert failure(ctap.get_assertion, "example.com", HASH, [descriptor(ids[3])]) == "NO_CREDENTIALS"
        make(ctap, BOB, exclude_list=[descriptor(ids[3])])  # not even that it exists is shown
        pin = ClientPin(ctap)
        pin.set_pin(PIN)
        code = pin.protocol.authenticate(pin_token(ctap, ClientPin.PERMISSION.GET_ASSERTION), HASH)
        found = ctap.get_assertions("example.com", HASH, pin_uv_param=code, pin_uv_protocol=2)
        assert [one.user["id"] for one in found] == [b"bob", b"\3", b"\2", b"\1"]
        assert found[0].user["name"] == "bob@example.com"

    async with plugged(SecurityKey()) as guest:
        await client(guest, use)


async def test_hmac_secret() -> None:
    """The client library encrypts the salts and decrypts the secrets."""

    def use(device: CtapHidDevice) -> None:
        user = PublicKeyCredentialUserEntity(id=b"alice", name="alice", display_name="Alice")
        server = Fido2Server(PublicKeyCredentialRpEntity(name="Example", id="example.com"))
        browser: Any = Fido2Client(
            device,
            DefaultClientDataCollector("https://example.com"),
            user_interaction=Typist(),
            extensions=[HmacSecretExtension(allow_hmac_secret=True)],
        )
        discouraged = UserVerificationRequirement.DISCOURAGED
        options, state = server.register_begin(user, user_verification=discouraged)
        result = browser.make_credential({**options["publicKey"], "extensions": {"hmacCreateSecret": True}})
        assert result.client_extension_results["hmacCreateSecret"] is True
        known = [server.register_complete(state, result).credential_data]

        def secrets(*salts: bytes) -> list[bytes]:
            options, _ = server.authenticate_begin(known, user_verification=discouraged)
            inputs = {f"salt{n}": salt for n, salt in enumerate(salts, 1)}
            answer = browser.get_assertion({**options["publicKey"], "extensions": {"hmacGetSecret": inputs}})
            outputs = answer.get_response(0).client_extension_results["hmacGetSecret"]
            return [websafe_decode(outputs[f"output{n}"]) for n in range(1, len(salts) + 1)]

        one, other = secrets(b"a" * 32, b"b" * 32)
        assert (len(one), len(other)) == (32, 32)
        assert one != other
        assert secrets(b"b" * 32) == [other]
        wrong = {1: ClientPin(Ctap2(device))._get_shared_secret()[0], 2: bytes(32), 3: bytes(16), 4: 1}
        status = failure(
            Ctap2(device).get_assertion,
            "example.com",
            HASH,
            [descriptor(known[0].credential_id)],
            extensions={"hmac-secret": wrong},
        )
        assert status == "PIN_AUTH_INVALID"

    async with plugged(SecurityKey()) as guest:
        await client(guest, use)


async def test_u2f() -> None:
    application, challenge = hashlib.sha256(b"https://example.com").digest(), hashlib.sha256(b"challenge").digest()

    def use(device: CtapHidDevice) -> None:
        ctap: Any = Ctap1(device)
        assert ctap.get_version() == "U2F_V2"
        made = ctap.register(challenge, application)
        made.verify(application, challenge)
        for counter in (1, 2):
            proof = ctap.authenticate(challenge, application, made.key_handle)
            proof.verify(application, challenge, made.public_key)
            assert (proof.user_presence, proof.counter) == (1, counter)
        silent = ctap.send_apdu(0, 2, 8, 0, challenge + application + bytes((len(made.key_handle),)) + made.key_handle)
        assert SignatureData(silent).user_presence == 0
        for control, handle, word in (
            (7, made.key_handle, APDU.USE_NOT_SATISFIED),
            (3, b"\0" + made.key_handle[1:], APDU.WRONG_DATA),
            (7, b"", APDU.WRONG_DATA),
            (9, made.key_handle, APDU.WRONG_DATA),
        ):
            with pytest.raises(ApduError) as caught:
                ctap.send_apdu(0, 2, control, 0, challenge + application + bytes((len(handle),)) + handle)
            assert caught.value.code == word
        for arguments, code in (
            ((1, 3, 0, 0), 0x6E00),
            ((0, 9, 0, 0), 0x6D00),
            ((0, 1, 0, 0, b"short"), 0x6700),
            ((0, 2, 3, 0, b"short"), 0x6700),
            ((0, 3, 0, 0, b"data"), 0x6700),
        ):
            with pytest.raises(ApduError) as caught:
                ctap.send_apdu(*arguments)
            assert caught.value.code == code
        assert device.call(CTAPHID.MSG, b"\0\3\0") == b"\x67\0"
        assert device.call(CTAPHID.MSG, bytes.fromhex("00030000")) == b"U2F_V2\x90\0"
        assert device.call(CTAPHID.MSG, bytes.fromhex("0003000000")) == b"U2F_V2\x90\0"
        # the credential works with CTAP2, whose site has the same hash
        found = Ctap2(device).get_assertion("https://example.com", HASH, [descriptor(made.key_handle)])
        found.verify(HASH, ES256.from_ctap1(made.public_key))

    async with plugged(SecurityKey()) as guest:
        await client(guest, use)
        used = [event for event in events_of(guest) if isinstance(event, KeyUsed)]
    assert used[0].use == "register"
    assert application.hex()[:16] in used[0].site


# Presence -----------------------------------------------------------------------------------------------------------


async def asked(key: SecurityKey) -> fido_key.PendingQuestion:
    """Wait until the key asks its user."""
    async with asyncio.timeout(100):
        while key.question is None:
            await asyncio.sleep(0.001)
    return key.question


async def test_a_user_who_refuses() -> None:
    async with plugged(SecurityKey(presence=Presence.DENY)) as guest:
        assert await client(guest, lambda device: failure(make, Ctap2(device))) == "OPERATION_DENIED"
        assert await client(guest, lambda device: failure(Ctap2(device).reset)) == "OPERATION_DENIED"


async def test_a_user_who_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fido_key, "KEEPALIVE_INTERVAL", 0.001)
    key = SecurityKey(presence=Presence.ASK)
    with pytest.raises(UsageError) as caught:
        key.answer(True)
    assert caught.value.reason is Reason.NOT_ASKED
    alive: list[int] = []

    def register(device: CtapHidDevice) -> Any:
        return make(Ctap2(device), on_keepalive=alive.append)

    async with plugged(key) as guest:
        registering = asyncio.ensure_future(client(guest, register))
        pending = await asked(key)
        assert str(pending.question) == "register the key at example.com as alice@example.com"
        assert 0 < pending.seconds <= 30
        while not alive:
            await asyncio.sleep(0.001)
        with pytest.raises(UsageError):
            key.answer(True, 99)
        key.answer(True, pending.number)
        await registering
        assert alive[0] == 2  # user presence needed
        refusing = asyncio.ensure_future(
            client(guest, lambda device: failure(Ctap2(device).get_assertion, "example.com", HASH))
        )
        await asked(key)
        key.answer(False)
        assert await refusing == "OPERATION_DENIED"
        assert key.question is None
        seen = [event for event in events_of(guest) if not isinstance(event, KeyUsed)]
    site, user = "example.com", "alice@example.com"
    first, _, second, _ = seen
    assert isinstance(first, PresenceAsked)
    assert isinstance(second, PresenceAsked)
    assert seen == [
        PresenceAsked(request=1, use="register", site=site, user=user, seconds=30.0, until=first.until),
        PresenceAnswered(request=1, answer=Answer.ALLOW),
        PresenceAsked(request=2, use="sign-in", site=site, user=user, seconds=30.0, until=second.until),
        PresenceAnswered(request=2, answer=Answer.REFUSE),
    ]
    assert str(first) == "the VM waits for your answer: register the key at example.com as alice@example.com (30 s)"


async def test_a_user_who_does_not_answer() -> None:
    async with plugged(SecurityKey(presence=Presence.ASK, timeout=0.01)) as guest:
        assert await client(guest, lambda device: failure(make, Ctap2(device))) == "USER_ACTION_TIMEOUT"
        assert PresenceAnswered(request=1, answer=Answer.TIMED_OUT) in events_of(guest)


async def test_a_client_that_cancels() -> None:
    key = SecurityKey(presence=Presence.ASK)
    event = threading.Event()

    def register(device: CtapHidDevice) -> str:
        return failure(make, Ctap2(device), event=event)

    async with plugged(key) as guest:
        registering = asyncio.ensure_future(client(guest, register))
        await asked(key)
        event.set()
        assert await registering == "KEEPALIVE_CANCEL"
        assert PresenceAnswered(request=1, answer=Answer.CANCELLED) in events_of(guest)
        assert (await client(guest, lambda device: Ctap2(device).info)).versions


async def test_a_request_that_is_cancelled_at_once() -> None:
    """The user is not asked, whatever the key does first."""
    key = SecurityKey(presence=Presence.ASK)
    async with plugged(key) as guest:
        await guest.interrupt_out(0x01, bytes.fromhex("ffffffff860008") + bytes(8))
        channel = (await guest.interrupt_in(0x81))[15:19]
        sending = [guest.interrupt_out(0x01, channel + rest) for rest in (b"\x90\0\1\x0b", b"\x91\0\0")]
        await asyncio.gather(*sending)
        while (reply := await guest.interrupt_in(0x81))[4] != 0x90:
            assert reply[4] == 0xBB
        assert reply[:8] == channel + b"\x90\0\1\x2d"
        assert key.question is None


async def test_a_client_that_begins_again_while_the_key_saves() -> None:
    """Requests that it abandoned before they were executed are forgotten, and the user is not asked for them."""

    class SlowStore(MemoryKeyStore):
        saved = asyncio.Event()

        async def save(self, state: KeyState) -> None:
            await self.saved.wait()
            await super().save(state)

    store = SlowStore()
    key = SecurityKey(store, Presence.ASK)
    async with plugged(key) as guest:
        await guest.interrupt_out(0x01, bytes.fromhex("ffffffff860008") + bytes(8))
        channel = (await guest.interrupt_in(0x81))[15:19]
        await guest.interrupt_out(0x01, channel + b"\x90\0\1\x07")  # authenticatorReset
        await asked(key)
        key.answer(True)
        counts = []
        for number in range(30):
            await guest.interrupt_out(0x01, channel + b"\x86\0\x08" + bytes((number,)) * 8)
            while (reply := await guest.interrupt_in(0x81))[4] != 0x86:
                assert reply[4] == 0xBB
            assert reply[7] == number
            await guest.interrupt_out(0x01, channel + b"\x90\0\1\x0b")  # authenticatorSelection
            counts.append(len(asyncio.all_tasks()))
        assert counts[-1] <= counts[0] + 4
        await guest.interrupt_out(0x01, channel + b"\x91\0\0")
        store.saved.set()
        while (reply := await guest.interrupt_in(0x81))[4] != 0x90:
            assert reply[4] == 0xBB
        assert reply[:8] == channel + b"\x90\0\1\x2d"
        assert [event.use for event in events_of(guest) if isinstance(event, PresenceAsked)] == ["reset"]


async def test_a_guest_that_resets_while_a_user_is_asked() -> None:
    key = SecurityKey(presence=Presence.ASK)
    async with plugged(key) as guest:
        message = bytes.fromhex("ffffffff860008") + bytes(8)
        await guest.interrupt_out(0x01, message)
        channel = (await guest.interrupt_in(0x81))[15:19]
        await guest.interrupt_out(0x01, channel + b"\x90\0\1\x0b")
        await asked(key)
        await guest.set_configuration(1)
        async with asyncio.timeout(100):
            while key.question is not None:
                await asyncio.sleep(0.001)
        assert PresenceAnswered(request=1, answer=Answer.CANCELLED) in events_of(guest)
        await guest.start_receiving(0x81)
        assert (await client(guest, lambda device: Ctap2(device).info)).versions
    async with plugged(key) as guest:  # plugged in again, and unplugged while the user is asked
        await guest.interrupt_out(0x01, message)
        channel = (await guest.interrupt_in(0x81))[15:19]
        await guest.interrupt_out(0x01, channel + b"\x90\0\1\x0b")
        await asked(key)
    assert key.question is None


async def test_u2f_asks_until_the_client_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fido_key, "REPEAT_TIMEOUT", 60.0)
    application, challenge = b"a" * 32, b"c" * 32
    key = SecurityKey(presence=Presence.ASK)

    def register_once(device: CtapHidDevice) -> int:
        with pytest.raises(ApduError) as caught:
            Ctap1(device).register(challenge, application)
        return int(caught.value.code)

    async with plugged(key) as guest:
        assert await client(guest, register_once) == 0x6985
        pending = await asked(key)
        assert await client(guest, register_once) == 0x6985
        assert key.question is pending
        key.answer(True)
        made = await client(guest, lambda device: Ctap1(device).register(challenge, application))
        made.verify(application, challenge)
        assert await client(guest, register_once) == 0x6985  # another request
        await asked(key)
        key.answer(False)
        while key.question is not None:
            await asyncio.sleep(0)
        assert await client(guest, register_once) == 0x6985
        assert key.question is None  # not asked again while the client repeats the request
        monkeypatch.setattr(fido_key, "REPEAT_TIMEOUT", 0.01)
        await asyncio.sleep(0.02)
        assert await client(guest, register_once) == 0x6985
        async with asyncio.timeout(100):  # the client does not repeat it
            while PresenceAnswered(request=3, answer=Answer.CANCELLED) not in events_of(guest):
                await asyncio.sleep(0.001)
        assert key.question is None


async def test_a_client_that_has_closed_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its replies are dropped: the next client does not get them."""
    monkeypatch.setattr(fido_key, "READER_TIMEOUT", 0.0)
    async with plugged(SecurityKey()) as guest:
        await guest.stop_receiving(0x81)
        await guest.interrupt_out(0x01, bytes.fromhex("ffffffff860008") + b"old-one!")
        await guest.interrupt_out(0x01, bytes(5))  # has no reply; is taken when the reply before is dropped
        await guest.start_receiving(0x81)
        assert (await client(guest, lambda device: Ctap2(device).info)).versions


async def test_wink_and_ping() -> None:
    def use(device: CtapHidDevice) -> None:
        device.wink()
        for size in (0, 1, 57, 58, 7609):
            assert device.ping(bytes(size)) == bytes(size)

    async with plugged(SecurityKey()) as guest:
        await client(guest, use)
        assert KeyUsed("wink", "", "", "success") in events_of(guest)
