"""Certificates for a SPICE server with TLS, in the three files that QEMU reads from its ``x509-dir``.

They have the extensions that RFC 5280 requires (sections 4.2.1.1 to 4.2.1.3 and 4.2.1.9): since version 3.13 Python's
default context checks them.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

LIFETIME = timedelta(days=7)

_CERTIFICATES_ONLY = x509.KeyUsage(
    key_cert_sign=True,
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    crl_sign=False,
    encipher_only=False,
    decipher_only=False,
)
"""Key usage of the authority's key."""


def write_certificates(folder: Path, host_names: Sequence[str]) -> str:
    """Write ``ca-cert.pem``, ``server-cert.pem`` and ``server-key.pem``.

    Args:
        folder: an existing folder.
        host_names: host names and addresses that the server's certificate is valid for; the first is its common name.

    Returns:
        The subject of the server's certificate, in the form of ``host-subject`` in a ``.vv`` file.
    """
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "farplug test authority")])
    ca = (
        _builder(ca_name, ca_key.public_key(), ca_name, ca_key.public_key(), is_authority=True)
        .add_extension(_CERTIFICATES_ONLY, critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "farplug"),
            x509.NameAttribute(NameOID.COMMON_NAME, host_names[0]),
        ]
    )
    names = x509.SubjectAlternativeName([_general_name(name) for name in host_names])
    certificate = (
        _builder(subject, key.public_key(), ca_name, ca_key.public_key(), is_authority=False)
        .add_extension(names, critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    (folder / "ca-cert.pem").write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    (folder / "server-cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "server-key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return f"O=farplug,CN={host_names[0]}"


def _builder(
    subject: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePublicKey,
    *,
    is_authority: bool,
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        # The peer's clock may be a little slow.
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + LIFETIME)
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
