"""Run a function on every shard, each in a Ray task."""

import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
import ray.data

from nanochat_ray.data.files import shown

MAX_TASKS = 2_000  # or 8 per CPU if that is more; each task costs the driver some milliseconds


def map_shards(function: Callable, shards: Sequence, *, memory: float | None = None) -> Iterator[tuple[int, Any]]:
    """Yield (index, function(shard)) for each shard, in the order in which the tasks end. Very many shards share tasks.

    memory: bytes per task. Raises ValueError with one line when the function raises ValueError or OSError: the task
    returns these errors as values, because Ray adds pages of its own trace to an error that a task raises."""
    # Shards are pickled, because a file name may not be UTF-8, and Arrow's strings must be.
    items = [{"index": index, "shard": pickle.dumps(shard)} for index, shard in enumerate(shards)]
    max_tasks = max(MAX_TASKS, int(8 * ray.cluster_resources().get("CPU", 1)))

    def task(row: dict) -> dict:
        try:
            result = function(pickle.loads(row["shard"]))
        except (ValueError, OSError) as error:
            result = ValueError(shown(str(error)))
        return {"index": row["index"], "result": pickle.dumps(result)}

    blocks = ray.data.from_items(items, override_num_blocks=min(len(items), max_tasks))
    for row in blocks.map(task, num_cpus=1, memory=memory).iter_rows():
        result = pickle.loads(row["result"])
        if isinstance(result, Exception):
            raise result
        yield row["index"], result
