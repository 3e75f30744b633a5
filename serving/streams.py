"""Streams of an engine's messages, side by side or one after the other."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

from ray import serve

from serving.protocol import ApiError


async def all_of(streams: list[Callable[[], AsyncIterator[dict]]], at_once: int) -> AsyncIterator[tuple[int, dict]]:
    """The messages of all streams as they come, each with its stream's place; so many streams at once, in their order.

    A stream that is turned away with 429 when others have been answered is asked for again.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]()) as messages:
            async for message in messages:
                yield 0, message
        return
    news, places = asyncio.Queue(at_once), asyncio.Semaphore(at_once)

    async def follow(i: int) -> None:
        # Serve's router knows calls by the request that they are made for, and would take all of these for one.
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


async def chain(first, rest: AsyncIterator) -> AsyncIterator:
    async with aclosing(rest):
        yield first
        async for message in rest:
            yield message
