"""Sweeps on a Ray with two logical CPUs: is a trial given up in order, with a dashboard and without one, and does all
that trials took come back?

    python benchmarks/drill_sweep.py

Two runs of both phases, each with a sweep of six short trials by successive halving, two at a time; one on a Ray with a
dashboard. One learning rate in three learns nothing. Prints a line a run; exits 1 where such a trial was not given up
early, or won, where a trial failed, or where CPUs or placement groups are left over.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
from pathlib import Path

import ray
from ray.util import placement_group_table
from small_run import prepare

from ray_pipeline import pipeline
from ray_pipeline.config import Config, load_config
from ray_pipeline.sweep_records import read_sweep, read_winner

USELESS = 1e-9
TIMEOUT_SECONDS = 120


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(Path(folder))
        for dashboard in (False, True):
            run = Path(folder) / ("dashboard" if dashboard else "plain")
            ray.init(
                address="local", num_cpus=2, include_dashboard=dashboard, dashboard_host="127.0.0.1",
                log_to_driver=False, logging_level=logging.ERROR,
            )  # fmt: skip
            try:
                problems += drill(config, run)
            finally:
                ray.shutdown()
    print("\n".join(problems) or "every useless trial was given up, a useful one won, and nothing was left over")
    return 1 if problems else 0


def make_config(work: Path) -> Config:
    """Both phases, with a sweep of six trials of three epochs."""
    path, _ = prepare(work, 8, (2, 4), precision="fp32")
    space = "{optimizer.lr: {grid: [1.0e-3, 1.0e-9, 8.0e-4]}, model.dropout: {grid: [0.0, 0.1]}}"
    values = {"enabled": "true", "epochs": 3, "reduction_factor": 2, "num_trials": 6, "space": space}
    return load_config(path, [f"sweep.{key}={value}" for key, value in values.items()])


def drill(config: Config, run: Path) -> list[str]:
    """One run -> what is wrong with its sweep, in words."""
    started = time.monotonic()
    pipeline.train(config.model_copy(update={"output_dir": str(run)}), say=lambda words: None)
    trials, winner = read_sweep(run).trials, read_winner(run)
    useless = [trial for trial in trials if trial.values["optimizer.lr"] == USELESS]
    problems = [f"{run.name}: {trial.name} failed: {trial.message}" for trial in trials if trial.status == "failed"]
    given_up = [trial for trial in useless if trial.status == "stopped" and trial.results[-1].epoch < 3]
    if len(given_up) < len(useless):
        problems.append(f"{run.name}: {len(given_up)} of {len(useless)} useless trials were given up early")
    if winner.overrides["optimizer.lr"] == USELESS:
        problems.append(f"{run.name}: a useless trial won")
    problems += left_over(run.name)
    words = ", ".join(f"{trial.status} at epoch {trial.results[-1].epoch}" for trial in trials if trial.results)
    print(f"{run.name}: {len(trials)} trials in {time.monotonic() - started:.0f} s: {words}", flush=True)
    return problems


def left_over(name: str) -> list[str]:
    """CPUs and placement groups that do not come back in time."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        free, have = ray.available_resources().get("CPU", 0), ray.cluster_resources()["CPU"]
        groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
        if free == have and not groups:
            return []
        time.sleep(1)
    return [f"{name}: {free:g} of {have:g} CPUs are free, and {len(groups)} placement groups are left"]


if __name__ == "__main__":
    sys.exit(main())
