"""Whether the workers of a run and their data streams fit on the Ray that is running."""

from __future__ import annotations

import os
import time

import ray
from ray.util import placement_group, remove_placement_group

from ray_pipeline.config import Config
from ray_pipeline.data.stream import ENCODER_CPUS
from ray_pipeline.errors import UserError
from ray_pipeline.training.setup import stream_cpus, stream_gpus, stream_workers

_POLL_SECONDS = 1


def uses_gpu(config: Config) -> bool:
    """Whether workers get a GPU each: as set, or `auto`, when the running Ray has any."""
    if config.ray.use_gpu == "auto":
        return ray.cluster_resources().get("GPU", 0) >= 1
    return bool(config.ray.use_gpu)


def worker_resources(config: Config) -> dict[str, float]:
    """What one worker takes, all of it on one node."""
    settings = config.ray
    gpu = {"GPU": 1.0} if uses_gpu(config) else {}
    return {"CPU": settings.cpus_per_worker} | gpu | settings.resources_per_worker


def encode_actors(config: Config) -> int:
    """Actors that encode beforehand: vae.actors, else one a GPU worker or a CPU core; at most ray.data_cpus."""
    cores = os.cpu_count() or 1
    if len(alive_nodes()) > 1:  # elsewhere the cores of this machine say nothing
        cores = int(ray.cluster_resources().get("CPU", 0))
    wanted = config.vae.actors or (config.ray.max_workers if uses_gpu(config) else cores)
    return max(1, min(wanted, config.ray.data_cpus or wanted))


def encoder_resources(config: Config) -> dict[str, float]:
    """What one of the actors that encode beforehand takes."""
    return {"CPU": ENCODER_CPUS} | ({"GPU": config.vae.gpus_per_actor or 1.0} if uses_gpu(config) else {})


class NoRoom(UserError):
    """There was no place for the workers for ray.timeout_minutes; who holds it may leave."""

    passing = True


def check_resources(config: Config) -> None:
    """UserError when the running Ray can never hold the workers, at least as few as may train, and their streams, or
    these streams take more than ray.data_cpus. With ray.autoscaling what it will hold is not known."""
    settings, have, each = config.ray, ray.cluster_resources(), worker_resources(config)
    workers = settings.min_workers
    if settings.data_cpus is not None and stream_cpus(config) > settings.data_cpus:
        raise UserError(
            f"ray.data_cpus={settings.data_cpus}, but the autoencoders of data.mode=tiles take {stream_cpus(config):g} "
            "CPU beside the training, at least one each worker; raise it, lower vae.actors or ray.num_workers, or use "
            "data.mode=latents"
        )
    if settings.autoscaling:
        return
    need = {name: workers * amount for name, amount in each.items()}
    # a stream that finds no room waits, and its worker with it
    need["CPU"] += stream_cpus(config) * workers / settings.max_workers
    if stream_gpus(config):
        need["GPU"] = need.get("GPU", 0) + workers * stream_workers(config) * stream_gpus(config)
    for name, amount in need.items():
        if have.get(name, 0) < amount:
            raise UserError(
                f"ray.num_workers={_asked(config)} with its data streams needs {amount:g} {name}, but this Ray "
                f"has {have.get(name, 0):g}; lower ray.num_workers or ray.resources_per_worker, or add nodes"
            )
    fitting = workers_that_fit(config)
    if fitting < workers:
        raise UserError(
            f"ray.num_workers={_asked(config)} with ray.placement_strategy={settings.placement_strategy} needs room "
            f"for {workers} worker(s) of {in_words(each)}, each on one node, but there is room for {fitting}: "
            f"{_nodes_in_words(each)}; lower ray.num_workers or what a worker takes, or add larger nodes"
        )


def await_room(config: Config, each: dict[str, float], count: int, who: str) -> None:
    """Wait until the running Ray has `count` times `each` free at once, as ray.placement_strategy wants it, and so let
    an autoscaler add the nodes; take nothing. who: those that it is for, in words.

    NoRoom after ray.timeout_minutes; a UserError at once where no node is large enough, and none that is will come.
    """
    settings = config.ray
    if not (settings.autoscaling or any(rooms_by_node(each).values())):
        raise UserError(f"no node is large enough for {who} ({in_words(each)} each): {_nodes_in_words(each)}")
    group = placement_group([each] * count, strategy=settings.placement_strategy)
    try:
        until = time.monotonic() + 60 * settings.timeout_minutes
        while not group.wait(_POLL_SECONDS):  # which no signal interrupts
            if time.monotonic() > until:
                free = {name: ray.available_resources().get(name, 0) for name in each}
                raise NoRoom(
                    f"in ray.timeout_minutes={settings.timeout_minutes:g} there was no room for {who}, {count} times "
                    f"{in_words(each)}; this Ray has {in_words(free)} free ({_nodes_in_words(each)}): end what else "
                    "runs there, add nodes, or ask for less"
                )
    finally:
        remove_placement_group(group)


def workers_that_fit(config: Config) -> int:
    """So many workers, each on one node, the running Ray has room for as ray.placement_strategy wants them."""
    rooms = rooms_by_node(worker_resources(config)).values()
    return {
        "STRICT_PACK": max(rooms),
        "STRICT_SPREAD": sum(room > 0 for room in rooms),
    }.get(config.ray.placement_strategy, sum(rooms))


def workers_by_node(config: Config) -> dict[str, int]:
    """Node id -> how many workers it gets in an empty cluster, as ray.placement_strategy wants them; with PACK and
    several ways to pack them the one with the fewest nodes."""
    rooms = rooms_by_node(worker_resources(config))
    placed = dict.fromkeys(rooms, 0)
    strategy = config.ray.placement_strategy
    most = 1 if strategy == "STRICT_SPREAD" else max(rooms.values())
    for _ in range(min(config.ray.max_workers, workers_that_fit(config))):
        open_nodes = [node for node in rooms if placed[node] < min(rooms[node], most)]
        if strategy in ("SPREAD", "STRICT_SPREAD"):
            chosen = min(open_nodes, key=placed.__getitem__)
        else:
            chosen = max(open_nodes, key=lambda node: (placed[node] > 0, rooms[node]))
        placed[chosen] += 1
    return placed


def alive_nodes() -> list[dict]:
    """The nodes of the running Ray, as Ray describes them."""
    return [node for node in ray.nodes() if node["Alive"]]


def rooms_by_node(each: dict[str, float]) -> dict[str, int]:
    """Node id -> how many times what `each` names fits there when nothing else runs."""
    return {node["NodeID"]: _room(node["Resources"], each) for node in alive_nodes()}


def groups_that_fit(config: Config) -> int:
    """How many groups of workers, with their streams, the running Ray has room for at once; at least 1."""
    settings, have, each = config.ray, ray.cluster_resources(), worker_resources(config)
    workers = settings.max_workers
    need = {name: workers * amount for name, amount in each.items()}
    need["CPU"] += stream_cpus(config)
    if not uses_gpu(config):  # where a worker computes with all cores, another one would only take them from it
        need["CPU"] = max(need["CPU"], workers * (config.train.threads or os.cpu_count() or 1))
    if stream_gpus(config):
        need["GPU"] = need.get("GPU", 0) + workers * stream_workers(config) * stream_gpus(config)
    rooms = [*rooms_by_node(each).values()]
    groups = sum(rooms) // workers
    if settings.placement_strategy == "STRICT_PACK":
        groups = sum(room // workers for room in rooms)
    elif settings.placement_strategy == "STRICT_SPREAD":  # of each group one worker a node
        while sum(min(room, groups) for room in rooms) < groups * workers:
            groups -= 1
    whole = [round(1e4 * have.get(name, 0)) // max(1, round(1e4 * amount)) for name, amount in need.items()]
    return max(1, min(groups, *whole))


def placement_in_words(config: Config) -> str:
    """What the workers of a run ask for, and what is free now."""
    each = worker_resources(config)
    free = {name: ray.available_resources().get(name, 0) for name in each}
    return (
        f"ray.num_workers={_asked(config)} asks for {in_words(each)} a worker, and this Ray has {in_words(free)} free "
        f"of {in_words({name: ray.cluster_resources().get(name, 0) for name in each})} ({_nodes_in_words(each)})"
    )


def in_words(resources: dict[str, float]) -> str:
    """Such as "4 CPU and 1 GPU"."""
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items())


def _asked(config: Config) -> str:
    settings = config.ray
    return f"[{settings.min_workers}, {settings.max_workers}]" if settings.elastic else str(settings.max_workers)


def _room(node: dict[str, float], each: dict[str, float]) -> int:
    """Workers that fit on a node; Ray counts in ten-thousandths."""
    return min(round(1e4 * node.get(name, 0)) // max(1, round(1e4 * amount)) for name, amount in each.items())


def _nodes_in_words(each: dict[str, float]) -> str:
    nodes = [node["Resources"] for node in alive_nodes()]
    return (
        f"{len(nodes)} node(s), at most "
        + in_words({name: max(node.get(name, 0) for node in nodes) for name in each})
        + " on one"
    )
