"""What all monitoring together costs a step: DiT-S/8 with every sink, charts and the report, and with none of them.

    python benchmarks/monitoring.py [--steps 600] [--rounds 2]

Each round trains twice in turn, on the same latents and from the same start: with a record every 10 steps for every
sink, and with one record in the middle and one at the end for none but metrics.jsonl. Compared are the means of the own
seconds of the steps in the second half, as the records tell them: sinks and charts have loaded their libraries by then.
Nothing is learnt, so that no best epoch is saved: writing a checkpoint takes a core meanwhile, with monitoring or not.
Validation and the drawing of samples are left out (the config asks for them, at an epoch's end), what sinks do with the
pictures is not.

Prints a line a run: with the charts and pages drawn while the compared steps ran, and the processor time that the
command, which draws them, took beside them, in percent of a core; then the ratio of the means. A page comes 400 times
as long as it takes after the one before, so few runs see one. Exits 1 where all monitoring takes more than 1 %, or
where a run with it drew no chart in its second half.
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
from datetime import datetime
from pathlib import Path

import numpy as np
import ray

from ray_pipeline import pipeline
from ray_pipeline.config import load_config
from ray_pipeline.data.sources.simulate import simulate
from ray_pipeline.monitoring.metrics_file import read_events

PHASE = "phase1_unconditional"
_CONFIG = """
data: {{root: {work}/data, tile_size: 512}}
model: {{architecture: DiT-S/8, hidden_size: 384}}
ema: {{start_step: 1, snapshots: 1}}
optimizer: {{lr: 1.0e-12}}
train: {{batch_size: 8, global_batch: 8, precision: fp32}}
monitoring:
  {{val_check_interval: 1000000, val_tiles: 2, val_noise_levels: 1, num_samples: 2, sample_steps: 2,
    sample_every_n_epochs: 4, nearest_tiles: 0}}
checkpoint: {{every_minutes: null}}
phases: [{{name: phase1_unconditional, epochs: {epochs}, epochs_to_save: [{epochs}]}}]
ray: {{use_gpu: false}}
"""
_OFF = {"tensorboard": "false", "ray_metrics": "false", "report": "false", "plot_loss": "false", "plot_lr": "false"}
_ON = {"wandb": "offline", "log_every_n_steps": "10"}
_MOST = 0.01
_DRAWN = {"charts": f"plots/{PHASE}/latest_progress.png", "pages": "report.html"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600, help="a multiple of 20")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "WANDB_ERROR_REPORTING": "false"}
    seconds: dict[str, list[float]] = {"off": [], "on": []}
    blind = False
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        made = simulate(work / "data", fields=40, seed=3, field_size=1024, tile_size=512, val_fraction=0.25)
        path = work / "config.yaml"
        path.write_text(_CONFIG.format(work=work, epochs=-(-8 * arguments.steps // made.tiles["train"])))
        for round_ in range(arguments.rounds):
            for name, settings in (("off", _OFF | {"log_every_n_steps": arguments.steps // 2}), ("on", _ON)):
                out = work / f"{name}_{round_}"
                words = [f"output_dir={out}"] + [f"monitoring.{key}={value}" for key, value in settings.items()]
                with watched(out) as (drawn, spent):
                    pipeline.train(load_config(path, words), say=lambda words: None)
                records = read_events(out, PHASE, "step")
                before = [0] + [record["step"] for record in records]
                late = [pair for pair in zip(records, before, strict=False) if pair[1] >= arguments.steps // 2]
                weights = [record["step"] - step for record, step in late]
                seconds[name].append(statistics.fmean((record["step_seconds"] for record, _ in late), weights))
                end = moment(late[-1][0])
                begin = end - sum(
                    record["step_seconds"] * weight for (record, _), weight in zip(late, weights, strict=True)
                )
                meanwhile = {kind: sum(begin <= when <= end for when in drawn[kind]) for kind in _DRAWN}
                blind |= name == "on" and not meanwhile["charts"]
                told = ", ".join(f"{number} {kind}" for kind, number in meanwhile.items())
                busy = np.diff(np.interp([begin, end], *zip(*spent, strict=True))).item() / (end - begin)
                pace = f"{seconds[name][-1]:.3f} s a step, {before[-1]} steps"
                print(f"{name:<4} {pace}; {told}, {100 * busy:.2f} % of a core", flush=True)
    off, on = (statistics.fmean(seconds[name]) for name in ("off", "on"))
    print(f"all monitoring: {100 * (on / off - 1):+.2f} % of a step ({off:.3f} s without, {on:.3f} s with)")
    ray.shutdown()
    if blind:
        print("a run drew no chart in its second half: give it more --steps")
    return 1 if on > (1 + _MOST) * off or blind else 0


@contextmanager
def watched(run: Path) -> Iterator[tuple[dict[str, list[float]], list[tuple[float, float]]]]:
    """For the length of the block; yields when each kind was drawn, in seconds since 1970, and at such moments the
    seconds of processor time that this process had taken."""
    drawn: dict[str, list[float]] = {kind: [] for kind in _DRAWN}
    spent: list[tuple[float, float]] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            spent.append((time.time(), time.process_time()))
            for kind, name in _DRAWN.items():
                when = (run / name).stat().st_mtime if (run / name).exists() else None
                if when is not None and when not in drawn[kind][-1:]:
                    drawn[kind].append(when)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield drawn, spent
    finally:
        ended.set()
        thread.join()


def moment(record: dict) -> float:
    """When it was told, in seconds since 1970."""
    return datetime.fromisoformat(record["time"]).timestamp()


if __name__ == "__main__":
    sys.exit(main())
