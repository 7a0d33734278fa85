"""A later attempt supersedes those before: they cannot commit, and what they did commit since does not count."""

import pytest
import torch

from ray_pipeline.attempts import Superseded
from ray_pipeline.checkpoints import CheckpointStore
from ray_pipeline.errors import UserError

PHASE = "phase1"


def begin(folder, step=None, phase=PHASE):
    """A store under a new attempt that began behind `step` steps."""
    store = CheckpointStore(folder)
    attempt = store.begin(phase, world_size=1)
    if step is not None:
        attempt.update(start_step=step)
    return store


def save(store, step, value=0.0):
    groups = {"model": {"weight": torch.full((3,), float(value))}}
    return store.save(f"{PHASE}_step_{step:08d}", groups, {"phase": PHASE, "step": step, "position": 8 * step})


def steps(store):
    return [store.load(name).state["step"] for name in store.names(PHASE)]


def test_attempts_are_numbered_and_their_commits_say_which(tmp_path):
    first, second = begin(tmp_path, 0), begin(tmp_path, 0)
    assert (first.attempt.number, second.attempt.number) == (1, 2)
    save(second, 3)
    assert second.load("phase1_step_00000003").state["attempt"] == 2
    assert [record.world_size for record in second.attempts()] == [1, 1]


def test_a_superseded_attempt_cannot_commit(tmp_path):
    first = begin(tmp_path, 0)
    save(first, 3)
    second = begin(tmp_path, 3)
    with pytest.raises(Superseded, match=r"attempt 1 of this run .* was superseded by attempt 2 on "):
        save(first, 5)
    with pytest.raises(Superseded):
        first.attempt.update(skipped=(4,))
    assert steps(second) == [3]
    second.attempt.check()


class Slow(dict):
    """Groups between which another attempt begins."""

    def __init__(self, groups, folder):
        super().__init__(groups)
        self.folder = folder

    def items(self):
        for number, item in enumerate(super().items()):
            if number:
                begin(self.folder, 3)
            yield item


def test_a_save_that_is_overtaken_in_the_middle_is_not_committed(tmp_path):
    first = begin(tmp_path, 0)
    groups = Slow({"model": {"weight": torch.ones(2)}, "optimizer": {"weight": torch.ones(2)}}, tmp_path)
    with pytest.raises(Superseded):
        first.save("phase1_step_00000005", groups, {"phase": PHASE, "step": 5, "position": 40})
    assert CheckpointStore(tmp_path).names() == []


def test_what_was_committed_behind_the_start_of_a_later_attempt_does_not_count(tmp_path):
    """As by a worker that outlived its driver, and committed in the very moment that its run was taken over."""
    first = begin(tmp_path, 0)
    for step in (3, 5):
        save(first, step)
    second = begin(tmp_path, 3)
    assert steps(second) == [3]
    assert second.latest(PHASE).state["step"] == 3
    assert "a superseded attempt made it" in second.search(PHASE).passed_over[0]
    save(second, 5, value=2.0)  # the same name, which counts now
    assert steps(begin(tmp_path, 5)) == [3, 5]
    assert second.latest(PHASE)["model"]["weight"][0] == 2.0


def test_folders_of_a_phase_whose_name_begins_alike_are_no_strays(tmp_path):
    store = CheckpointStore(tmp_path)
    for name in ("phase1_step_2_epoch_001.ckpt", "phase1_extra_epoch_001.ckpt", "phase1_epoch_001.ckpt"):
        (tmp_path / name).mkdir()
    assert store.listing(PHASE).strays == ("phase1_epoch_001.ckpt",)


def test_commits_of_other_phases_are_untouched_by_a_new_attempt(tmp_path):
    first = begin(tmp_path, 0)
    save(first, 7)
    assert steps(begin(tmp_path, 0, phase="phase2")) == [7]


def test_an_attempt_may_take_back_its_own_commits(tmp_path):
    """Before it goes back: those behind a step that spoiled the weights."""
    first = begin(tmp_path, 0)
    for step in (2, 4, 6):
        save(first, step)
    first.attempt.update(valid_until=4)
    assert steps(begin(tmp_path)) == [2, 4]


def test_a_store_without_attempts_shows_all_and_saves(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    assert steps(store) == [1]


@pytest.mark.parametrize("damage", [b"", b"{", b'{"attempt": "x"}', b"[]", b"\xff"])
def test_a_damaged_record_is_named(tmp_path, damage):
    store = begin(tmp_path, 0)
    (tmp_path / "attempts" / "attempt_000001.json").write_bytes(damage)
    with pytest.raises(UserError, match=r"attempt_000001\.json is damaged .* delete it if no training"):
        store.names()


def test_a_lost_record_ends_its_attempt_and_not_the_run(tmp_path):
    store = begin(tmp_path, 0)
    save(store, 2)
    (tmp_path / "attempts" / "attempt_000001.json").unlink()
    with pytest.raises(Superseded, match="superseded by nobody"):
        save(store, 4)
    assert steps(begin(tmp_path, 2)) == [2]
