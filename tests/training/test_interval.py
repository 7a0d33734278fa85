"""What a record says of the steps since the one before it."""

import math
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from phase_runs import make_phase_run

from ray_pipeline.config import parse_config
from ray_pipeline.monitoring import phase_state
from ray_pipeline.monitoring.events import STEP_PARTS
from ray_pipeline.monitoring.metrics_file import read_events
from ray_pipeline.monitoring.plots import plot_progress
from ray_pipeline.monitoring.report import write_report
from ray_pipeline.status import describe_run
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
        "monitoring": {"tensorboard": False, "log_every_n_steps": 10},
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
        interval = Interval(run, records)
        for result in (StepResult(1.0, 0.5, skipped=False), StepResult(2.0, 2.5, skipped=False), NOT_FINITE):
            run.state.step += 1
            interval.add(result)
        interval.report()
        run.state.step += 1
        interval.add(NOT_FINITE)
        interval.report()
    first, second = read_events(run.config.output_dir, "prior", "step")
    assert (first["loss"], first["grad_norm"], first["skipped"]) == (1.5, 1.5, 1)
    assert math.isnan(second["loss"])
    assert math.isnan(second["grad_norm"])
    assert second["skipped"] == 1


def test_steps_that_were_not_computed_count_for_neither_pace_nor_utilisation(run):
    """The rate is that of the samples which were trained on, over all of the time."""
    avoided = StepResult(math.nan, math.nan, skipped=True, avoided=True)
    with PhaseRecords(run) as records:
        for results in ([avoided] * 9 + [StepResult(1.0, 0.5)], [avoided] * 10):
            interval = Interval(run, records)
            for result in results:
                run.state.step += 1
                interval.add(result)
            interval.seconds = 2.0
            interval.report()
    one, nothing = read_events(run.config.output_dir, "prior", "step")
    assert nothing["skipped"] == 10
    parts = [f"{part}_seconds" for part in STEP_PARTS.values()]
    for name in ("samples_per_second", "step_seconds", "utilisation", *parts):
        assert math.isnan(nothing[name]), name
    assert (one["skipped"], one["loss"]) == (9, 1.0)
    assert one["step_seconds"] >= 2.0
    assert one["samples_per_second"] == pytest.approx(4 / one["step_seconds"])
    folder = Path(run.config.output_dir)
    (folder / "config.yaml").write_text(run.config.to_yaml())
    assert "steps without a finite loss are passed over, ? left" in describe_run(folder)
    page = write_report(folder).read_text()
    assert f"newest {one['samples_per_second']:.4g} samples/s" in page
    plot_progress(read_events(folder, "prior"), folder / "chart.png", title="prior")


def result_of(step):
    return NOT_FINITE if step in (12, 17) else StepResult(1 / step, step / 8)


def go_on(run, records, until):
    """Do the steps up to this one, with the records that the loop of a phase makes on its own account."""
    interval = Interval(run, records)
    while run.state.step < until:
        run.state.step += 1
        interval.add(result_of(run.state.step))
        if run.state.step % run.config.monitoring.log_every_n_steps == 0:
            interval.report()


def test_the_records_of_a_run_that_was_killed_and_stopped_have_each_step_in_exactly_one_mean(run):
    with suppress(KeyboardInterrupt), PhaseRecords(run) as records:
        go_on(run, records, 13)
        records.save("safety")
        assert records.commits.saver.drain(60)
        go_on(run, records, 24)
        raise KeyboardInterrupt  # the kill
    run.state.step = 13
    with PhaseRecords(run) as records:
        go_on(run, records, 18)
        records.stop("SIGTERM")
    with PhaseRecords(run) as records:
        go_on(run, records, 30)
    told = read_events(run.config.output_dir, "prior", "step")
    assert [record["step"] for record in told] == [10, 13, 18, 20, 30]
    for before, record in zip([0, *(record["step"] for record in told)], told, strict=False):
        done = [one for one in map(result_of, range(before + 1, record["step"] + 1)) if not one.skipped]
        assert record["loss"] == pytest.approx(np.mean([one.loss for one in done]))
        assert record["grad_norm"] == pytest.approx(np.mean([one.grad_norm for one in done]))
        assert record["skipped"] == record["step"] - before - len(done)


def test_a_commit_that_a_kill_came_too_soon_after_is_told_once_by_the_next_attempt(run):
    run.state.step = 4
    with suppress(KeyboardInterrupt), PhaseRecords(run) as records:
        records.save("best", epoch=1)
        assert records.commits.saver.drain(60)
        raise KeyboardInterrupt  # the kill
    assert not read_events(run.config.output_dir, "prior", "checkpoint")
    for _ in range(2):
        with PhaseRecords(run):
            pass
        (told,) = read_events(run.config.output_dir, "prior", "checkpoint")
        assert (told["name"], told["kind"], told["step"], told["epoch"]) == ("prior_epoch_001.ckpt", "best", 4, 1)
        assert math.isnan(told["seconds"])
        history = phase_state.load(records.state_file).history
        assert [entry.message for entry in history if entry.event == "checkpoint"] == ["prior_epoch_001.ckpt (best)"]


def test_the_state_is_written_every_few_seconds_and_with_every_checkpoint_and_not_with_every_record(run):
    def step_in_file():
        return phase_state.load(records.state_file).phase("prior").step

    with PhaseRecords(run) as records:
        written, began = set(), time.monotonic()
        for step in range(10, 90, 10):
            go_on(run, records, step)
            written.add(records.state_file.stat().st_mtime_ns)
        assert len(written) <= 2 + (time.monotonic() - began) / 2
        time.sleep(2.1)
        go_on(run, records, 90)
        assert step_in_file() == 90
        for told in (True, False):  # when the checkpoint is asked for
            run.state.step += 1
            interval = Interval(run, records)
            interval.add(result_of(run.state.step))
            if told:
                interval.report()
            records.save("safety")
            assert step_in_file() == run.state.step


def committed_steps(run):
    """Of the checkpoints that the records tell of."""
    return [record["step"] for record in read_events(run.config.output_dir, "prior", "checkpoint")]


def test_a_commit_that_was_passed_over_is_not_told_before_it_is_made_again(run):
    kept, passed_over = run.phase.save_epochs[:2]
    with PhaseRecords(run) as records:
        for epoch in (kept, passed_over):
            run.state.step = 4 * epoch
            records.save("epoch", epoch=epoch)
            assert records.commits.saver.drain(60)
            records.after_step(save=False)
    damaged = Path(run.checkpoints.path(f"prior_epoch_{passed_over:03d}.ckpt"), "model.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    run.state.step = run.checkpoints.latest("prior").state["step"]
    with PhaseRecords(run) as records:
        assert committed_steps(run) == [4 * kept]
        run.state.step = 4 * passed_over
        records.save("epoch", epoch=passed_over)
        assert records.commits.saver.drain(60)
        records.after_step(save=False)
    assert committed_steps(run) == [4 * kept, 4 * passed_over]


def test_a_damaged_checkpoint_that_was_passed_over_neither_drives_out_the_best_nor_stands_for_its_step(run):
    def save(records, step, val_loss, epoch=None):
        run.state.step, records.progress.metrics["val_loss"] = step, val_loss
        records.save("safety" if epoch is None else "epoch", epoch=epoch)
        assert records.commits.saver.drain(60)
        records.after_step(save=False)

    kept, damaged = run.phase.save_epochs[:2]
    assert damaged > kept + 2
    with PhaseRecords(run) as records:
        save(records, 4 * kept, 0.9, kept)
        save(records, 4 * damaged, 0.25, damaged)
    file = Path(run.checkpoints.path(f"prior_epoch_{damaged:03d}.ckpt"), "model.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    run.state.step = run.checkpoints.latest("prior").state["step"]
    with PhaseRecords(run) as records:
        save(records, 4 * (kept + 1), 0.5, kept + 1)
        save(records, 4 * (kept + 1) + 2, None)
        assert f"prior_epoch_{kept + 1:03d}.ckpt" in records.commits.committed()
        run.state.step = 4 * damaged
        records.stop("SIGTERM")
    assert run.checkpoints.latest("prior").state["step"] == 4 * damaged


def test_an_attempt_that_ended_without_a_word_is_a_fault_of_the_run_and_one_that_was_stopped_is_none(run):
    with suppress(KeyboardInterrupt), PhaseRecords(run) as records:
        go_on(run, records, 10)
        time.sleep(2.1)
        go_on(run, records, 20)
        raise KeyboardInterrupt  # the kill
    run.state.step = 13
    with PhaseRecords(run) as records:
        records.stop("SIGTERM")
    with PhaseRecords(run):
        pass
    (fault,) = read_events(run.config.output_dir, "prior", "fault")
    assert (fault["kind"], fault["step"]) == ("restart", 13)
    assert fault["message"] == "attempt 1 ended without a word after step 20, this one goes on from step 13"
