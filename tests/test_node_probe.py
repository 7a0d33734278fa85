"""What a node tells, with the folder that it sees given to it: the same one as the driver's, another, none."""

import os
import time
from dataclasses import asdict

import psutil
import pytest

from ray_pipeline import node_probe
from ray_pipeline.config import parse_config
from ray_pipeline.node_probe import SameFiles, SharedFolder, glance, nearest_folder, probe
from ray_pipeline.storage import Folder
from ray_pipeline.training.nodes import answer_seconds


def marked(folder) -> SharedFolder:
    """As the driver leaves it."""
    folder.write("token", b"of the driver")
    return SharedFolder("output_dir", f"{folder.location}/run", folder.location, "token")


def seen_from(place, folder) -> dict:
    """The answer of a node where the place is that folder."""
    return probe("node", [asdict(place) | {"place": folder.location}], [], False, False)


@pytest.mark.parametrize("where", ["tmp_path", "s3"])
def test_a_node_answers_in_the_folder_that_it_shares(where, request, tmp_path):
    place = request.getfixturevalue(where)
    folder = Folder(place).child(tmp_path.name) if where == "s3" else Folder(place)
    assert seen_from(marked(folder), folder) == {"unseen": {}, "unusable": {}, "other": {}}
    assert folder.read("token.node") == b"of the driver"


def test_a_node_with_another_folder_says_so_and_writes_nothing(tmp_path):
    mine, other = Folder(tmp_path / "mine"), Folder(tmp_path / "other")
    other.create()
    assert "output_dir" in seen_from(marked(mine), other)["unseen"]
    assert os.listdir(tmp_path / "other") == []


def test_storage_that_refuses_a_node_is_told_in_words_without_the_query(s3_server):
    deny = {"Effect": "Deny", "Principal": "*", "Action": "s3:PutObject", "Resource": "arn:aws:s3:::guarded/*"}
    guarded = Folder(s3_server.make_bucket("guarded"))
    place = marked(guarded)
    s3_server.make_bucket("guarded", {"Version": "2012-10-17", "Statement": [deny]})
    words = seen_from(place, guarded)["unusable"]["output_dir"]
    assert "s3://guarded" in words
    assert "ACCESS_DENIED" in words
    assert "endpoint" not in words


def test_a_file_that_is_missing_or_another_one_is_named(tmp_path):
    mine, other = Folder(tmp_path / "mine"), Folder(tmp_path / "other")
    for folder, sizes in ((mine, "one"), (other, "two")):
        folder.child("a", "manifests").write("train.csv", sizes.encode())
        folder.write("same.csv", b"same")
    mine.write("alone.csv", b"")
    for names, said in (
        (["same.csv"], {}),
        (["same.csv", "a/manifests/train.csv"], {"data.root": "has another a/manifests/train.csv there"}),
        (["alone.csv"], {"data.root": "has no alone.csv there"}),
    ):
        expected = SameFiles("data.root", other.location, glance(mine, names))
        assert probe("node", [], [asdict(expected)], False, False)["other"] == said


def test_a_node_tells_its_memory_and_what_it_runs():
    answer = probe("node", [], [], True, False)
    assert 0 < answer["memory"] <= psutil.virtual_memory().total
    assert set(answer["versions"]) == {"python", "ray-pipeline", "ray", "torch", "diffusers"}
    assert "none" not in answer["versions"].values()


@pytest.mark.parametrize("runtime_env", [{}, {"env_vars": {"OMP_NUM_THREADS": "1"}}])
def test_a_node_whose_gpus_hang_answers_all_the_same_and_in_time(runtime_env, monkeypatch):
    config = parse_config({"phases": [{"name": "one", "epochs": 1}], "ray": {"runtime_env": runtime_env}})
    assert answer_seconds(config, measure=True) >= answer_seconds(config) + node_probe.GPU_SECONDS
    monkeypatch.setattr(node_probe, "GPU_SECONDS", 0.2)
    monkeypatch.setattr(node_probe, "_GPU_MEMORY", "import time; time.sleep(60)")
    started = time.monotonic()
    assert probe("node", [], [], True, True)["gpu_memory"] == []
    assert time.monotonic() - started < 60


def test_any_change_of_a_source_changes_the_hash(tmp_path):
    def hash_of(**sources):
        folder = tmp_path / f"version{len(list(tmp_path.iterdir()))}"
        for name, text in sources.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.py").write_text(text)
        return node_probe.sources_hash(folder)

    first = hash_of(a="x = 1", b="y = 1")
    assert first == hash_of(b="y = 1", a="x = 1")
    assert len({first, hash_of(a="x = 1", b="y = 2"), hash_of(a="x = 1", c="y = 1"), hash_of(a="x = 1")}) == 4


def test_the_nearest_folder_is_one_that_is_there(tmp_path, s3):
    assert nearest_folder(str(tmp_path / "not" / "there")).local == tmp_path
    assert nearest_folder(str(tmp_path)).local == tmp_path
    assert nearest_folder(s3).location == s3
