"""What a run takes of the Ray that is running. Six logical CPUs, no GPU, one node."""

import os
import time

import pytest
import ray

from ray_pipeline.config import parse_config
from ray_pipeline.errors import UserError
from ray_pipeline.training.placement import await_room, check_resources, encode_actors, workers_by_node


def config_of(mode="latents", actors=None, **settings):
    tree = {"phases": [{"name": "one", "epochs": 1}], "data": {"mode": mode}, "vae": {"actors": actors}}
    return parse_config(tree | {"ray": settings})


@pytest.mark.parametrize(
    ("actors", "limit", "expected"),
    [(None, None, os.cpu_count()), (5, None, 5), (5, 3, 3), (2, 3, 2), (None, 1, 1)],
)
def test_data_cpus_bounds_the_actors_that_encode(ray_cluster, actors, limit, expected):
    assert encode_actors(config_of(actors=actors, data_cpus=limit)) == expected


def test_streams_that_encode_with_more_than_data_cpus_are_refused(ray_cluster):
    check_resources(config_of("tiles", actors=4, num_workers=2, data_cpus=4))
    check_resources(config_of("latents", actors=4, num_workers=2, data_cpus=1))
    with pytest.raises(UserError, match=r"ray\.data_cpus=3, but the autoencoders of data\.mode=tiles take 4 CPU"):
        check_resources(config_of("tiles", actors=4, num_workers=2, data_cpus=3))


def test_where_nodes_come_when_asked_for_more_workers_than_have_room_are_no_mistake(ray_cluster):
    with pytest.raises(UserError, match="needs 7 CPU, but this Ray has 6"):
        check_resources(config_of(num_workers=7))
    check_resources(config_of(num_workers=7, autoscaling=True, use_gpu=False))
    check_resources(config_of(num_workers=7, autoscaling=True, use_gpu=True))


def test_room_is_waited_for_and_given_back_and_what_no_node_has_is_refused_at_once(ray_cluster):
    free = ray.available_resources()["CPU"]
    await_room(config_of(), {"CPU": 2}, 2, "the workers")
    while ray.available_resources()["CPU"] < free:
        time.sleep(0.1)
    with pytest.raises(
        UserError, match=r"no node is large enough for the workers \(7 CPU each\): 1 node\(s\), at most 6"
    ):
        await_room(config_of(), {"CPU": 7}, 1, "the workers")
    comes = config_of(autoscaling=True, use_gpu=False, timeout_minutes=0.03)
    with pytest.raises(
        UserError, match=r"in ray\.timeout_minutes=0\.03 there was no room for the workers, 1 times 7 CPU"
    ):
        await_room(comes, {"CPU": 7}, 1, "the workers")


@pytest.mark.parametrize(
    ("settings", "placed"),
    [
        ({"num_workers": 4}, 4),
        ({"num_workers": [1, 9]}, 6),
        ({"num_workers": 2, "placement_strategy": "STRICT_SPREAD"}, 1),
        ({"num_workers": 2, "placement_strategy": "STRICT_PACK"}, 2),
        ({"num_workers": 2, "resources_per_worker": {"microscope": 1}}, 0),
    ],
)
def test_workers_are_laid_out_as_far_as_there_is_room(ray_cluster, settings, placed):
    assert [*workers_by_node(config_of(**settings)).values()] == [placed]
