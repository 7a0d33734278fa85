"""Ways to disturb a training run, each of which says what it hit: Missed when it did not."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil
import pyarrow.fs
from ray.cluster_utils import Cluster
from small_run import TIMEOUT_SECONDS, Missed, Place, SmallRun

#: what the command exits with when a signal ended it in an orderly way
EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}
NODE_CPUS = 2


@dataclass
class Target:
    """A run, the storage of its checkpoints, the nodes of the Cluster that it has joined (None: it starts a Ray of its
    own), and where the chances come from."""

    run: SmallRun
    store: str
    nodes: Cluster | None
    chances: random.Random


@dataclass
class Hit:
    """One disturbance. place: the last step recorded before; keeps: whether that step must not be lost."""

    kind: str
    place: Place
    words: str
    driver_ended: bool = False
    keeps: bool = False
    problems: list[str] = field(default_factory=list)


def kill_worker(target: Target) -> Hit:
    """SIGKILL of one training process."""
    victims = _workers(target.run)
    victim = target.chances.choice(victims)
    with _frozen(victim):
        place = _supersede(target.run)
        victim.kill()
    return Hit("worker", place, f"worker {victim.pid} of {len(victims)} killed{_gone(victim)}")


def kill_in_mid_save(target: Target) -> Hit:
    """SIGKILL of rank 0 while a checkpoint of which files are there is not committed, nor ever becomes it."""
    writer = target.run.writer()
    if writer is None:
        raise Missed("no rank 0")
    folder = CheckpointFolder(target.store)
    while True:
        # only of a save that begins from now on: a kill before may have left pieces
        target.run.wait_until(folder.uncommitted, "a save was seen", pause=0.001)
        with _frozen(writer):
            pieces = folder.uncommitted()
            if pieces:
                place = _supersede(target.run)
                writer.kill()
        if pieces:
            break
    words = f"rank 0 {writer.pid} killed{_gone(writer)} with {len(pieces)} files of {pieces[0][0]} written"
    hit = Hit("mid-save", place, words)
    if not set(pieces) <= set(folder.uncommitted()):
        hit.problems.append(f"{pieces[0][0]} was committed after its writer was dead")
    return hit


def kill_driver(target: Target) -> Hit:
    """SIGKILL of the command; its workers may outlive it for a while, and half of the time they are not waited for."""
    run, driver = target.run, target.run.driver
    workers = _workers(run)
    with _frozen(driver):
        place = _supersede(run)
        driver.kill()
    words = f"driver {driver.pid} killed{_gone(driver)}"
    alive = sum(map(psutil.Process.is_running, workers))
    if target.chances.random() < 0.5:
        return Hit("driver", place, f"{words}, resumed with {alive} of its workers alive", driver_ended=True)
    _, alive = psutil.wait_procs(workers, timeout=120)
    return Hit(
        "driver", place, f"{words}, resumed without its workers", True,
        problems=[f"worker {process.pid} outlived its driver by 120 s" for process in alive],
    )  # fmt: skip


def terminate(target: Target) -> Hit:
    """SIGTERM of the command: it commits, then ends."""
    return _signal(target, "SIGTERM", signal.SIGTERM, os.kill)


def interrupt(target: Target) -> Hit:
    """Ctrl-C: SIGINT to the whole process group."""
    return _signal(target, "SIGINT", signal.SIGINT, os.killpg)


def kill_raylet(target: Target) -> Hit:
    """SIGKILL of a node's raylet under a worker; the node does not come back, an empty one joins."""
    run, nodes = target.run, target.nodes
    children = {node: psutil.Process(raylet_pid(node)).children(recursive=True) for node in nodes.worker_nodes}
    node, worker = target.chances.choice(
        [(node, worker) for worker in _workers(run) for node in children if worker in children[node]]
    )
    raylet = psutil.Process(raylet_pid(node))
    with _frozen(raylet):
        place = _supersede(run)
        raylet.kill()
    words = f"raylet {raylet.pid} killed{_gone(raylet)}, its worker {worker.pid}{_gone(worker)}"
    nodes.remove_node(node, allow_graceful=False)
    add_node(nodes, NODE_CPUS)
    return Hit("raylet", place, words)


KINDS: dict[str, Callable[[Target], Hit]] = {
    "worker": kill_worker,
    "driver": kill_driver,
    "SIGTERM": terminate,
    "SIGINT": interrupt,
    "mid-save": kill_in_mid_save,
    "raylet": kill_raylet,
}


def raylet_pid(node: object) -> int:
    """Process id of the raylet of a node of a Cluster."""
    return node.all_processes["raylet"][0].process.pid


@contextmanager
def small_cluster(cpus: tuple[int, ...]) -> Iterator[Cluster | None]:
    """Nodes with so many logical CPUs each, the head first, on this machine; None without any."""
    if not cpus:
        yield None
        return
    nodes = Cluster()
    try:
        for count in cpus:
            add_node(nodes, count)
        yield nodes
    finally:
        nodes.shutdown()


def add_node(nodes: Cluster, cpus: int) -> object:
    """Start a node, the first of a cluster being its head."""
    # Ray waits 30 s for its own processes, which a busy machine may need longer to start
    for tries_left in (2, 1, 0):
        before = set(psutil.Process().children(recursive=True))
        try:
            return nodes.add_node(num_cpus=cpus, include_dashboard=False)
        except Exception:
            for process in set(psutil.Process().children(recursive=True)) - before:
                process.kill()
            if not tries_left:
                raise


class CheckpointFolder:
    """Files of a checkpoint store, seen from outside: which have come since, in checkpoints that are not committed."""

    def __init__(self, uri: str):
        if "://" in uri:
            self.filesystem, self.root = pyarrow.fs.FileSystem.from_uri(uri)
        else:
            self.filesystem, self.root = pyarrow.fs.LocalFileSystem(), uri
        self.committed: set[str] = set()
        self.before = self._files()

    def uncommitted(self) -> list[tuple[str, str]]:
        """(checkpoint, file) of new files without a state.json beside them; where there was one, the checkpoint is
        being deleted, not saved."""
        files = self._files()
        self.committed |= {name for name, file in files if file == "state.json"}
        return sorted(
            key for key, about in files.items() if key[0] not in self.committed and self.before.get(key) != about
        )

    def _files(self) -> dict[tuple[str, str], tuple]:
        selector = pyarrow.fs.FileSelector(self.root, recursive=True, allow_not_found=True)
        parts = [(info.path.split("/")[-2:], info) for info in self.filesystem.get_file_info(selector) if info.is_file]
        return {(name, file): (info.size, info.mtime_ns) for (name, file), info in parts if name.endswith(".ckpt")}


def _signal(target: Target, name: str, number: signal.Signals, send: Callable[[int, int], None]) -> Hit:
    run, driver = target.run, target.run.driver
    place = _supersede(run)
    send(driver.pid, number)
    code = driver.wait(TIMEOUT_SECONDS)
    if code == 0:
        raise Missed("the run had ended")
    hit = Hit(name, place, f"driver {driver.pid} exited with {code}", driver_ended=True, keeps=True)
    if code != EXIT_CODES[number]:
        hit.problems.append(f"the command exited with {code} on {name}, expected {EXIT_CODES[number]}")
    return hit


def _workers(run: SmallRun) -> list[psutil.Process]:
    workers = run.workers()
    if not workers or run.writer() is None:
        raise Missed("no workers")
    return workers


def _supersede(run: SmallRun) -> Place:
    """The last step of an attempt that ends here."""
    attempt = run.attempt()
    if attempt is None:
        raise Missed("no phase was being trained")
    run.supersede()
    return attempt.last


@contextmanager
def _frozen(process: psutil.Process) -> Iterator[None]:
    """Within, the process stands still: what is read of the run is how it was when the kill came."""
    try:
        process.suspend()
    except psutil.NoSuchProcess:
        raise Missed("the process had ended") from None
    try:
        yield
    finally:
        if process.is_running():
            process.resume()


def _gone(process: psutil.Process) -> str:
    """Wait for the end of a killed process -> words; a zombie is gone too."""
    _, alive = psutil.wait_procs([process], timeout=60)
    if alive and process.status() != psutil.STATUS_ZOMBIE:
        raise SystemExit(f"process {process.pid} was killed and lives on")
    return " and gone"
