from __future__ import annotations

import socket
import ssl
import threading
from pathlib import Path

import pytest

from farplug.vm.certificates import write_certificates


def test_tls_trusts_them_for_their_names_only(tmp_path: Path) -> None:
    assert write_certificates(tmp_path, ("guest.example", "127.0.0.1")) == "O=farplug,CN=guest.example"
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "server-cert.pem", tmp_path / "server-key.pem")
    client = ssl.create_default_context(cafile=str(tmp_path / "ca-cert.pem"))
    client.verify_flags |= ssl.VERIFY_X509_STRICT  # as Python's default since 3.13

    def handshake(name: str) -> None:
        ours, theirs = socket.socketpair()

        def serve() -> None:
            try:
                server.wrap_socket(theirs, server_side=True).close()
            except OSError:
                theirs.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with ours, client.wrap_socket(ours, server_hostname=name):
                pass
        finally:
            thread.join()

    handshake("guest.example")
    handshake("127.0.0.1")
    for name in ("other.example", "127.0.0.2"):
        with pytest.raises(ssl.SSLCertVerificationError, match=r"mismatch|not valid for"):
            handshake(name)
