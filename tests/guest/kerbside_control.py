"""A control plane of the SPICE proxy kerbside for tests: it authorizes connections, and ends sessions.

It runs with the Python of ``.venv-kerbside``: :mod:`tests.guest.kerbside` starts it with the path of a UNIX socket,
which the proxy connects to (gRPC service ``kerbside.rpc.KerbsideProxy``, ``kerbside.proto`` of kerbside 0.8.0).
Requests arrive on standard input, records leave on standard output; each is one line, a JSON object:

=============================================== ================================================================
``{"do": "allow", "token": T, "target": {…}}``  accept this token, for this target (fields of the message Target)
``{"do": "revoke", "token": T}``                refuse this token from now on
``{"do": "permit", "channels": [1, 9]}``        the channel types that the proxy relays (empty: all)
``{"do": "terminate", "session": S}``           end all channels of a session
``{"done": …}``                                 a request was executed
``{"call": NAME, …}``                           the proxy called this method; ``Listening``: the socket is ready
=============================================== ================================================================
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
from google.protobuf.json_format import MessageToDict, ParseDict
from kerbside.rpc import kerbside_pb2 as messages
from kerbside.rpc.kerbside_pb2_grpc import KerbsideProxyServicer, add_KerbsideProxyServicer_to_server


def record(**fields: object) -> None:
    """Write one line to standard output."""
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


class ControlPlane(KerbsideProxyServicer):  # type: ignore[misc]  # kerbside has no types
    """The methods that the proxy calls, and the requests of the tests."""

    def __init__(self) -> None:
        self._targets: dict[str, Any] = {}
        self._firewall = messages.FirewallPolicy()
        self._terminations: asyncio.Queue[str] = asyncio.Queue()

    async def AuthorizeConnection(self, request: Any, context: object) -> Any:
        """Return the target of a token, and the channels that the proxy permits."""
        target = self._targets.get(request.token)
        channel = [request.channel_type, request.channel_id]
        record(call="AuthorizeConnection", channel=channel, accepted=target is not None)
        if target is None:
            return messages.AuthorizeConnectionReply(denied=messages.Denied(reason="unknown or expired token"))
        return messages.AuthorizeConnectionReply(target=target, firewall_policy=self._firewall)

    async def ProxyControl(self, request: object, context: object) -> AsyncIterator[Any]:
        """Yield the sessions that the proxy must end, as long as the proxy listens."""
        record(call="ProxyControl")
        yield messages.ProxyControlEvent(heartbeat=messages.Heartbeat())
        while True:
            end = messages.TerminateSession(session_id=await self._terminations.get())
            yield messages.ProxyControlEvent(terminate_session=end)

    async def _accept(self, request: Any, context: object) -> Any:
        record(call=type(request).__name__.removesuffix("Request"), **MessageToDict(request))
        return messages.StatusReply(success=True)

    RegisterChannel = DeregisterChannel = ClearNodeChannels = RecordAuditEvent = _accept

    def execute(self, request: dict[str, Any]) -> None:
        """Execute a request of the tests."""
        match request:
            case {"do": "allow", "token": str(token), "target": dict(target)}:
                self._targets[token] = ParseDict(target, messages.Target())
            case {"do": "revoke", "token": str(token)}:
                del self._targets[token]
            case {"do": "permit", "channels": list(channels)}:
                self._firewall = messages.FirewallPolicy(permitted_channels=channels)
            case {"do": "terminate", "session": str(session)}:
                self._terminations.put_nowait(session)
            case _:
                raise ValueError(f"{request} is not a valid request")
        record(done=request["do"])


async def main(path: str) -> None:
    """Serve until standard input ends."""
    control = ControlPlane()
    server = grpc.aio.server()
    add_KerbsideProxyServicer_to_server(control, server)
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    record(call="Listening")
    requests = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(requests), sys.stdin)
    async for line in requests:
        control.execute(json.loads(line))
    await server.stop(grace=None)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
