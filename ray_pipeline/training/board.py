"""Where driver, Train's controller, workers and trials meet: actors that live beside the driver and end with it.

A worker whose driver is gone is asked nothing. This module imports little: it is all that the process of such an actor
loads.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import dataclass

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@dataclass(frozen=True)
class News:
    """What the driver is told of its run.

    controller: Train's. unplaced_seconds: for how long it has been without workers; 0 while they run. committed: the
    newest checkpoint, as (step, name). failure: what the ranks that failed last have said, with their tracebacks.
    """

    controller: ActorHandle | None = None
    unplaced_seconds: float = 0.0
    committed: tuple[int, str] | None = None
    failure: str = ""


class Board:
    """Actor with the wishes of the driver and the news of a run; only `wait` and `verdict` take their time."""

    def __init__(self):
        self._reason = ""
        self._asked = asyncio.Event()
        self._judged, self._verdict = 0, asyncio.Event()
        self._controller: ActorHandle | None = None
        self._unplaced_since: float | None = time.monotonic()
        self._committed: tuple[int, str] | None = None
        self._failure = ""

    async def stop(self, reason: str) -> None:
        """Ask the workers, those that run and those to come, to commit and to return."""
        self._reason = reason
        self._asked.set()

    async def asked(self) -> str:
        """Why to stop; "" while nobody asks."""
        return self._reason

    async def wait(self) -> str:
        """Why to stop, once anybody asks."""
        await self._asked.wait()
        return self._reason

    async def judge(self, step: int) -> None:
        """Who waits for a verdict on `step` may go on, unless someone asked to stop."""
        self._judged = max(self._judged, step)
        self._verdict.set()

    async def verdict(self, step: int) -> str:
        """Why to stop, or "" to go on, once step `step` was judged."""
        while self._judged < step and not self._asked.is_set():
            self._verdict.clear()
            waits = [asyncio.ensure_future(event.wait()) for event in (self._verdict, self._asked)]
            _, late = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in late:
                wait.cancel()
        return self._reason

    async def controlled_by(self, controller: ActorHandle) -> None:
        self._controller = controller

    async def running(self, running: bool) -> None:
        """Whether there are workers."""
        if running:
            self._unplaced_since = None
        elif self._unplaced_since is None:
            self._unplaced_since = time.monotonic()

    async def committed(self, step: int, checkpoint: str) -> None:
        self._committed = (step, checkpoint)

    async def failed(self, words: str) -> None:
        self._failure = words

    async def news(self) -> News:
        unplaced = 0.0 if self._unplaced_since is None else time.monotonic() - self._unplaced_since
        return News(self._controller, unplaced, self._committed, self._failure)


class Notes:
    """Actor: who is to stop, and why others failed. `everyone`: the sweep itself ends."""

    def __init__(self):
        self._stopped: dict[int, str] = {}
        self._failures: dict[int, str] = {}
        self._everyone = ""

    def stop(self, number: int, reason: str) -> None:
        """Ask one trial to stop."""
        self._stopped[number] = reason

    def stop_everyone(self, reason: str) -> None:
        """Ask all to stop, those to come too."""
        self._everyone = reason

    def asked(self, number: int) -> str:
        """Why a trial is to stop; "" while nobody asks."""
        return self._everyone or self._stopped.get(number, "")

    def fail(self, number: int, words: str) -> None:
        """What a trial says of its end."""
        self._failures[number] = words

    def failure(self, number: int) -> str:
        return self._failures.get(number, "its process ended")


def open_board(of: str) -> ActorHandle:
    """A Board on the driver's node: the loss of another node does not take it away. of: a name to know it by in Ray's
    dashboard."""
    return _beside_the_driver(Board, f"board-of-{of}")


def open_notes() -> ActorHandle:
    """Notes on the driver's node."""
    return _beside_the_driver(Notes, "notes-of-sweep")


def _beside_the_driver(actor: type, name: str) -> ActorHandle:
    unique = f"{name}-{uuid.uuid4().hex[:12]}"
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(actor).options(name=unique, scheduling_strategy=here).remote()
