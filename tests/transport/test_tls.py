from __future__ import annotations

import datetime
import shlex
import ssl
from pathlib import Path
from typing import cast

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from tests.transport.fake_spice import Certificates

from farplug.cli.log import remedy_lines
from farplug.errors import Reason, UsageError
from farplug.transport import tls
from farplug.transport.tls import HostSubject


def certificate(*subject: tuple[x509.ObjectIdentifier, str]) -> x509.Certificate:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(oid, value) for oid, value in subject])
    start = datetime.datetime(2026, 1, 1)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )


O, OU, CN = NameOID.ORGANIZATION_NAME, NameOID.ORGANIZATIONAL_UNIT_NAME, NameOID.COMMON_NAME  # noqa: E741
PVE = certificate((OU, "PVE Cluster Node"), (O, "Proxmox"), (CN, "pve.example.org"))
COMMA = certificate((O, "A, B \\ C"), (CN, "x"))


@pytest.mark.parametrize(
    ("subject", "theirs", "matches"),
    [
        ("OU=PVE Cluster Node,O=Proxmox,CN=pve.example.org", PVE, True),
        ("OU=PVE Cluster Node, O=Proxmox,  CN=pve.example.org", PVE, True),
        ("organizationalUnitName=pve  cluster node ,O=PROXMOX,CN=PVE.example.org", PVE, True),
        ("2.5.4.11=PVE Cluster Node,2.5.4.10=Proxmox,2.5.4.3=pve.example.org", PVE, True),
        ("O=Proxmox,OU=PVE Cluster Node,CN=pve.example.org", PVE, False),
        ("CN=pve.example.org", PVE, False),
        ("OU=PVE Cluster Node,O=Proxmox,CN=pve.example.org,C=AT", PVE, False),
        ("OU=PVE Cluster Node,O=Proxmox,CN=pve2.example.org", PVE, False),
        (r"O=A\, B \\ C,CN=x", COMMA, True),
        ("CN=x=y", certificate((CN, "x=y")), True),
        ("CN=K", certificate((CN, "\N{KELVIN SIGN}")), False),
    ],
)
def test_host_subject(subject: str, theirs: x509.Certificate, matches: bool) -> None:
    assert HostSubject.parse(subject).matches(theirs) is matches


@pytest.mark.parametrize(
    ("subject", "expected_text"),
    [
        ("", "'' is not an attribute"),
        ("nonsense", "'nonsense' is not an attribute"),
        ("CN=x,", "'' is not an attribute"),
        ("CN=", "attribute CN has no value"),
        ("CN", "attribute CN has no value"),
        (r"CN=a\b", "a backslash is valid only before"),
        ("CN=a\\", "a backslash is valid only before"),
        ("XX=1", "'XX' is not an attribute"),
    ],
)
def test_malformed_host_subject(subject: str, expected_text: str) -> None:
    with pytest.raises(UsageError, match=expected_text) as caught:
        HostSubject.parse(subject)
    assert caught.value.reason is Reason.BAD_TARGET


@pytest.mark.parametrize("theirs", [PVE, COMMA])
def test_the_described_subject_is_a_valid_host_subject(theirs: x509.Certificate) -> None:
    text = tls.describe_certificate(theirs).removeprefix("certificate of ").partition(", issued by ")[0]
    assert HostSubject.parse(text).matches(theirs)


@pytest.mark.parametrize("theirs", [PVE, COMMA, certificate((O, "it's; $(so)"), (CN, "x:y"))])
def test_the_remedy_has_the_subject(theirs: x509.Certificate) -> None:
    remedy = tls.subject_remedy("give", theirs)
    assert remedy.setting == "target.host_subject"
    assert HostSubject.parse(str(remedy.value)).matches(theirs)
    (line,) = remedy_lines(remedy)
    assert shlex.split(line.partition(": --host-subject ")[2]) == [remedy.value]


@pytest.mark.parametrize("theirs", [None, certificate(), certificate((CN, "a\nb")), certificate(*[(CN, "x" * 60)] * 6)])
def test_a_subject_that_is_not_a_valid_host_subject(theirs: x509.Certificate | None) -> None:
    remedy = tls.subject_remedy("give", theirs)
    assert remedy == "give the certificate's subject, such as O=Lab,CN=vmhost (host-subject= in a .vv file)"
    assert (remedy.setting, remedy.value) == ("target.host_subject", None)


def test_context_checks() -> None:
    for check_hostname in (True, False):
        context = tls.client_context(ca=None, check_hostname=check_hostname)
        assert context.verify_mode is ssl.CERT_REQUIRED
        assert context.check_hostname is check_hostname
        assert context.minimum_version is ssl.TLSVersion.TLSv1_2


def test_given_ca_replaces_the_system(tmp_path: Path) -> None:
    context = tls.client_context(ca=Certificates(tmp_path).ca, check_hostname=True)
    (encoded,) = context.get_ca_certs(binary_form=True)
    assert "CN=test CA" in tls.describe_certificate(x509.load_der_x509_certificate(encoded))


@pytest.mark.parametrize("ca", ["", "nonsense", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "ü"])
def test_malformed_ca(ca: str) -> None:
    with pytest.raises(UsageError, match="no readable certificate"):
        tls.client_context(ca=ca, check_hostname=True)


@pytest.mark.parametrize(
    ("error", "expected_text"),
    [
        (ConnectionResetError(104, "Connection reset by peer"), "closed the connection during the handshake"),
        (ConnectionAbortedError("SSL handshake is taking longer than 10 seconds"), "did not finish the handshake"),
        (OSError(113, "No route to host"), "No route to host"),
    ],
)
def test_handshake_errors(error: OSError, expected_text: str) -> None:
    failure = tls.handshake_error("vmhost:1", error)
    assert expected_text in str(failure)
    assert failure.reason is Reason.TLS_FAILED


def test_a_server_without_tls() -> None:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    session = tls.inspection_context().wrap_bio(incoming, outgoing)
    incoming.write(b"REDQ\2\0\0\0\2\0\0\0\xba\0\0\0")
    with pytest.raises(ssl.SSLError) as caught:
        session.do_handshake()
    failure = tls.handshake_error("vmhost:1", caught.value)
    assert "this is not a TLS port" in str(failure)
    assert "spice://" in failure.remedy


def test_unreadable_certificate() -> None:
    assert tls.describe_certificate(None) == "a certificate that cannot be read"


@pytest.mark.parametrize(
    ("good", "bad", "expected_text"),
    [
        # a second subjectAltName instead of an issuerAltName
        (b"\x06\x03\x55\x1d\x12", b"\x06\x03\x55\x1d\x11", "certificate of CN=evil, issued by CN=evil, valid until"),
        # an x400Address instead of a DNS name
        (b"\x82\x09a.example", b"\xa3\x09a.example", "certificate of CN=evil, issued by CN=evil, valid until"),
        # a name that is not UTF-8
        (b"\x0c\x04evil", b"\x0c\x04\xff\xfe\xffl", "a certificate that cannot be read"),
    ],
)
def test_hostile_certificate(good: bytes, bad: bytes, expected_text: str) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(CN, "evil")])
    start = datetime.datetime(2026, 1, 1)
    encoded = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("a.example")]), critical=False)
        .add_extension(x509.IssuerAlternativeName([x509.DNSName("b.example")]), critical=False)
        .sign(key, hashes.SHA256())
        .public_bytes(Encoding.DER)
    )
    assert good in encoded
    hostile = x509.load_der_x509_certificate(encoded.replace(good, bad))
    assert tls.describe_certificate(hostile).startswith(expected_text)
    assert HostSubject.parse("CN=evil").matches(hostile) is ("CN=evil" in expected_text)


def test_certificate_of_an_unknown_version() -> None:
    encoded = PVE.public_bytes(Encoding.DER)
    assert encoded.count(b"\xa0\x03\x02\x01\x02") == 1

    class Session:
        def getpeercert(self, binary_form: bool) -> bytes:
            return encoded.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x09")

    assert tls.peer_certificate(cast("ssl.SSLObject", Session())) is None
