import math
import resource

import numpy as np
import pytest
from PIL import Image

from ray_pipeline.monitoring.event_log import EventLog
from ray_pipeline.monitoring.events import (
    CheckpointEvent,
    PhaseEvent,
    StepEvent,
    ValidationEvent,
)
from ray_pipeline.monitoring.metrics_file import read_events
from ray_pipeline.monitoring.plots import plot_progress


def write_run(run_dir, losses, validated=True, ema=("ema_decay_0.9999",)):
    with EventLog(run_dir, "phase1") as log:
        for step, loss in enumerate(losses, start=1):
            epoch = 1 + (step - 1) // 10
            log.emit(StepEvent("phase1", step, 8 * step, epoch, loss, 1e-4, 2 * loss, 60.0, 0.01))
            if validated and step % 10 == 0:
                for track in ema:
                    levels = {"0.1": 2 * loss, "10": 0.1 * loss}
                    log.emit(ValidationEvent("phase1", step, 8 * step, epoch, loss, 0.01, levels, track))
                log.emit(CheckpointEvent("phase1", step, epoch, f"step_{step}", "epoch", 0.5, 0.6))
            if step == 15:
                log.emit(PhaseEvent("phase1", "resumed", step, "attempt 2"))
    return read_events(run_dir, "phase1")


def plot(records, path, **options):
    plot_progress(records, path, title="phase1_unconditional", **options)
    with Image.open(path) as picture:
        assert picture.size == (1400, 900)
        return np.asarray(picture.convert("RGB"))


def shown_color(picture, color):
    """Number of pixels of exactly this colour."""
    return int((picture == np.array(color, np.uint8)).all(axis=-1).sum())


DECAY = [1.0 / (1 + 0.1 * step) for step in range(60)]
RED = (0xC0, 0x39, 0x2B)


def test_chart_shows_the_data(tmp_path):
    first = plot(write_run(tmp_path / "a", DECAY), tmp_path / "plots" / "a.png")
    other = plot(write_run(tmp_path / "b", DECAY[::-1]), tmp_path / "plots" / "b.png")
    again = plot(read_events(tmp_path / "a", "phase1"), tmp_path / "plots" / "a.png")
    assert (first != other).any()
    # The time of writing is part of the records, so the same records give the same picture.
    assert (first == again).all()
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["a.png", "b.png"]


@pytest.mark.parametrize("losses", [[], [0.5], [0.0, 0.0]])
def test_chart_of_few_records_and_no_validation(tmp_path, losses):
    records = write_run(tmp_path, losses, validated=False)
    assert plot(records, tmp_path / "chart.png").std() > 0


def test_non_finite_losses_are_marked_in_red(tmp_path):
    healthy = plot(write_run(tmp_path / "a", DECAY, validated=False), tmp_path / "a.png")
    losses = [*DECAY[:5], math.nan, math.inf, *DECAY[7:]]
    diverged = plot(write_run(tmp_path / "b", losses, validated=False), tmp_path / "b.png")
    assert shown_color(healthy, RED) == 0
    assert shown_color(diverged, RED) > 20


def test_chart_of_a_run_that_diverged_completely(tmp_path):
    plot(write_run(tmp_path, [math.nan] * 20), tmp_path / "chart.png", baseline=math.nan)


def test_baseline_and_second_ema_track_appear(tmp_path):
    one = write_run(tmp_path / "a", DECAY)
    two = write_run(tmp_path / "b", DECAY, ema=("ema_decay_0.9999", "ema_power_0.05"))
    plain = plot(one, tmp_path / "plain.png")
    assert (plot(one, tmp_path / "baseline.png", baseline=0.3) != plain).any()
    assert (plot(two, tmp_path / "tracks.png") != plain).any()


def test_failing_write_leaves_the_old_chart(tmp_path):
    records = write_run(tmp_path / "run", DECAY[:3])
    path = tmp_path / "plots" / "latest_progress.png"
    old = plot(records, path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError):
            plot_progress(records[:1], path, title="new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (np.asarray(Image.open(path).convert("RGB")) == old).all()
    assert [entry.name for entry in path.parent.iterdir()] == ["latest_progress.png"]
