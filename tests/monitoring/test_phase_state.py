import json
import math
import resource

import pytest
from pydantic import ValidationError

from ray_pipeline.errors import UserError
from ray_pipeline.monitoring.phase_state import (
    HISTORY_LIMIT,
    BestCheckpoint,
    DamagedState,
    PhaseProgress,
    PhaseState,
    load,
)


def state_in_phase_two():
    state = PhaseState(current_phase="phase2_conditional", run={"seed": 3, "device": {"name": "cpu"}})
    first = state.phase("phase1_unconditional")
    first.status, first.step, first.position, first.epoch = "finished", 400, 3200, 10
    first.steps, first.epochs, first.attempt = 400, 10, 2
    first.best = BestCheckpoint(checkpoint="phase1_epoch_008.ckpt", val_loss=0.8125, epoch=8)
    first.last, first.checkpoints = "phase1_epoch_010.ckpt", ["phase1_epoch_008.ckpt", "phase1_epoch_010.ckpt"]
    state.phase("phase2_conditional").status = "running"
    state.record("phase_finished", "phase1_unconditional after 400 steps")
    return state


def test_round_trip_keeps_everything(tmp_path):
    state = state_in_phase_two()
    state.phase("phase2_conditional").baseline_val_loss = 0.9
    state.save(tmp_path / "run" / "phase_state.json")
    assert load(tmp_path / "run" / "phase_state.json") == state
    assert list(load(tmp_path / "run" / "phase_state.json").phases) == [
        "phase1_unconditional",
        "phase2_conditional",
    ]


def test_missing_file_is_a_fresh_state(tmp_path):
    fresh = load(tmp_path / "phase_state.json")
    assert fresh.current_phase is None
    assert fresh.phase("phase1").status == "pending"
    assert fresh.phase("phase1") is fresh.phase("phase1")
    assert list(tmp_path.iterdir()) == []


def test_diverged_losses_survive_as_strict_json(tmp_path):
    path = tmp_path / "phase_state.json"
    state = PhaseState()
    state.phase("phase1").best = BestCheckpoint(checkpoint="a", val_loss=math.inf, epoch=1)
    state.phase("phase1").metrics = {"loss": math.nan, "psnr": 24.1}
    state.save(path)

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    json.loads(path.read_text(encoding="ascii"), parse_constant=refuse)
    back = load(path).phase("phase1")
    assert back.best.val_loss == math.inf
    assert math.isnan(back.metrics["loss"])
    assert back.metrics["psnr"] == 24.1


def test_history_keeps_the_newest_entries(tmp_path):
    state = PhaseState()
    for number in range(HISTORY_LIMIT + 5):
        state.record("checkpoint", f"number {number}")
    state.save(tmp_path / "phase_state.json")
    history = load(tmp_path / "phase_state.json").history
    assert len(history) == HISTORY_LIMIT == 1000
    assert (history[0].message, history[-1].message) == ("number 5", "number 1004")
    assert history[0].time.endswith("+00:00")


def test_failing_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "phase_state.json"
    old = state_in_phase_two()
    old.save(path)
    new = old.model_copy(deep=True)
    new.phase("phase2_conditional").step = 77
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError):
            new.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert load(path) == old
    assert [entry.name for entry in tmp_path.iterdir()] == ["phase_state.json"]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "0 bytes"),
        (b'{"current_phase": "phase1", "pha', "damaged"),
        (b"\xff\xfe\x00", "damaged"),
        (b"[]", "damaged"),
        (b'{"phases": {"phase1": {"stepp": 3}}}', r"phases\.phase1\.stepp"),
        (b'{"phases": {"phase1": {"status": "done"}}}', r"phases\.phase1\.status"),
        (b'{"version": 2, "phases": {}}', "key version"),
    ],
)
def test_corrupt_file_is_named_with_what_to_do(tmp_path, content, found):
    path = tmp_path / "phase_state.json"
    path.write_bytes(content)
    with pytest.raises(DamagedState, match=found) as caught:
        load(path)
    message = str(caught.value)
    assert str(path) in message
    assert "`train --resume` rebuilds it" in message
    assert message.isascii()
    assert "\n" not in message
    assert path.read_bytes() == content


def test_a_folder_in_its_place_is_named(tmp_path):
    (tmp_path / "phase_state.json").mkdir()
    with pytest.raises(UserError, match=r"phase_state\.json cannot be read"):
        load(tmp_path / "phase_state.json")


def test_a_wrong_status_is_refused_at_once():
    with pytest.raises(ValidationError, match="status"):
        PhaseState().phase("phase1").status = "done"


@pytest.mark.parametrize(
    ("status", "epochs", "done"), [("finished", 4, True), ("finished", 2, False), ("running", 4, False)]
)
def test_a_phase_is_done_when_it_finished_as_many_epochs_as_are_asked_for(status, epochs, done):
    assert PhaseProgress(status=status, epochs=epochs).is_done(4) == done


def test_a_file_from_before_there_were_versions_is_read(tmp_path):
    state_in_phase_two().save(tmp_path / "phase_state.json")
    text = json.loads((tmp_path / "phase_state.json").read_text())
    assert text.pop("version") == 1
    (tmp_path / "phase_state.json").write_text(json.dumps(text))
    assert load(tmp_path / "phase_state.json").phase("phase1_unconditional").step == 400
