"""A sequence that is being generated, and the completion that it becomes."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from llguidance import LLMatcher

from nanochat_ray.inference.sampling import SamplingParams
from nanochat_ray.inference.text import AnswerStream

SECOND_DRAW = 2**32  # added to the sample's number for a second draw; no prompt has so many samples
Logprob = tuple[float, list[tuple[int, float]]]


@dataclass(frozen=True)
class Completion:
    """What was generated after a prompt. mask is 1 for sampled tokens and 0 for tool output.

    finish_reason:
    - "stop": the model ended its turn (assistant_end or bos, not in tokens), generated a stop string, or completed its
      grammar.
    - "length": max_tokens, the reach of rotary positions or the KV cache ended it.
    - "error": no token could be sampled.
    - "cancelled": the caller ended it.
    logprobs, if requested: for each token its log probability in nats, and the likeliest tokens with theirs. They are
    the model's own, before penalties and grammar.
    prompt_logprobs, if requested: the same for the prompt's tokens, on the prompt's first sample. None for the first
    token.
    drawn_logprobs, for training: the log probability in nats with which each token was sampled; 0 for tool output.
    """

    tokens: list[int]
    mask: list[int]
    finish_reason: str
    logprobs: list[Logprob] | None = None
    prompt_logprobs: list[Logprob | None] | None = None
    drawn_logprobs: list[float] | None = None


@dataclass(eq=False)
class Sequence:
    ids: list[int]  # the prompt, then what was generated
    params: SamplingParams
    sample: int  # index among the prompt's params.n samples
    max_tokens: int
    answer: AnswerStream | None = None  # watches for stop strings
    matcher: LLMatcher | None = None  # state of the grammar after the answer so far
    prompt_logprobs: list[Logprob | None] | None = None  # if requested, of the tokens scored so far
    prompt_len: int = 0
    arrival: int = 0  # index in the order of arrival
    mask: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    drawn_logprobs: list[float] | None = None  # if requested
    forced: deque[int] = field(default_factory=deque)  # pending tokens of tool output
    code_start: int | None = None  # index in ids of the first token after python_start
    table: Any = None  # the BlockTable of its blocks in the KV cache, while it has some
    cached_tokens: int = 0  # prompt tokens found in the prefix cache
    in_flight: int = 0  # tokens that launched steps sample and the host has not seen; at most 1 between steps
    slot: int = 0  # its index in the step that was launched last
    finish_reason: str | None = None
    error: str | None = None  # why finish_reason is "error"
    ending: tuple[int, tuple] | None = None  # with logprobs: the token that ended the turn, and its Logprob
    longest: int = 0  # limit of len(ids): the prompt and max_tokens
    needs_logits: bool = False  # whether the host needs the logits, or all earlier tokens, for the next token
    plain: bool = False  # whether ordinary tokens are appended without further checks

    def __post_init__(self):
        self.prompt_len = len(self.ids)
        self.longest = self.prompt_len + self.max_tokens
        self.needs_logits = self.params.logprobs is not None or self.params.penalizes or self.matcher is not None
        self.drawn_logprobs = [] if self.params.for_training else None
        self.plain = self.max_tokens > 0 and self.answer is None and self.matcher is None

    @property
    def generated(self) -> int:
        return len(self.ids) - self.prompt_len

    @property
    def length(self) -> int:
        """Tokens of the prompt and the answer, including those in flight."""
        return len(self.ids) + self.in_flight

    @property
    def findable(self) -> int:
        """How many of its first tokens may come from the prefix cache. Tokens that wait for their score may not."""
        scored = self.prompt_len if self.prompt_logprobs is None else len(self.prompt_logprobs)
        return (len(self.ids) if scored == self.prompt_len else scored) - 1

    @property
    def last_token(self) -> int | None:
        """The id of the last token, or None while the host has not seen it."""
        if not self.in_flight:
            return self.ids[-1]
        return self.forced[0] if self.forced else None  # a forced token replaces what is drawn

    @property
    def key(self) -> tuple[int, int, int]:
        """The integers that decide the randomness of the next token."""
        return self.params.seed, self.sample, self.generated + self.in_flight

    @property
    def second_key(self) -> tuple[int, int, int]:
        """The key of a second draw of the same token."""
        seed, sample, step = self.key
        return seed, sample + SECOND_DRAW, step

    @property
    def tokens(self) -> list[int]:
        return self.ids[self.prompt_len :]

    def completion(self) -> Completion:
        assert self.finish_reason
        logprobs = None if self.params.logprobs is None else self.logprobs
        return Completion(
            self.tokens, self.mask, self.finish_reason, logprobs, self.prompt_logprobs, self.drawn_logprobs
        )
