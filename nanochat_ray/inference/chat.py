"""Chat in the terminal: a single question or a conversation."""

import signal
import sys
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, takewhile
from typing import Annotated

import torch
import tyro

from nanochat_ray.inference.engine import Engine
from nanochat_ray.inference.sampling import SamplingParams
from nanochat_ray.inference.text import AnswerStream

OPENS = {"text": "", "python": "[calculator: ", "python_output": "[result: "}
CLOSES = {"text": "", "python": "]", "python_output": "]"}


@dataclass
class ChatOptions:
    """Talk to a checkpoint."""

    checkpoint: str
    """Folder of the checkpoint."""
    prompt: Annotated[str | None, tyro.conf.arg(aliases=["-p"])] = None
    """Answer this and exit; without it, chat."""
    temperature: float = 0.6
    """0 takes the likeliest token every time."""
    top_k: int | None = 50
    """Sample among the k likeliest tokens."""
    max_tokens: int = 512
    """Tokens of an answer at most."""
    seed: int = 42
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: str | None = None
    """float32 or bfloat16; the default is bfloat16 where the hardware is fast at it."""


def chat(model, tokenizer, options: ChatOptions) -> None:
    """Print the answer to options.prompt, or else answer questions from stdin, each with the conversation before it.

    It drops the oldest turns when the conversation outgrows the context. Raises ValueError for bad options, and
    KeyboardInterrupt when Ctrl-C is pressed twice during an answer.
    """
    for stream in (sys.stdin, sys.stdout):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="replace")  # print "?" for characters that the terminal cannot show
    engine = Engine(model, tokenizer, max_batch_size=1)
    params = SamplingParams(options.max_tokens, options.temperature, options.top_k, seed=options.seed)
    if options.prompt is not None:
        answer(engine, [], options.prompt, params)
        return
    if sys.stdin.isatty():
        print("Ctrl-C stops an answer, /clear starts over, /quit leaves.")
    turns = []  # token ids of each question and its answer
    for question in questions():
        if question == "/quit":
            return
        if question == "/clear":
            turns = []
        elif question:
            try:
                turns = answer(engine, turns, question, params)
            except ValueError as error:  # the question is too long
                print(f"error: {error}")


def questions() -> Iterator[str]:
    """Lines of stdin. A terminal has line editing and history, and lines pasted together are one question.

    In a terminal Ctrl-C clears the line. On an empty line it ends the chat, as Ctrl-D does.
    """
    if not sys.stdin.isatty():
        yield from map(str.strip, sys.stdin)
        return
    from prompt_toolkit import PromptSession

    session = PromptSession()
    while True:
        try:
            yield session.prompt("> ").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            if not session.default_buffer.text:
                return


def answer(engine: Engine, turns: list[list[int]], question: str, params: SamplingParams) -> list[list[int]]:
    """Print the answer as it is generated. Returns the turns in context, with the new one."""
    tokenizer, context = engine.tokenizer, engine.config.sequence_len
    bos, *turn = tokenizer.render_for_completion({"messages": [{"role": "user", "content": question}]})
    # Keep at least half of the context for the conversation, however long an answer may be.
    turns = fit_turns(turns, context - min(params.max_tokens, context // 2) - len(turn) - 1)
    with stoppable() as stopped:  # the conversation keeps what was generated of a stopped answer
        tokens = takewhile(lambda _: not stopped.is_set(), engine.stream([bos, *chain(*turns), *turn], params))
        for text in decode_stream(_recorded(tokens, turn), tokenizer):
            print(text, end="", flush=True)
    print()
    return [*turns, [*turn, tokenizer.special("<|assistant_end|>")]]


def fit_turns(turns: list[list[int]], room: int) -> list[list[int]]:
    """The latest turns, of at most `room` tokens in total."""
    while turns and sum(map(len, turns)) > room:
        turns = turns[1:]
    return turns


def decode_stream(tokens: Iterable[int], tokenizer) -> Iterator[str]:
    """The text of tokens as they come, with tool calls in brackets."""
    stream = AnswerStream(tokenizer)
    for token in tokens:
        before = stream.kind
        text = "".join(text for _, text in stream.push(token))
        if stream.kind != before:
            text += CLOSES[before] + OPENS[stream.kind]
        if text:
            yield text
    yield from (text for _, text in stream.finish())


def _recorded(tokens: Iterable[int], record: list[int]) -> Iterator[int]:
    for token in tokens:
        record.append(token)
        yield token


@contextmanager
def stoppable() -> Generator[threading.Event]:
    """An event that Ctrl-C sets, so that the engine stops between steps. A second Ctrl-C raises KeyboardInterrupt."""
    stopped = threading.Event()

    def stop(*_) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)
