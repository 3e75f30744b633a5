import asyncio

import pytest

from nanochat_ray.data.tokenizer import Tokenizer
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


def test_what_comes_while_nobody_asks_is_told(golden, tmp_path):
    """The engine ends an answer while its reader holds the message before."""
    tokenizer = Tokenizer.load(str(golden / "nanochat_d2"))
    model = GPT(GPTConfig(64, tokenizer.vocab_size, 1, 2, 2, 32, "L"))
    model.init_weights()
    folder = save_checkpoint(str(tmp_path), 1, model, None, tokenizer, {})
    options = ServiceOptions(dtype="float32", compile=False).model_dump()
    params = vars(SamplingParams(max_tokens=40, temperature=0, n=2))

    async def read() -> list[dict]:
        server, choices = EngineServer.func_or_class(folder, options, 1), []
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
