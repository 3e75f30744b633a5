import asyncio

import pytest

from nanochat_ray.inference.engine import Engine
from nanochat_ray.inference.sampling import SamplingParams
from serving.engine_server import EngineThread


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
