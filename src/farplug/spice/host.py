"""Hosts in targets and files: names, IPv4 addresses, IPv6 addresses in all their notations. No I/O.

An IPv6 address may have brackets (RFC 3986, section 3.2.2), and a zone after ``%`` (RFC 4007, section 11) or, as in
URLs, after ``%25`` (RFC 6874).
"""

from __future__ import annotations

import ipaddress
import re


def plain_host(text: str) -> str:
    """Return a host in the form that getaddrinfo accepts: an IPv6 address without brackets, its zone after ``%``.

    Anything else is returned unchanged: a name, an IPv4 address, the ticket of a proxy.
    """
    return _ipv6(text[1:-1] if text.startswith("[") and text.endswith("]") else text) or text


def without_zone(host: str) -> str:
    """Return a host without the zone of an IPv6 address: certificates do not name zones."""
    return host.partition("%")[0] if _ipv6(host) else host


def split_host_and_port(text: str, *, port_required: bool) -> tuple[str, int | None]:
    """Split ``HOST``, ``HOST:PORT`` or ``:PORT``.

    An IPv6 address without brackets is split from its port if only one interpretation is possible. With a port required
    this is always the case: ``2001:db8::1:5900`` is port 5900 of 2001:db8::1.

    Args:
        text: the part of a URL between ``//`` and the path, without a password.
        port_required: the text is not valid without a port.

    Returns:
        The host as :func:`plain_host` returns it, empty if there is none, and the port (0 to 65535), None if there is
        none.

    Raises:
        ValueError: the text has none of these forms; the exception's text says why, and quotes nothing.
    """
    if text.startswith("["):
        bracketed, bracket, rest = text.partition("]")
        host = _ipv6(bracketed[1:])
        if not bracket or (rest and not rest.startswith(":")):
            raise ValueError("the brackets around its host are malformed")
        if host is None:
            raise ValueError("its host in brackets is not an IPv6 address")
        return host, _port(rest[1:])
    if "[" in text or "]" in text:
        raise ValueError("the brackets around its host are malformed")
    if text.count(":") < 2:
        host, _, port = text.partition(":")
        return host, _port(port)
    whole, (left, _, port) = _ipv6(text), text.rpartition(":")
    host = _ipv6(left) if _PORT.fullmatch(port) else None
    if host is not None and (whole is None or port_required):
        return host, _port(port)
    if whole is None:
        raise ValueError("its host contains colons and is not an IPv6 address")
    if host is not None:
        raise ValueError("its IPv6 address needs brackets, as in [2001:db8::1]:5900: the last number may be its port")
    return whole, None


_PORT = re.compile("[0-9]{1,5}")


def _port(text: str) -> int | None:
    if not text:
        return None
    if not _PORT.fullmatch(text) or int(text) > 65535:
        raise ValueError("a port is a number from 1 to 65535")
    return int(text)


def _ipv6(text: str) -> str | None:
    """Return an IPv6 address, its zone after ``%``; None for anything else."""
    address, percent, zone = text.partition("%")
    if percent and zone.startswith("25") and len(zone) > 2:
        zone = zone[2:]
    try:
        ipaddress.IPv6Address(address)
    except ValueError:
        return None
    if percent and not re.fullmatch("[!-9;-~]+", zone):  # no colon: it separates a port
        return None
    return address + percent + zone
