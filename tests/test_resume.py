"""What `train` and `train --resume` do with what lies in output_dir, before data or Ray are touched."""

import json
import shutil

import pytest
import torch
import yaml

from ray_pipeline.cli import main
from ray_pipeline.config import Config
from ray_pipeline.errors import UserError
from ray_pipeline.monitoring import phase_state
from ray_pipeline.resume import open_run
from ray_pipeline.run_state import mend_state


def changed(config: Config, **sections) -> Config:
    tree = config.dump()
    for name, values in sections.items():
        tree[name] = tree[name] | values if isinstance(values, dict) else values
    return Config.model_validate(tree)


def refusal(config: Config, *allow: str, resume: bool = True) -> str:
    with pytest.raises(UserError) as caught:
        open_run(config, resume=resume, allow=allow)
    return str(caught.value)


@pytest.fixture
def train(tmp_path, capsys):
    """(config, *words) -> exit code, printed text and errors of the command. There is no data where the config says, so
    anything that looks at it fails."""

    def run(config: Config, *words: str) -> tuple[int, str, str]:
        path = tmp_path / "given.yaml"
        path.write_text(config.to_yaml())
        capsys.readouterr()
        code = main(["train", "--config", str(path), *words])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def finished(make_run):
    run = make_run()
    run.train("one", 4, finish=True)
    run.train("two", 2, finish=True)
    return run


def test_a_finished_run_says_so_without_ray_or_data(finished, train):
    before = finished.state_file.read_bytes()
    code, out, err = train(finished.config, "--resume")
    assert code == 0, err
    assert out.splitlines() == [
        f"the run in {finished.folder} is finished, so there is nothing to resume; phases[].epochs may give it more"
    ]
    assert err == ""
    assert finished.state_file.read_bytes() == before


def test_a_finished_run_that_is_asked_for_more_is_not_finished(finished, train):
    longer = [phase.model_dump() | {"epochs": phase.epochs + 1} for phase in finished.config.phases[1:]]
    longer = changed(finished.config, phases=[finished.config.phases[0].model_dump(), *longer])
    assert "phases.1.epochs: 2 -> 3" in refusal(longer)
    start = open_run(longer, resume=True, allow=["phases.1.epochs"])
    assert not start.is_finished()
    code, _, err = train(longer, "--resume", "--allow-change", "phases.1.epochs")
    assert code == 2
    assert "no_data" in err  # so it set out to train


def test_a_finished_run_whose_state_was_lost_is_still_finished(finished, train):
    before = phase_state.load(finished.state_file).phases
    finished.state_file.unlink()
    code, out, err = train(finished.config, "--resume")
    assert code == 0
    assert "is finished" in out
    assert "rebuilt from 6 checkpoints" in err
    assert phase_state.load(finished.state_file).phases == before


def test_a_run_is_never_begun_twice(half_run, train):
    code, _, err = train(half_run.config)
    assert code == 2
    assert "holds a run already; go on with --resume" in err
    half_run.state_file.unlink()
    assert "holds a run already" in refusal(half_run.config, resume=False)
    shutil.rmtree(half_run.folder / "checkpoints")  # what logs tell was an attempt
    assert "holds a run already" in refusal(half_run.config, resume=False)


def test_a_start_that_failed_over_its_data_blocks_neither_a_start_nor_a_resume(make_run, train):
    config = make_run().config
    shutil.rmtree(config.output_dir)
    for words in ([], [], ["--resume"], []):
        code, _, err = train(changed(config, optimizer={"lr": 1e-3 * (1 + len(words))}), *words)
        assert code == 2
        assert "no_data" in err
        assert "--resume" not in err
    assert open_run(config, resume=True).changes[0].key == "optimizer.lr"


def test_latents_without_an_attempt_are_no_run_and_an_attempt_is(make_run):
    run = make_run()
    start = open_run(run.config, resume=False)
    start.accept("f" * 64)  # as before the encode
    assert [p.status for p in phase_state.load(run.state_file).phases.values()] == ["pending", "pending"]
    assert not open_run(changed(run.config, seed=7), resume=False).begun
    assert not open_run(changed(run.config, seed=7), resume=True).begun
    claimed = run.folder / "checkpoints" / "attempts" / "attempt_000001.json"
    claimed.parent.mkdir(parents=True)
    record = {"attempt": 1, "phase": "one", "world_size": 1, "began": "now", "host": "here", "pid": 1, "token": "a"}
    claimed.write_text(json.dumps(record))
    assert "holds a run already" in refusal(run.config, resume=False)
    assert "seed: 0 -> 7" in refusal(changed(run.config, seed=7))
    assert open_run(changed(run.config, seed=7), resume=True, allow=["seed"]).begun


def test_a_resume_of_nothing_is_refused(make_run, train):
    config = make_run().config
    shutil.rmtree(config.output_dir)
    code, _, err = train(config, "--resume")
    assert code == 2
    assert "does not exist, so there is nothing to resume" in err


def test_allowing_changes_is_for_a_resume(half_run, train):
    code, _, err = train(half_run.config, "--allow-change", "optimizer")
    assert code == 2
    assert "--allow-change optimizer is for a run that goes on; add --resume" in err


def test_changes_are_told_written_into_the_history_and_into_config_yaml(half_run):
    now = changed(half_run.config, optimizer={"lr": 5e-4}, ray={"num_workers": 2})
    before = half_run.state_file.read_bytes()
    start = open_run(now, resume=True, allow=["optimizer.lr"])
    assert start.describe_changes() == ["optimizer.lr: 0.0001 -> 0.0005", "ray.num_workers: 1 -> 2"]
    assert half_run.state_file.read_bytes() == before  # nothing is written until the data was looked at
    start.accept("f" * 64)
    history = phase_state.load(half_run.state_file).history[-2:]
    assert [entry.event for entry in history] == ["config", "config"]
    assert [entry.message for entry in history] == start.describe_changes()
    assert yaml.safe_load((half_run.folder / "config.yaml").read_text())["optimizer"]["lr"] == 5e-4
    assert open_run(now, resume=True).changes == []


def test_a_refused_change_leaves_everything_as_it_was(half_run, train):
    before = {path: path.read_bytes() for path in half_run.folder.rglob("*") if path.is_file()}
    code, _, err = train(changed(half_run.config, optimizer={"lr": 5e-4}), "--resume")
    assert code == 2
    assert "optimizer.lr: 0.0001 -> 0.0005" in err
    assert err.count("\n") == 1
    assert {path: path.read_bytes() for path in half_run.folder.rglob("*") if path.is_file()} == before


def test_other_latents_under_the_same_config_are_another_training(half_run):
    start = open_run(half_run.config, resume=True)
    with pytest.raises(UserError, match=r"trained on other tiles.*latents ffffffffffff, now 0{12}.*--allow-change lat"):
        start.accept("0" * 64)
    half_run.state_file.unlink()  # the checkpoints tell it too
    with pytest.warns(UserWarning, match="is lost"), pytest.raises(UserError, match="trained on other tiles"):
        start.accept("0" * 64)
    with pytest.raises(UserError, match="--allow-change latents: they are those"):
        open_run(half_run.config, resume=True, allow=["latents"]).accept("f" * 64)
    open_run(half_run.config, resume=True, allow=["latents"]).accept("0" * 64)
    assert phase_state.load(half_run.state_file).history[-1].message == "latents: ffffffffffff -> 000000000000"
    open_run(half_run.config, resume=True).accept("0" * 64)


def test_a_change_that_makes_other_latents_says_so_once(half_run):
    now = changed(half_run.config, data={"augment_variants": 2})
    open_run(now, resume=True, allow=["data.augment_variants"]).accept("0" * 64)
    moved = changed(now, data={"root": "/elsewhere"})  # a path alone explains no other contents
    with pytest.raises(UserError, match="trained on other tiles"):
        open_run(moved, resume=True).accept("1" * 64)


def test_a_store_without_the_runs_checkpoints_is_the_wrong_one(half_run, tmp_path):
    elsewhere = changed(half_run.config, checkpoint={"store": str(tmp_path / "elsewhere")})
    told = refusal(elsewhere)
    for words in (str(tmp_path / "elsewhere"), "no checkpoint of two", "two_epoch_001.ckpt", "copy the checkpoints"):
        assert words in told
    shutil.copytree(half_run.folder / "checkpoints", tmp_path / "elsewhere")
    assert [change.key for change in open_run(elsewhere, resume=True).changes] == ["checkpoint.store"]


def test_a_store_that_holds_another_runs_checkpoints_is_not_begun_in(half_run, tmp_path):
    store = {"store": str(half_run.folder / "checkpoints")}
    other = changed(half_run.config, output_dir=str(tmp_path / "other"), checkpoint=store)
    assert "holds checkpoints of a run already" in refusal(other, resume=False)


def test_a_run_of_which_only_the_checkpoints_are_left_goes_on(half_run, tmp_path):
    """The disk of output_dir is gone, the store elsewhere is not."""
    shutil.move(half_run.folder / "checkpoints", tmp_path / "store")
    shutil.rmtree(half_run.folder)
    config = changed(half_run.config, checkpoint={"store": str(tmp_path / "store")})
    with pytest.warns(UserWarning, match=r"config\.yaml is lost") as warned:
        start = open_run(config, resume=True)
    assert any("rebuilt from 5 checkpoints" in str(warning.message) for warning in warned)
    assert start.begun
    assert start.state().phase("two").step == 3
    start.accept("f" * 64)
    assert yaml.safe_load((half_run.folder / "config.yaml").read_text()) == config.dump()
    assert open_run(config, resume=True).changes == []
    (half_run.folder / "config.yaml").unlink()
    with pytest.warns(UserWarning, match=r"config\.yaml is lost"):
        assert "optimizer.lr" in refusal(changed(config, optimizer={"lr": 5e-4}))


def test_a_save_that_the_state_file_does_not_know_of_counts(half_run):
    """A kill between the two: "two" has a checkpoint that phase_state.json does not name."""
    tree = json.loads(half_run.state_file.read_text())
    tree["phases"]["two"] |= {"checkpoints": [], "last": None, "best": None, "status": "pending"}
    half_run.state_file.write_text(json.dumps(tree))
    longer = [phase.model_dump() for phase in half_run.config.phases]
    longer[0]["epochs"] = 6
    assert "two has begun" in refusal(changed(half_run.config, phases=longer), "phases")


def test_a_state_damaged_while_it_runs_is_mended_between_the_phases(half_run):
    start = open_run(half_run.config, resume=True)
    half_run.state_file.write_bytes(half_run.state_file.read_bytes()[:100])
    with pytest.warns(UserWarning, match="is damaged"):
        assert start.state().phase("one").best.checkpoint == "one_epoch_002.ckpt"
    assert mend_state(half_run.config).phase("one").is_done(4)


def test_a_checkpoint_of_no_phase_of_ours_is_no_obstacle(half_run):
    half_run.store.save("copied", {"model": {"w": torch.zeros(1)}}, {"phase": "guide", "step": 1, "position": 8})
    assert open_run(half_run.config, resume=True).begun
    half_run.state_file.unlink()
    with pytest.warns(UserWarning, match="is lost"):
        assert list(mend_state(half_run.config).phases) == ["one", "two"]
