"""Combines streams of an engine's messages."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from ray import serve

from serving.protocol import ApiError


async def all_of(
    streams: Sequence[Callable[[], AsyncGenerator[dict]]], at_once: int
) -> AsyncGenerator[tuple[int, dict]]:
    """Yield (index of the stream, message) of all streams. `at_once` of them run at a time, in their order.

    A stream after the first `at_once` that is refused with 429 is started again a second later.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]()) as messages:
            async for message in messages:
                yield 0, message
        return
    news, places = asyncio.Queue(at_once), asyncio.Semaphore(at_once)

    async def follow(i: int) -> None:
        # Serve's router identifies calls by their request's context. Without a context of its own each, it would take
        # all of these for one call.
        serve.context._serve_request_context.set(serve.context._RequestContext())
        async with places:
            try:
                while True:
                    try:
                        async with aclosing(streams[i]()) as messages:
                            async for message in messages:
                                await news.put((i, message))
                        break
                    except ApiError as error:
                        if error.status != 429 or i < at_once:
                            raise
                    await asyncio.sleep(1)
                await news.put((i, None))
            except Exception as error:
                await news.put((i, error))

    tasks, left = [asyncio.create_task(follow(i)) for i in range(len(streams))], len(streams)
    try:
        while left:
            i, message = await news.get()
            if isinstance(message, Exception):
                raise message
            if message is None:
                left -= 1
            else:
                yield i, message
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def chain(first, rest: AsyncGenerator) -> AsyncGenerator:
    async with aclosing(rest):
        yield first
        async for message in rest:
            yield message
