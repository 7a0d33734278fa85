"""What all monitoring together costs a step: DiT-S/8 with every sink, charts and the report, and with none of them.

    python benchmarks/monitoring.py [--steps 60] [--rounds 3]

Each round trains twice in turn, on the same latents and from the same start. Compared are the steps' own seconds as
the records tell them, logging and saving included, validation and sampling left out (they are asked for by the config,
at an epoch's end). Prints a line a run and the ratio of medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

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
train: {{batch_size: 8, global_batch: 8, precision: fp32}}
monitoring:
  {{log_every_n_steps: 10, val_check_interval: 1000000, val_tiles: 2, val_noise_levels: 1, plot_samples: false}}
checkpoint: {{every_minutes: null}}
phases: [{{name: phase1_unconditional, epochs: {epochs}, epochs_to_save: [{epochs}]}}]
ray: {{use_gpu: false}}
"""
_OFF = {"tensorboard": "false", "ray_metrics": "false", "report": "false", "plot_loss": "false", "plot_lr": "false"}
_ON = {"wandb": "offline"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "WANDB_ERROR_REPORTING": "false"}
    seconds: dict[str, list[float]] = {"off": [], "on": []}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        made = simulate(work / "data", fields=4, seed=3, field_size=1024, tile_size=512, val_fraction=0.25)
        path = work / "config.yaml"
        path.write_text(_CONFIG.format(work=work, epochs=-(-8 * arguments.steps // made.tiles["train"])))
        for round_ in range(arguments.rounds):
            for name, settings in (("off", _OFF), ("on", _ON)):
                out = work / f"{name}_{round_}"
                words = [f"output_dir={out}"] + [f"monitoring.{key}={value}" for key, value in settings.items()]
                pipeline.train(load_config(path, words), say=lambda words: None)
                steps = read_events(out, PHASE, "step")[1:]  # the first ones warm up
                seconds[name] += [step["step_seconds"] for step in steps]
                print(f"{name:<4} {statistics.median(step['step_seconds'] for step in steps):.3f} s a step", flush=True)
    off, on = (statistics.median(seconds[name]) for name in ("off", "on"))
    print(f"all monitoring: {100 * (on / off - 1):+.2f} % of a step ({off:.3f} s without, {on:.3f} s with)")
    ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
