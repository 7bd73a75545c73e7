"""The attestation certificate that the U2F protocol requires in each registration."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

_TRANSPORTS = x509.ObjectIdentifier("1.3.6.1.4.1.45724.2.1.1")
"""id-fido-u2f-ce-transports (FIDO U2F Authenticator Transports Extension)."""
_USB = bytes.fromhex("03020520")
"""A BIT STRING with bit 2."""
_NAME: Final = "farplug security key for tests"


def attestation_certificate(secret: bytes) -> bytes:
    """Return a certificate of a private key of P-256, signed with the key itself, DER.

    Args:
        secret: the private value, big-endian.
    """
    key = ec.derive_private_key(int.from_bytes(secret, "big"), ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, _NAME)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime(2020, 1, 1, tzinfo=UTC))
        .not_valid_after(datetime(2099, 12, 31, tzinfo=UTC))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.UnrecognizedExtension(_TRANSPORTS, _USB), critical=False)
    )
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)
