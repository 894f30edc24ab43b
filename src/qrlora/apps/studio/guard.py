"""Decide who may use the studio, and limit what its pages may do in a browser."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qrlora._files import write_atomically
from qrlora._said import said
from qrlora.apps.studio.pages import csrf_of, in_words

LOCAL = ("127.0.0.1", "localhost", "::1")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; font-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
"""No inline script or style, nothing from elsewhere."""
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
OPEN = ("/static/", "/login", "/health")
TOKEN = "x-csrf-token"


def secret_in(folder: Path) -> str:
    """Return the key that session cookies are signed with; it is made at the first start, so that logins outlive a
    restart."""
    path = folder / "session.key"
    if not path.is_file():
        write_atomically(path, secrets.token_hex(32).encode())
        path.chmod(0o600)
    return path.read_text()


def right_key(given: str, keys: Sequence[str]) -> bool:
    """Compare with every key, each in a time that does not depend on where they differ."""
    digest = hashlib.sha256(given.encode()).digest()
    return any([hmac.compare_digest(digest, hashlib.sha256(key.encode()).digest()) for key in keys])


class Guard:
    """Middleware, inside the session's, that refuses foreign hosts, foreign pages, unknown people and missing tokens.

    Args:
        keys: of which people who are not on this machine log in with one; none: whoever reaches it may use it.
        local: it listens on this machine alone; then only names of this machine are answered, so that no page of
            elsewhere reaches it under a name of its own (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str] = (), local: bool = True):
        self.app, self.keys, self.local = app, keys, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refused = self._refusal(Request(scope))
        await (refused or self.app)(scope, receive, with_headers)

    def _refusal(self, request: Request) -> Response | None:
        path, headers = request.url.path, request.headers
        host = urlsplit(f"//{headers.get('host', '')}").hostname
        if self.local and host not in LOCAL:
            what = said("expected a name of this machine: http://localhost, got %(host)s", host=host)
            return PlainTextResponse(in_words(request, what), 421)
        if self._foreign(headers):
            return PlainTextResponse(in_words(request, said("refused: this request comes from another site")), 403)
        if path.startswith("/api/"):  # has keys of its own, in a header that no page can make a browser send
            return None
        if self.keys and not request.session.get("person") and not path.startswith(OPEN):
            if "hx-request" in headers:
                return Response(status_code=401, headers={"HX-Redirect": "/login"})
            return RedirectResponse("/login", 303)
        changes = request.method not in ("GET", "HEAD", "OPTIONS")
        if changes and not hmac.compare_digest(headers.get(TOKEN, ""), csrf_of(request.session)):
            return PlainTextResponse(in_words(request, said("this page is too old: reload it and try again")), 403)
        return None

    @staticmethod
    def _foreign(headers: Headers) -> bool:
        """Return True if a page of another site sent the request, unless it is a link that the user followed."""
        origin = headers.get("origin")
        if origin and urlsplit(origin).netloc != headers.get("host"):
            return True
        return headers.get("sec-fetch-site") == "cross-site" and headers.get("sec-fetch-mode") != "navigate"
