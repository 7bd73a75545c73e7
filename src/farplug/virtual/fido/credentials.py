"""What a security key keeps: its credentials, its PIN, its counter. Plain data; see :mod:`.key_file` for the file."""

from __future__ import annotations

import hmac
import secrets
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cached_property
from hashlib import sha256
from typing import Final, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from farplug.virtual.fido.cbor import Key, Value

MAX_CREDENTIALS: Final = 100
"""Discoverable credentials of a key. Others are not stored: their ids contain them, encrypted."""
MAX_RETRIES: Final = 8
"""Wrong PINs before the key must be reset."""
MASTER_SIZE: Final = 32
PRIVATE_SIZE: Final = 32
"""Bytes of a private key, of either algorithm."""
DISCOVERABLE_ID_SIZE: Final = 32
MAX_RP_ID: Final = 253
"""Characters of a relying party's id: a domain name."""
MAX_NAME: Final = 64
"""Bytes that are kept of the name of a user or a relying party (CTAP 2.1, chapter 6.1.2)."""
MAX_USER_ID: Final = 64
"""Bytes of a user's id (WebAuthn, chapter 5.4.3)."""

_NONCE_SIZE = 12


class Algorithm(IntEnum):
    """A COSE algorithm that keys of credentials can have."""

    ES256 = -7
    EDDSA = -8


class Protection(IntEnum):
    """The policy of a credential (CTAP 2.1, chapter 12.1, credProtect)."""

    OPTIONAL = 1
    """User verification is optional."""
    OPTIONAL_WITH_ID = 2
    """Only a request that names the credential needs no user verification."""
    REQUIRED = 3


@dataclass(frozen=True)
class PrivateKey:
    """The key pair of a credential.

    Attributes:
        algorithm: of the key.
        secret: 32 bytes: the private value, big-endian, or the seed.
    """

    algorithm: Algorithm
    secret: bytes = field(repr=False)

    @classmethod
    def generate(cls, algorithm: Algorithm) -> Self:
        """Return a new key pair."""
        if algorithm is Algorithm.EDDSA:
            return cls(algorithm, secrets.token_bytes(PRIVATE_SIZE))
        value = ec.generate_private_key(ec.SECP256R1()).private_numbers().private_value
        return cls(algorithm, value.to_bytes(PRIVATE_SIZE, "big"))

    @cached_property
    def _key(self) -> ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey:
        if self.algorithm is Algorithm.EDDSA:
            return ed25519.Ed25519PrivateKey.from_private_bytes(self.secret)
        return ec.derive_private_key(int.from_bytes(self.secret, "big"), ec.SECP256R1())

    def check(self) -> None:
        """Raise ``ValueError`` if the secret is not a private key of the algorithm."""
        if len(self.secret) != PRIVATE_SIZE:
            raise ValueError(f"a private key has {PRIVATE_SIZE} bytes")
        assert self._key

    def sign(self, data: bytes) -> bytes:
        """Return the signature: DER for ES256, 64 bytes for EdDSA."""
        if isinstance(self._key, ed25519.Ed25519PrivateKey):
            return self._key.sign(data)
        return self._key.sign(data, ec.ECDSA(hashes.SHA256()))

    @property
    def point(self) -> bytes:
        """Return the public key of ES256: the uncompressed point, 65 bytes."""
        return self._key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)

    @property
    def cose(self) -> dict[Key, Value]:
        """Return the public key as a COSE_Key (RFC 9053, chapter 7)."""
        if isinstance(self._key, ed25519.Ed25519PrivateKey):
            return {1: 1, 3: int(self.algorithm), -1: 6, -2: self._key.public_key().public_bytes_raw()}
        return {1: 2, 3: int(self.algorithm), -1: 1, -2: self.point[1:33], -3: self.point[33:]}


@dataclass(frozen=True, slots=True)
class User:
    """A user account of a relying party (PublicKeyCredentialUserEntity)."""

    id: bytes = b""
    name: str = ""
    display_name: str = ""

    def __str__(self) -> str:
        return self.name or self.display_name or self.id.hex()


@dataclass(frozen=True, slots=True)
class Credential:
    """A credential.

    Attributes:
        id: its credential id.
        rp_id: the relying party's id; empty if only its hash is known, as for credentials that are not discoverable.
        user: whose it is; an empty one if the credential is not discoverable.
        key: its key pair.
        protection: its policy.
        discoverable: whether the key keeps it, and finds it without its id.
        rp_name: the relying party's name; empty: unknown.
    """

    id: bytes
    rp_id: str
    user: User
    key: PrivateKey
    protection: Protection = Protection.OPTIONAL
    discoverable: bool = True
    rp_name: str = ""

    @property
    def rp_hash(self) -> bytes:
        """Return the SHA-256 hash of the relying party's id."""
        return sha256(self.rp_id.encode()).digest()


@dataclass(frozen=True, slots=True)
class Pin:
    """The PIN of a key.

    Attributes:
        hash: the first 16 bytes of its SHA-256 hash.
        retries: wrong ones that are left.
    """

    hash: bytes = field(repr=False)
    retries: int = MAX_RETRIES


@dataclass(frozen=True)
class KeyState:
    """Everything that a key keeps. A change is a new object, so a state that could not be saved is never in use.

    Attributes:
        master: 32 random bytes, which encrypt credentials into their ids.
        attestation: the private key of the certificate that U2F requires, 32 bytes.
        certificate: the certificate, DER.
        counter: the last signature counter.
        pin: the PIN; None: not set.
        credentials: the discoverable credentials, the oldest first.
    """

    master: bytes = field(repr=False)
    attestation: bytes = field(repr=False)
    certificate: bytes = field(repr=False)
    counter: int = 0
    pin: Pin | None = None
    credentials: tuple[Credential, ...] = ()

    @classmethod
    def new(cls) -> Self:
        """Return the state of a new key."""
        from farplug.virtual.fido.certificate import attestation_certificate  # X.509 is a large import

        key = PrivateKey.generate(Algorithm.ES256)
        return cls(secrets.token_bytes(MASTER_SIZE), key.secret, attestation_certificate(key.secret))

    def derive(self, purpose: bytes) -> bytes:
        """Return 32 secret bytes for a purpose."""
        return hmac.digest(self.master, purpose, sha256)

    def seal(self, key: PrivateKey, protection: Protection, rp_hash: bytes) -> bytes:
        """Return a credential id that contains a key pair, for one relying party."""
        nonce = secrets.token_bytes(_NONCE_SIZE)
        plain = bytes((-key.algorithm, protection)) + key.secret
        return nonce + AESGCM(self.derive(b"credential id")).encrypt(nonce, plain, rp_hash)

    def unseal(self, id: bytes, rp_hash: bytes) -> Credential | None:
        """Return the credential that an id of :meth:`seal` contains; None if this key did not make it for the site."""
        try:
            plain = AESGCM(self.derive(b"credential id")).decrypt(id[:_NONCE_SIZE], id[_NONCE_SIZE:], rp_hash)
        except (InvalidTag, ValueError):
            return None
        key = PrivateKey(Algorithm(-plain[0]), plain[2:])
        return Credential(id, "", User(), key, Protection(plain[1]), discoverable=False)

    def find(self, id: bytes, rp_hash: bytes) -> Credential | None:
        """Return a credential of a relying party by its id."""
        for credential in self.credentials:
            if credential.id == id and credential.rp_hash == rp_hash:
                return credential
        return self.unseal(id, rp_hash)

    def of(self, rp_hash: bytes) -> list[Credential]:
        """Return the discoverable credentials of a relying party, the newest first."""
        return [credential for credential in reversed(self.credentials) if credential.rp_hash == rp_hash]

    def with_credential(self, new: Credential) -> KeyState:
        """Return the state with another credential, in place of one of the same user at the same relying party."""
        return replace(self, credentials=(*self._others(new), new))

    def is_full(self, new: Credential) -> bool:
        """Return whether there is no room for another credential."""
        return len(self._others(new)) >= MAX_CREDENTIALS

    def _others(self, new: Credential) -> list[Credential]:
        return [one for one in self.credentials if (one.rp_id, one.user.id) != (new.rp_id, new.user.id)]


class KeyStore(ABC):
    """Where a key keeps its state."""

    @property
    @abstractmethod
    def state(self) -> KeyState:
        """Return the last state that was saved."""

    @abstractmethod
    async def save(self, state: KeyState) -> None:
        """Keep another state. When the call returns, the state is durable; after an exception the old one is in use.

        Raises:
            ImageError: the state cannot be saved.
        """

    async def close(self) -> None:
        """Release what is open. Closing a store twice has no effect."""


class MemoryKeyStore(KeyStore):
    """A key without a file: it is new each time."""

    def __init__(self, state: KeyState | None = None) -> None:
        self._state = state or KeyState.new()

    @property
    def state(self) -> KeyState:
        return self._state

    async def save(self, state: KeyState) -> None:
        self._state = state
