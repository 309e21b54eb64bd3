"""What the studio's server answers: requests to its own names, of bounded size, without files, and no quick guesses.

The page without a password is safe on this machine only if no other web page can reach it. A page of another site can
have its own name lead to 127.0.0.1 (DNS rebinding), or send requests from there. The browser tells the name that was
called (Host) and the site that sends (Origin), so others than the page's own are refused.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

MAX_BYTES = 1 << 20
"""The largest request: the page sends texts and nothing else."""

FIRST_DELAY, MAX_DELAY = 0.5, 5.0
"""Seconds until a wrong password is answered: the first time, and after many wrong ones from one address."""

MAX_WAITING = 8
"""Passwords of one address that wait to be checked; further ones are refused."""

MAX_ADDRESSES = 10_000
"""Addresses whose wrong passwords are remembered."""


@dataclass
class _Tries:
    """The passwords that one address has tried.

    Attributes:
        lock: held while one is checked and answered.
        waiting: how many wait for that.
        wrong: how many were wrong in a row.
    """

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    waiting: int = 0
    wrong: int = 0


class RequestGuard:
    """ASGI middleware that refuses what the page never sends.

    Args:
        app: what answers the rest.
        names: the names and addresses, beside this machine's own, by which the page may be called.
    """

    def __init__(self, app: App, names: Collection[str] = ()) -> None:
        self.app = app
        self.names = {_host_name(name) for name in names}
        self._tries: dict[str, _Tries] = {}

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] not in ("http", "websocket"):  # the server's own start and end
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        host = _host_name(headers.get(b"host", b"").decode("latin-1"))
        sender = _origin_name(headers[b"origin"].decode("latin-1")) if b"origin" in headers else host
        path = scope["path"].rstrip("/")
        length = headers.get(b"content-length", b"0")
        if not self._is_own(host, scope):
            await _refuse(scope, send, 421, f"{host or 'no host'} is not a name of this page: name it (--allow-host)")
        elif not self._is_own(sender, scope):
            await _refuse(scope, send, 403, "another site's page may not use this one")
        elif path.endswith(("/upload", "/process_recording")):
            await _refuse(scope, send, 403, "this page takes no files")
        elif not length.isdigit() or int(length) > MAX_BYTES:
            await _refuse(scope, send, 413, f"a request may have {MAX_BYTES} bytes")
        elif path.endswith("/login") and scope.get("method") == "POST":
            await self._log_in(scope, _bounded(receive), send)
        else:
            await self.app(scope, _bounded(receive), send)

    def _is_own(self, host: str, scope: MutableMapping[str, Any]) -> bool:
        """Return whether a request was sent to this machine by a name that other sites cannot give themselves."""
        # A server at all addresses does not know its own ones, but on which one it was called.
        called = (scope.get("server") or ("",))[0]
        return host == "localhost" or host in self.names or _is_loopback(host) or host == called != ""

    async def _log_in(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Have a password checked; of each address one after the other, and wrong ones are answered late."""
        address = _network((scope.get("client") or ("",))[0])
        tries = self._tries.setdefault(address, _Tries())
        if len(self._tries) > MAX_ADDRESSES:
            del self._tries[next(iter(self._tries))]
        if tries.waiting >= MAX_WAITING:
            await _refuse(scope, send, 429, "too many passwords at once: wait")
            return

        async def send_late(message: Message) -> None:
            if message["type"] == "http.response.start":
                wrong = message["status"] >= 400
                tries.wrong = tries.wrong + 1 if wrong else 0
                if wrong:
                    await asyncio.sleep(min(FIRST_DELAY * 2.0 ** min(tries.wrong - 1, 10), MAX_DELAY))
            await send(message)

        tries.waiting += 1
        try:
            async with tries.lock:
                await self.app(scope, receive, send_late)
        finally:
            tries.waiting -= 1


def _bounded(receive: Receive) -> Receive:
    """Return a function that receives a request's body up to :data:`MAX_BYTES`; beyond, its sender is gone."""
    total = 0

    async def receive_some() -> Message:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        return message if total <= MAX_BYTES else {"type": "http.disconnect"}

    return receive_some


def _host_name(host: str) -> str:
    """Return the name or address of a Host header, without its port."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host if host.count(":") > 1 else host.partition(":")[0].rstrip(".")


def _origin_name(origin: str) -> str:
    """Return the name of the site in an Origin header; empty if it has none, as of a page from a file."""
    try:
        return urlsplit(origin).hostname or ""
    except ValueError:
        return ""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _network(address: str) -> str:
    """Return an address, or of version 6 its network, all of whose addresses one machine may have."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    return str(parsed if parsed.version == 4 else ipaddress.ip_network((parsed, 64), strict=False))


async def _refuse(scope: MutableMapping[str, Any], send: Send, status: int, reason: str) -> None:
    """Answer with an error."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": reason.encode()})
