"""Serving on this machine alone: the port, and the names of this machine that requests may use."""

import socket
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse

from hfllm.errors import InputError

# Where other machines cannot reach a server.
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class LocalOnly:
    """ASGI middleware that refuses requests by other names of this machine.

    A page of another site could reach a server on localhost under a name of its own (DNS rebinding), and a link there
    could have it do something: requests that come from other sites' pages are refused too.

    Args:
        app: the application.
        hosts: accepted names; `None` accepts all.
        headers: of each answer, such as Content-Security-Policy.
    """

    def __init__(self, app: Any, hosts: Sequence[str] | None = LOOPBACK, headers: Mapping[str, str] | None = None):
        self.app, self.hosts, self.headers = app, hosts, dict(headers or {})

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        asked = Headers(scope=scope)
        refusal = self._refusal(asked.get("host", ""), asked.get("origin"))
        if refusal is not None:
            error = {"message": refusal, "type": "invalid_request_error", "param": None, "code": None}
            await JSONResponse({"error": error}, 403)(scope, receive, send)
            return

        async def answer(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
            await send(message)

        await self.app(scope, receive, answer)

    def _refusal(self, host: str, origin: str | None) -> str | None:
        name = _name_of(host.lower())
        if self.hosts is not None and name not in self.hosts:
            return f"host {name!r}: expected one of {', '.join(self.hosts)}"
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            return f"a page of {origin} asks: only this server's own may"
        return None


def _name_of(host: str) -> str:
    """Return the name of a header Host, without its port."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on a port, a free one for 0.

    Raises:
        InputError: naming the port, when it is taken or not allowed.
    """
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        # At once: until then another process may take the port too, and whoever reads the address is turned away.
        listening.listen()
    except (OSError, OverflowError) as error:
        listening.close()
        raise InputError(f"--host {host} --port {port}: {getattr(error, 'strerror', None) or error}") from None
    return listening


def address_of(listening: socket.socket) -> str:
    """Return the address of a listening socket, as browsers take it."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
