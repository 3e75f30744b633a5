import io
import os
import pty
import select
import signal
import threading
import time
from collections.abc import Callable

import pytest
import torch

from nanochat_ray.inference.chat import ChatOptions, chat, decode_stream
from nanochat_ray.inference.engine import Engine
from nanochat_ray.inference.sampling import SamplingParams
from nanochat_ray.model.gpt import GPT, GPTConfig


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    model = GPT(GPTConfig(128, tokenizer.vocab_size, n_layer=1, n_head=1, n_kv_head=1, n_embd=32))
    model.init_weights()
    return model


def conversation(tokenizer, *texts: str) -> list[int]:
    roles = ["user", "assistant"] * len(texts)
    return tokenizer.render_for_completion(
        {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]}
    )


@pytest.fixture
def scripted(tokenizer, monkeypatch):
    """Engine.stream records its prompt and says the next of `answers`; during one with ^C, that is pressed there."""
    prompts, answers = [], []

    def stream(engine, prompt, params):
        prompts.append(prompt)
        said, *more = answers.pop(0).split("^C")
        yield from tokenizer.encode(said)
        for said in more:
            signal.raise_signal(signal.SIGINT)
            yield from tokenizer.encode(said)

    monkeypatch.setattr(Engine, "stream", stream)
    return prompts, answers


def type_in(monkeypatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))


def test_characters_are_never_broken(tokenizer):
    text = "naïve 日本語 🙂👩‍👩‍👧 été"
    singles = [tokenizer.ranks[bytes([byte])] for byte in text.encode()]
    for tokens in (tokenizer.encode(text), singles):
        assert len(tokens) > len(text) / 2
        pieces = list(decode_stream(tokens, tokenizer))
        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)
    assert list(decode_stream(singles, tokenizer)) == list(text)
    # Bytes that never become a character: at the end, and before a tool call.
    assert "".join(decode_stream(singles[:3], tokenizer)) == "na\ufffd"
    call = [tokenizer.special("<|python_start|>"), *tokenizer.encode("1+1"), tokenizer.special("<|python_end|>")]
    result = [tokenizer.special("<|output_start|>"), *tokenizer.encode("2"), tokenizer.special("<|output_end|>")]
    shown = "".join(decode_stream([*singles[:3], *call, *result, *singles[4:6]], tokenizer))
    assert shown == "na\ufffd[calculator: 1+1][result: 2]ve"


def test_text_comes_out_as_tokens_come_in(tokenizer):
    given = []

    def tokens():
        for token in tokenizer.encode("one two three"):
            given.append(token)
            yield token

    for number, _ in enumerate(decode_stream(tokens(), tokenizer), start=1):
        assert len(given) == number


def test_a_prompt_is_answered_by_the_model(model, tokenizer, capsys):
    chat(model, tokenizer, ChatOptions("", prompt="Hello", max_tokens=5, temperature=0))
    engine = Engine(model, tokenizer)
    [completion] = engine.generate([conversation(tokenizer, "Hello")], SamplingParams(5, 0))
    assert capsys.readouterr().out == "".join(decode_stream(completion.tokens, tokenizer)) + "\n"


def test_turns_are_remembered_until_cleared(model, tokenizer, scripted, monkeypatch, capsys):
    prompts, answers = scripted
    answers += ["One.", "Two.^C And more.", "Three.", "Four."]
    type_in(monkeypatch, "a", "", "b", "c", "/clear", " d ", "/quit", "never read")
    chat(model, tokenizer, ChatOptions("", max_tokens=10))
    assert prompts == [
        conversation(tokenizer, "a"),
        conversation(tokenizer, "a", "One.", "b"),
        conversation(tokenizer, "a", "One.", "b", "Two.", "c"),
        conversation(tokenizer, "d"),
    ]
    assert capsys.readouterr().out == "One.\nTwo.\nThree.\nFour.\n"


READY = "\x1b[?2004h"  # pastes are to be marked: a prompt has begun, and takes keys


class Terminal:
    """A chat whose stdin and stdout are a terminal; `typed` goes to it as keys, `seen` is what it has shown."""

    def __init__(self, monkeypatch, chat: Callable[[], None]):
        self.master, slave = pty.openpty()
        self.seen, self.chat, self.closed = "", chat, False
        monkeypatch.setattr("sys.stdin", os.fdopen(slave, "r", closefd=False))
        monkeypatch.setattr("sys.stdout", os.fdopen(slave, "w", closefd=False))
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("PROMPT_TOOLKIT_NO_CPR", "1")  # nobody answers where the cursor is

    def run(self, *script: tuple[str, str]) -> None:
        """Chat while a person types: each time that the text has been seen, the keys."""
        person = threading.Thread(target=self.type, args=(script,), daemon=True)
        person.start()
        self.chat()
        person.join(10)
        assert not person.is_alive(), self.seen

    def type(self, script: tuple[tuple[str, str], ...]) -> None:
        for text, keys in script:
            deadline = time.monotonic() + 20
            while text not in self.seen and time.monotonic() < deadline:
                if select.select([self.master], [], [], 0.1)[0]:
                    self.seen += os.read(self.master, 65536).decode(errors="replace")
            if text not in self.seen:
                os.close(self.master)  # hangs up: the chat ends, and the test fails
                raise AssertionError(f"{text!r} did not appear after {self.seen!r}")
            self.seen = self.seen.partition(text)[2]
            os.write(self.master, keys.encode())


def test_a_terminal_edits_lines_and_a_pasted_block_is_one_question(model, tokenizer, scripted, monkeypatch):
    prompts, answers = scripted
    answers += ["One.", "Two.", "Three."]
    terminal = Terminal(monkeypatch, lambda: chat(model, tokenizer, ChatOptions("", max_tokens=5)))
    terminal.run(
        (READY, "ab\x1b[D-\r"),  # the cursor goes left
        ("One.", ""),
        (READY, "\x1b[200~def f():\r    return 1\r\x1b[201~ and?\r"),
        ("Two.", ""),
        (READY, "\x1b[A" * 4 + "\r"),  # history: up through the three lines, and on
        ("Three.", ""),
        (READY, "dropped\x03"),
        (READY, "\x03"),
    )
    turns = ["a-b", "One.", "def f():\n    return 1\n and?", "Two.", "a-b"]
    assert prompts == [conversation(tokenizer, *turns[:length]) for length in (1, 3, 5)]


def test_ctrl_c_twice_in_an_answer_ends_the_chat(model, tokenizer, scripted, monkeypatch):
    prompts, answers = scripted
    answers += ["One.^C^C Never."]
    type_in(monkeypatch, "a", "b")
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        chat(model, tokenizer, ChatOptions("", max_tokens=10))
    assert len(prompts) == 1 and signal.getsignal(signal.SIGINT) is before


def test_the_oldest_turns_go_when_the_context_is_full(model, tokenizer, scripted, monkeypatch):
    prompts, answers = scripted
    questions = [f"q {i}" for i in range(16)]
    answers += [f"answer {i}" for i in range(16)]
    type_in(monkeypatch, *questions)
    chat(model, tokenizer, ChatOptions("", max_tokens=28))
    assert all(len(prompt) + 28 <= 128 for prompt in prompts)
    last = [text for i in range(16) for text in (f"answer {i - 1}", questions[i])][1:]
    kept = next(k for k in range(16) if conversation(tokenizer, *last[2 * k :]) == prompts[-1])
    assert 1 <= kept < 15
    assert len(conversation(tokenizer, *last[2 * kept - 2 :])) + 28 > 128  # one more turn would not have fitted


def test_a_question_beyond_the_reach_does_not_end_the_chat(model, tokenizer, monkeypatch, capsys):
    type_in(monkeypatch, "y z " * 1000, "Hello")
    chat(model, tokenizer, ChatOptions("", max_tokens=2))
    error, *rest = capsys.readouterr().out.splitlines()
    assert error.startswith("error: a prompt of ")
    assert rest
    with pytest.raises(ValueError, match="temperature -1"):
        chat(model, tokenizer, ChatOptions("", prompt="Hello", temperature=-1))
