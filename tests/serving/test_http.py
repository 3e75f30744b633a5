"""HTTP around the API, over real sockets: who is answered, and what becomes of clients that are slow or odd."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from serving import connections, http
from serving.protocol import ApiError

JSON = {"Content-Type": "application/json"}
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


class Service:
    """The gate and the connections of the chat service around a small application, on a port of this machine."""

    def __init__(self, hosts: list[str], origins: list[str]):
        self.sent = 0
        routes = [
            Route("/v1/models", self.models),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/endless", self.endless),
        ]
        handlers = {ApiError: lambda request, error: JSONResponse(error.body, error.status)}
        app = Starlette(routes=routes, exception_handlers=handlers | {HTTPException: self.error})
        app.router.redirect_slashes = False
        app.add_middleware(http.Gate, hosts=hosts, origins=origins)
        connections.limit_connections()
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    async def error(self, request: Request, error: HTTPException) -> Response:
        return JSONResponse({}, error.status_code, error.headers)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"data": []})

    async def complete(self, request: Request) -> Response:
        return JSONResponse(json.loads(await http.read_body(request)))

    async def endless(self, request: Request) -> Response:
        async def events() -> Iterator[bytes]:
            while True:
                self.sent += 1000
                yield b"x" * 1000
                await asyncio.sleep(0)

        return StreamingResponse(events())

    def post(self, body: bytes = b"{}", **headers: str) -> httpx.Response:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        return httpx.post(f"{self.url}/v1/completions", content=body, headers=JSON | given, trust_env=False)

    def connect(self, *said: bytes) -> socket.socket:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", self.port))
        connection.settimeout(20)
        for part in said:
            connection.sendall(part)
        return connection


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    service = Service(http.hosts_of("127.0.0.1", ["*.lan"]), ["https://site.example"])
    yield service
    service.server.should_exit = service.server.force_exit = True
    service.thread.join(10)


def everything(connection: socket.socket) -> bytes:
    said = b""
    with connection:
        while piece := connection.recv(65536):
            said += piece
    return said


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST.:8000", "127.0.0.1:1", "[::1]:8000", "box.lan:8000"])
def test_known_hosts_are_answered(service, host):
    assert service.post(Host=host).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example:8000", "localhost@evil.example", "[::1", ""])
def test_other_hosts_are_refused_as_in_dns_rebinding(service, host):
    assert service.post(Host=host).status_code == 403
    refused = httpx.get(f"{service.url}/v1/models", headers={"Host": host}, trust_env=False)
    assert refused.status_code == 403 and "--allowed-hosts" in refused.json()["error"]["message"]


def test_only_a_service_on_loopback_asks_for_its_name():
    for host in ("127.0.0.1", "::1", "localhost"):
        assert http.hosts_of(host, []) == ["localhost", "127.0.0.1", "::1", host]
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        assert http.hosts_of(host, []) == ["*"]
        assert http.hosts_of(host, ["chat.example"]) == ["localhost", "127.0.0.1", "::1", host, "chat.example"]


def test_other_sites_pages_may_not_post(service):
    own = f"127.0.0.1:{service.port}"
    for origin in (f"http://{own}", "https://site.example"):
        assert service.post(Origin=origin).status_code == 200
    assert service.post(Host="chat.lan", Origin="https://chat.lan").status_code == 200
    assert service.post(Host="chat.lan:443", Origin="https://chat.lan").status_code == 200
    assert service.post(Host=own, Origin="https://behind.example", Sec_Fetch_Site="same-origin").status_code == 200
    for origin in ("http://evil.example", "null", "http://127.0.0.1:3000", f"http://{own}.evil.example", "x://[", ""):
        refused = service.post(Origin=origin)
        assert refused.status_code == 403 and "--cors-origins" in refused.json()["error"]["message"], origin


def test_a_body_is_json_by_its_header(service):
    for kind in ("application/json", "Application/JSON; charset=utf-8", "application/vnd.api+json"):
        assert service.post(Content_Type=kind).status_code == 200
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        assert service.post(Content_Type=kind).status_code == 415, kind
    assert httpx.post(f"{service.url}/v1/completions", content=b"{}", trust_env=False).status_code == 200
    assert service.post(Content_Encoding="gzip").status_code == 415
    assert service.post(b'\xef\xbb\xbf{"a": 1}').json() == {"a": 1}


def test_slashes_head_and_options(service):
    for path in ("/v1/models/", "/v1/models//"):
        assert httpx.get(service.url + path, trust_env=False).json() == {"data": []}
    assert httpx.post(f"{service.url}/v1/completions/", json={"a": 1}, trust_env=False).json() == {"a": 1}
    head = httpx.head(f"{service.url}/v1/models", trust_env=False)
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", "11")
    for path, allowed in (("models", {"GET", "HEAD", "OPTIONS"}), ("completions", {"POST", "OPTIONS"})):
        options = httpx.options(f"{service.url}/v1/{path}", trust_env=False)
        assert options.status_code == 204 and set(options.headers["allow"].split(", ")) == allowed
    assert httpx.options(f"{service.url}/nowhere", trust_env=False).status_code == 404


def test_a_large_body_is_refused_by_its_header_and_on_its_way(service):
    with service.connect(POST, b"Content-Length: 1000000000\r\n\r\n") as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")

    def pieces() -> Iterator[bytes]:
        for _ in range(200):
            yield b" " * 100_000

    refused = httpx.post(f"{service.url}/v1/completions", content=pieces(), headers=JSON, trust_env=False)
    assert refused.status_code == 413
    assert service.post(b" " * 999_000 + b"{}").status_code == 200


def test_a_body_that_comes_slowly_is_given_up(service, monkeypatch):
    monkeypatch.setattr(http, "BODY_SECONDS", 0.5)
    monkeypatch.setattr(connections, "REST_SECONDS", 0.5)
    began, connection = time.monotonic(), service.connect(POST, b"Content-Length: 1000\r\n\r\n")
    with suppress(OSError):  # a reset, when it has ended
        while time.monotonic() - began < 20:
            connection.sendall(b" ")
            time.sleep(0.1)
    assert time.monotonic() - began < 5
    with service.connect(POST, b"Content-Length: 1000\r\n\r\n", b" ") as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 408 ")


def test_headers_that_come_slowly_or_never_are_given_up(service, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.5)
    for said in ((), (b"GET /v1/models HTTP/1.1\r\nHost: loc",)):
        began, connection = time.monotonic(), service.connect(*said)
        assert everything(connection) == b""
        assert time.monotonic() - began < 5


def test_a_reader_that_stops_ends_its_stream(service, monkeypatch):
    monkeypatch.setattr(connections, "UNREAD_SECONDS", 0.5)
    before = service.sent
    with service.connect(b"GET /endless HTTP/1.1\r\nHost: localhost\r\n\r\n"):
        deadline, last = time.monotonic() + 10, -1
        while service.sent != last and time.monotonic() < deadline:
            last = service.sent
            time.sleep(0.2)
        assert 0 < service.sent - before < 1_000_000  # what waits for a reader
        while service.server.server_state.connections and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not service.server.server_state.connections


def test_headers_without_end_and_of_any_bytes(service):
    request = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n%s\r\n"
    connection = service.connect(request[:-4])
    for i in range(10_000):
        connection.sendall(b"X-%d: many\r\n" % i)
    assert connection.recv(100).startswith(b"HTTP/1.1 431 ")
    connection.close()
    odd = service.connect(request % b"X-Request-Timeout-Seconds: \xff\r\nConnection: close\r\n")
    assert everything(odd).startswith(b"HTTP/1.1 200 ")


def test_pipelined_requests_are_answered_in_turn(service):
    asked = [POST + b"Content-Length: 6\r\n\r\n[10%02d]" % i for i in range(50)]
    last = POST + b"Connection: close\r\nContent-Length: 6\r\n\r\n[1050]"
    said = everything(service.connect(b"".join(asked) + last))
    assert said.count(b"HTTP/1.1 200 ") == 51
    assert said.index(b"[1000]") < said.index(b"[1049]") < said.index(b"[1050]")
