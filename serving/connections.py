"""Limits on slow connections, for the HTTP servers of ChatService and of Serve's proxies."""

import asyncio
import json
import socket

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_SECONDS, MAX_HEAD_BYTES = 20, 65_536  # limits of a request's line and headers
UNREAD_SECONDS = 60  # for a client to read what is buffered: up to 64 KiB here and SEND_BYTES in the kernel
REST_SECONDS = 10  # for a client to send the rest of a body that was already answered, and to find the answer
SEND_BYTES = 65_536


class Connection(HttpToolsProtocol):
    """uvicorn's protocol with limits: it closes if a client is too slow in sending headers or reading its answer."""

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
            return  # keep reading until the client closes: a reset could come before it has read the answer
        super().data_received(data)
        self.head_bytes = self.head_bytes + len(data) if "head" in self.timers else 0
        if self.head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.refused = True
            error = {
                "message": f"the headers have more than {MAX_HEAD_BYTES:,} bytes",
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
        except UnicodeDecodeError:  # Serve decodes some headers as UTF-8, and would answer 500
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
        if self.cycle.response_complete:  # if not, the next request is already being answered
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
    """Use Connection in the servers that this process starts. Serve calls this in its proxies, because
    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it.
    """
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{Connection.__module__}:{Connection.__name__}"
