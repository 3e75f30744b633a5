"""What happens to requests when replicas are lost, replaced, or too few, and to those who may not ask."""

import hashlib
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import psutil
import pytest
from openai import OpenAI

pytestmark = pytest.mark.slow
LONG = 1200  # tokens of an answer that takes a second or more


def body(content: str, max_tokens: int, **fields) -> dict:
    messages = [{"role": "user", "content": content}]
    return {"messages": messages, "max_tokens": max_tokens, "temperature": 1, "seed": 1} | fields


def post(url: str, *args, key: str = "none", **fields) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{url}/v1/chat/completions", json=body(*args, **fields), headers=headers, timeout=90)


class Stream(threading.Thread):
    """An answer of LONG tokens being read. `failure` is what ended it early, as OpenAI's client raises it."""

    def __init__(self, url: str, content: str):
        super().__init__(daemon=True)
        self.client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
        self.content, self.began = content, threading.Event()
        self.tokens, self.failure, self.finish_reason = 0, None, None
        self.start()

    def run(self):
        request = body(self.content, LONG, stream=True, model=None, stream_options={"include_usage": True})
        try:
            for chunk in self.client.chat.completions.create(**request):
                self.began.set()
                for choice in chunk.choices:
                    self.finish_reason = choice.finish_reason or self.finish_reason
                self.tokens = chunk.usage.completion_tokens if chunk.usage else self.tokens
        except openai.APIError as error:
            self.failure = error
        self.began.set()

    @property
    def whole(self) -> bool:
        return self.failure is None and self.finish_reason in ("stop", "length") and self.tokens > 0


def streams(url: str, count: int) -> list[Stream]:
    """Once all of them have said something."""
    opened = [Stream(url, f"Tell me of number {i}") for i in range(count)]
    assert all(stream.began.wait(60) for stream in opened)
    return opened


def replicas(app: str) -> list[psutil.Process]:
    """Processes of an application's engines, in this test's Ray."""
    name = f"ServeReplica:{app}:engine"
    return [p for p in psutil.Process().children(recursive=True) if name in " ".join(p.cmdline())]


def joined(opened: list[Stream]) -> None:
    for stream in opened:
        stream.join(60)
        assert not stream.is_alive()


def test_two_replicas(deploy, checkpoints):
    url = deploy("pair", checkpoint=f"pair={checkpoints['babbling']}", replicas=2)
    conversations_stay_where_they_are_cached(url)
    requests_of_a_silent_replica_go_to_one_that_answers(url)
    streams_of_a_lost_replica_end_with_an_error_the_others_go_on(url)


def conversations_stay_where_they_are_cached(url):
    for i in range(6):
        turns = [{"role": "user", "content": f"{i}: a story of a fox, a hen and a long winter. " * 5}]
        for turn in range(3):
            answer = post(url, "", 20, messages=turns).json()
            cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert (cached > 32) == (turn > 0)
            text = answer["choices"][0]["message"]["content"]
            turns += [{"role": "assistant", "content": text}, {"role": "user", "content": "Go on"}]
    text = httpx.get(f"{url}/metrics").text
    requests = [line for line in text.splitlines() if line.startswith("nanochat_engine_requests{")]
    assert len(requests) == 2 and sum(float(line.split()[-1]) for line in requests) == 18


def requests_of_a_silent_replica_go_to_one_that_answers(url):
    """At their second attempt, each: half of all other names would find the silent one again."""
    stopped = replicas("pair")[0]
    stopped.suspend()
    began = time.monotonic()
    try:
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda i: post(url, f"Is there anybody at number {i}?", 4), range(12)))
    finally:
        stopped.resume()
    assert [response.status_code for response in answers] == [200] * 12
    assert 4 < time.monotonic() - began < 8


def streams_of_a_lost_replica_end_with_an_error_the_others_go_on(url):
    opened = streams(url, 12)
    replicas("pair")[0].send_signal(signal.SIGKILL)
    after = [post(url, f"Tell me of number {i}", 4) for i in range(12)]  # of the same conversations
    assert [response.status_code for response in after] == [200] * 12
    joined(opened)
    lost = [stream for stream in opened if stream.failure]
    assert 0 < len(lost) < 12 and all(stream.whole for stream in opened if stream not in lost)
    assert {str(stream.failure) for stream in lost} == {"the replica that answered was lost; ask again"}


def test_one_replica(deploy, checkpoints):
    url = deploy("single", checkpoint=f"old={checkpoints['babbling']}")
    the_next_request_waits_for_a_new_replica(url)
    opened = streams(url, 4)
    with ThreadPoolExecutor(4) as pool:
        updating = threading.Event()
        asked = [pool.submit(ask_until, updating, url) for _ in range(4)]
        deploy("single", checkpoint=f"new={checkpoints['knowing']}")
        time.sleep(2)
        updating.set()
        answers = [response for sent in asked for response in sent.result()]
    joined(opened)
    assert all(stream.whole for stream in opened)
    assert {response.status_code for response in answers} == {200}
    models = [response.json()["model"] for response in answers]
    assert set(models) == {"old", "new"}
    assert post(url, "Hi", 9, temperature=0).json()["choices"][0]["message"]["content"] == "Hello!"


def ask_until(done: threading.Event, url: str) -> list[httpx.Response]:
    answers = []
    while not done.is_set():
        answers.append(post(url, "Hi", 9))
        time.sleep(0.05)
    return answers


def the_next_request_waits_for_a_new_replica(url):
    opened = streams(url, 3)
    replicas("single")[0].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    with ThreadPoolExecutor(4) as pool:  # of which some are sent before Serve knows
        after = list(pool.map(lambda i: post(url, f"{i}", 4), range(4)))
    assert [response.status_code for response in after] == [200] * 4
    assert time.monotonic() - killed < 30
    joined(opened)
    assert all(stream.failure for stream in opened)


KEYS = ("first-key", "second-key", "third-key")
SITE, OTHER_SITE = {"Origin": "http://site.example"}, {"Origin": "http://other.example"}


def test_limits(deploy, checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr("serving.app.KEEP_ALIVE", 1)
    keys = tmp_path / "keys.txt"
    keys.write_text("".join(f"{hashlib.sha256(key.encode()).hexdigest()}  {key[0]}\n" for key in KEYS))
    options = {"max_batch_size": 2, "queue_limit": 2, "api_keys": str(keys), "requests_per_minute": 60}
    checkpoint = f"locked={checkpoints['babbling']}"
    url = deploy("locked", checkpoint=checkpoint, cors_origins=["http://site.example"], **options)
    only_keys_open(url)
    only_named_sites_may_ask(url)
    keys_know_nothing_of_each_others_prompts(url)
    a_stream_that_waits_says_so(url)
    more_than_the_queue_holds_are_told_at_once(url)
    a_key_has_so_many_requests_a_minute(url)


def only_keys_open(url):
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer"}, {"Authorization": "\xff"}):
        headers = {name: value.encode("latin-1") for name, value in headers.items()}
        for response in (
            httpx.get(f"{url}/v1/models", headers=headers),
            httpx.post(f"{url}/v1/chat/completions", json=body("Hi", 2), headers=headers),
            httpx.post(f"{url}/v1/completions", content=b"x" * 2_000_000, headers=headers),
        ):
            assert response.status_code == 401, response.text
            assert response.json()["error"]["type"] == "authentication_error"
    with pytest.raises(openai.AuthenticationError):
        OpenAI(base_url=f"{url}/v1", api_key="wrong").models.list()
    assert [m.id for m in OpenAI(base_url=f"{url}/v1", api_key=KEYS[0]).models.list()] == ["locked"]
    for scheme in ("bearer ", "BEARER  "):
        headers = {"Authorization": scheme + KEYS[0]}
        assert httpx.get(f"{url}/v1/models/", headers=headers).status_code == 200
    assert httpx.get(f"{url}/health").status_code == 200


def only_named_sites_may_ask(url):
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    allowed = httpx.options(f"{url}/v1/chat/completions", headers=SITE | asked)
    assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == SITE["Origin"]
    refused = httpx.options(f"{url}/v1/chat/completions", headers=OTHER_SITE | asked)
    assert refused.status_code == 400 and "access-control-allow-origin" not in refused.headers
    assert "access-control-allow-origin" not in httpx.get(f"{url}/health", headers=OTHER_SITE).headers
    assert "Retry-After" in httpx.get(f"{url}/health", headers=SITE).headers["access-control-expose-headers"]
    for site, status in ((SITE, 401), (OTHER_SITE, 403)):
        assert httpx.post(f"{url}/v1/chat/completions", json=body("Hi", 2), headers=site).status_code == status


def a_stream_that_waits_says_so(url):
    client = OpenAI(base_url=f"{url}/v1", api_key=KEYS[0], max_retries=0, timeout=60)
    running = [client.chat.completions.create(**body(f"Tell {i}", 12_000, stream=True, model=None)) for i in range(2)]
    assert all(next(iter(stream)) for stream in running)
    headers, asked = {"Authorization": f"Bearer {KEYS[0]}"}, body("And?", 2, stream=True)
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=asked, headers=headers, timeout=60) as waiting:
        lines = waiting.iter_lines()
        assert waiting.status_code == 200 and next(lines) == ": keep-alive"
        for stream in running:
            stream.close()
        assert next(line for line in lines if line.startswith("data:")) and list(lines)[-2] == "data: [DONE]"


def keys_know_nothing_of_each_others_prompts(url):
    def cached(key: str) -> int:
        usage = post(url, "A secret of the fox and the hen. " * 20, 1, key=key).json()["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    assert cached(KEYS[0]) == 0 and cached(KEYS[0]) > 0
    assert cached(KEYS[2]) == 0 and cached(KEYS[2]) > 0


def more_than_the_queue_holds_are_told_at_once(url):
    def ask(i: int) -> tuple[httpx.Response, float]:
        began = time.monotonic()
        return post(url, f"Number {i}", LONG, key=KEYS[0], stream=i % 2 == 0), time.monotonic() - began

    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(ask, range(24)))
    refused = [(response, seconds) for response, seconds in answers if response.status_code == 429]
    whole = [(response, seconds) for response, seconds in answers if response.status_code == 200]
    assert len(whole) + len(refused) == 24 and len(whole) >= 4 and refused
    fastest = min(seconds for _, seconds in whole)
    for response, seconds in refused:
        assert int(response.headers["retry-after"]) >= 1 and response.json()["error"]["code"] == "busy"
        assert seconds < fastest
    for response, _ in whole:
        assert '"finish_reason": "' in response.text or '"finish_reason":"' in response.text


def a_key_has_so_many_requests_a_minute(url):
    statuses = [post(url, "", 0, key=KEYS[1]).status_code for _ in range(61)]
    assert statuses == [400] * 60 + [429]
    refused = post(url, "Hi", 1, key=KEYS[1])
    assert refused.json()["error"]["code"] == "rate_limit_exceeded" and 0 < int(refused.headers["retry-after"]) <= 60
    assert post(url, "Hi", 1, key=KEYS[0]).status_code == 200
