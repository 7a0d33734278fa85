"""Which folders the nodes of a Ray are asked for; tests/test_check_cluster.py has nodes that answer."""

import os

import pytest

from ray_pipeline.config import parse_config
from ray_pipeline.errors import UserError
from ray_pipeline.storage import Folder
from ray_pipeline.training.nodes import (
    ask,
    asked_places,
    check_nodes,
    check_this_node,
    find_problems,
    manifests,
    marked,
    shown,
    working_nodes,
)


@pytest.fixture
def config_of(tiny_data, tmp_path):
    """(mode, **fields of the config) -> a config with the session's tiles and an output_dir that is not there yet."""

    def make(mode="latents", **fields):
        tree = {"phases": [{"name": "one", "epochs": 1}], "data": {"root": str(tiny_data), "mode": mode}}
        tree["data"]["latents"] = str(tmp_path / "latents")
        return parse_config(tree | {"output_dir": str(tmp_path / "run")} | fields)

    return make


def test_a_worker_on_a_node_without_the_run_says_so_instead_of_beginning_again(ray_cluster, tmp_path):
    """As on a node that has joined later: the same path is another folder there, with an equal run of its own."""
    run, older = tmp_path / "run", tmp_path / "older"
    for folder in (run, older):
        folder.mkdir()
        (folder / "config.yaml").write_text("seed: 1")
    with marked(str(run)) as mark:
        check_this_node(str(run), mark)
        with pytest.raises(
            UserError, match=rf"output_dir={older} is not this run's folder on node \S+, which does not"
        ):
            check_this_node(str(older), mark)
    assert os.listdir(run) == ["config.yaml"]


@pytest.mark.parametrize(
    ("mode", "trains", "encodes", "shared", "same"),
    [
        ("latents", True, True, ["output_dir", "data.latents"], ["data.root"]),
        ("latents", True, False, ["output_dir"], ["data.latents"]),
        ("latents", False, True, ["data.latents"], ["data.root"]),
        ("tiles", True, False, ["output_dir"], ["data.root", "data.latents"]),
    ],
)
def test_nodes_are_asked_for_what_they_will_read_and_write(
    ray_cluster, config_of, tmp_path, mode, trains, encodes, shared, same
):
    config = config_of(mode)
    with asked_places(config, trains=trains, encodes=encodes) as places:
        assert [place.key for place in places.shared] == shared
        assert [place.key for place in places.same] == same
        assert len(os.listdir(tmp_path)) == len(shared)
        nodes = working_nodes(config)
        assert find_problems(places, nodes, ask(nodes, places, 60)) == {}
        assert len(os.listdir(tmp_path)) == 2 * len(shared)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_the_driver_cannot_use_is_told(ray_cluster, config_of):
    with asked_places(config_of(output_dir="/dev/null/run"), trains=True, encodes=True) as places:
        said = find_problems(places, [], {})
    assert list(said) == ["output_dir"]
    assert said["output_dir"].startswith("output_dir=/dev/null/run cannot be used: ")


def test_a_ray_of_one_node_is_asked_nothing(ray_cluster, config_of):
    check_nodes(config_of(output_dir="/dev/null/run"))


@pytest.mark.parametrize("where", ["tmp_path", "s3"])
def test_the_manifests_of_a_data_root_are_found(where, request, tmp_path):
    root = Folder(request.getfixturevalue(where)).child(f"{tmp_path.name}_root")
    assert manifests(root) == []
    root.child("foundation", "a", "manifests").write("train.csv", b"id,image\n")
    root.child("foundation", "b", "images").write("tile.png", b"png")
    assert manifests(root) == ["foundation/a/manifests/train.csv"]


def test_locations_are_shown_without_user_and_query():
    assert shown("s3://key:secret@bucket/run?endpoint_override=host") == "s3://bucket/run"
    assert shown("/data/a?b@c") == "/data/a?b@c"
