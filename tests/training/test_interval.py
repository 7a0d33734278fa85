"""What a record says of the steps since the one before it."""

import math

import numpy as np
import pytest
from phase_runs import make_phase_run

from ray_pipeline.config import parse_config
from ray_pipeline.monitoring.metrics_file import read_events
from ray_pipeline.training.phase import Interval
from ray_pipeline.training.records import PhaseRecords
from ray_pipeline.training.setup import Start
from ray_pipeline.training.step import StepResult

MODEL = {
    "latent_size": 8, "architecture": "custom", "depth": 1, "hidden_size": 64, "num_heads": 2, "patch_size": 4,
}  # fmt: skip
NOT_FINITE = StepResult(math.inf, math.nan, skipped=True)


@pytest.fixture
def run(tmp_path, write_latents):
    """A phase of 100 steps on one worker, under its first attempt."""
    values = np.random.default_rng(5).normal(size=(16, 1, 1, 4, 8, 8)).astype(np.float16)
    store = write_latents(tmp_path / "store", values)
    config = parse_config({
        "phases": [{"name": "prior", "epochs": 25}],
        "model": MODEL,
        "data": {"tile_size": 64},
        "train": {"batch_size": 4, "global_batch": 4, "precision": "fp32"},
        "monitoring": {"tensorboard": False},
        "checkpoint": {"every_minutes": None},
        "output_dir": str(tmp_path / "run"),
    })  # fmt: skip
    made = make_phase_run(config, store)
    attempt = made.checkpoints.begin("prior", 1)
    attempt.update(start_step=0)
    made.start = Start(attempt=attempt.number)
    return made


def test_a_record_has_the_means_over_the_steps_that_changed_something(run):
    with PhaseRecords(run) as records:
        interval = Interval(run)
        for result in (StepResult(1.0, 0.5, skipped=False), StepResult(2.0, 2.5, skipped=False), NOT_FINITE):
            run.state.step += 1
            interval.add(result)
        interval.report(records)
        run.state.step += 1
        interval.add(NOT_FINITE)
        interval.report(records)
    first, second = read_events(run.config.output_dir, "prior", "step")
    assert (first["loss"], first["grad_norm"], first["skipped"]) == (1.5, 1.5, 1)
    assert math.isnan(second["loss"])
    assert math.isnan(second["grad_norm"])
    assert second["skipped"] == 1
