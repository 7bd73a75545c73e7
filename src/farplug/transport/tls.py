"""TLS to a SPICE server: trusted certificates, the check of the server's name, errors of the handshake.

A certificate is always checked: against the given CA or the system's, and against the host name or the host subject.
"""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass

from cryptography import x509
from cryptography.x509.oid import NameOID, ObjectIdentifier

from farplug.errors import Reason, Remedy, TargetError, UsageError
from farplug.text import printable

_OIDS = {
    **{
        name: oid
        for names, oid in (
            (("CN", "commonName"), NameOID.COMMON_NAME),
            (("O", "organizationName"), NameOID.ORGANIZATION_NAME),
            (("OU", "organizationalUnitName"), NameOID.ORGANIZATIONAL_UNIT_NAME),
            (("C", "countryName"), NameOID.COUNTRY_NAME),
            (("ST", "S", "stateOrProvinceName"), NameOID.STATE_OR_PROVINCE_NAME),
            (("L", "localityName"), NameOID.LOCALITY_NAME),
            (("street", "streetAddress"), NameOID.STREET_ADDRESS),
            (("DC", "domainComponent"), NameOID.DOMAIN_COMPONENT),
            (("UID", "userId"), NameOID.USER_ID),
            (("SN", "surname"), NameOID.SURNAME),
            (("GN", "givenName"), NameOID.GIVEN_NAME),
            (("title",), NameOID.TITLE),
            (("serialNumber",), NameOID.SERIAL_NUMBER),
            (("emailAddress", "E"), NameOID.EMAIL_ADDRESS),
        )
        for name in names
    }
}
"""Attribute names of OpenSSL, short and long."""
_SHORT_NAMES = {oid: name for name, oid in reversed(_OIDS.items())}

_UNREADABLE = (ValueError, x509.InvalidVersion, x509.DuplicateExtension, x509.UnsupportedGeneralNameType)
"""The exceptions for a hostile certificate, when it or one of its parts is read."""

_X509_V_ERR_HOSTNAME_MISMATCH = 62
_X509_V_ERR_IP_ADDRESS_MISMATCH = 64


@dataclass(frozen=True, slots=True)
class HostSubject:
    """A certificate's subject, which is checked instead of the host name, as in spice-gtk.

    The certificate must have the same attributes in the same order. Values are compared as by X509_NAME_cmp, ignoring
    case and the number of spaces.
    """

    attributes: tuple[tuple[ObjectIdentifier, str], ...]
    text: str

    @classmethod
    def parse(cls, text: str) -> HostSubject:
        r"""Parse ``O=Example\, Inc.,CN=host``: ``\,`` is a comma, ``\\`` a backslash. Raises UsageError."""
        attributes = []
        for part in re.findall(r"(?:^|,)((?:\\.|[^,])*)", text):
            key, equals, value = part.lstrip(" ").partition("=")
            key = key.strip()
            try:
                oid = _OIDS[key] if key in _OIDS else ObjectIdentifier(key)
            except ValueError:
                raise _bad_subject(text, f"{key[:40]!r} is not an attribute") from None
            if not equals or not value:
                raise _bad_subject(text, f"attribute {key} has no value")
            if re.search(r"\\(?![\\,])", re.sub(r"\\\\", "", value)):
                raise _bad_subject(text, r"a backslash is valid only before a backslash or a comma")
            attributes.append((oid, _canonical(re.sub(r"\\(.)", r"\1", value))))
        return cls(tuple(attributes), text)

    def matches(self, certificate: x509.Certificate) -> bool:
        """Return whether a certificate has this subject; False if the certificate cannot be read."""
        try:
            theirs = tuple((item.oid, _canonical(str(item.value))) for item in certificate.subject)
        except _UNREADABLE:
            return False
        return theirs == self.attributes

    def __str__(self) -> str:
        return self.text


def _canonical(value: str) -> str:
    lower = "".join(char.lower() if char.isascii() else char for char in value)  # ASCII only, as OpenSSL
    return re.sub(r"[ \t\n\v\f\r]+", " ", lower).strip(" ")


def _bad_subject(text: str, why: str) -> UsageError:
    return UsageError(f"host subject {text[:200]!r}: {why}", reason=Reason.BAD_TARGET, remedy=subject_remedy("give"))


def client_context(*, ca: str | None, check_hostname: bool) -> ssl.SSLContext:
    """Return a context that checks the server's certificate.

    Args:
        ca: certificates to trust, PEM; None: the system's.
        check_hostname: check the host name. If False, the caller checks the subject.

    Raises:
        UsageError: ``ca`` contains no certificate.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = check_hostname
    if ca is None:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
        return context
    try:
        context.load_verify_locations(cadata=ca)
    except (ssl.SSLError, ValueError, TypeError):  # ValueError: empty; TypeError: not ASCII
        raise UsageError(
            "the CA file contains no readable certificate",
            reason=Reason.BAD_OPTION,
            remedy=Remedy("give the CA's certificates in PEM format (ca= in a .vv file)", setting="target.ca_file"),
        ) from None
    return context


def inspection_context() -> ssl.SSLContext:
    """Return a context that checks nothing: it reads a refused certificate for an error message.

    No data is sent over it.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def peer_certificate(session: ssl.SSLObject) -> x509.Certificate | None:
    """Return the peer's certificate; None if it cannot be parsed."""
    encoded = session.getpeercert(binary_form=True)
    try:
        return x509.load_der_x509_certificate(encoded) if encoded else None
    except _UNREADABLE:
        return None


def describe_certificate(certificate: x509.Certificate | None) -> str:
    """Return a certificate's subject, issuer, names and date of expiry, in one line."""
    unreadable = "a certificate that cannot be read"
    if certificate is None:
        return unreadable
    try:
        who = f"certificate of {_name(certificate.subject)}, issued by {_name(certificate.issuer)}"
        until = f"valid until {certificate.not_valid_after_utc:%Y-%m-%d}"
    except _UNREADABLE:
        return unreadable
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        texts = [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]
    except (x509.ExtensionNotFound, *_UNREADABLE):
        texts = []
    return ", ".join([who, f"for {printable(', '.join(texts[:8]))}", until] if texts else [who, until])


def subject_remedy(text: str, certificate: x509.Certificate | None = None) -> Remedy:
    """Return the remedy to check a subject instead of the host name.

    Args:
        text: the beginning of the remedy, before "the certificate's subject".
        certificate: the remedy has its subject as value. With None, or a subject that is not valid as a host subject,
            the text has an example instead.
    """
    value, example = None, ", such as O=Lab,CN=vmhost"
    if certificate is not None:
        try:
            subject = _name(certificate.subject)
            if HostSubject.parse(subject).matches(certificate):
                value, example = subject, ""
        except (UsageError, *_UNREADABLE):
            pass
    return Remedy(
        f"{text} the certificate's subject{example} (host-subject= in a .vv file)",
        setting="target.host_subject",
        value=value,
    )


def subject_error(where: str, expected: HostSubject, certificate: x509.Certificate | None) -> TargetError:
    """Return the error for a certificate with another subject than expected."""
    return TargetError(
        f"TLS to {where}: the server's subject is not {printable(expected.text)}: {describe_certificate(certificate)}",
        reason=Reason.TLS_WRONG_HOST,
        remedy=subject_remedy(
            "check that this is the right host (an old .vv file may name another one); if it is, give", certificate
        ),
    )


def certificate_error(
    where: str, expected: str, error: ssl.SSLCertVerificationError, certificate: x509.Certificate | None
) -> TargetError:
    """Return the error for a refused certificate.

    Args:
        where: host and port.
        expected: the expected name of the certificate.
        error: the exception of the handshake.
        certificate: the refused certificate; None if it could not be read.
    """
    facts = "" if certificate is None else f": {describe_certificate(certificate)}"
    if error.verify_code in (_X509_V_ERR_HOSTNAME_MISMATCH, _X509_V_ERR_IP_ADDRESS_MISMATCH):
        return TargetError(
            f"TLS to {where}: the server's certificate is not for {expected}{facts}",
            reason=Reason.TLS_WRONG_HOST,
            remedy=subject_remedy(
                "use a name of the certificate as the host; or, if this is the right host, give", certificate
            ),
        )
    return TargetError(
        f"TLS to {where}: the server's certificate is not trusted ({error.verify_message}){facts}",
        reason=Reason.TLS_UNTRUSTED,
        remedy=Remedy(
            "give the certificate of the CA that issued it (ca= in a .vv file; QEMU's is ca-cert.pem in its x509-dir)",
            setting="target.ca_file",
        ),
    )


def handshake_error(where: str, error: OSError) -> TargetError:
    """Return the error for a handshake that failed for another reason than the certificate."""
    remedy = "read QEMU's log on the VM's host"
    if isinstance(error, ssl.SSLError):
        why = (error.reason or str(error)).replace("_", " ").lower()
        if error.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "UNKNOWN_PROTOCOL"):
            why += ": this is not a TLS port"
            remedy = "check the port: for a plain SPICE port use spice://HOST:PORT"
    elif isinstance(error, ConnectionError):
        why = "the server closed the connection during the handshake"
        remedy = "check the port: for a plain SPICE port use spice://HOST:PORT"
        if "longer than" in str(error):
            why = "the server did not finish the handshake in time"
    else:
        why = error.strerror or str(error)
    return TargetError(f"TLS to {where}: {why}", reason=Reason.TLS_FAILED, remedy=remedy)


def _name(name: x509.Name) -> str:
    """Return a name in the notation of :class:`HostSubject`: in the certificate's order."""
    parts = []
    for item in name:
        value = str(item.value).replace("\\", r"\\").replace(",", r"\,")
        parts.append(f"{_SHORT_NAMES.get(item.oid, item.oid.dotted_string)}={value}")
    return printable(",".join(parts), 300) or "(no name)"
