"""One sample of one prompt on its way, and what it is in the end."""

from collections import deque
from dataclasses import dataclass, field

from llguidance import LLMatcher

from nanochat_ray.inference.kv_cache import BlockTable
from nanochat_ray.inference.sampling import SamplingParams
from nanochat_ray.inference.text import AnswerStream

SECOND = 2**32  # more than the samples that a prompt has
Logprob = tuple[float, list[tuple[int, float]]]


@dataclass(frozen=True)
class Completion:
    """What was generated after a prompt. mask is 1 where a token was sampled, 0 where a tool's output was put in.

    finish_reason is "stop" when the model ended its turn (assistant_end or bos; that token is left out of tokens), said
    a stop string, or came to the end of its grammar; "length" when max_tokens, the model's reach, or the room for keys
    and values came first; "error" when no token could be drawn.
    logprobs: if asked for, of each token its log probability in nats, and the likeliest tokens with theirs, by the
    model alone, before penalties and grammar. A tool's output has those that the model gave it.
    prompt_logprobs: the same of the prompt's tokens, if asked for, by the prompt's first sample. None for the first
    token, which follows nothing.
    drawn_logprobs: of answers for training, of each token the log probability in nats that it was drawn with; 0 where a
    tool's output was put in.
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
    sample: int  # which of the prompt's params.n
    max_tokens: int
    answer: AnswerStream | None = None  # watches for stop strings
    matcher: LLMatcher | None = None  # of the grammar: it has read the answer so far
    prompt_logprobs: list[Logprob | None] | None = None  # if they are asked for, of the tokens that were scored yet
    prompt_len: int = 0
    arrival: int = 0  # place in the order of arrival
    mask: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    drawn_logprobs: list[float] | None = None  # if they are asked for
    forced: deque[int] = field(default_factory=deque)  # tool output that is still to be put in
    code_start: int | None = None  # where in ids the code after python_start begins
    table: BlockTable | None = None  # while it has a place in the cache
    cached_tokens: int = 0  # of the prompt, found in the cache
    in_flight: int = 0  # tokens drawn by launched steps that the host does not know yet; at most 1 between steps
    slot: int = 0  # its place in the step that was launched last
    finish_reason: str | None = None
    error: str | None = None  # why finish_reason is "error"
    ending: tuple[int, tuple] | None = None  # with logprobs: the token that ended the turn, and its log probabilities
    longest: int = 0  # tokens of the prompt and of an answer of max_tokens
    needs_logits: bool = False  # whether the host has to look at the logits, or the tokens so far, for the next token
    plain: bool = False  # whether a token that is none of the special ones is just added to the answer

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
        """Tokens of the prompt and the answer, those in flight included."""
        return len(self.ids) + self.in_flight

    @property
    def findable(self) -> int:
        """How many of its first tokens may be found in the cache: those whose logits are of no use any more."""
        scored = self.prompt_len if self.prompt_logprobs is None else len(self.prompt_logprobs)
        return (len(self.ids) if scored == self.prompt_len else scored) - 1

    @property
    def last_token(self) -> int | None:
        """Its id, or None while the host does not know it."""
        if not self.in_flight:
            return self.ids[-1]
        return self.forced[0] if self.forced else None  # a forced token replaces what is drawn

    @property
    def key(self) -> tuple[int, int, int]:
        """What the next token's randomness is a function of."""
        return self.params.seed, self.sample, self.generated + self.in_flight

    @property
    def second_key(self) -> tuple[int, int, int]:
        """The same when it is drawn a second time."""
        seed, sample, step = self.key
        return seed, sample + SECOND, step

    @property
    def tokens(self) -> list[int]:
        return self.ids[self.prompt_len :]

    def completion(self) -> Completion:
        logprobs = None if self.params.logprobs is None else self.logprobs
        return Completion(
            self.tokens, self.mask, self.finish_reason, logprobs, self.prompt_logprobs, self.drawn_logprobs
        )
