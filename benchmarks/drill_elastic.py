"""Add a node to a cluster while it trains, then kill it: one worker, two, one, to the loss of one worker alone?

    python benchmarks/drill_elastic.py

A node holds one worker, and ray.num_workers is [1, 2]. Prints how long each change took; exits 1 unless the run grew
and shrank, each step took the planned samples, and the final loss is within 1e-3 of the undisturbed run's. Without
dropout, which is exact at equal numbers of workers only.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import psutil
from disturbances import NODE_CPUS, add_node, raylet_pid, small_cluster
from ray.cluster_utils import Cluster
from run_proof import unplanned_samples, world_sizes
from small_run import PHASES, SmallRun, prepare

from ray_pipeline.data.plan import SamplePlan
from ray_pipeline.monitoring.metrics_file import read_events

GLOBAL_BATCH = 8
TOLERANCE = 1e-3
SETTINGS = {
    "phases": "[{name: phase1_unconditional, epochs: 12}]",
    "checkpoint.every_minutes": 0.05,
    "ray.cpus_per_worker": 0.75 * NODE_CPUS,  # one worker a node
}
ELASTIC = {"ray.num_workers": "[1, 2]", "ray.resize_minutes": 0.02}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fields", type=int, default=64, help="of 4 tiles: the more, the longer an epoch")
    arguments = parser.parse_args()
    os.environ.pop("RAY_ADDRESS", None)
    with tempfile.TemporaryDirectory() as folder, small_cluster((0, NODE_CPUS)) as nodes:
        work = Path(folder)
        config, tiles = prepare(work, arguments.fields, (1, 1), dropout=0.0, precision="fp32")
        environment = {"RAY_ADDRESS": nodes.address}
        undisturbed = SmallRun(config, work / "undisturbed", SETTINGS | {"ray.num_workers": 1}, environment)
        undisturbed.start()
        undisturbed.finish()
        elastic = SmallRun(config, work / "elastic", SETTINGS | ELASTIC, environment)
        grow_and_shrink(elastic, nodes)
        problems = compare(undisturbed.folder, elastic.folder, SamplePlan(tiles, GLOBAL_BATCH, 0, PHASES[0]))
    print("\n".join(problems) or "same samples, same final loss")
    return 1 if problems else 0


def grow_and_shrink(run: SmallRun, nodes: Cluster) -> None:
    """Train on one node, on two once it has trained, and on one again once both have."""
    run.start()
    wait_for_workers(run, 1)
    added = time.monotonic()
    node = add_node(nodes, NODE_CPUS)
    wait_for_workers(run, 2)
    print(f"{time.monotonic() - added:.0f} s from a new node to the next step, on two workers", flush=True)
    run.supersede()
    killed = time.monotonic()
    psutil.Process(raylet_pid(node)).kill()
    nodes.remove_node(node, allow_graceful=False)
    wait_for_workers(run, 1)
    print(f"{time.monotonic() - killed:.0f} s from its raylet's end to the next step, on one worker", flush=True)
    run.finish()


def wait_for_workers(run: SmallRun, count: int) -> None:
    """Until an attempt on so many workers has done a step behind those before."""
    run.wait_until(
        lambda: run.attempt() is not None and world_sizes(run.folder, PHASES[0])[-1:] == [count],
        f"training on {count} worker(s)",
        pause=0.1,
    )


def compare(undisturbed: Path, elastic: Path, plan: SamplePlan) -> list[str]:
    """What is wrong with a run that should have grown, shrunk, and learned the same, in words."""
    problems, phase = [], PHASES[0]
    sizes = world_sizes(elastic, phase)
    changes = [size for size, before in zip(sizes, [0, *sizes], strict=False) if size != before]
    if changes != [1, 2, 1]:
        problems.append(f"it trained on {', '.join(map(str, sizes))} workers in turn, expected one, two and one")
    one, other = (read_events(run, phase, "step") for run in (undisturbed, elastic))
    problems += unplanned_samples(elastic, phase, plan, one[-1]["step"])
    if [record["step"] for record in other] != [record["step"] for record in one]:
        problems.append(f"it recorded {len(other)} steps, the undisturbed run {len(one)}")
    losses = [run[-1]["loss"] for run in (one, other)]
    validation = [read_events(run, phase, "validation")[-1]["loss"] for run in (undisturbed, elastic)]
    for what, (first, second) in {"loss": losses, "validation loss": validation}.items():
        print(f"final {what}: undisturbed {first:.6f}, elastic {second:.6f}", flush=True)
        if not abs(second - first) <= TOLERANCE * abs(first):
            problems.append(f"the final {what} is {second}, of the undisturbed run {first}")
    return problems


if __name__ == "__main__":
    sys.exit(main())
