"""Stopping with nothing lost: the driver asks, every worker sees it at its next step, commits and returns.

Driver, Train's controller and the workers of a phase meet at one actor, the Board.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from queue import SimpleQueue

import ray
import ray.train
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.context import get_train_context

from ray_pipeline.errors import find_user_error

SIGNAL_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class StopWatch:
    """What a worker is asked, at no cost to ask: nothing is sent when `stop` and `save` are read."""

    def __init__(self, board: ActorHandle | None):
        self._board = board
        self._reason = ""
        self._leaving: set[str] = set()

    def __enter__(self) -> StopWatch:
        # Train tells every worker of a node that will be taken away; ray.train.get_preemption_info is a barrier
        self._preemption = get_train_context().preemption_context
        if self._board is not None and ray.train.get_context().get_world_rank() == 0:
            self._board.wait.remote().future().add_done_callback(self._told)
        return self

    def __exit__(self, *exception: object) -> None:
        self._board = None

    def _told(self, answer: Future) -> None:
        # without its driver, and so without its board, a worker is asked nothing
        if not answer.cancelled() and answer.exception() is None:
            self._reason = answer.result()

    @property
    def stop(self) -> str:
        """Why this worker should commit and then return, such as "SIGTERM"; "" while nobody asked. Rank 0 knows."""
        return self._reason

    @property
    def save(self) -> bool:
        """True once for each notice that a node of this run will be taken away: commit, and go on."""
        notice = self._preemption.preemption_info
        if notice is None or self._leaving.issuperset(notice.preempted_node_to_ranks):
            return False
        self._leaving.update(notice.preempted_node_to_ranks)
        return True

    def await_verdict(self, step: int) -> None:
        """Wait until step `step` was judged; `stop` tells how."""
        if self._board is not None:
            with suppress(RayActorError):  # without its driver nobody judges
                self._reason = ray.get(self._board.verdict.remote(step)) or self._reason

    def committed(self, step: int, checkpoint: str) -> None:
        """Tell the driver of a commit; does not wait."""
        if self._board is not None:
            self._board.committed.remote(step, checkpoint)


class ControllerReports(ControllerCallback, WorkerGroupCallback):
    """In Train's controller: keeps the board up to date, and ends the run at wrong input, which no retry mends, and
    where it is asked to stop while there are no workers: then it does not answer its driver."""

    def __init__(self, board: ActorHandle):
        self.board = board

    def after_controller_start(self, train_run_context) -> None:
        self.board.controlled_by.remote(ray.get_runtime_context().current_actor)

    def after_controller_state_update(self, previous_state, current_state) -> None:
        if type(previous_state) is type(current_state):
            return
        name = type(current_state).__name__
        without_place = ("InitializingState", "SchedulingState", "ReschedulingState", "RestartingState")
        self.board.running.remote(name not in (*without_place, "ResizingState"))
        if name in without_place:
            with suppress(RayActorError):  # without its driver nobody asks
                if ray.get(self.board.asked.remote()):
                    raise RuntimeError("there were no workers to commit anything")

    def after_worker_group_poll_status(self, worker_group_status) -> None:
        errors = {rank: each.error for rank, each in worker_group_status.worker_statuses.items() if each.error}
        if errors:
            self.board.failed.remote("\n".join(f"rank {rank}: {error}" for rank, error in errors.items()))
        for error in worker_group_status.errors.values():
            wrong_input = find_user_error(error)
            if wrong_input is not None and not wrong_input.passing:
                raise wrong_input


@contextmanager
def signals_into(events: SimpleQueue) -> Iterator[None]:
    """SIGINT and SIGTERM arrive in `events` as numbers. Python allows handlers in the main thread alone: in another
    one, this does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # a SimpleQueue may be put into by a handler that interrupts its own reader
    before = {number: signal.signal(number, lambda number, _: events.put(number)) for number in SIGNAL_NAMES}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
