"""A Serve replica with the engine of one checkpoint. A thread runs its steps; requests wait for tokens in asyncio."""

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
from typing import Any

import ray
import torch
from ray import serve

from nanochat_ray.inference.engine import Engine
from nanochat_ray.inference.sampling import SamplingParams
from nanochat_ray.inference.sequence import Sequence
from nanochat_ray.machine import available_cpus
from nanochat_ray.train.checkpoint import load_model

# Seconds between messages of a stream. A message costs half a millisecond of CPU time, so they are less frequent when
# there are many streams. The page shows the words at an even pace.
MIN_FLUSH, FLUSH_PER_STREAM, MAX_FLUSH = 0.05, 1 / 100, 1 / 3
HEARTBEAT = 2  # seconds without news after which an empty message is sent, because the engine is alive
GPU_MEMORY_SHARE = 0.85  # of the free memory, for keys and values; the rest is for activations and CUDA graphs
# Python's switch interval in seconds; its default is 0.005. On a GPU the engine's thread releases the GIL at each of a
# step's many launches and then waits for it.
GPU_SWITCH_SECONDS, SWITCH_SECONDS = 0.0001, 0.001

logger = logging.getLogger("ray.serve")


class EngineThread(threading.Thread):
    """Runs the engine's steps while it has requests, and wakes the requests whose sequences have news."""

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop):
        super().__init__(daemon=True)
        self.engine, self.loop, self.calls = engine, loop, queue.SimpleQueue()
        self.listeners: dict[Sequence, asyncio.Event] = {}
        self.failure: str | None = None

    def call(self, function, *args) -> asyncio.Future:
        """Run function(*args) between two steps. The future has its result."""
        future = self.loop.create_future()
        self.calls.put((future, function, args))
        return future

    def run(self) -> None:
        news, flushed = set(), 0.0
        try:
            while True:
                self._answer_calls()
                moved = self.engine.step() if self.engine.busy else []
                news.update(moved)
                # Send the first token and the end at once, and the tokens between them every `interval` seconds.
                interval = min(MAX_FLUSH, max(MIN_FLUSH, FLUSH_PER_STREAM * len(self.engine.rows)))
                due = time.monotonic() - flushed > interval
                ready = set(news) if due else {s for s in moved if s.finish_reason or len(s.ids) == s.prompt_len + 1}
                if ready:
                    news -= ready
                    flushed = time.monotonic() if due else flushed
                    self.loop.call_soon_threadsafe(self._wake, ready)
        except Exception:  # every request of this replica fails with it, and Serve replaces the replica
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
    """Load the model and make its engine. On a GPU, capture its CUDA graphs before the replica is ready."""
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
        """engines: how many all models have. Serve spreads them over the hosts, and those of a host share its CPUs."""
        on_gpu, nodes = torch.cuda.is_available(), ray.nodes() if ray.is_initialized() else []
        hosts = sum(node["Alive"] and "CPU" in node["Resources"] for node in nodes)
        neighbours = math.ceil(engines / max(1, hosts))
        sys.setswitchinterval(GPU_SWITCH_SECONDS if on_gpu else SWITCH_SECONDS)
        torch.set_num_threads(1 if on_gpu else max(1, available_cpus() // neighbours))  # Ray's own default is one
        # Load in a thread that ends afterwards, and its OpenMP threads with it. With more OpenMP threads than CPUs, all
        # of them sleep between kernels, and decoding takes twice as long.
        with ThreadPoolExecutor(1) as loader:
            try:
                self.engine = loader.submit(load_engine, checkpoint, options).result()
            except (OSError, ValueError) as error:  # log one line; Serve logs a long traceback and tries again
                logger.error("this engine cannot start: %s", error)
                raise
        gc.collect()
        gc.freeze()  # exclude the model from collections, each of which would stop the engine for a tenth of a second
        self.most_ongoing = options["max_batch_size"] + options["queue_limit"]
        self.ongoing = 0
        self.thread: Any = None  # an EngineThread, once there was a request
        self.compiled = on_gpu and options["compile"]
        if options["compile"] and not on_gpu:
            threading.Thread(target=self._compile, daemon=True).start()  # the engine answers uncompiled meanwhile

    def _compile(self) -> None:
        self.engine.compile()
        self.compiled = True

    def capacity(self) -> int:
        """Return the tokens of the longest sequence."""
        return self.engine.manager.capacity

    async def generate(self, prompt: list[int], params: dict, stream: bool) -> AsyncIterator[dict]:
        """Yield messages {"choices": [...], "cached_tokens": N} with the news of each sample.

        A choice has index, tokens, logprobs and finish_reason. A message comes at least every HEARTBEAT seconds; it has
        no choices if nothing is new, or if `stream` is false and the answer is not complete. The first message with
        choices has prompt_logprobs, if they were requested. {"busy": True} refuses a request, and {"error": …} ends one
        for which no token could be drawn. Raises ValueError for a request that the engine cannot take.
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
            if params["grammar"]:  # compile it here: in the engine's thread it would hold up all requests
                await asyncio.to_thread(self.engine.grammars.matcher, params["grammar"])
            sequences = await thread.call(self._submit, prompt, SamplingParams(**params), news)
            sent, ended, scores = [0] * len(sequences), set(), sequences[0].prompt_logprobs
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
                choices = list(self._news(sequences, sent, ended))
                message = {"choices": choices, "cached_tokens": sequences[0].cached_tokens}
                if scores and choices:
                    message["prompt_logprobs"], scores = scores, None
                yield message
                if len(ended) == len(sequences):  # the ends that were sent; others may have ended since
                    return
        finally:
            self.ongoing -= params["n"]
            thread.calls.put((thread.loop.create_future(), self._forget, (news,)))

    def _submit(self, prompt: list[int], params: SamplingParams, news: asyncio.Event) -> list[Sequence]:
        sequences = self.engine.submit(prompt, params)
        self.thread.listeners |= dict.fromkeys(sequences, news)
        return sequences

    def _forget(self, news: asyncio.Event) -> None:
        """End a request, also if its client went away."""
        for sequence in [s for s, event in self.thread.listeners.items() if event is news]:
            self.engine.cancel(sequence)
            del self.thread.listeners[sequence]

    def _news(self, sequences: list[Sequence], sent: list[int], ended: set[int]) -> Iterator[dict]:
        for i, sequence in enumerate(sequences):
            reason = sequence.finish_reason  # read it before the tokens: if it is set, they are complete
            tokens = sequence.ids[sequence.prompt_len + sent[i] :]
            if i in ended or not (tokens or reason):
                continue
            logprobs = sequence.logprobs[sent[i] : sent[i] + len(tokens)]
            sent[i] += len(tokens)
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
