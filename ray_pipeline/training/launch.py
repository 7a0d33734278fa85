"""Run one phase as a TorchTrainer; what the workers say arrives as a progress line or a clear error."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
import ray.train
import ray.train.torch

from ray_pipeline.config import Config
from ray_pipeline.errors import UserError, find_user_error
from ray_pipeline.monitoring.events import metrics_path
from ray_pipeline.monitoring.progress import Progress
from ray_pipeline.training.phase import train_phase
from ray_pipeline.training.setup import PhaseJob, job_values, stream_cpus, stream_gpus, stream_workers

#: environment of a training process on CPU. Freed blocks stay with the process (glibc's mallopt(3)) and are backed by
#: huge pages: a step allocates the same gigabytes of activations and gradients again, and fresh small pages cost as
#: much as the arithmetic on them
WORKER_ENVIRONMENT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**26),
    "THP_MEM_ALLOC_ENABLE": "1",
}


def uses_gpu(config: Config) -> bool:
    """Whether workers get a GPU each: as set, or `auto`, when the running Ray has any."""
    if config.ray.use_gpu == "auto":
        return ray.cluster_resources().get("GPU", 0) >= 1
    return bool(config.ray.use_gpu)


def check_resources(config: Config) -> None:
    """UserError when the running Ray can never hold all workers and their data streams at once."""
    settings, have = config.ray, ray.cluster_resources()
    need = {"CPU": settings.cpus_per_worker * settings.num_workers}
    if uses_gpu(config):
        need["GPU"] = settings.num_workers
    for name, amount in settings.resources_per_worker.items():
        need[name] = amount * settings.num_workers
    # a stream that finds no room waits for ever, and its worker with it
    need["CPU"] += stream_cpus(config)
    if stream_gpus(config):
        need["GPU"] = need.get("GPU", 0) + settings.num_workers * stream_workers(config) * stream_gpus(config)
    for name, amount in need.items():
        if have.get(name, 0) < amount:
            raise UserError(
                f"ray.num_workers={settings.num_workers} with its data streams needs {amount:g} {name}, but this Ray "
                f"has {have.get(name, 0):g}; lower ray.num_workers or ray.resources_per_worker, or add nodes"
            )


def run_phase(config: Config, job: PhaseJob) -> None:
    """Run one phase to its end on the Ray that is running.

    Raises UserError with a worker's own words for wrong input, RuntimeError with its traceback for anything else.
    """
    check_resources(config)
    phase = config.phases[job.phase]
    settings = config.ray
    trainer = ray.train.torch.TorchTrainer(
        train_phase,
        train_loop_config=job_values(job),
        scaling_config=ray.train.ScalingConfig(
            num_workers=settings.num_workers,
            use_gpu=uses_gpu(config),
            resources_per_worker={"CPU": settings.cpus_per_worker}
            | ({"GPU": 1} if uses_gpu(config) else {})
            | settings.resources_per_worker,
            placement_strategy=settings.placement_strategy,
        ),
        run_config=ray.train.RunConfig(
            name=f"{phase.name}_attempt{job.attempt}",
            storage_path=str(Path(job.run_dir, "logs", "ray")),
            worker_runtime_env={} if uses_gpu(config) else {"env_vars": WORKER_ENVIRONMENT},
            failure_config=ray.train.FailureConfig(
                max_failures=settings.max_failures, controller_failure_limit=settings.max_failures
            ),
        ),
    )
    with _followed(Path(job.run_dir), phase.name, config.train.global_batch):
        try:
            trainer.fit()
        except Exception as error:  # Ray wraps what a worker raised in classes of its own
            raise find_user_error(error) or RuntimeError(f"training stopped: {error}") from error


@contextmanager
def _followed(run_dir: Path, phase: str, global_batch: int) -> Iterator[None]:
    """Show the phase's progress line while the workers write their records."""
    stopped = threading.Event()
    path = metrics_path(run_dir)
    offset = path.stat().st_size if path.exists() else 0
    thread = threading.Thread(target=_follow, args=(path, offset, phase, global_batch, stopped), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join(timeout=5)


def _follow(path: Path, offset: int, phase: str, global_batch: int, stopped: threading.Event) -> None:
    progress: Progress | None = None
    state_file = path.parent.parent / "phase_state.json"
    ended = False
    while not ended:
        ended = stopped.wait(0.5)
        # a resume cuts the file, so it may have become shorter than what was read
        if not path.exists():
            continue
        offset = min(offset, path.stat().st_size)
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        offset += len(whole)
        for line in whole.splitlines():
            record = json.loads(line)
            if record.get("phase") != phase:
                continue
            if progress is None and record["event"] == "phase":
                steps = json.loads(state_file.read_bytes())["phases"][phase]["steps"] if state_file.exists() else None
                progress = Progress(steps, phase, start=record["step"], samples_per_unit=global_batch)
            elif progress is not None:
                _show(progress, record)
    if progress is not None:
        progress.close()


def _show(progress: Progress, record: dict) -> None:
    if record["event"] == "step":
        progress.update(record["step"], epoch=record["epoch"], loss=record["loss"])
    elif record["event"] == "validation":
        progress.update(record["step"], val=record["loss"])
