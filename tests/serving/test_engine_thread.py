import asyncio
import sys
import time

import pytest

from nanochat_ray.data.tokenizer import Tokenizer
from nanochat_ray.inference import grammar
from nanochat_ray.inference.engine import Engine
from nanochat_ray.inference.sampling import SamplingParams
from nanochat_ray.model.gpt import GPT, GPTConfig
from nanochat_ray.train.checkpoint import save_checkpoint
from serving.app import ServiceOptions
from serving.engine_server import EngineServer, EngineThread


def test_an_engine_that_fails_tells_those_who_wait_and_those_who_come(reference_model, monkeypatch):
    async def talk() -> None:
        engine = Engine(reference_model)
        thread = EngineThread(engine, asyncio.get_running_loop())
        thread.start()
        with pytest.raises(ValueError, match="empty"):
            await thread.call(engine.submit, [], SamplingParams())
        news = asyncio.Event()

        def listen(sequences):
            thread.listeners |= dict.fromkeys(sequences, news)

        monkeypatch.setattr(engine.runner, "run", lambda *inputs: 1 / 0)
        await thread.call(lambda: listen(engine.submit([1, 2], SamplingParams(max_tokens=2))))
        await news.wait()
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            await thread.call(engine.submit, [1, 2], SamplingParams())

    asyncio.run(asyncio.wait_for(talk(), 60))


@pytest.fixture
def folder(golden, tmp_path):
    """Of a checkpoint."""
    tokenizer = Tokenizer.load(str(golden / "nanochat_d2"))
    model = GPT(GPTConfig(64, tokenizer.vocab_size, 1, 2, 2, 32, "L"))
    model.init_weights()
    return save_checkpoint(str(tmp_path), 1, model, None, tokenizer, {})


def engine_server(folder: str, **options) -> EngineServer:
    options = ServiceOptions(dtype="float32", compile=False, **options).model_dump()
    return EngineServer.func_or_class(folder, options, 1)


def test_what_comes_while_nobody_asks_is_told(folder):
    """The engine ends an answer while its reader holds the message before."""
    params = vars(SamplingParams(max_tokens=40, temperature=0, n=2))

    async def read() -> list[dict]:
        server, choices = engine_server(folder), []
        async for message in server.generate([1, 2, 3], params, stream=True):
            choices += message["choices"]
            while any(not sequence.finish_reason for sequence in server.thread.listeners):
                await asyncio.sleep(0.01)
        await server.thread.call(lambda: None)  # behind what the end of a request leaves to be done
        return choices

    choices = asyncio.run(asyncio.wait_for(read(), 60))
    assert len(choices) > 2
    assert [sum(len(c["tokens"]) for c in choices if c["index"] == i) for i in range(2)] == [40, 40]
    assert [c["finish_reason"] for c in choices if c["finish_reason"]] == ["length", "length"]


def talk_to(server, *asked: dict) -> list:
    """Of each of these parameters, asked together, the messages with news, or the error."""

    async def ask(params: dict) -> list[dict] | ValueError:
        try:
            messages = server.generate([1, 2, 3, 4, 5], vars(SamplingParams(**params)), stream=True)
            return [message async for message in messages if message.get("choices") != []]
        except ValueError as error:
            return error

    async def ask_all() -> list:
        answers = await asyncio.gather(*map(ask, asked))
        await server.thread.call(lambda: None)
        assert (server.ongoing, server.thread.listeners, server.engine.busy) == (0, {}, False)
        return answers

    return asyncio.run(asyncio.wait_for(ask_all(), 60))


def test_a_wrong_request_is_a_value_error_and_the_replica_goes_on(folder):
    server = engine_server(folder, max_batch_size=2, queue_limit=6)
    wrong, bias, many, short, good = talk_to(
        server,
        {"max_tokens": 5, "grammar": "start: ("},
        {"max_tokens": 5, "logit_bias": ((10**6, 1.0),)},
        {"max_tokens": 5, "n": 9},
        {"max_tokens": 20, "grammar": grammar.from_choices(["yes"])},
        {"max_tokens": 20, "n": 4},
    )
    assert "grammar" in str(wrong)
    assert "logit_bias" in str(bias)
    assert "n 9 is above 8" in str(many)
    assert short[-1]["choices"][0]["finish_reason"] == "stop"
    ends = [c["finish_reason"] for message in good for c in message["choices"] if c["finish_reason"]]
    assert ends == ["length"] * 4  # more than the batch takes: the others waited


def test_the_first_message_brings_the_prompts_scores(folder):
    scored, both = talk_to(
        engine_server(folder),
        {"max_tokens": 0, "prompt_logprobs": 2},
        {"max_tokens": 3, "prompt_logprobs": 0, "n": 2, "logprobs": 1},
    )
    [message] = scored
    assert message["choices"] == [{"index": 0, "tokens": [], "logprobs": [], "finish_reason": "length"}]
    first, *scores = message["prompt_logprobs"]
    assert first is None
    assert [len(likeliest) for _, likeliest in scores] == [2] * 4
    assert len(both[0]["prompt_logprobs"]) == 5
    assert not any("prompt_logprobs" in message for message in both[1:])


def test_a_request_without_a_token_to_draw_ends_with_its_error(folder, monkeypatch):
    server = engine_server(folder)
    logits = server.engine.runner.model.logits
    monkeypatch.setattr(server.engine.runner.model, "logits", lambda hidden: logits(hidden) * float("nan"))
    [messages] = talk_to(server, {"max_tokens": 5})
    assert messages == [{"error": "the model's output is not a number (NaN)"}]
    monkeypatch.undo()
    for _ in range(500):  # or two threads would step the engine
        if waits_for_calls(server.thread):
            break
        time.sleep(0.01)
    server.thread = None  # its event loop has ended
    [messages] = talk_to(server, {"max_tokens": 5})
    assert messages[-1]["choices"][0]["finish_reason"] == "length"


def waits_for_calls(thread) -> bool:
    return sys._current_frames()[thread.ident].f_code.co_name == "_answer_calls"


def test_an_engine_whose_checkpoint_is_gone_names_it_in_a_line(tmp_path, caplog):
    gone = str(tmp_path / "checkpoints" / "step_000001")
    with pytest.raises(OSError, match="step_000001"):
        engine_server(gone)
    assert [f"cannot start: no checkpoint in {gone}" in record.message for record in caplog.records] == [True]
