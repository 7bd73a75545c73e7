"""The PIN/UV auth protocols: a secret that a client and the key share, and what they encrypt and authenticate with it.

Source: CTAP 2.1, chapters 6.5.6 (protocol one) and 6.5.7 (protocol two).
"""

from __future__ import annotations

import hmac
import secrets
from hashlib import sha256
from typing import ClassVar, Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from farplug.virtual.fido.cbor import Key, Value

_BLOCK = 16
_ECDH_ES_HKDF_256 = -25
TOKEN_SIZE: Final = 32


class PinProtocol:
    """PIN/UV auth protocol one.

    Attributes:
        number: of the protocol, as clients name it.
        token: the pinUvAuthToken that clients with this protocol get.
    """

    number: ClassVar[int] = 1

    def __init__(self) -> None:
        self.regenerate()
        self.token = b""
        self.reset_token()

    def regenerate(self) -> None:
        """Make a new key pair, so that no client shares a secret with the key any more."""
        self._key = ec.generate_private_key(ec.SECP256R1())

    def reset_token(self) -> None:
        """Make a new token: the old one is not valid any more."""
        self.token = secrets.token_bytes(TOKEN_SIZE)

    @property
    def public_key(self) -> dict[Key, Value]:
        """Return the public key for key agreement, as a COSE_Key."""
        point = self._key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        return {1: 2, 3: _ECDH_ES_HKDF_256, -1: 1, -2: point[1:33], -3: point[33:]}

    def shared_secret(self, x: bytes, y: bytes) -> bytes:
        """Return the secret that the key shares with a client.

        Raises:
            ValueError: the coordinates are not a point of P-256.
        """
        numbers = ec.EllipticCurvePublicNumbers(int.from_bytes(x, "big"), int.from_bytes(y, "big"), ec.SECP256R1())
        return self._derive(self._key.exchange(ec.ECDH(), numbers.public_key()))

    def _derive(self, z: bytes) -> bytes:
        return sha256(z).digest()

    def encrypt(self, secret: bytes, plain: bytes) -> bytes:
        """Encrypt data whose length is a multiple of 16 bytes."""
        encryptor = Cipher(algorithms.AES(secret), modes.CBC(bytes(_BLOCK))).encryptor()
        return encryptor.update(plain) + encryptor.finalize()

    def decrypt(self, secret: bytes, data: bytes) -> bytes:
        """Decrypt data.

        Raises:
            ValueError: its length is not valid.
        """
        decryptor = Cipher(algorithms.AES(secret), modes.CBC(bytes(_BLOCK))).decryptor()
        return decryptor.update(data) + decryptor.finalize()

    def authenticate(self, key: bytes, message: bytes) -> bytes:
        """Return the authentication code of a message, for a shared secret or a token."""
        return hmac.digest(key, message, sha256)[:16]

    def verify(self, key: bytes, message: bytes, code: bytes) -> bool:
        """Return whether an authentication code is that of a message."""
        return hmac.compare_digest(self.authenticate(key, message), code)


class PinProtocolTwo(PinProtocol):
    """PIN/UV auth protocol two: the shared secret is an HMAC key of 32 bytes, and an AES key of 32 bytes."""

    number = 2

    def _derive(self, z: bytes) -> bytes:
        return b"".join(
            HKDF(hashes.SHA256(), 32, salt=bytes(32), info=info).derive(z)
            for info in (b"CTAP2 HMAC key", b"CTAP2 AES key")
        )

    def encrypt(self, secret: bytes, plain: bytes) -> bytes:
        vector = secrets.token_bytes(_BLOCK)
        encryptor = Cipher(algorithms.AES(secret[32:]), modes.CBC(vector)).encryptor()
        return vector + encryptor.update(plain) + encryptor.finalize()

    def decrypt(self, secret: bytes, data: bytes) -> bytes:
        decryptor = Cipher(algorithms.AES(secret[32:]), modes.CBC(data[:_BLOCK])).decryptor()
        return decryptor.update(data[_BLOCK:]) + decryptor.finalize()

    def authenticate(self, key: bytes, message: bytes) -> bytes:
        return hmac.digest(key[:32], message, sha256)
