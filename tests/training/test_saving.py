"""Saves written while training goes on: of the moment they were asked for, in order, and never lost in silence."""

import os
import sys
import threading
import time
from contextlib import contextmanager

import psutil
import pytest
import torch
from full_disk import full_disk
from moto.server import DomainDispatcherApplication, create_backend_app
from pyarrow.fs import FileSystem
from werkzeug.serving import make_server

from ray_pipeline.attempts import Superseded
from ray_pipeline.checkpoints import CheckpointStore
from ray_pipeline.training.saving import Save, Saver, fits_in_memory, free_memory

NUMBERS = 100_000  # of a tensor; 400 kB, more than the full disk below takes


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints")


def save_of(store, step, tensor=None, **more):
    tensor = torch.full((NUMBERS,), float(step)) if tensor is None else tensor
    state = {"phase": "p", "step": step, "position": step}
    return Save(store, f"p_step_{step:08d}", {"model": {"weight": tensor}}, state, {"about": "test"}, **more)


def collect(saver, count):
    """The next `count` outcomes, as they come."""
    found, until = [], time.monotonic() + 60
    while len(found) < count:
        assert time.monotonic() < until, found
        found += saver.outcomes()
        time.sleep(0.01)
    return found


def committed(store):
    return {store.load(name).state["step"]: float(store.load(name)["model"]["weight"][0]) for name in store.names()}


def test_what_is_saved_is_of_the_moment_it_was_asked_for(store):
    weight = torch.zeros(NUMBERS)
    with Saver() as saver:
        for step in (1, 2, 3):
            weight.fill_(step)
            saver.submit(save_of(store, step, weight))
            weight.fill_(-1)
        assert saver.drain(60)
        outcomes = saver.outcomes()
    assert [(one.save.state["step"], one.error, one.dropped) for one in outcomes] == [
        (step, None, False) for step in (1, 2, 3)
    ]
    assert committed(store) == {1: 1.0, 2: 2.0, 3: 3.0}


def test_saves_that_follow_each_other_closely_are_all_committed(store):
    """Waiting for the one before is no refusal."""
    with Saver() as saver:
        saver.submit(save_of(store, 1, torch.zeros(20_000_000), replaceable=False))
        for step in (2, 3, 4):
            saver.submit(save_of(store, step))
        assert saver.drain(60)
        assert [one.save.state["step"] for one in saver.outcomes()] == [1, 2, 3, 4]


def test_a_full_disk_is_told_and_the_save_is_committed_once_there_is_room(store, tmp_path):
    weight = torch.full((NUMBERS,), 7.0)
    with Saver() as saver:
        with full_disk():
            saver.submit(save_of(store, 1, weight))
            refused = collect(saver, 1)[0]
            assert not saver.drain(0.01)
        weight.fill_(-1)
        assert "model.safetensors cannot be used (File too large); check the path" in refused.error
        assert not refused.dropped
        assert store.names() == []
        assert saver.drain(60)
    assert committed(store) == {1: 7.0}
    assert not list(tmp_path.rglob("*.tmp"))


def test_while_the_disk_is_full_a_later_save_takes_the_place_of_one_that_waits(store):
    """But not of an average's snapshot, which nothing can make again later."""
    with Saver() as saver:
        with full_disk():
            saver.submit(save_of(store, 1, replaceable=False))
            collect(saver, 1)
            for step in (2, 3):
                saver.submit(save_of(store, step))
            dropped = [one for one in collect(saver, 1) if one.dropped]
        assert saver.drain(60)
    assert [one.save.state["step"] for one in dropped] == [2]
    assert committed(store) == {1: 1.0, 3: 3.0}


def test_a_store_that_refuses_does_not_hold_up_another(store, tmp_path):
    """As a full local disk, where snapshots go, beside a store of checkpoints elsewhere."""
    (tmp_path / "taken").write_text("a file where the folder of the store would be")
    refusing = CheckpointStore(tmp_path / "taken")
    with Saver() as saver:
        saver.submit(save_of(refusing, 1, replaceable=False))
        for step in (2, 3):
            saver.submit(save_of(store, step))
        told = []
        while {2, 3} - {one.save.state["step"] for one in told}:
            told += collect(saver, 1)
        assert committed(store) == {2: 2.0, 3: 3.0}
        assert {one.save.state["step"]: one.error is None for one in told} == {1: False, 2: True, 3: True}
        (tmp_path / "taken").unlink()
        assert saver.drain(60)
    assert committed(refusing) == {1: 1.0}


def test_what_is_obsolete_is_deleted_after_the_commit_and_not_without_it(store):
    with Saver() as saver:
        saver.submit(save_of(store, 1))
        assert saver.drain(60)
        with full_disk():
            saver.submit(save_of(store, 2, obsolete=("p_step_00000001.ckpt",)))
            collect(saver, 2)
            assert committed(store) == {1: 1.0}
        assert saver.drain(60)
    assert committed(store) == {2: 2.0}


def test_a_save_without_a_copy_is_committed_when_the_call_returns_or_given_up(store):
    with Saver() as saver:
        saver.write(save_of(store, 1))
        assert committed(store) == {1: 1.0}
        with full_disk():
            saver.write(save_of(store, 2))
        outcomes = saver.outcomes()
    assert [one.dropped for one in outcomes] == [False, True]
    assert "File too large" in outcomes[1].error
    assert committed(store) == {1: 1.0}


def test_a_superseded_attempt_learns_it_from_its_saves(store):
    store.begin("p", 1)
    CheckpointStore(store.root).begin("p", 1)
    with Saver() as saver:
        saver.submit(save_of(store, 1))
        saver.drain(60)
        with pytest.raises(Superseded):
            saver.outcomes()
    assert store.names() == []


def test_the_same_snapshot_may_be_stored_again_and_a_checkpoint_may_not(store):
    with Saver() as saver:
        for value in (1.0, 2.0):
            saver.submit(save_of(store, 1, torch.full((3,), value), replaceable=False, overwrite=True))
        assert saver.drain(60)
        assert committed(store) == {1: 2.0}
        saver.submit(save_of(store, 1))
        saver.drain(60)
        with pytest.raises(FileExistsError, match="committed already"):
            saver.outcomes()


def test_writing_gives_way_to_training(store):
    own = os.getpriority(os.PRIO_PROCESS, 0)
    with Saver() as saver:
        saver.submit(save_of(store, 1))
        assert saver.drain(60)
        niceness = {
            thread.name: os.getpriority(os.PRIO_PROCESS, thread.native_id)
            for thread in threading.enumerate()
            if thread.native_id is not None
        }
    # elsewhere than on Linux a thread has no priority of its own
    assert niceness["saver"] == (19 if sys.platform == "linux" else own)
    assert niceness["MainThread"] == own < 19


def test_leaving_does_not_wait_for_a_storage_that_refuses(store):
    with full_disk():
        with Saver() as saver:
            saver.submit(save_of(store, 1))
            collect(saver, 1)
        assert store.names() == []


def test_a_copy_is_made_only_where_there_is_room_for_it(store):
    assert 0 < free_memory() <= psutil.virtual_memory().total
    assert fits_in_memory(save_of(store, 1))
    huge = torch.empty(1).expand(free_memory())  # four times as many bytes, none of them its own
    assert not fits_in_memory(save_of(store, 1, huge))


@contextmanager
def s3_on(port):
    """moto's S3, answering on this port of 127.0.0.1 within; what it holds outlives it."""
    server = make_server("127.0.0.1", port, DomainDispatcherApplication(create_backend_app), threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_store_that_goes_away_gets_what_waits_when_it_is_back(aws_environment):
    with Saver() as saver:
        with s3_on(0) as port:
            endpoint = f"endpoint_override=127.0.0.1:{port}&scheme=http"
            filesystem, _ = FileSystem.from_uri(f"s3://saving?{endpoint}&allow_bucket_creation=true")
            filesystem.create_dir("saving")
            store = CheckpointStore(f"s3://saving/run?{endpoint}")
            saver.submit(save_of(store, 1))
            assert saver.drain(60)
        saver.submit(save_of(store, 2))
        *_, refused = collect(saver, 2)
        assert "cannot be used" in refused.error
        assert not refused.dropped
        with s3_on(port):
            assert saver.drain(120)
            assert committed(store) == {1: 1.0, 2: 2.0}
