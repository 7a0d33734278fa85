"""A trace of a few steps by torch.profiler: what `train --profile` writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from ray_pipeline.run_copy import run_path
from ray_pipeline.training.setup import PhaseRun

Draw = Callable[[str, Callable[[], object]], None]
#: steps that are left aside, that the profiler itself needs, and that it records
_WAIT, _WARM_UP, _RECORDED = 3, 1, 3


@contextmanager
def profiled(run: PhaseRun, draw: Draw | None) -> Iterator[Callable[[], None]]:
    """Within, call the function after every step. Rank 0 writes <run>/logs/profile/<phase>_step_<first>.json.gz, which
    chrome://tracing and Perfetto show, where the job asks for it. draw: PhaseRecords.draw, which calls what writes it
    and tells of a failure; other ranks have none."""
    left = run.end_step - run.state.step
    if not run.job.profile or draw is None or left < 1:
        yield lambda: None
        return
    recorded = min(_RECORDED, left)
    warm_up = min(_WARM_UP, left - recorded)
    wait = min(_WAIT, left - recorded - warm_up)
    name = f"{run.phase.name}_step_{run.state.step + wait + warm_up + 1:08d}.json.gz"
    path = run_path(run.config.output_dir, "logs", "profile") / name

    def write(profiler: profile) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(
        activities=activities,
        schedule=schedule(wait=wait, warmup=warm_up, active=recorded, repeat=1),
        on_trace_ready=lambda profiler: draw("the trace of the profiler", lambda: write(profiler)),
        record_shapes=True,
    ) as profiler:
        yield profiler.step
