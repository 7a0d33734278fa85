"""Time that training loses to saving, of a save every 5 minutes, and the memory that it takes: DiT-B/8 by default.

    python benchmarks/saving.py
    python benchmarks/saving.py --architecture DiT-S/8 --saves 2

One process trains on one batch as benchmarks/step.py does and saves now and then. Lost is how long it stands still for
a save, and how much longer than those before and after it the steps take while it is written, in one run; resident
memory is looked at by a thread. Nothing else should run on the machine; 12 GB of memory. Exits 1 at 2 % or more.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from bare_run import bare_run

from ray_pipeline.checkpoints import CheckpointStore
from ray_pipeline.config import load_config
from ray_pipeline.training.build import precision, prepare_torch
from ray_pipeline.training.launch import WORKER_ENVIRONMENT
from ray_pipeline.training.saving import Save, Saver
from ray_pipeline.training.setup import PhaseRun
from ray_pipeline.training.step import MicroBatch, optimize

SECONDS_BETWEEN_SAVES = 300
MOST_LOST = 0.02
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Lost:
    """Of one save: seconds of standing still, seconds until it was committed, and the steps that ran meanwhile."""

    stood_still: float
    written: float
    steps: list[float]

    def seconds(self, usual: float) -> float:
        """Seconds that training lost, given how long a step takes otherwise."""
        return self.stood_still + sum(step - usual for step in self.steps)


@dataclass
class Memory:
    """Resident bytes of this process, looked at all the time."""

    highest: int = 0
    _ended: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def watched(self) -> Iterator[Memory]:
        """Within, `highest` grows with what this process holds."""
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._ended.wait(0.02):
            self.highest = max(self.highest, process.memory_info().rss)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", default="DiT-B/8")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="timed steps without a save, before and after each")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    arguments = parser.parse_args()
    if not os.environ.items() >= WORKER_ENVIRONMENT.items():  # read when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | WORKER_ENVIRONMENT)
    run, batches = open_run(arguments)
    lost, during = [], 0
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder, Saver() as saver:
        store = CheckpointStore(folder)
        timed_step(run, batches)  # the first one also makes the optimizer's state
        before, quiet = quiet_steps(run, batches, arguments.steps)
        for number in range(arguments.saves):
            with Memory().watched() as memory:
                save = save_while_training(run, batches, saver, store, f"{run.phase.name}_epoch_{number:03d}")
            during = max(during, memory.highest)
            _, after = quiet_steps(run, batches, arguments.steps)
            usual = statistics.median(quiet + after)
            lost.append(save.seconds(usual))
            print_save(number, save, usual)
            quiet = after
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) / arguments.saves
    share = statistics.median(lost) / SECONDS_BETWEEN_SAVES
    how = f"in {precision(run.config, 'cpu')} on {os.cpu_count()} cores"
    print(f"{arguments.architecture}, batch {arguments.batch} {how}")
    print(f"a step takes {usual:.3f} s, a checkpoint has {size / 2**20:.0f} MiB")
    print(f"lost to a save every {SECONDS_BETWEEN_SAVES} s: {share:.2%} of training time (at most {MOST_LOST:.0%})")
    print(f"resident memory: {before / 2**20:.0f} MiB before the first save, at most "
          f"{during / 2**20:.0f} MiB during one, {(during - before) / size:.2f} checkpoints more")  # fmt: skip
    return 0 if share < MOST_LOST else 1


def quiet_steps(run: PhaseRun, batches: list[MicroBatch], count: int) -> tuple[int, list[float]]:
    """Steps without a save -> the most resident bytes, the seconds of each."""
    with Memory().watched() as memory:
        seconds = [timed_step(run, batches) for _ in range(count)]
    return memory.highest, seconds


def print_save(number: int, save: Lost, usual: float) -> None:
    steps = " ".join(f"{step:.2f}" for step in save.steps)
    print(
        f"save {number + 1}: {save.stood_still:.2f} s still, written after {save.written:.1f} s; steps meanwhile "
        f"{steps} s, otherwise {usual:.2f} s; lost {save.seconds(usual):.2f} s",
        flush=True,
    )


def save_while_training(
    run: PhaseRun, batches: list[MicroBatch], saver: Saver, store: CheckpointStore, name: str
) -> Lost:
    """Save as rank 0 does and train on until it is committed."""
    state = {"phase": run.phase.name, "step": run.state.step, "position": run.state.step * run.plan.global_batch}
    started = time.perf_counter()
    saver.submit(Save(store, name, run.state.groups(), state, {}))
    stood_still, steps = time.perf_counter() - started, []
    while not (outcomes := saver.outcomes()):
        steps.append(timed_step(run, batches))
    if outcomes[0].error is not None:
        raise SystemExit(f"{name} was not saved: {outcomes[0].error}")
    return Lost(stood_still, outcomes[0].seconds, steps)


def timed_step(run: PhaseRun, batches: list[MicroBatch]) -> float:
    """Seconds of one optimizer step."""
    started = time.perf_counter()
    optimize(run, run.state.step, batches)
    return time.perf_counter() - started


def open_run(arguments: argparse.Namespace) -> tuple[PhaseRun, list[MicroBatch]]:
    """A phase of configs/microscopy.yaml without data, checkpoints and records, and a batch for every step."""
    size = arguments.batch
    values = {
        "model.architecture": arguments.architecture,
        "model.hidden_size": "null",
        "train.batch_size": size,
        "train.global_batch": size,
        "ema.start_step": 0,
    }
    config = load_config(ROOT / "configs" / "microscopy.yaml", [f"{key}={value}" for key, value in values.items()])
    prepare_torch(config, torch.device("cpu"), local_workers=1)
    torch.set_num_threads(os.cpu_count() or 1)
    generator = torch.Generator().manual_seed(config.seed)
    shape = (size, 4, 64, 64)
    x0, noise = (scale * torch.randn(shape, generator=generator) for scale in (config.scheduler.sigma_data, 1.0))
    return bare_run(config), [
        MicroBatch(x0=x0, noise=noise, z=torch.randn(size, generator=generator), hints=None, mask=None)
    ]


if __name__ == "__main__":
    sys.exit(main())
