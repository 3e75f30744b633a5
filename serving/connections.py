"""Limits on slow connections, for the servers of ChatService and of Serve's proxies, which import nothing else."""

import asyncio
import json
import socket

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_SECONDS, MOST_HEAD_BYTES = 20, 65_536  # for a request's line and headers
UNREAD_SECONDS = 60  # for a client to take what waits for it: up to 64 KiB here, and SEND_BYTES in the kernel
REST_SECONDS = 10  # for the rest of a body after its answer, in which a client finds the answer
SEND_BYTES = 65_536


class Connection(HttpToolsProtocol):
    """uvicorn's, but it ends when a client takes too long to send its headers, or to read what it asked for."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
        self.timers: dict[str, asyncio.TimerHandle] = {}
        self.head_bytes, self.refused = 0, False
        self.wait_for("head", HEAD_SECONDS)

    def wait_for(self, what: str, seconds: float) -> None:
        self.have(what)
        self.timers[what] = self.loop.call_later(seconds, self.transport.abort)

    def have(self, what: str) -> None:
        if timer := self.timers.pop(what, None):
            timer.cancel()

    def data_received(self, data: bytes) -> None:
        if self.refused:
            return  # until the client ends, so that it is not reset before it has read the answer
        super().data_received(data)
        self.head_bytes = self.head_bytes + len(data) if "head" in self.timers else 0
        if self.head_bytes > MOST_HEAD_BYTES and not self.transport.is_closing():
            self.refused = True
            error = {
                "message": f"the headers have more than {MOST_HEAD_BYTES:,} bytes",
                "type": "invalid_request_error",
            }
            body = json.dumps({"error": error | {"param": None, "code": None}})
            head = f"HTTP/1.1 431 \r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            self.transport.write(f"{head}Connection: close\r\n\r\n{body}".encode())
            self.wait_for("rest", REST_SECONDS)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.wait_for("head", HEAD_SECONDS)

    def on_header(self, name: bytes, value: bytes) -> None:
        try:
            value.decode()
        except UnicodeDecodeError:  # Serve reads some as UTF-8, and answers with 500 when they are not
            value = value.decode("latin-1").encode()
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self.have("head")
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self.have("rest")
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete:  # else the next one is being answered already
            if self.cycle.more_body:
                self.wait_for("rest", REST_SECONDS)
            else:
                self.wait_for("head", self.timeout_keep_alive + HEAD_SECONDS)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.wait_for("reader", UNREAD_SECONDS)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.have("reader")

    def connection_lost(self, exc: Exception | None) -> None:
        for what in list(self.timers):
            self.have(what)
        super().connection_lost(exc)


def limit_connections() -> None:
    """Of the servers that this process starts. Serve calls it, as RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH says."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{Connection.__module__}:{Connection.__name__}"
