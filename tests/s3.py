"""An S3 server for tests (moto's, a process of its own), and an HTTP proxy before it that injects faults."""

import http.client
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ERROR = '<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
SLOW_DOWN = 503, "SlowDown", "Please reduce your request rate."
EXPIRED = 400, "ExpiredToken", "The provided token has expired."
DENIED = 403, "AccessDenied", "Access Denied"
CUT = "cut"  # the connection ends in the middle of the request's or the answer's body
SILENT = "silent"  # the connection stays open and nothing is sent


class Faults:
    """Decides what happens to each request, and counts what was done to them."""

    def __init__(self):
        self.lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        self.counts, self.requests = Counter(), Counter()
        self.decide = lambda method, path: None  # an answer of the store, CUT or SILENT
        self.latency = 0.0

    def of(self, method: str, path: str):
        with self.lock:
            self.requests[method] += 1
            fault = self.decide(method, path)
            if fault:
                self.counts[fault if isinstance(fault, str) else fault[1]] += 1
        time.sleep(self.latency)
        return fault


def share(probability: float, fault, seed: int = 0):
    """That share of the requests, by chance."""
    chance = random.Random(seed)
    return lambda method, path: fault if chance.random() < probability else None


def burst(first: int, last: int, fault):
    """The requests number first to last, from 0."""
    number = iter(range(10**9))
    return lambda method, path: fault if first <= next(number) <= last else None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def handle_all(self) -> None:
        fault = self.server.faults.of(self.command, self.path)
        if fault == SILENT:
            time.sleep(60)
            self.close_connection = True
            return
        if fault == CUT and self.command == "PUT":
            self.rfile.read1(1000)
            self.hang_up()
            return
        body = self.read_body()
        if fault and fault != CUT:
            status, *said = fault
            content = ERROR.format(code=said[0], message=said[1]).encode()
            self.answer(status, [("Content-Type", "application/xml")], content, len(content))
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream)
        set_here = ("transfer-encoding", "content-length")
        headers = {key: value for key, value in self.headers.items() if key.lower() not in set_here}
        upstream.request(self.command, self.path, body, headers | {"Content-Length": str(len(body))})
        response = upstream.getresponse()
        content = response.read()
        left_out = ("connection", "transfer-encoding", "content-length", "date", "server")
        headers = [(key, value) for key, value in response.getheaders() if key.lower() not in left_out]
        length = int(response.getheader("Content-Length") or len(content))
        upstream.close()
        if fault == CUT and not content:
            self.hang_up()
        elif fault == CUT:
            self.answer(response.status, headers, content[: len(content) // 2], length)
            self.hang_up()
        else:
            self.answer(response.status, headers, content, length)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_all

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return body

    def answer(self, status: int, headers: list, content: bytes, length: int) -> None:
        self.send_response(status)
        for key, value in [*headers, ("Content-Length", str(length))]:
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)


class Proxy(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, upstream: int, host: str = "127.0.0.1"):
        super().__init__((host, 0), Handler)
        self.upstream, self.faults = upstream, Faults()
        self.url = f"http://{host}:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address) -> None:
        """A client that gave up on a connection is what these tests are about."""


def start_moto() -> tuple[subprocess.Popen, int]:
    """(process, port) of a server that answers."""
    return start_server(sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p")


def start_server(*command: str) -> tuple[subprocess.Popen, int]:
    """(process, port) of a server that answers. The port is the last argument of the command."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    process = subprocess.Popen([*command, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return process, port
        except OSError:
            time.sleep(0.05)
    process.kill()
    raise RuntimeError(f"{' '.join(command)} does not start")
