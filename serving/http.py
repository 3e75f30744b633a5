"""HTTP around the API: hosts and origins that may ask, paths and methods as clients send them, limits on bodies."""

import asyncio
import codecs
import socket
from fnmatch import fnmatchcase
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.protocol import ApiError

MAX_BODY_BYTES = 1_000_000
BODY_SECONDS, BODY_BYTES_PER_SECOND = 10, 10_000  # a body may take its bytes at this speed plus 10 seconds
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Gate:
    """ASGI middleware: refuses unknown hosts and origins, ignores a trailing slash, and answers HEAD and OPTIONS.

    hosts: names of the service, where * stands for any characters. origins: other sites whose pages may use it.
    """

    def __init__(self, app: ASGIApp, hosts: list[str], origins: list[str]):
        self.app, self.hosts, self.origins = app, [host.lower() for host in hosts], origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self.check(scope["method"], Headers(scope=scope))
            except ApiError as error:
                await JSONResponse(error.body, error.status)(scope, receive, send)
                return
            scope = as_without_slash(scope)
            if scope["method"] == "OPTIONS":
                send = with_what_is_allowed(send)
            elif scope["method"] == "HEAD":
                scope = {**scope, "method": "GET"}  # uvicorn leaves out the body
        await self.app(scope, receive, send)

    def check(self, method: str, headers: Headers) -> None:
        """Raise ApiError for an unknown Host, as in DNS rebinding, and for a POST by another site's page."""
        for host in headers.getlist("host"):
            name = hostname(f"//{host}")
            if not any(fnmatchcase(name, known) for known in self.hosts):
                raise ApiError(403, f"this service does not answer as {name!r}; --allowed-hosts can name it")
        origin = headers.get("origin")
        if method != "POST" or origin is None or headers.get("sec-fetch-site") == "same-origin":
            return
        own = site(f"//{headers.get('host', '')}", origin.partition(":")[0])
        if site(origin) != own and not {origin, "*"} & set(self.origins):
            raise ApiError(403, f"pages of {origin} may not use this service; --cors-origins can name them")


def hosts_of(host: str, allowed: list[str]) -> list[str]:
    """Return the names of a service that listens on `host`: any, except on loopback or if `allowed` names them."""
    try:
        loopback = all(ip_address(info[4][0]).is_loopback for info in socket.getaddrinfo(host, None))
    except OSError:
        loopback = False
    return [*LOOPBACK, host, *allowed] if loopback or allowed else ["*"]


def hostname(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").removesuffix(".")
    except ValueError:
        return ""


def site(url: str, scheme: str = "") -> tuple[str, int | None]:
    """Return the name and the port, which is None if it is invalid."""
    try:
        parts = urlsplit(url, scheme)
        return hostname(url), parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        return hostname(url), None


def as_without_slash(scope: Scope) -> Scope:
    root = scope.get("root_path", "")
    path = scope["path"].removeprefix(root).rstrip("/") or "/"
    return {**scope, "path": root + path}


def with_what_is_allowed(send: Send) -> Send:
    """Turn the answer 405 to OPTIONS into 204 with the list of methods."""
    changing = False

    async def changed(message: Message) -> None:
        nonlocal changing
        if message["type"] == "http.response.start" and message["status"] == 405:
            changing = True
            methods = {*Headers(raw=message["headers"]).get("allow", "").split(", "), "OPTIONS"}
            methods |= {"HEAD"} if "GET" in methods else set()
            message = {**message, "status": 204, "headers": [(b"allow", ", ".join(sorted(methods)).encode())]}
        elif changing:
            message = {**message, "body": b""}
        await send(message)

    return changed


async def read_body(request: Request) -> bytes:
    """Read the body. Raises ApiError as soon as it is known not to be JSON, too large or too slow."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise ApiError(415, f"the body is {kind!r}; needed is Content-Type: application/json")
    coding = request.headers.get("content-encoding", "identity").lower()
    if coding != "identity":
        raise ApiError(415, f"the body has Content-Encoding {coding!r}; it is read as it is")
    length, body = request.headers.get("content-length", ""), b""
    loop = asyncio.get_running_loop()
    began, pieces = loop.time(), request.stream()
    too_large = ApiError(413, f"the body is larger than {MAX_BODY_BYTES:,} bytes", code="request_too_large")
    if length.isdecimal() and int(length) > MAX_BODY_BYTES:
        raise too_large
    try:
        while True:
            async with asyncio.timeout_at(began + BODY_SECONDS + len(body) / BODY_BYTES_PER_SECOND):
                piece = await anext(pieces, None)
            if piece is None:
                return body.removeprefix(codecs.BOM_UTF8)
            body += piece
            if len(body) > MAX_BODY_BYTES:
                raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body came too slowly: {len(body):,} bytes in {loop.time() - began:.0f} s") from None
