"""A job's plan against what a Ray cluster has: what `ray-pipeline check --address URL` prints, a line a fact."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import ray

from ray_pipeline.config import Config
from ray_pipeline.data.encode_job import encode_job
from ray_pipeline.errors import UserError
from ray_pipeline.estimate import estimate_phase, worker_memory
from ray_pipeline.monitoring.progress import format_bytes
from ray_pipeline.node_probe import sources_hash, versions
from ray_pipeline.phase_sections import PhaseConfig
from ray_pipeline.ray_session import store_bytes
from ray_pipeline.storage import Folder
from ray_pipeline.training.nodes import (
    SILENT,
    Node,
    Places,
    all_nodes,
    answer_seconds,
    ask,
    asked_places,
    find_problems,
    shown,
    working_nodes,
)
from ray_pipeline.training.placement import (
    check_resources,
    encode_actors,
    encoder_resources,
    in_words,
    rooms_by_node,
    uses_gpu,
    worker_resources,
    workers_by_node,
    workers_that_fit,
)
from ray_pipeline.training.setup import stream_cpus, stream_gpus, stream_workers

Line = tuple[str, bool, str]
_FLOAT = 4


def check_cluster(config: Config) -> Iterator[Line]:
    """Yield (what, is well, in words): what is needed and what is there, on the Ray that is running."""
    nodes, working = all_nodes(), working_nodes(config)
    encodes = Folder(encode_job(config).store).size("stats.json") < 0
    with asked_places(config, trains=True, encodes=encodes) as places:
        answers = ask(nodes, places, answer_seconds(config, measure=True), measure=True)
        problems = find_problems(places, working, answers)
    problems.pop("nodes", None)  # each has a line of its own
    told = {node: answer for node, answer in answers.items() if isinstance(answer, dict)}
    placed = workers_by_node(config)
    for node in nodes:
        yield _node_line(node, answers[node.id], placed[node.id])
    yield _workers_line(config)
    yield "batch", True, _batch(config, sum(placed.values()) or config.ray.min_workers)
    yield _encoders_line(config, encodes)
    yield "streams", True, _streams(config)
    yield "object store", True, _object_store(config)
    for phase in config.phases:
        yield memory_line(config, phase, [node for node in nodes if placed[node.id]], placed, told)
    yield from _places_lines(places, sum(node.id in told for node in working), problems, config.ray.autoscaling)
    yield from _versions_lines(nodes, told)


def _node_line(node: Node, answer: dict[str, Any] | str, workers: int) -> Line:
    has = in_words({name: node.resources.get(name, 0) for name in ("CPU", "GPU")})
    store = f"object store {format_bytes(int(node.resources.get('object_store_memory', 0)))}"
    if isinstance(answer, str):
        return f"node {node.name}", False, f"{has}, {store}; {answer}; {SILENT}"
    gpus = node.resources.get("GPU", 0)
    if gpus and len(answer["gpu_memory"]) < math.ceil(gpus):
        return f"node {node.name}", False, f"{has}, but torch sees {len(answer['gpu_memory'])} CUDA device(s) there"
    of_gpus = f", a GPU {format_bytes(min(answer['gpu_memory']))}" if answer["gpu_memory"] else ""
    words = f"{has}, memory {format_bytes(answer['memory'])}{of_gpus}, {store}; takes {workers} worker(s)"
    return f"node {node.name}", True, words


def _workers_line(config: Config) -> Line:
    settings = config.ray
    try:
        check_resources(config)
    except UserError as error:
        return "workers", False, str(error)
    asked = f"{settings.min_workers} to {settings.max_workers}" if settings.elastic else str(settings.max_workers)
    return (
        "workers",
        True,
        f"{asked} of {in_words(worker_resources(config))} needed ({settings.placement_strategy}), room for "
        f"{workers_that_fit(config)}{_more_comes(config)}",
    )


def _batch(config: Config, world: int) -> str:
    total, most = config.train.global_batch, math.ceil(config.train.global_batch / world)
    fewest = total // world
    size = config.train.batch_size
    samples = str(most) if most == fewest else f"{most} or {fewest}"
    return (
        f"{total} a step = {samples} on each of {world} worker(s), in {math.ceil(most / size)} micro-step(s) of {size}"
    )


def _encoders_line(config: Config, encodes: bool) -> Line:
    each, wanted = encoder_resources(config), encode_actors(config)
    room = sum(rooms_by_node(each).values())
    store = shown(encode_job(config).store)
    if not encodes:
        return "encode actors", True, f"none needed, {store} is there"
    words = f"{wanted} of {in_words(each)} wanted (ray.data_cpus={config.ray.data_cpus}), room for {room}"
    if room or config.ray.autoscaling:
        return "encode actors", True, words + _more_comes(config)
    return "encode actors", False, f"{words}; add such a node, or lower vae.gpus_per_actor"


def _more_comes(config: Config) -> str:
    return f" now, the rest within {config.ray.timeout_minutes:g} minutes or not at all" * config.ray.autoscaling


def _streams(config: Config) -> str:
    actors = stream_workers(config)
    each = {"CPU": stream_cpus(config) / (config.ray.max_workers * actors)}
    if stream_gpus(config):
        each["GPU"] = stream_gpus(config)
    kind = "encode" if config.data.mode == "tiles" else "gather"
    return f"{actors} actor(s) a worker that {kind}, of {in_words(each)} each"


def _object_store(config: Config) -> str:
    have = format_bytes(int(ray.cluster_resources().get("object_store_memory", 0)))
    limit = store_bytes(config.ray)
    most = "as much of it as Ray Data chooses" if limit is None else f"at most {format_bytes(limit)} of it"
    return f"{have} on all nodes; encoding, and the stream of each worker, hold {most}"


def memory_line(
    config: Config, phase: PhaseConfig, nodes: Sequence[Node], placed: dict[str, int], told: dict[str, dict]
) -> Line:
    """What the workers of a node need against what it has, there where it is tightest; on GPUs one has one of its own.

    The node's memory is all that it has: what else runs there, and the object store, want some of it.
    """
    what, gpu = f"memory {phase.name}", uses_gpu(config)
    split = memory_split(config, phase, "cuda" if gpu else "cpu")
    each = sum(split.values())
    words = f"{format_bytes(each)} a worker: " + ", ".join(f"{name} {format_bytes(x)}" for name, x in split.items())
    tight = []
    for node in nodes:
        answer = told.get(node.id)
        have = min(answer["gpu_memory"], default=0) if gpu and answer else (answer or {}).get("memory", 0)
        if have:
            need = each if gpu else each * placed[node.id]
            tight.append((need / have, need, have, node))
    if not tight:
        return what, not nodes, f"{words}; " + ("what the nodes have is not known" if nodes else "no node takes any")
    share, need, have, node = max(tight, key=lambda found: found[0])
    of = "of a GPU's" if gpu else f"for {placed[node.id]} worker(s), of"
    words += f"; {format_bytes(need)} {of} {format_bytes(have)} on node {node.name}"
    if share > 1:
        words += "; lower train.batch_size, set train.activation_checkpointing, take fewer averages, or larger nodes"
    return what, share <= 1, words


def memory_split(config: Config, phase: PhaseConfig, device_type: str) -> dict[str, int]:
    """Bytes of `worker_memory` by what they are for."""
    found = estimate_phase(config, phase, 1)
    ema = config.ema
    averages = (1 + len(ema.more_decays) + len(ema.power_stds)) if ema.enabled else 0
    frozen = found.checkpoint_bytes - _FLOAT * (3 + averages) * found.parameters
    split = {
        "parameters": _FLOAT * found.parameters + frozen,
        "gradients": _FLOAT * found.parameters,
        "Adam": 2 * _FLOAT * found.parameters,
        f"{averages} average(s)": averages * _FLOAT * found.parameters,
    }
    return split | {"activations": worker_memory(config, phase, device_type) - sum(split.values())}


def _places_lines(places: Places, heard: int, problems: dict[str, str], to_come: bool) -> Iterator[Line]:
    """heard: nodes that work for the run and answered; to_come: whether others may still come."""
    for key, words in problems.items():
        yield key, False, words
    if not heard and to_come:
        yield "folders", True, "asked before a run begins, of the nodes that have come then"
        return
    for place in places.shared:
        if place.key not in problems:
            words = f"{shown(place.location)}: the same folder, readable and writable, on {heard} node(s)"
            yield place.key, heard > 0, words
    for same in places.same:
        if same.key not in problems:
            words = f"{shown(same.location)}: {len(same.files)} file(s) the same on {heard} node(s)"
            yield same.key, heard > 0, words


def _versions_lines(nodes: Sequence[Node], told: dict[str, dict]) -> Iterator[Line]:
    """Of packages and of our sources: alike on every node, or which node has others than this process."""
    here = versions()
    heard = [(node.name, told[node.id]) for node in nodes if node.id in told]
    for name, version in here.items():
        others = [
            f"{node} has {answer['versions'][name]}" for node, answer in heard if answer["versions"][name] != version
        ]
        words = f"{version} on {len(heard)} node(s)"
        if others:
            words = f"{version} here, but {', '.join(others)}; install the same version on every node"
        yield f"{name} on nodes", not others, words
    ours = sources_hash()
    others = [node for node, answer in heard if answer["sources"] != ours]
    words = f"the same source files on {len(heard)} node(s)"
    if others:
        words = f"other source files than here on {', '.join(others)}; install the same version on every node"
    yield "sources on nodes", not others, words
