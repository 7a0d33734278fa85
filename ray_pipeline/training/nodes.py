"""Whether every node of the running Ray finds the folders of a run: asked by one tiny task a node, all at once."""

from __future__ import annotations

import re
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError, TaskUnschedulableError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_pipeline.config import Config
from ray_pipeline.data.encode_job import encode_job
from ray_pipeline.errors import UserError
from ray_pipeline.node_probe import (
    GPU_SECONDS,
    TOKEN,
    SameFiles,
    SharedFolder,
    glance,
    nearest_folder,
    probe,
    read_soon,
)
from ray_pipeline.storage import Folder, shown
from ray_pipeline.training.placement import alive_nodes, encoder_resources, rooms_by_node, worker_resources

#: a node answers within so many seconds, or is said not to; one that first gets ray.runtime_env may take longer
_ANSWER_SECONDS = 60.0
#: what to do about a node that does not answer
SILENT = "see that the same ray_pipeline is installed there and that its disks answer"
#: nodes that a message names
_TOLD = 3
_SHARE = "give a folder that all nodes share (NFS, ...) or an s3:// URI"


@dataclass(frozen=True)
class Node:
    """A node of the running Ray; name: in words, its own among all."""

    id: str
    name: str
    resources: dict[str, float]


@dataclass(frozen=True)
class Places:
    """What nodes are asked for. unwritable: key -> why the driver itself cannot write there."""

    shared: list[SharedFolder]
    same: list[SameFiles]
    unwritable: dict[str, str]


def check_nodes(config: Config, *, trains: bool = True, encodes: bool = True) -> None:
    """UserError, in words, where a node that may get a worker or encode does not find what the run reads and writes.

    trains: output_dir and checkpoint.store; encodes: data.latents is written, not only read. Costs nothing on a Ray of
    one node.
    """
    if len(alive_nodes()) < 2:
        return
    with asked_places(config, trains=trains, encodes=encodes) as places:
        nodes = working_nodes(config)
        problems = find_problems(places, nodes, ask(nodes, places, answer_seconds(config)))
    if problems:
        more = f" (and {len(problems) - 1} more: `ray-pipeline check` lists them)" if len(problems) > 1 else ""
        raise UserError(f"{next(iter(problems.values()))}{more}")


@contextmanager
def marked(output_dir: str) -> Iterator[str]:
    """Within, a file of this name lies there, by which `check_this_node` knows the run's folder."""
    folder, name = Folder(output_dir), f"{TOKEN}{uuid.uuid4().hex}"
    folder.write(name, name.encode())
    try:
        yield name
    finally:
        with suppress(UserError):  # of a storage that refuses now
            folder.remove([name])


def check_this_node(output_dir: str, mark: str) -> None:
    """UserError, in words, where the node of this worker does not find the run: one that joined later was not asked.

    mark: the name that `marked` gave. An older run under the same path may hold every other file of this one.
    """
    try:
        read_soon(Folder(output_dir), mark)
    except FileNotFoundError:
        node = ray.util.get_node_ip_address()
        raise UserError(
            f"output_dir={shown(output_dir)} is not this run's folder on node {node}, which does not see what the "
            f"driver wrote there; {_SHARE}"
        ) from None


def answer_seconds(config: Config, *, measure: bool = False) -> float:
    """How long nodes have to answer; measure: and to count their GPUs, whose driver may hang."""
    seconds = max(_ANSWER_SECONDS, 60 * config.ray.timeout_minutes) if config.ray.runtime_env else _ANSWER_SECONDS
    return seconds + GPU_SECONDS * measure


def all_nodes() -> list[Node]:
    """The nodes of the running Ray by address; several on one machine are told apart by their id."""
    found = sorted(alive_nodes(), key=lambda node: (node["NodeManagerAddress"], node["NodeID"]))
    names = [f"{node['NodeManagerAddress']} ({node['NodeManagerHostname']})" for node in found]
    counts = Counter(names)
    return [
        Node(
            id=node["NodeID"],
            name=name if counts[name] == 1 else f"{name[:-1]}, node {node['NodeID'][:8]})",
            resources=node["Resources"],
        )
        for node, name in zip(found, names, strict=True)
    ]


def working_nodes(config: Config) -> list[Node]:
    """Nodes that may get a training worker or an actor that encodes."""
    rooms = [rooms_by_node(each) for each in (worker_resources(config), encoder_resources(config))]
    return [node for node in all_nodes() if any(room.get(node.id) for room in rooms)]


@contextmanager
def asked_places(config: Config, *, trains: bool, encodes: bool) -> Iterator[Places]:
    """What nodes must find; within, the driver's tokens lie there, and afterwards neither they nor the answers."""
    shared, unwritable = [], {}
    try:
        tables = manifests(Folder(config.data.root)) if encodes or config.data.mode == "tiles" else []
        locations = _shared_locations(config, trains, encodes)
        if encodes and not tables:  # they will be simulated
            locations["data.root"] = config.data.root
        for key, location in locations.items():
            try:
                shared.append(_mark(key, location))
            except UserError as error:
                unwritable[key] = f"{key}={shown(location)} cannot be used: {error}"
        yield Places(shared, list(_same_files(config, tables, encodes)), unwritable)
    finally:
        for folder in shared:
            with suppress(UserError):  # of a storage that refuses now
                answers = [f"{folder.token}.{node['NodeID']}" for node in alive_nodes()]
                Folder(folder.place).remove([folder.token, *answers])


def _shared_locations(config: Config, trains: bool, encodes: bool) -> dict[str, str]:
    """Key -> location of what is written."""
    store = config.checkpoint.store
    found = {"output_dir": config.output_dir} if trains else {}
    found |= {"checkpoint.store": store} if trains and store is not None else {}
    return found | ({"data.latents": encode_job(config).store} if encodes else {})


def _same_files(config: Config, tables: Sequence[str], encodes: bool) -> Iterator[SameFiles]:
    """Files that nodes read: manifests, where they read tiles, a finished latent store, an autoencoder's folder."""
    pretrained = Path(config.vae.pretrained).expanduser()
    if tables:
        yield _as_they_are("data.root", config.data.root, tables)
    if not encodes:
        yield _as_they_are("data.latents", encode_job(config).store, ["stats.json"])
    if pretrained.is_dir():
        files = sorted(path for path in pretrained.iterdir() if path.is_file() and not path.name.startswith("."))
        yield _as_they_are("vae.pretrained", str(pretrained), [path.name for path in files])


def manifests(root: Folder) -> list[str]:
    """Paths of all manifests of a data root's data sets, below it."""
    foundation = root.child("foundation")
    return [
        f"foundation/{dataset}/manifests/{name}"
        for dataset in foundation.folders()
        for name in foundation.child(dataset, "manifests").names()
        if name.endswith(".csv")
    ]


def _as_they_are(key: str, location: str, names: Sequence[str]) -> SameFiles:
    folder = Folder(location)
    return SameFiles(key, folder.location, glance(folder, names))


def _mark(key: str, location: str) -> SharedFolder:
    place, token = nearest_folder(location), f"{TOKEN}{uuid.uuid4().hex}"
    place.write(token, token.encode())
    return SharedFolder(key, Folder(location).location, place.location, token)


def ask(
    nodes: Sequence[Node], places: Places, seconds: float, *, measure: bool = False
) -> dict[str, dict[str, Any] | str]:
    """Node id -> what `probe` answers there, or in words why it does not."""
    task = ray.remote(num_cpus=0, max_retries=0)(probe)
    shared, same = ([asdict(place) for place in group] for group in (places.shared, places.same))
    asked = {}
    for node in nodes:
        here = NodeAffinitySchedulingStrategy(node.id, soft=False)
        gpus = node.resources.get("GPU", 0) > 0
        asked[node.id] = task.options(scheduling_strategy=here).remote(node.id, shared, same, measure, gpus)
    _, late = ray.wait([*asked.values()], num_returns=len(asked), timeout=seconds) if asked else ([], [])
    for reference in late:
        ray.cancel(reference, force=True)
    return {
        node: f"did not answer within {seconds:g} s" if reference in late else _answer(reference)
        for node, reference in asked.items()
    }


def _answer(reference: ray.ObjectRef) -> dict[str, Any] | str:
    try:
        return ray.get(reference)
    except TaskUnschedulableError:
        return "has left the cluster"
    except RayTaskError as error:
        # the last line that names an exception; what stands above is Ray's and ours
        said = re.findall(r"^(?:\w+\.)*\w*(?:Error|Exception): .+$", str(error), re.MULTILINE)
        return f"cannot run this package ({(said or [str(error)])[-1][:300]})"
    except RayError as error:
        return f"does not answer ({' '.join(str(error).split())[:300]})"


def find_problems(places: Places, nodes: Sequence[Node], answers: dict[str, dict[str, Any] | str]) -> dict[str, str]:
    """What is wrong, by key, each in one sentence; "nodes" for those that did not answer."""
    problems = dict(places.unwritable)
    alive = {node["NodeID"] for node in alive_nodes()}  # whoever has left will get no worker
    silent = [(node, answers[node.id]) for node in nodes if isinstance(answers[node.id], str) and node.id in alive]
    if silent:
        problems["nodes"] = f"{_in_words(silent)}; {SILENT}"
    heard = [(node, answers[node.id]) for node in nodes if isinstance(answers[node.id], dict)]
    for place in (*places.shared, *places.same):
        where = f"{place.key}={shown(place.location)}"
        unseen, unusable, other = (
            [(node, answer[kind][place.key]) for node, answer in heard if place.key in answer[kind]]
            for kind in ("unseen", "unusable", "other")
        )
        if isinstance(place, SharedFolder):
            wrote = [node for node, answer in heard if place.key not in answer["unseen"] | answer["unusable"]]
            unseen += [(node, "wrote what the driver does not see") for node in wrote if not _answered(place, node)]
        if unseen:
            problems[place.key] = f"{where} is not the same folder on every node: {_in_words(unseen)}; {_SHARE}"
        elif unusable:
            problems[place.key] = f"{where} cannot be used on every node: {_in_words(unusable)}"
        elif other:
            problems[place.key] = (
                f"{where} does not hold the same files on every node: {_in_words(other)}; copy it there, or {_SHARE}"
            )
    return problems


def _answered(place: SharedFolder, node: Node) -> bool:
    """Whether the driver finds the node's answer to its token."""
    try:
        read_soon(Folder(place.place), f"{place.token}.{node.id}")
    except FileNotFoundError:
        return False
    return True


def _in_words(found: Sequence[tuple[Node, str]]) -> str:
    told = [f"node {node.name} {words}" for node, words in found[:_TOLD]]
    return ", ".join(told) + (f", and {len(found) - _TOLD} node(s) more" if len(found) > _TOLD else "")
