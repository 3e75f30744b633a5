"""A service whose answers are written by the test: the API's contract over real HTTP, no model behind it.

For what a real model cannot be made to do on demand: hostile output, tool calls, errors in mid-stream, being busy.
"""

import asyncio
import json
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles

UI = Path(__file__).resolve().parents[2] / "serving" / "ui"


@dataclass
class Script:
    """What the next answers are. A test changes fields while the service runs."""

    answer: list = field(default_factory=lambda: ["Hello", " there."])
    """Deltas: text; (part, text); {"error": ...}; None to end early; a threading.Event to wait for."""
    delay: float = 0.0
    """Seconds before each delta."""
    refusals: list = field(default_factory=list)
    """(status, message, headers) of the next requests, taken from the front."""
    models: list = field(default_factory=lambda: ["tiny"])
    key: str | None = None
    """The API key that is asked for."""
    requests: list = field(default_factory=list)
    """Bodies received."""
    cancelled: int = 0
    """Streams whose client went away."""
    streaming: int = 0
    most_streaming: int = 0
    """Streams that were open at the same time, at most."""


def app(script: Script) -> FastAPI:
    api = FastAPI()

    def refusal(status: int, message: str, headers: dict | None = None) -> JSONResponse:
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        return JSONResponse({"error": error}, status, headers)

    def locked(request: Request) -> bool:
        return script.key is not None and request.headers.get("authorization") != f"Bearer {script.key}"

    @api.get("/v1/models")
    def models(request: Request):
        if locked(request):
            return refusal(401, "no such key")
        return {"object": "list", "data": [{"id": name, "object": "model"} for name in script.models]}

    @api.post("/v1/chat/completions")
    async def complete(request: Request):
        body = await request.json()
        script.requests.append(body)
        if locked(request):
            return refusal(401, "no such key")
        if script.refusals:
            return refusal(*script.refusals.pop(0))
        tokens = sum(isinstance(delta, str | tuple) for delta in script.answer)
        usage = {"prompt_tokens": prompt_tokens(body), "completion_tokens": tokens}
        if not body.get("stream"):
            await asyncio.sleep(script.delay * tokens)
            deltas = [("text", delta) if isinstance(delta, str) else delta for delta in script.answer]
            parts = [{"type": part, "text": text} for part, text in deltas]
            message = {
                "role": "assistant",
                "content": "".join(p["text"] for p in parts if p["type"] == "text"),
                "nanochat_parts": parts,
            }
            return {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage}
        return StreamingResponse(stream(usage), media_type="text/event-stream")

    async def stream(usage: dict):
        script.streaming += 1
        script.most_streaming = max(script.most_streaming, script.streaming)
        try:
            for delta in script.answer:
                await asyncio.sleep(script.delay)
                if delta is None:
                    return
                if isinstance(delta, threading.Event):
                    while not delta.is_set():
                        await asyncio.sleep(0.01)
                    continue
                if isinstance(delta, dict):
                    yield event(delta)
                    continue
                part, text = (None, delta) if isinstance(delta, str) else delta
                yield event(
                    chunk({"content": "", "nanochat_part": part, "nanochat_text": text} if part else {"content": text})
                )
            yield event(chunk({}, "stop"))
            yield event({"choices": [], "usage": usage})
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            script.cancelled += 1
            raise
        finally:
            script.streaming -= 1

    api.get("/")(lambda: FileResponse(UI / "index.html"))
    api.mount("/ui", StaticFiles(directory=UI))
    return api


def chunk(delta: dict, finish_reason: str | None = None) -> dict:
    return {
        "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}],
    }


def event(data: dict) -> str:
    return f"data: {json.dumps(data)}\n\n"


def prompt_tokens(body: dict) -> int:
    """One a word, and a few around each turn, as with a tokenizer that knows all the words."""
    return sum(len(str(message["content"]).split()) + 2 for message in body["messages"])


class ScriptedService:
    """Serves on a free port of 127.0.0.1 in a thread, from `with` to its end."""

    def __init__(self):
        self.script = Script()
        config = uvicorn.Config(app(self.script), host="127.0.0.1", port=0, log_level="warning", lifespan="off")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self) -> "ScriptedService":
        self.thread.start()
        while not self.server.started:
            if not self.thread.is_alive():
                raise OSError("the scripted service did not start")
            time.sleep(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        return self

    def __exit__(self, *_):
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(timeout=10)
