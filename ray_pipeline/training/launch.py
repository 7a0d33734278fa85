"""Run one phase as a TorchTrainer; what the workers say arrives as a progress line or a clear error."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError

from ray_pipeline.config import Config
from ray_pipeline.errors import RunStopped, UserError, find_user_error
from ray_pipeline.monitoring.ending import ending_noted
from ray_pipeline.monitoring.follow import Follower
from ray_pipeline.run_copy import refresh
from ray_pipeline.storage import Folder
from ray_pipeline.training.board import News, open_board
from ray_pipeline.training.entry import train_on_worker
from ray_pipeline.training.nodes import marked
from ray_pipeline.training.placement import NoRoom, check_resources, placement_in_words, uses_gpu, worker_resources
from ray_pipeline.training.setup import PhaseJob, job_values
from ray_pipeline.training.stopping import SIGNAL_NAMES, ControllerReports, signals_into

#: environment of a training process on CPU. Freed blocks stay with the process (glibc's mallopt(3)) and are backed by
#: huge pages: a step allocates the same gigabytes of activations and gradients again, and fresh small pages cost as
#: much as the arithmetic on them
WORKER_ENVIRONMENT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**26),
    "THP_MEM_ALLOC_ENABLE": "1",
}


#: workers that find no place within this many seconds ask anew: while it waits, Train's controller answers nobody; a
#: group of changing size is tried in another one, for up to 20 s Train counts on a node that has gone
_START_SECONDS = 10
#: nodes taken away with notice; more in one phase, and the run is stopped
_MAX_PREEMPTIONS = 1000
#: how often Train's controller looks after its workers, in seconds; its default of 2 s delays each restart
_HEALTH_CHECK_SECONDS = "0.5"
#: how often the driver reads the news of its run, and how long a stopped controller may take to go, in seconds
_NEWS_SECONDS, _ABORT_SECONDS = 5.0, 30.0


def run_phase(config: Config, job: PhaseJob, *, board: ActorHandle | None = None, show: bool = True) -> None:
    """Run one phase to its end on the Ray that is running.

    board: where others may ask it to stop, default its own; show: a line of progress.

    SIGINT and SIGTERM ask the workers to commit and to return, a second one, or ray.stop_timeout_seconds, ends the run
    at once. Raises RunStopped then; UserError with a worker's own words for wrong input; NoRoom when workers find no
    place for ray.timeout_minutes; after ray.max_failures since the last time that a checkpoint was committed a passing
    UserError for storage that refuses, and RuntimeError with a rank's traceback for anything else.
    """
    check_resources(config)
    phase = config.phases[job.phase]
    board = board or open_board(phase.name)
    follower = Follower(config, phase.name, progress=show)
    # the follower's last picture shows how it ended
    with follower, ending_noted(config, phase.name), marked(config.output_dir) as mark:
        fit_to_the_end(config, board, lambda: make_trainer(config, replace(job, stop=board, mark=mark)))


def fit_to_the_end(config: Config, board: ActorHandle, make: Callable[[], ray.train.torch.TorchTrainer]) -> None:
    """Fit the trainers that `make` gives until one finishes, or fails though no checkpoint was committed in it: Train
    counts failures over all of its run, which may be a week. Raises as `run_phase` does."""
    committed = None
    while True:
        attendance = Attendance(config, board)
        refresh(config.output_dir)  # what this process wrote is there for the workers, and theirs for what follows
        try:
            attendance.attend(make())
            return
        except (RuntimeError, UserError) as error:
            no_failure = isinstance(error, NoRoom) or (isinstance(error, UserError) and not error.passing)
            if no_failure or attendance.news.committed == committed:
                raise
            committed = attendance.news.committed
        finally:
            refresh(config.output_dir)


def make_trainer(config: Config, job: PhaseJob) -> ray.train.torch.TorchTrainer:
    """The TorchTrainer of a phase, which `job.stop` stops."""
    settings = config.ray
    timeout = 60 * settings.timeout_minutes
    return ray.train.torch.TorchTrainer(
        train_on_worker,
        train_loop_config=job_values(job),
        torch_config=ray.train.torch.TorchConfig(timeout_s=math.ceil(timeout)),
        scaling_config=ray.train.ScalingConfig(
            num_workers=settings.num_workers,
            use_gpu=uses_gpu(config),
            resources_per_worker=worker_resources(config),
            placement_strategy=settings.placement_strategy,
            elastic_resize_monitor_interval_s=60 * settings.resize_minutes,
        ),
        run_config=ray.train.RunConfig(
            # a name of its own: Train would go on from the records of an older run of this name, ours are the truth
            name=f"{config.phases[job.phase].name}_{uuid.uuid4().hex[:12]}",
            **_ray_records(config),
            worker_runtime_env={} if uses_gpu(config) else {"env_vars": WORKER_ENVIRONMENT},
            failure_config=ray.train.FailureConfig(
                max_failures=settings.max_failures,
                # one for each time that they found no place; `attend` bounds the time of them all
                controller_failure_limit=settings.max_failures + math.ceil(timeout / _START_SECONDS),
                max_preemption_failures=_MAX_PREEMPTIONS,
            ),
            callbacks=[ControllerReports(job.stop)],
        ),
    )


def _ray_records(config: Config) -> dict[str, Any]:
    """Where Train keeps records of its own, which all nodes must see."""
    folder = Folder(config.output_dir).child("logs", "ray")
    if folder.local is not None:
        return {"storage_path": str(folder.local)}
    return dict(zip(("storage_filesystem", "storage_path"), folder.opened, strict=True))


@contextmanager
def _train_environment(config: Config) -> Iterator[None]:
    """What Train's controller and workers take from the environment of the driver; whoever set one keeps it."""
    timeout = 60 * config.ray.timeout_minutes
    wanted = {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": _HEALTH_CHECK_SECONDS,
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": str(timeout),
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(timeout),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(_START_SECONDS),
    }
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ |= added
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


class Attendance:
    """The driver while its run trains: `fit` in a thread, signals and the news of the run in this one."""

    def __init__(self, config: Config, board: ActorHandle):
        self.config, self.board = config, board
        self.events: SimpleQueue[int | BaseException | None] = SimpleQueue()  # signals; how `fit` ended
        self.news = News()
        self.stopped_by: int | None = None

    def attend(self, trainer: ray.train.torch.TorchTrainer) -> None:
        """Returns when the phase is finished; raises as `run_phase` does."""
        fit = threading.Thread(target=self._fit, args=(trainer,), daemon=True, name="train-fit")
        with _train_environment(self.config), signals_into(self.events):
            fit.start()
            try:
                orderly, error = self._until_the_end()
            finally:
                self._read_news()
                if fit.is_alive():
                    self._abort()
                    fit.join(_ABORT_SECONDS)
        if self.stopped_by is not None:
            raise RunStopped(self._stopped_in_words(orderly, error), 128 + self.stopped_by)
        if error is not None:
            words = self.news.failure or str(error)
            raise find_user_error(error) or RuntimeError(f"training stopped: {words}") from error

    def _fit(self, trainer: ray.train.torch.TorchTrainer) -> None:
        try:
            trainer.fit()
        except BaseException as error:  # whatever it is, `attend` raises it, in the thread that waits
            self.events.put(error)
        else:
            self.events.put(None)

    def _until_the_end(self) -> tuple[bool, BaseException | None]:
        """Whether the run has ended by itself, and what it raised."""
        deadline = math.inf
        while True:
            try:
                event = self.events.get(timeout=min(_NEWS_SECONDS, max(0, deadline - time.monotonic())))
            except Empty:
                if time.monotonic() >= deadline:
                    return False, None
                self._read_news()
                self._check_placed()
                continue
            if not isinstance(event, int):
                return True, event
            if self.stopped_by is not None:
                return False, None
            self.stopped_by = event
            deadline = time.monotonic() + self.config.ray.stop_timeout_seconds
            self.board.stop.remote(SIGNAL_NAMES[event])
            print("\nstopping: the workers are asked to commit, again to stop at once", file=sys.stderr, flush=True)

    def _read_news(self) -> None:
        # without an answer the older news stand: a board that is lost or slow is no reason to end a run
        with suppress(RayActorError, GetTimeoutError):
            self.news = ray.get(self.board.news.remote(), timeout=_NEWS_SECONDS)

    def _check_placed(self) -> None:
        if self.stopped_by is None and self.news.unplaced_seconds > 60 * self.config.ray.timeout_minutes:
            raise NoRoom(
                f"the workers found no place for ray.timeout_minutes={self.config.ray.timeout_minutes:g}: "
                f"{placement_in_words(self.config)}; end what else runs there, add nodes, lower ray.num_workers, or "
                "allow more time"
            )

    def _abort(self) -> None:
        """End Train's controller, and with it the workers."""
        # before it has told the board of itself, and while it waits for a place, it answers nobody, but asks the board
        self.board.stop.remote("the run ends")
        controller = self.news.controller
        if controller is None:
            return
        # killed, it would leave its workers' place taken until the driver ends
        ray.wait([controller.abort.remote()], timeout=_ABORT_SECONDS)
        ray.kill(controller)

    def _stopped_in_words(self, orderly: bool, error: BaseException | None) -> str:
        how = f"stopped by {SIGNAL_NAMES[self.stopped_by]}"
        if not orderly:
            how += " before the workers had committed"
        elif error is not None:
            how += f" ({str(error).strip().splitlines()[-1]})"
        committed = self.news.committed
        newest = f"the newest checkpoint is {committed[1]}, step {committed[0]}" if committed else "no new checkpoint"
        return f"{how}; {newest}; go on with --resume"
