"""A function over many items in Ray tasks: results in order, few in flight, so that memory does not grow."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import ray
from ray.exceptions import RayTaskError

Item = TypeVar("Item")
Result = TypeVar("Result")


def ray_map(work: Callable[[Item], Result], items: Sequence[Item], *, together: int = 1) -> Iterator[Result]:
    """work(item) of each item, in their order, on the Ray that is running; `together` items make one task.

    A task whose process dies is run again. What `work` raises is raised here. When it raises, or the iterator is
    closed, the tasks under way are cancelled, and have ended when this returns.
    """
    name = getattr(work, "func", work).__name__  # as Ray's dashboard shows it; a partial has none of its own
    remote = ray.remote(num_cpus=1, max_retries=3)(_each).options(name=name)
    shared = ray.put(work)  # sent to each node once
    limit = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting: deque[ray.ObjectRef] = deque()
    try:
        for start in range(0, len(items), together):
            waiting.append(remote.remote(shared, items[start : start + together]))
            if len(waiting) >= limit:
                yield from _results(waiting.popleft())
        while waiting:
            yield from _results(waiting.popleft())
    finally:
        left = list(waiting)
        for reference in left:
            ray.cancel(reference)
        if left:
            ray.wait(left, num_returns=len(left))


def _each(work: Callable, items: Sequence) -> list:
    return [work(item) for item in items]


def _results(reference: ray.ObjectRef) -> list:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from error
