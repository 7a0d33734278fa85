"""Lost or damaged files of a run directory are rebuilt from its checkpoints and records, and that is said."""

import json
import os
import shutil

import pytest

from ray_pipeline.cli import main
from ray_pipeline.errors import UserError
from ray_pipeline.monitoring import phase_state
from ray_pipeline.retention import best_of
from ray_pipeline.run_state import mend_state, read_run, read_state, rebuild


def without_times(state: phase_state.PhaseState) -> dict:
    plain = state.model_dump()
    plain["history"] = [(entry["event"], entry["message"]) for entry in plain["history"]]
    return plain


DAMAGES = {
    "lost": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "no JSON": lambda path: path.write_bytes(b"\xff\x00" + path.read_bytes()),
    "of another version": lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 9})),
    "of other keys": lambda path: path.write_text(json.dumps({"stage": 2})),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_state_file_is_rebuilt_as_it_was(half_run, damage):
    before = phase_state.load(half_run.state_file)
    DAMAGES[damage](half_run.state_file)
    found = read_state(half_run.config)
    assert str(half_run.state_file) in found.problem
    assert without_times(found.state) == without_times(before)


def test_who_trains_writes_it_and_keeps_the_damaged_one_and_who_reads_touches_nothing(half_run, capsys):
    DAMAGES["truncated"](half_run.state_file)
    damaged = half_run.state_file.read_bytes()
    assert main(["status", str(half_run.folder)]) == 0
    told = capsys.readouterr()
    assert "two: running" in told.out
    assert "phase_state.json is damaged" in told.err
    assert "rebuilt from checkpoints and records" in told.err
    assert half_run.state_file.read_bytes() == damaged
    assert not list(half_run.folder.glob("*.damaged"))
    words = r"rebuilt from 5 checkpoints in .*/run/checkpoints .*kept as phase_state\.json\.damaged"
    with pytest.warns(UserWarning, match=words):
        mended = mend_state(half_run.config)
    assert (half_run.folder / "phase_state.json.damaged").read_bytes() == damaged
    assert phase_state.load(half_run.state_file) == mended
    assert mended.history[-1].event == "rebuilt"
    assert read_state(half_run.config).problem == ""


def test_a_whole_file_is_left_alone_whatever_the_checkpoints_say(half_run):
    before = half_run.state_file.read_bytes()
    shutil.rmtree(half_run.folder / "checkpoints")
    assert mend_state(half_run.config) == phase_state.load(half_run.state_file)
    assert half_run.state_file.read_bytes() == before


def test_nothing_is_missed_where_nothing_was_trained(make_run):
    run = make_run()
    found = read_state(run.config)
    assert found.problem == ""
    assert [progress.status for progress in found.state.phases.values()] == ["pending", "pending"]
    mend_state(run.config)
    assert not run.state_file.exists()


def test_a_phase_whose_finish_no_record_tells_is_opened_again(half_run):
    log = half_run.folder / "logs" / "metrics.jsonl"
    log.write_text("".join(line for line in log.open() if '"finished"' not in line))
    assert rebuild(half_run.config).phase("one").status == "running"
    log.unlink()
    rebuilt = rebuild(half_run.config)
    assert [progress.status for progress in rebuilt.phases.values()] == ["running", "running"]
    assert rebuilt.phase("one").step == 12
    assert rebuilt.phase("one").best.checkpoint == "one_epoch_002.ckpt"
    assert rebuilt.history == []


def test_a_finish_counts_only_for_the_newest_checkpoint(half_run):
    half_run.store.delete(
        "one_epoch_004"
    )  # as when its last checkpoint was damaged: the phase goes back to the one before
    rebuilt = rebuild(half_run.config).phase("one")
    assert (rebuilt.status, rebuilt.step, rebuilt.last) == ("running", 9, "one_epoch_003.ckpt")
    shutil.rmtree(half_run.folder / "checkpoints")
    assert rebuild(half_run.config).phase("one").status == "running"


def test_a_torn_record_costs_nothing_but_itself(half_run):
    before = rebuild(half_run.config)
    log = half_run.folder / "logs" / "metrics.jsonl"
    log.write_bytes(log.read_bytes() + b'{"event": "checkp')
    assert without_times(rebuild(half_run.config)) == without_times(before)


def test_checkpoints_tell_enough_without_the_newer_keys(half_run):
    """Those that an earlier version wrote name neither metrics nor total_steps."""
    import torch

    half_run.store.save(
        "two_epoch_002",
        {"model": {"w": torch.zeros(1)}},
        {"phase": "two", "step": 6, "position": 48, "epoch": 2, "attempt": 3, "kind": "last", "val_loss": 0.4},
    )
    progress = rebuild(half_run.config).phase("two")
    assert (progress.step, progress.steps, progress.attempt) == (6, None, 3)
    assert progress.metrics == {"val_loss": 0.4}
    assert progress.best.checkpoint == "two_epoch_002.ckpt"


def test_the_best_is_one_that_a_validation_of_its_own_scored():
    states = {
        "a": {"kind": "epoch", "val_loss": 0.9, "step": 1, "epoch": 1},
        "b": {"kind": "best", "val_loss": 0.7, "step": 2, "epoch": 2},
        "c": {"kind": "last", "val_loss": 0.7, "step": 3, "epoch": 3},
        "d": {"kind": "safety", "val_loss": 0.1, "step": 4, "epoch": 4},
        "e": {"kind": "epoch", "val_loss": float("nan"), "step": 5, "epoch": 5},
        "f": {"kind": "epoch", "val_loss": None, "step": 6, "epoch": 6},
    }
    assert best_of(states).checkpoint == "b"
    assert best_of({name: states[name] for name in "def"}) is None


def test_a_lost_config_is_that_of_the_newest_checkpoint(half_run, capsys):
    """Not of the newest by name or step: that of the last phase."""
    (half_run.folder / "config.yaml").unlink()
    with pytest.warns(UserWarning, match=r"config\.yaml is lost; .*\(two, step 3\)"):
        assert read_run(half_run.folder).config == half_run.config
    assert main(["status", str(half_run.folder)]) == 0
    assert "two: running" in capsys.readouterr().out
    assert not (half_run.folder / "config.yaml").exists()
    shutil.rmtree(half_run.folder / "checkpoints")
    with pytest.raises(UserError, match=r"holds no run \(no config\.yaml\)"):
        read_run(half_run.folder)


def test_a_damaged_config_is_told_with_what_to_do(half_run):
    path = half_run.folder / "config.yaml"
    path.write_bytes(b"phases: [{name: one")
    with pytest.raises(UserError, match=r"config\.yaml is not readable YAML.*take it away and `train --resume`"):
        read_run(half_run.folder)


def test_a_run_that_was_moved_is_read_where_it_lies(half_run, tmp_path):
    os.rename(half_run.folder, tmp_path / "moved")
    assert read_run(tmp_path / "moved").config.checkpoint_store == str(tmp_path / "moved" / "checkpoints")


def test_checkpoints_in_a_store_of_their_own_are_found(make_run, tmp_path):
    run = make_run(checkpoint={"store": str(tmp_path / "elsewhere")})
    run.train("one", 2)
    assert not (run.folder / "checkpoints").exists()
    before = phase_state.load(run.state_file)
    run.state_file.unlink()
    with pytest.warns(UserWarning, match=r"phase_state\.json is lost"):
        assert without_times(read_run(run.folder).state)["phases"]["one"] == without_times(before)["phases"]["one"]
