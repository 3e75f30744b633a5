"""The load test against a service whose timing and failures are known."""

import json
import math
import sys
import time

import pytest

from serving import load_test
from serving.load_test import Options, run


def test_closed_loop_counts_what_the_service_gave(scripted):
    scripted.script.answer, scripted.script.delay = ["a ", "b ", "c"], 0.02
    result = run(Options(url=scripted.url, clients=4, requests=10, prompt_tokens=[20], max_tokens=[3, 5], seed=0))
    assert (result.requests, result.ok, result.failed, result.errors) == (10, 10, 0, {})
    assert (result.tokens, result.prompt_tokens) == (30, 200)  # the service counts a word as a token
    assert 0.02 <= result.ttft_p50 <= result.ttft_p95 < result.latency_p95
    assert result.gap_p50 == pytest.approx(result.inter_token_p50, rel=0.5) and result.gap_p50 >= 0.01
    assert result.seconds >= 3 * 0.06 and result.tokens_per_s == pytest.approx(30 / result.seconds)
    bodies = scripted.script.requests[2:]  # after the two that measure the tokenizer
    assert len({body["messages"][0]["content"] for body in bodies}) == 10
    assert {body["max_tokens"] for body in bodies} == {3, 5} and all(body["stream"] for body in bodies)


def test_prompts_are_others_each_time_but_for_a_seed(scripted):
    for seed in (None, None, 7, 7):
        run(Options(url=scripted.url, clients=1, requests=1, prompt_tokens=[50], seed=seed))
    first, second, third, again = [b["messages"][0]["content"] for b in scripted.script.requests[2::3]]
    assert first != second and third == again


def test_closed_loop_has_as_many_open_as_clients(scripted):
    scripted.script.delay = 0.05
    run(Options(url=scripted.url, clients=3, requests=9))
    assert scripted.script.most_streaming == 3


def test_poisson_arrivals_do_not_wait_for_answers(scripted):
    scripted.script.delay = 0.5
    result = run(Options(url=scripted.url, rate=200, requests=20, prompt="Hi"))
    assert result.ok == 20 and scripted.script.most_streaming > 3


def test_duration_ends_the_load(scripted):
    result = run(Options(url=scripted.url, clients=2, duration=0.3))
    assert result.ok == result.requests >= 2 and result.seconds < 10


def test_without_streaming(scripted):
    result = run(Options(url=scripted.url, requests=3, clients=1, stream=False))
    assert result.ok == 3 and result.tokens == 6 and math.isnan(result.ttft_p50) and result.latency_p50 > 0


def test_fixed_prompt_and_key(scripted):
    scripted.script.key = "secret-key"
    with pytest.raises(OSError, match="401"):
        run(Options(url=scripted.url, requests=1))
    run(Options(url=scripted.url, requests=2, prompt="Why?", api_key="secret-key"))
    assert [body["messages"][0]["content"] for body in scripted.script.requests[-2:]] == ["Why?", "Why?"]


def test_proxies_that_the_environment_names_are_not_asked(scripted, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert run(Options(url=scripted.url, requests=2)).ok == 2


def test_dropped_streams_are_cancelled(scripted):
    scripted.script.answer, scripted.script.delay = ["more "] * 2000, 0.005
    result = run(Options(url=scripted.url, clients=6, requests=6, drop=1.0, prompt="Hi"))
    assert (result.dropped, result.ok, result.failed) == (6, 0, 0)
    deadline = time.monotonic() + 10
    while scripted.script.cancelled < 6:
        assert time.monotonic() < deadline, f"{scripted.script.cancelled} of 6 streams were cancelled"
        time.sleep(0.02)


@pytest.mark.parametrize("status", [429, 503])
def test_rejections_are_not_failures(scripted, status):
    scripted.script.refusals = [(status, "full", {"Retry-After": "0"})] * 3
    result = run(Options(url=scripted.url, clients=1, requests=5, prompt="Hi"))
    assert (result.rejected, result.ok, result.failed) == (3, 2, 0) and result.rejection_p95 > 0


@pytest.mark.parametrize(
    ("answer", "error"),
    [(["a", {"error": {"message": "replica died"}}, None], "replica died"), (["a", None], "ended early")],
)
def test_broken_streams_are_failures(scripted, answer, error):
    scripted.script.answer = answer
    result = run(Options(url=scripted.url, clients=2, requests=4, prompt="Hi"))
    assert (result.failed, result.ok) == (4, 0) and error in next(iter(result.errors))


def test_json_is_the_last_line_and_has_no_nan(scripted, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["load_test", "--url", scripted.url, "--requests", "2", "--no-stream", "--json"])
    load_test.main()
    figures = json.loads(capsys.readouterr().out.splitlines()[-1], parse_constant=lambda name: pytest.fail(name))
    assert figures["ok"] == 2 and figures["ttft_p50"] is None


@pytest.mark.parametrize(
    "options", [Options(clients=0), Options(rate=-1), Options(drop=2), Options(drop=0.5, stream=False)]
)
def test_bad_options(options):
    with pytest.raises(ValueError, match=r"share of|above 0"):
        run(options)
