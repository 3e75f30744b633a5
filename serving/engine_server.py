"""A Serve replica with one checkpoint's engine: a thread steps it, requests wait for their tokens in asyncio."""

import asyncio
import gc
import logging
import math
import queue
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor

import ray
import torch
from ray import serve

from nanochat_ray.inference.engine import Engine
from nanochat_ray.inference.sampling import SamplingParams
from nanochat_ray.inference.sequence import Sequence
from nanochat_ray.machine import available_cpus
from nanochat_ray.train.checkpoint import load_model

# Seconds between messages of a stream. Each costs half a millisecond of CPU time in all, so where streams are many they
# are rarer; the page shows their words at an even pace.
FLUSH, FLUSH_PER_STREAM, MOST_FLUSH = 0.05, 1 / 100, 1 / 3
HEARTBEAT = 2  # seconds without news after which a message without any says that the engine lives
GPU_MEMORY_SHARE = 0.85  # of what is free, for keys and values; the rest is for activations and CUDA graphs
GPU_SWITCH_SECONDS = 0.0001  # a GPU step's many launches each give up Python's lock and wait for it again
SWITCH_SECONDS = 0.001  # that Python lets the engine's thread keep others from running, instead of 5 ms

logger = logging.getLogger("ray.serve")


class EngineThread(threading.Thread):
    """Steps an engine while there is something to do, and wakes those whose sequences have news."""

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop):
        super().__init__(daemon=True)
        self.engine, self.loop, self.calls = engine, loop, queue.SimpleQueue()
        self.listeners: dict[Sequence, asyncio.Event] = {}
        self.failure: str | None = None

    def call(self, function, *args) -> asyncio.Future:
        """Run function(*args) between two steps."""
        future = self.loop.create_future()
        self.calls.put((future, function, args))
        return future

    def run(self) -> None:
        news, told = set(), 0.0
        try:
            while True:
                self._answer_calls()
                moved = self.engine.step() if self.engine.busy else []
                news.update(moved)
                # A first token and an end are told at once, what is between them in as few messages as look smooth.
                interval = min(MOST_FLUSH, max(FLUSH, FLUSH_PER_STREAM * len(self.engine.rows)))
                due = time.monotonic() - told > interval
                heard = set(news) if due else {s for s in moved if s.finish_reason or len(s.ids) == s.prompt_len + 1}
                if heard:
                    news -= heard
                    told = time.monotonic() if due else told
                    self.loop.call_soon_threadsafe(self._wake, heard)
        except Exception:  # every request of this replica is told, and Serve replaces it
            self.failure = traceback.format_exc()
            self.loop.call_soon_threadsafe(self._wake, list(self.listeners))
            while True:
                future, _, _ = self.calls.get()
                self.loop.call_soon_threadsafe(self._resolve, future, None, RuntimeError(self.failure))

    def _answer_calls(self) -> None:
        while not self.engine.busy or not self.calls.empty():
            future, function, args = self.calls.get()
            try:
                result, error = function(*args), None
            except ValueError as wrong:
                result, error = None, wrong
            self.loop.call_soon_threadsafe(self._resolve, future, result, error)

    @staticmethod
    def _resolve(future: asyncio.Future, result, error) -> None:
        if future.cancelled():
            return
        if error:
            future.set_exception(error)
        else:
            future.set_result(result)

    def _wake(self, sequences) -> None:
        for sequence in sequences:
            if event := self.listeners.get(sequence):
                event.set()


def load_engine(checkpoint: str, options: dict) -> Engine:
    """On a GPU with its CUDA graphs captured: a replica is ready when it is fast."""
    on_gpu = torch.cuda.is_available()
    model, tokenizer, _ = load_model(checkpoint, "cuda" if on_gpu else "cpu", options["dtype"])
    kv_bytes = None if options["kv_gb"] is None else int(options["kv_gb"] * 2**30)
    if on_gpu and kv_bytes is None:
        copies = sum(p.numel() for p in model.parameters()) * model.compute_dtype.itemsize  # the engine's own weights
        kv_bytes = int(GPU_MEMORY_SHARE * (torch.cuda.mem_get_info()[0] - copies))
    engine = Engine(model, tokenizer, options["max_batch_size"], kv_bytes)
    if on_gpu and options["compile"]:
        engine.compile()
    return engine


@serve.deployment
class EngineServer:
    def __init__(self, checkpoint: str, options: dict, engines: int):
        """engines: of all models. Serve spreads them over the hosts, and those of a host share its CPUs."""
        on_gpu, nodes = torch.cuda.is_available(), ray.nodes() if ray.is_initialized() else []
        hosts = sum(node["Alive"] and "CPU" in node["Resources"] for node in nodes)
        neighbours = math.ceil(engines / max(1, hosts))
        sys.setswitchinterval(GPU_SWITCH_SECONDS if on_gpu else SWITCH_SECONDS)
        torch.set_num_threads(1 if on_gpu else max(1, available_cpus() // neighbours))  # Ray's own default is one
        # In a thread that ends, and OpenMP's with it: with more of those than CPUs, all sleep between kernels, and
        # decoding takes twice as long.
        with ThreadPoolExecutor(1) as loader:
            try:
                self.engine = loader.submit(load_engine, checkpoint, options).result()
            except (OSError, ValueError) as error:  # Serve tries again, and has a traceback of many lines
                logger.error("this engine cannot start: %s", error)
                raise
        gc.collect()
        gc.freeze()  # the model stays: to look through it would stop the engine for a tenth of a second each time
        self.most_ongoing = options["max_batch_size"] + options["queue_limit"]
        self.ongoing, self.thread = 0, None
        self.compiled = on_gpu and options["compile"]
        if options["compile"] and not on_gpu:
            threading.Thread(target=self._compile, daemon=True).start()  # answers uncompiled until it is done

    def _compile(self) -> None:
        self.engine.compile()
        self.compiled = True

    def capacity(self) -> int:
        """Tokens of the longest sequence."""
        return self.engine.manager.capacity

    async def generate(self, prompt: list[int], params: dict, stream: bool) -> AsyncIterator[dict]:
        """Messages of what is new in each sample: index, tokens, logprobs, finish_reason; first of all {"busy": …}.

        There is one every HEARTBEAT seconds or more often; it has no choices when nothing is new, or `stream` is false.
        The first with choices has prompt_logprobs, if they are asked for. {"error": …} ends a request for which no
        token could be drawn. Raises ValueError for what the engine cannot take.
        """
        if params["n"] > self.most_ongoing:
            raise ValueError(f"n {params['n']} is above {self.most_ongoing}, the answers that an engine takes at once")
        if self.ongoing + params["n"] > self.most_ongoing:
            yield {"busy": True}
            return
        if self.thread is None:
            self.thread = EngineThread(self.engine, asyncio.get_running_loop())
            self.thread.start()
        thread, news, sequences = self.thread, asyncio.Event(), []
        self.ongoing += params["n"]
        try:
            if params["grammar"]:  # compiled before the engine's thread needs it, which has others to serve
                await asyncio.to_thread(self.engine.grammars.matcher, params["grammar"])
            sequences = await thread.call(self._submit, prompt, SamplingParams(**params), news)
            told, ended, scores = [0] * len(sequences), set(), sequences[0].prompt_logprobs
            loop = asyncio.get_running_loop()
            beat = loop.time() + HEARTBEAT
            while True:
                try:
                    async with asyncio.timeout_at(beat):
                        await news.wait()
                except TimeoutError:
                    beat = loop.time() + HEARTBEAT
                    yield {"choices": []}
                    continue
                news.clear()
                if thread.failure:
                    raise RuntimeError(thread.failure)
                if error := next((s.error for s in sequences if s.error), None):
                    yield {"error": error}
                    return
                if not stream and not all(s.finish_reason for s in sequences):
                    continue
                beat = loop.time() + HEARTBEAT
                choices = list(self._news(sequences, told, ended))
                message = {"choices": choices, "cached_tokens": sequences[0].cached_tokens}
                if scores and choices:
                    message["prompt_logprobs"], scores = scores, None
                yield message
                if len(ended) == len(sequences):  # not those that have ended since
                    return
        finally:
            self.ongoing -= params["n"]
            thread.calls.put((thread.loop.create_future(), self._forget, (news,)))

    def _submit(self, prompt: list[int], params: SamplingParams, news: asyncio.Event) -> list[Sequence]:
        sequences = self.engine.submit(prompt, params)
        self.thread.listeners |= dict.fromkeys(sequences, news)
        return sequences

    def _forget(self, news: asyncio.Event) -> None:
        """The end of a request, also of one whose client went away."""
        for sequence in [s for s, event in self.thread.listeners.items() if event is news]:
            self.engine.cancel(sequence)
            del self.thread.listeners[sequence]

    def _news(self, sequences: list[Sequence], told: list[int], ended: set[int]) -> Iterator[dict]:
        for i, sequence in enumerate(sequences):
            reason = sequence.finish_reason  # before the tokens: once it is there, they are complete
            tokens = sequence.ids[sequence.prompt_len + told[i] :]
            if i in ended or not (tokens or reason):
                continue
            logprobs = sequence.logprobs[told[i] : told[i] + len(tokens)]
            told[i] += len(tokens)
            if reason:
                ended.add(i)
            news = {"index": i, "tokens": tokens, "logprobs": logprobs, "finish_reason": reason}
            yield news | {"ending": sequence.ending} if sequence.ending else news

    def stats(self) -> dict[str, float]:
        engine, manager = self.engine, self.engine.manager
        return engine.counts | {
            "running": len(engine.scheduler.running),
            "waiting": len(engine.scheduler.waiting),
            "kv_pages_used": manager.used_pages,
            "kv_pages": manager.num_pages,
            "preemptions": engine.scheduler.preemptions,
            "compiled": int(self.compiled),
        }

    def check_health(self) -> None:
        if self.thread and self.thread.failure:
            raise RuntimeError(self.thread.failure)
