from __future__ import annotations

from dataclasses import replace

import pytest

from farplug.errors import Reason, TargetError
from farplug.spice.messages import SwitchHost
from farplug.transport.moved import moved_target
from farplug.transport.spice_target import SpiceTarget

OLD = SpiceTarget(
    host="old",
    port=1,
    tls_port=2,
    password="ticket",
    ca="PEM",
    host_subject="CN=old",
    proxy="http://proxy:3128",
    secure_channels=frozenset({"main"}),
)


@pytest.mark.parametrize(
    ("old", "where", "new"),
    [
        (OLD, SwitchHost(3, 4, "new"), replace(OLD, host="new", port=3, tls_port=4)),
        (
            replace(OLD, allow_plain=True),
            SwitchHost(3, None, "new"),
            replace(OLD, host="new", port=3, tls_port=None, allow_plain=True),
        ),
        (OLD, SwitchHost(3, 4, "new", "CN=new"), replace(OLD, host="new", port=3, tls_port=4, host_subject="CN=new")),
        (OLD, SwitchHost(None, 4, "[::1]"), replace(OLD, host="::1", port=None, tls_port=4)),
        (OLD, SwitchHost(3, 4, ""), replace(OLD, port=3, tls_port=4)),
        (SpiceTarget(host="old", tls_port=2), SwitchHost(3, 4, "new"), SpiceTarget(host="new", tls_port=4)),
        (SpiceTarget(unix_path="/vm"), SwitchHost(3, None, "new"), SpiceTarget(host="new", port=3)),
        (SpiceTarget(unix_path="/vm"), SwitchHost(3, 4, "new"), SpiceTarget(host="new", port=3, tls_port=4)),
        (SpiceTarget(host="old", port=1), SwitchHost(3, 4, "new", "CN=new"), SpiceTarget(host="new", port=3)),
        (SpiceTarget(host="old", port=1), SwitchHost(3, None, "new", "CN=new"), SpiceTarget(host="new", port=3)),
        (
            SpiceTarget(host="old", port=1),
            SwitchHost(None, 4, "new", "CN=new"),
            SpiceTarget(host="new", tls_port=4, host_subject="CN=new"),
        ),
    ],
)
def test_the_target_of_the_new_host(old: SpiceTarget, where: SwitchHost, new: SpiceTarget) -> None:
    assert moved_target(old, where) == new


@pytest.mark.parametrize(
    ("old", "where", "reason", "text"),
    [
        (
            OLD,
            SwitchHost(None, None, "new"),
            Reason.UNREACHABLE,
            "the VM moved to new: the server reported no host and port",
        ),
        (SpiceTarget(host="old", tls_port=2), SwitchHost(None, None, "new"), Reason.UNREACHABLE, "no host and port"),
        (SpiceTarget(host="old", tls_port=2), SwitchHost(3, None, "new"), Reason.NEEDS_TLS, "no TLS port"),
        (OLD, SwitchHost(3, None, "new"), Reason.NEEDS_TLS, "no TLS port, and this target has one"),
        (SpiceTarget(unix_path="/vm"), SwitchHost(3, None, ""), Reason.UNREACHABLE, "no host and port"),
    ],
)
def test_a_new_host_that_cannot_be_reached(old: SpiceTarget, where: SwitchHost, reason: Reason, text: str) -> None:
    with pytest.raises(TargetError, match=text) as caught:
        moved_target(old, where)
    assert caught.value.reason is reason
