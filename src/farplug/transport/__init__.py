"""Connections to VMs: sockets, TLS, proxies, SPICE sessions."""

TARGET_FORMS = (
    "spice://host:port, spice+tls://host:port, FILE.vv, kubevirt://[CONTEXT/]NAMESPACE/VM, tcp://host:port, "
    "tcp-listen://host:port, unix:/path or usbip-listen://host:port"
)
"""The forms of a target, for messages and help. :func:`farplug.target.parse_target` parses them."""
