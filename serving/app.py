"""The chat service on Ray Serve: OpenAI's API and a page, over one engine replica or many.

    nanochat-ray serve --checkpoint DIR            on this machine
    serve run serving.app:app checkpoint=DIR       the same; on a cluster, a Serve config file names serving.app:app

A request comes to the ChatService of the host that was asked, which checks and tokenizes it, and goes on to an
EngineServer of its model: to the one that had the conversation's beginning before, and so most of its prefix in cache.
"""

import asyncio
import hashlib
import hmac
import logging
import math
import os
import time
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import suppress
from functools import partial
from pathlib import Path

import ray
import torch
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import Metric
from pydantic import BaseModel, field_validator
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.context import _get_global_client
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request

from nanochat_ray import storage
from nanochat_ray.data.tokenizer import Tokenizer
from nanochat_ray.train.checkpoint import latest_checkpoint, read_meta, resolve_checkpoint, run_name
from serving import schema, tokens
from serving.answers import ChatWriter, CompletionWriter, Writer
from serving.engine_server import EngineServer
from serving.fronts import ENGINE_MARK, one_on_each_host
from serving.http import Gate, hosts_of, read_body
from serving.metrics import Metrics
from serving.protocol import ApiError, dumps, parse
from serving.requests import ChatRequest, CompletionRequest, Conversing
from serving.responses import ResponsesRequest, ResponsesWriter
from serving.streams import all_of, chain
from serving.tokens import DetokenizeRequest, TokenizeRequest

# Serve pickles ChatService by value, with the names of this module that it uses: they must be defined above it.
UI = Path(__file__).parent / "ui"
AFFINE_TOKENS = 64  # prompts with the same first tokens go to the same engine
LOST = "the replica that answered was lost; ask again"
MAX_ATTEMPTS = 3  # at busy or lost engines, before a request fails
# Seconds without a message after which an engine counts as lost; a living one sends one every 2 seconds. Before the
# first message the limit is lower, because the next engine that is tried may be lost, too.
MAX_SILENCE, MAX_FIRST_SILENCE, MAX_SILENT_ATTEMPTS = 8, 4, 16
KEEP_ALIVE = 10  # seconds without an event after which a stream sends a comment
HEALTH_TTL, HEALTH_TIMEOUT = 2, 3  # seconds that a health check is valid, and that it may take
CHECKPOINT_FILES = ("meta.json", "model.safetensors", "tokenizer.json", "tokenizer.tiktoken")  # an engine loads them
UNREACHABLE = (RayError, RayServeException, TimeoutError)
CONSISTENT_HASH_ROUTER = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
PAGE_HEADERS = {  # the rest of the policy is in the page itself
    "Content-Security-Policy": "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
Asked = Conversing | CompletionRequest
CPU_SHARE = 0.5  # CPUs that Ray reserves for an engine: in an update the next engine starts beside the old one
MAX_ONGOING = 10_000  # requests of a replica in Serve's count; replicas limit themselves
QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)


class ServiceOptions(BaseModel):
    """What `nanochat-ray serve`, `serve run` and a Serve config file may set."""

    checkpoint: list[str] = []
    """Checkpoint or run folders, each a model named after its run, or as NAME=FOLDER; the newest one by default."""
    max_batch_size: int = 32
    """Answers that an engine generates at once."""
    queue_limit: int = 64
    """Requests that wait for an engine; more are turned away with 429."""
    kv_gb: float | None = None
    """GiB of keys and values of each engine. The default on a CPU has room for max_batch_size answers as long as the
    context, and on a GPU it is most of the memory that the weights leave."""
    dtype: str | None = None
    """float32 or bfloat16; the default is bfloat16 where the hardware is fast at it."""
    compile: bool = True
    """For several times the speed: torch.compile in the background on CPUs, a minute or two; CUDA graphs on GPUs."""
    replicas: int = 1
    """Engines of each model, one per GPU, or sharing the CPUs."""
    use_gpu: bool | None = None
    """Engines on GPUs. The default is what the cluster has now: say so where nodes with GPUs come later."""
    max_replicas: int | None = None
    """Add engines, up to this many, while requests exceed what those there are generate at once."""
    api_keys: str | None = None
    """File with the sha256 of each API key, a line each (printf %s KEY | sha256sum); everybody may ask without it."""
    shared_cache: bool = False
    """Let an API key's prompts begin with what is cached of another's. How long an answer takes, and its cached_tokens,
    then tell one key what another has asked."""
    requests_per_minute: int | None = None
    """Of each API key, or of everybody together where there are no keys."""
    cors_origins: list[str] = []
    """Web sites whose pages may use this service; by default only its own."""
    allowed_hosts: list[str] = []
    """More names that the service has, such as *.example.com, where it listens on this machine alone: there it answers
    as localhost only. Elsewhere it answers as anything, unless some are given."""

    @field_validator("checkpoint", mode="before")
    @classmethod
    def one_or_more(cls, given):
        return [given] if isinstance(given, str) else given  # `serve run … checkpoint=FOLDER`


class Model:
    """A served checkpoint: its tokenizer and limits, the handle of its engines, and their health."""

    def __init__(self, name: str, folder: str, engine: DeploymentHandle):
        # Streams use gRPC. In a stream through Ray's own transport, an engine would stop for all its clients when the
        # host of one front is cut off.
        self.tokenizer, self.engine = Tokenizer.load(folder), engine.options(_by_reference=False)
        self.sequence_len = read_meta(folder)["model_config"]["sequence_len"]
        self.created = int(storage.modified(storage.join(folder, "meta.json")).timestamp())
        self.capacity, self.asking = None, asyncio.Lock()  # tokens of the longest sequence, once an engine runs
        self.longest = int(self.tokenizer.token_bytes().max())  # bytes of the longest token
        self.name, self.folder, self.checked, self.checking = name, folder, -math.inf, asyncio.Lock()
        self.trouble = self.gone = None  # why no engine answers, and which of the checkpoint's files is missing
        self.session, self.session_heard = "", -math.inf  # the session that got the last message, and when

    def heard(self, session: str | None = None) -> None:
        """Note that an engine sent a message, in this session if one is given."""
        self.trouble, self.gone, self.checked = None, None, time.monotonic()
        if session is not None:
            self.session, self.session_heard = session, self.checked

    async def check(self) -> str | None:
        """Return why no engine answers, or None if one has answered within HEALTH_TTL."""
        async with self.checking:
            if time.monotonic() - self.checked < HEALTH_TTL:
                return self.trouble
            before = self.trouble
            try:
                await asyncio.wait_for(self.engine.capacity.remote(), HEALTH_TIMEOUT)
                self.heard()
            except BackPressureError:
                self.heard()  # a busy engine is alive
            except UNREACHABLE:
                self.gone = await asyncio.to_thread(self.missing)
                lost = f": its checkpoint is gone, {self.gone} is missing" if self.gone else ""
                self.trouble, self.checked = f"no engine of {self.name} answers{lost}", time.monotonic()
                if self.trouble != before:
                    logging.getLogger("ray.serve").error(self.trouble)
            return self.trouble

    def missing(self) -> str | None:
        """Return the path of the first missing checkpoint file, or None."""
        paths = (storage.join(self.folder, name) for name in CHECKPOINT_FILES)
        return next((path for path in paths if not storage.exists(path)), None)

    async def expect_engine(self) -> None:
        """Raise ApiError if no engine answers and none can start, because a checkpoint file is missing."""
        if await asyncio.to_thread(self.missing):
            trouble = await self.check()
            if self.gone and trouble:
                raise ApiError(503, trouble, code="checkpoint_gone")

    def card(self, name: str) -> dict:
        card = {"id": name, "object": "model", "created": self.created, "owned_by": "nanochat-ray"}
        return card | {"context_length": self.sequence_len}


api = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)


@api.exception_handler(ApiError)
async def api_error(request: Request, error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


@api.exception_handler(HTTPException)
async def http_error(request: Request, error: HTTPException) -> Response:
    body = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").body
    return JSONResponse(body, error.status_code, error.headers)


@api.exception_handler(Exception)
async def our_error(request: Request, error: Exception) -> Response:
    """Answer 500 for a bug in the service. The traceback is in the replica's log."""
    return JSONResponse(ApiError(500, f"internal error: {type(error).__name__}").body, 500)


def read_request(model: Model, asked: Asked, cache_salt: str) -> tuple[list[list[int]], list[str], dict]:
    """Return each prompt's token ids, each prompt's affinity, and the fields of SamplingParams.

    Requests of one conversation have the same affinity, a hash. Raises ApiError for invalid messages, ids or grammars,
    and for a prompt that does not fit.
    """
    assert model.capacity is not None  # respond() has asked for it
    if longest_text(asked) > model.capacity * model.longest:  # refuse it without encoding it
        message = f"it has more bytes than the {model.capacity - 1} tokens that there is room for can have"
        raise too_long(asked.prompt_path, message)
    prompts = asked.prompts(model.tokenizer)
    for i, prompt in enumerate(prompts):
        if len(prompt) >= model.capacity:
            path = asked.prompt_path + (f"[{i}]" if len(prompts) > 1 else "")
            raise too_long(path, f"it has {len(prompt)} tokens; there is room for {model.capacity - 1}")
    beginnings = [repr(prompt[:AFFINE_TOKENS]) for prompt in prompts]
    if isinstance(asked, Conversing):
        beginnings = [dumps(asked.turns[0]["content"])]
    affinities = [hashlib.sha256(beginning.encode()).hexdigest() for beginning in beginnings]
    return prompts, affinities, asked.sampling(model.tokenizer.vocab_size, cache_salt)


def longest_text(asked: Asked) -> int:
    """Return the bytes of the longest prompt that is text."""
    if isinstance(asked, Conversing):
        return sum(len(part["text"].encode()) for turn in asked.turns for part in turn["content"])
    prompts = asked.prompt if isinstance(asked.prompt, list) else [asked.prompt]
    return max((len(prompt.encode()) for prompt in prompts if isinstance(prompt, str)), default=0)


def too_long(path: str, message: str) -> ApiError:
    return ApiError(400, f"{path}: {message}", path, "context_length_exceeded")


def busy() -> ApiError:
    return ApiError(429, "too many requests wait already; try again soon", code="busy", retry=1)


async def capacity(model: Model) -> int:
    """Return the tokens of the longest sequence. Raises ApiError if no engine answers."""
    for _ in range(MAX_SILENT_ATTEMPTS):  # without a session each attempt goes to a random replica
        if model.gone:
            await model.expect_engine()
        try:
            return await asyncio.wait_for(model.engine.capacity.remote(), MAX_FIRST_SILENCE)
        except TimeoutError:
            await model.expect_engine()
        except BackPressureError:
            raise busy() from None
        except (RayError, RayServeException):
            break
    raise ApiError(503, "the model is not ready yet; try again soon", code="not_ready", retry=5)


async def from_all(deployment: DeploymentHandle, method: str) -> list:
    """Call a method of each replica. Returns [] while all of them start, or if one was just lost."""
    with suppress(*UNREACHABLE):
        return await asyncio.wait_for(deployment.broadcast(method).results_async(), 3)
    return []


def read_keys(uri: str | None) -> list[str]:
    """Return the sha256 of each key: the first word of a line, as `printf %s KEY | sha256sum` prints it.

    Raises ValueError for any other line.
    """
    if uri is None:
        return []
    lines = storage.read_text(uri).splitlines()
    keys = {number: line.split()[0] for number, line in enumerate(lines, 1) if line.strip()}
    for number, key in keys.items():
        if len(key) != 64 or set(key) - set("0123456789abcdef"):
            # The message goes to logs. It must not show the line, which may be the key itself.
            raise ValueError(f"{uri}, line {number}: not a sha256 in hexadecimal: printf %s KEY | sha256sum")
    if not keys:
        raise ValueError(f"{uri} holds no key")
    return list(keys.values())


def ui_file(name: str) -> Response:
    kinds = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    path = UI / name
    if path.parent != UI or path.suffix not in kinds or not path.is_file():
        raise HTTPException(404, "Not Found")
    return Response(path.read_bytes(), media_type=kinds[path.suffix], headers=PAGE_HEADERS)


@serve.deployment(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=MAX_ONGOING, logging_config=QUIET)
class RequestCounter:
    """Counts the requests of each key over all fronts."""

    def __init__(self, per_minute: int):
        self.per_minute, self.recent = per_minute, defaultdict(list)

    async def take(self, key: bytes) -> int:
        """Count a request and return 0, or return the seconds to wait if the limit is reached."""
        now = time.monotonic()
        recent = self.recent[key] = [then for then in self.recent[key] if then > now - 60]
        if len(recent) >= self.per_minute:
            return int(recent[0] + 60 - now) + 1
        recent.append(now)
        return 0


@serve.deployment(
    max_ongoing_requests=MAX_ONGOING,
    graceful_shutdown_timeout_s=600,
    max_surge_percent=100,  # start new fronts before the old ones stop
    logging_config=QUIET,
)
@serve.ingress(api)
class ChatService:
    def __init__(
        self, models: dict[str, str], options: dict, counter: DeploymentHandle | None, *engines: DeploymentHandle
    ):
        os.environ |= {"grpc_proxy": ""}  # reach engines without a proxy, also if http_proxy is set
        pairs = zip(models.items(), engines, strict=True)
        self.models = {name: Model(name, folder, engine) for (name, folder), engine in pairs}
        me = serve.get_replica_context()
        self.name, self.fronts = me.replica_tag, serve.get_deployment_handle(me.deployment, me.app_name)
        self.metrics = Metrics(self.name)
        self.keys = [key.encode() for key in options["api_keys"]]
        self.counter, self.per_minute = counter, options["requests_per_minute"]
        self.at_once, self.shared_cache = options["max_batch_size"], options["shared_cache"]
        origins, host = options["cors_origins"], _get_global_client().http_config.host
        api.add_middleware(Gate, hosts=hosts_of(host, options["allowed_hosts"]), origins=origins)
        if origins:  # outside of the gate, so that browsers can read its refusals
            headers: dict = {"allow_headers": ["*"], "expose_headers": ["Retry-After", "X-Request-ID"]}
            api.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], **headers)

    @api.get("/")
    async def page(self) -> Response:
        return ui_file("index.html")

    @api.get("/ui/{name}")
    async def page_file(self, name: str) -> Response:
        return ui_file(name)

    @api.get("/health")
    async def health(self) -> Response:
        """Answer 503 while a model has no engine that answers."""
        troubles = await asyncio.gather(*(model.check() for model in self.models.values()))
        status = "; ".join(filter(None, troubles)) or "ok"
        return JSONResponse({"status": status, "models": list(self.models)}, 200 if status == "ok" else 503)

    @api.get("/metrics")
    async def prometheus(self) -> Response:
        asked = [from_all(self.fronts, "counted")] + [from_all(m.engine, "stats") for m in self.models.values()]
        fronts, *engines = await asyncio.gather(*asked)
        text = Metrics.text(fronts or [await self.counted()], dict(zip(self.models, engines, strict=True)))
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    async def counted(self) -> list[Metric]:
        return list(self.metrics.registry.collect())

    @api.get("/v1/models")
    async def list_models(self, request: Request) -> dict:
        await self.authorize(request)
        return {"object": "list", "data": [model.card(name) for name, model in self.models.items()]}

    @api.get("/v1/models/{name:path}")
    async def retrieve_model(self, request: Request, name: str) -> dict:
        await self.authorize(request)
        return self.model(name).card(name)

    @api.get("/openapi.json")
    async def openapi(self) -> dict:
        return schema.document()

    @api.get("/docs")
    async def docs(self) -> Response:
        return Response(schema.page(), media_type="text/html", headers=PAGE_HEADERS)

    @api.post("/v1/chat/completions")
    async def chat_completions(self, request: Request) -> Response:
        return await self.answer(request, ChatRequest, ChatWriter)

    @api.post("/v1/completions")
    async def completions(self, request: Request) -> Response:
        return await self.answer(request, CompletionRequest, CompletionWriter)

    @api.post("/v1/responses")
    async def responses(self, request: Request) -> Response:
        return await self.answer(request, ResponsesRequest, ResponsesWriter)

    @api.post("/tokenize")
    async def tokenize(self, request: Request) -> dict:
        await self.authorize(request)
        asked = parse(TokenizeRequest, await read_body(request))
        model = self.model(asked.model)
        return await asyncio.to_thread(tokens.tokenize, model.tokenizer, asked, model.sequence_len)

    @api.post("/detokenize")
    async def detokenize(self, request: Request) -> dict:
        await self.authorize(request)
        asked = parse(DetokenizeRequest, await read_body(request))
        return await asyncio.to_thread(tokens.detokenize, self.model(asked.model).tokenizer, asked)

    @api.get("/tokenizer_info")
    async def tokenizer_info(self, request: Request) -> dict:
        """Of the default model."""
        await self.authorize(request)
        return tokens.about(self.model(None).tokenizer)

    async def answer(self, request: Request, kind: type[Asked], writer: type[Writer]) -> Response:
        route = request.url.path
        try:
            key = await self.authorize(request)
            asked = parse(kind, await read_body(request))
            response = await self.respond(asked, writer, key)
            self.metrics.requests.labels(self.name, route, 200).inc()
            return response
        except ApiError as error:
            self.metrics.requests.labels(self.name, route, error.status).inc()
            raise

    async def respond(self, asked: Asked, writer: type[Writer], key: str) -> Response:
        model = self.model(asked.model)
        if asked.samples > self.at_once:
            raise ApiError(400, f"n: {asked.samples} is more than the {self.at_once} that are generated at once", "n")
        async with model.asking:  # the first of several concurrent requests asks for all
            if model.capacity is None:
                model.capacity = await capacity(model)
        # Tokenize in a thread, so that other streams go on while a long prompt is encoded.
        salt = "" if self.shared_cache else key
        prompts, affinities, fields = await asyncio.to_thread(read_request, model, asked, salt)
        stream = bool(asked.stream)
        streams = [
            partial(
                self.messages, model, affinity, prompt, vars(asked.params(fields, model.capacity - len(prompt))), stream
            )
            for prompt, affinity in zip(prompts, affinities, strict=True)
        ]
        messages = all_of(streams, max(1, self.at_once // asked.samples))
        first = await anext(messages)  # errors before the first message become the response's status
        messages, answer = chain(first, messages), writer(model.name, model.tokenizer, asked, prompts)
        if stream:
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return StreamingResponse(answer.events(messages), media_type="text/event-stream", headers=headers)
        return JSONResponse(await answer.whole(messages))

    def model(self, name: str | None) -> Model:
        """Return the model of this name, by default the first. Raises ApiError for an unknown name."""
        name = name or next(iter(self.models))
        if name not in self.models:
            known = ", ".join(self.models)
            raise ApiError(404, f"no model {name!r}; there are {known}", "model", "model_not_found")
        return self.models[name]

    async def messages(
        self, model: Model, affinity: str, prompt: list[int], params: dict, stream: bool
    ) -> AsyncGenerator[dict]:
        """Yield the engine's messages. If the engine is lost before it sent one, ask another.

        A silent engine counts as lost, because Ray may notice only a minute later that a host was cut off. A stream
        gets a message without choices after KEEP_ALIVE seconds without news. Raises ApiError if the engine is lost
        later.
        """
        if model.gone:
            await model.expect_engine()
        began = last = last_sent = time.monotonic()
        attempts, silences, silent, asked = 0, 0, False, began
        while attempts < MAX_ATTEMPTS:
            # The router chooses the engine by the session's name, so another name may reach another engine. After a
            # silence, take the name of a session that got a message meanwhile: its engine is alive.
            if silent and model.session_heard > asked:
                session = model.session
            else:
                session = f"{affinity} {attempts + silences}" if attempts + silences else affinity
            asked, max_silence = time.monotonic(), MAX_FIRST_SILENCE
            answer = model.engine.options(stream=True, session_id=session).generate.remote(prompt, params, stream)
            try:
                while True:
                    async with asyncio.timeout(max_silence):
                        message = await anext(answer, None)
                    if message is None:
                        return
                    model.heard(session)
                    max_silence = MAX_SILENCE
                    if "busy" in message:
                        attempts, silent = attempts + 1, False
                        break
                    if "error" in message:
                        raise ApiError(500, message["error"])
                    now, count = time.monotonic(), sum(len(choice["tokens"]) for choice in message["choices"])
                    if not message["choices"]:  # a heartbeat
                        if stream and now - last_sent > KEEP_ALIVE:
                            last_sent = now
                            yield message
                        continue
                    if last == began:
                        self.metrics.ttft.observe(now - began)
                    elif count:
                        self.metrics.itl.observe((now - last) / count)
                    last = last_sent = now
                    yield message
            except BackPressureError:
                break
            except UNREACHABLE as error:
                if isinstance(error, RayTaskError) and isinstance(error.cause, ValueError):
                    raise ApiError(400, str(error.cause), code="invalid_value") from None
                silent = isinstance(error, TimeoutError)  # also while no engine has started yet
                attempts, silences = attempts + (not silent), silences + silent
                if last != began or attempts == MAX_ATTEMPTS or silences == MAX_SILENT_ATTEMPTS:
                    raise ApiError(503, LOST, code="replica_lost", retry=5) from error
                if silent:
                    await model.expect_engine()
                await asyncio.sleep(0.5)
            finally:
                with suppress(RayError, RayServeException):  # cancel() raises the stream's own error again
                    answer.cancel()  # the client may have gone away
            if stream and time.monotonic() - last_sent > KEEP_ALIVE:
                last_sent = time.monotonic()
                yield {"choices": []}
        raise busy()

    async def authorize(self, request: Request) -> str:
        """Return the key's sha256, or "" without keys. Raises ApiError for a missing, unknown or busy key."""
        key = b""
        if self.keys:
            scheme, _, given = request.headers.get("authorization", "").strip().partition(" ")
            given = given.strip() if scheme.lower() == "bearer" else ""
            key = hashlib.sha256(given.encode()).hexdigest().encode()
            known = [hmac.compare_digest(key, other) for other in self.keys]  # compare with all keys, in constant time
            if not any(known):
                raise ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        if self.counter and request.method == "POST":
            wait = 0
            with suppress(*UNREACHABLE):  # no limit while the counter restarts on another host
                wait = await asyncio.wait_for(self.counter.take.remote(key), 1)
            if wait:
                message = f"more than {self.per_minute} requests a minute; try again in {wait} s"
                raise ApiError(429, message, code="rate_limit_exceeded", retry=wait)
        return key.decode()


def app(options: ServiceOptions) -> serve.Application:
    """Build the Serve application.

    Raises OSError if a checkpoint or the keys' file is missing, and ValueError if two models have the same name.
    """
    models = {}
    for given in options.checkpoint or [newest_checkpoint()]:
        name, folder = named(given)
        folder = resolve_checkpoint(storage.absolute(folder))
        name = name or run_name(folder)
        if name in models:
            raise ValueError(f"two checkpoints are named {name!r}: give one as NAME=FOLDER")
        models[name] = folder
    on_gpu = has_gpus() if options.use_gpu is None else options.use_gpu
    scaling = {"num_replicas": options.replicas}
    if options.max_replicas:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=options.replicas,
                max_replicas=options.max_replicas,
                target_ongoing_requests=options.max_batch_size,
            )
        }
    engines = [
        EngineServer.options(
            name=f"engine-{i}",  # stays the same when its checkpoint, and so its model's name, changes
            ray_actor_options=({"num_gpus": 1} if on_gpu else {"num_cpus": CPU_SHARE})
            | {"resources": {ENGINE_MARK: 0.001}},
            max_surge_percent=0 if on_gpu else 100,
            max_ongoing_requests=MAX_ONGOING,  # a busy replica refuses requests itself, at once
            max_queued_requests=options.max_batch_size + options.queue_limit,  # used while no replica runs
            logging_config=QUIET,
            health_check_period_s=2,  # Serve replaces an engine after three failures
            health_check_timeout_s=10,
            graceful_shutdown_timeout_s=600,  # answers of the old checkpoint may finish
            request_router_config=RequestRouterConfig(request_router_class=CONSISTENT_HASH_ROUTER),
            **scaling,
        ).bind(folder, options.model_dump(), options.replicas * len(models))
        for i, folder in enumerate(models.values())
    ]
    given = options.model_dump() | {"api_keys": read_keys(options.api_keys)}
    counter = options.requests_per_minute and RequestCounter.bind(options.requests_per_minute)
    return ChatService.options(**one_on_each_host()).bind(models, given, counter, *engines)


def named(given: str) -> tuple[str, str]:
    """Split NAME=FOLDER or FOLDER. Both may contain "=", so a split whose folder exists is preferred."""
    splits = [("", given)] + [(given[:i], given[i + 1 :]) for i, sign in enumerate(given) if sign == "="]
    splits = [(name, folder) for name, folder in splits if folder and not storage.is_remote(name)]
    splits = [split for split in splits if "=" not in split[1].partition("://")[0] or not storage.is_remote(split[1])]
    there = [split for split in splits if storage.exists(storage.absolute(split[1]))]
    return (there or splits[1:] or splits)[0]


def has_gpus() -> bool:
    """Return whether the cluster has GPUs, or this machine if Ray is not connected."""
    return ray.cluster_resources().get("GPU", 0) >= 1 if ray.is_initialized() else torch.cuda.is_available()


def newest_checkpoint() -> str:
    """Return the checkpoint that was written last in all runs. Raises FileNotFoundError if there is none."""
    runs = storage.join(storage.home(), "runs")
    folders = [storage.join(runs, name) for name in storage.listdir(runs)] if storage.exists(runs) else []
    found = [checkpoint for folder in folders if (checkpoint := latest_checkpoint(folder))]
    if not found:
        raise FileNotFoundError(f"no checkpoint under {runs}: train one, or name one with checkpoint=FOLDER")
    return max(found, key=lambda checkpoint: storage.modified(storage.join(checkpoint, "meta.json")))
