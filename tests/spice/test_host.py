from __future__ import annotations

import pytest

from farplug.spice.host import plain_host, split_host_and_port, without_zone


@pytest.mark.parametrize(
    ("text", "plain", "bare"),
    [
        ("vmhost", "vmhost", "vmhost"),
        ("192.0.2.1", "192.0.2.1", "192.0.2.1"),
        ("2001:DB8::1", "2001:DB8::1", "2001:DB8::1"),
        ("[::1]", "::1", "::1"),
        ("[::ffff:192.0.2.1]", "::ffff:192.0.2.1", "::ffff:192.0.2.1"),
        ("fe80::1%eth0", "fe80::1%eth0", "fe80::1"),
        ("[fe80::1%25eth0]", "fe80::1%eth0", "fe80::1"),
        ("fe80::1%25", "fe80::1%25", "fe80::1"),
        ("fe80::1%2525", "fe80::1%25", "fe80::1"),
        # not IPv6 addresses: as they are
        ("[vmhost]", "[vmhost]", "[vmhost]"),
        ("100%25", "100%25", "100%25"),
        ("fe80::1%", "fe80::1%", "fe80::1%"),
        ("[fe80::1%a b]", "[fe80::1%a b]", "[fe80::1%a b]"),
        ("pvespiceproxy:6567A3D8:100:pve::5ba2e0c0", "pvespiceproxy:6567A3D8:100:pve::5ba2e0c0", None),
        ("", "", ""),
    ],
)
def test_hosts(text: str, plain: str, bare: str | None) -> None:
    assert plain_host(text) == plain
    assert without_zone(plain) == (plain if bare is None else bare)


@pytest.mark.parametrize(
    ("text", "required", "optional"),
    [
        ("", ("", None), ("", None)),
        (":1", ("", 1), ("", 1)),
        ("vm:", ("vm", None), ("vm", None)),
        ("vm:00080", ("vm", 80), ("vm", 80)),
        ("[::1]", ("::1", None), ("::1", None)),
        ("[::1]:", ("::1", None), ("::1", None)),
        ("[::1]:0", ("::1", 0), ("::1", 0)),
        ("::", ("::", None), ("::", None)),
        (":::80", ("::", 80), ("::", 80)),
        ("::1:80", ("::1", 80), None),
        ("::1:beef", ("::1:beef", None), ("::1:beef", None)),
        ("fe80::1%eth0", ("fe80::1%eth0", None), ("fe80::1%eth0", None)),
        ("fe80::1%25eth0:80", ("fe80::1%eth0", 80), ("fe80::1%eth0", 80)),
        ("1:2:3:4:5:6:7:8:80", ("1:2:3:4:5:6:7:8", 80), ("1:2:3:4:5:6:7:8", 80)),
    ],
)
def test_host_and_port(text: str, required: tuple[str, int | None], optional: tuple[str, int | None] | None) -> None:
    assert split_host_and_port(text, port_required=True) == required
    if optional is None:
        with pytest.raises(ValueError, match="needs brackets"):
            split_host_and_port(text, port_required=False)
    else:
        assert split_host_and_port(text, port_required=False) == optional
