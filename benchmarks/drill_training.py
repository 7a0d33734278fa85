"""Disturb a small training run at random moments: does it end as an undisturbed one, bit for bit?

    python benchmarks/drill_training.py            # 20 kills, and 4 more with checkpoints on S3
    python benchmarks/drill_training.py --short    # 4 kills

Both phases, the second one low-rank, with dropout and in bf16, on two workers and on three, on a Ray of its own and on
a cluster of several nodes. A kill counts when its process was there, training, and is gone; a moment that missed is
drawn again. Prints a line a kill. At the end of each run the last checkpoint of each phase (weights, averages,
optimizer) and the stored averages are compared with those of an undisturbed run on the same latents, and the sample log
with the plan; what the command said must be ASCII. Exits 1 where anything differs.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pyarrow.fs
from disturbances import KINDS, NODE_CPUS, Hit, Target, add_node, small_cluster
from run_proof import differing, last_tensors, logged_samples, snapshot_tensors, unplanned_samples
from small_run import CREDENTIALS, PHASES, Missed, Place, SmallRun, prepare

from ray_pipeline.checkpoints import CheckpointStore
from ray_pipeline.data.plan import SamplePlan

GLOBAL_BATCH = 8
#: a command that is refused for want of nodes has ended after so many
_LATE_SECONDS = 5.0
_SERVE = """
import logging, sys, threading
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server
logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
server = make_server(sys.argv[1], 0, DomainDispatcherApplication(create_backend_app), threaded=True)
threading.Thread(target=server.serve_forever, daemon=True).start()
print(server.server_port)
sys.stdin.read()
"""


@dataclass(frozen=True)
class Part:
    """Disturbances of runs on `workers` workers. cpus: of the nodes of a cluster that the command joins; none: it
    starts a Ray of its own. late: all nodes but the head come when the first command waits for them, as an autoscaler
    adds them."""

    name: str
    workers: int
    kinds: tuple[str, ...]
    cpus: tuple[int, ...] = ()
    late: bool = False
    s3: bool = False


SHORT_KINDS = ("worker", "driver", "SIGTERM", "mid-save")
FULL = (
    Part("two workers", 2, ("worker", "driver", "SIGTERM", "SIGINT", "mid-save") * 2 + ("mid-save",)),
    Part("three workers", 3, ("worker", "driver", "SIGTERM", "mid-save")),
    Part("cluster", 2, ("raylet",) * 3 + ("driver", "worker"), (0, NODE_CPUS, NODE_CPUS)),
    Part("s3", 2, SHORT_KINDS, s3=True),
)
# a head and two nodes, each with a worker; one Ray for all commands, as starting one costs 5 s
SHORT = (Part("two nodes", 2, SHORT_KINDS, (0, NODE_CPUS, NODE_CPUS), late=True),)


@dataclass
class Drill:
    """What all parts share: where it happens, steps of each phase, and one undisturbed run for each number of
    workers."""

    work: Path
    config: Path
    plans: dict[str, SamplePlan]
    steps: dict[str, int]
    chances: random.Random
    undisturbed: dict[int, SmallRun]
    kills: int = 0

    def moment(self, after: Place | None = None) -> Place:
        """A place of the run at random, behind `after`; the run's last one where nothing is left."""
        places = [Place(number, step) for number, name in enumerate(PHASES) for step in range(1, self.steps[name])]
        return self.chances.choice([place for place in places if after is None or place > after] or places[-1:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="four kills")
    parser.add_argument("--parts", help=f"of the long drill, some of {', '.join(part.name for part in FULL)}")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--work", type=Path, help="an empty folder to work in, which is kept")
    arguments = parser.parse_args()
    chosen = arguments.parts.split(",") if arguments.parts else [part.name for part in FULL]
    parts = SHORT if arguments.short else [part for part in FULL if part.name in chosen]
    epochs = (5, 4) if arguments.short else (30, 24)
    os.environ.pop("RAY_ADDRESS", None)
    os.environ.update(CREDENTIALS)
    with nullcontext(arguments.work) if arguments.work else tempfile.TemporaryDirectory() as folder:
        work = Path(folder).absolute()
        config, tiles = prepare(work, 8, epochs)
        plans = {name: SamplePlan(tiles, GLOBAL_BATCH, seed=0, phase=name) for name in PHASES}
        steps = {name: plans[name].steps(count) for name, count in zip(PHASES, epochs, strict=True)}
        drill = Drill(work, config, plans, steps, random.Random(arguments.seed), {})
        problems = [problem for part in parts for problem in disturb_part(drill, part)]
    print("\n".join(problems) or f"{drill.kills} kills: every run ended as the undisturbed one, bit for bit")
    return 1 if problems else 0


def disturb_part(drill: Drill, part: Part) -> list[str]:
    """Runs that are disturbed, until each of the part's kinds has hit -> what is wrong, in words."""
    problems: list[str] = []
    settings = {"ray.num_workers": part.workers}
    if len(part.cpus) > 1:
        settings["ray.cpus_per_worker"] = 0.75 * NODE_CPUS  # one worker a node
    if part.late:
        settings["ray.autoscaling"] = True
    with (
        small_cluster(part.cpus[: 1 if part.late else None]) as nodes,
        s3_store() if part.s3 else nullcontext() as bucket,
    ):
        environment = {"RAY_ADDRESS": nodes.address} if nodes else {}
        if part.workers not in drill.undisturbed:
            run = SmallRun(drill.config, drill.work / f"undisturbed_{part.workers}", settings, environment)
            run.start()
            if part.late:
                run.wait_until((run.folder / "config.yaml").exists, "its beginning")
                time.sleep(_LATE_SECONDS)
                for count in part.cpus[1:]:
                    add_node(nodes, count)
            run.finish()
            drill.undisturbed[part.workers] = run
        kinds, number = drill.chances.sample(part.kinds, len(part.kinds)), 0
        while kinds:
            number += 1
            folder = drill.work / f"{part.name.replace(' ', '_')}_{number}"
            store = bucket.format(run=folder.name) if bucket else str(folder / "checkpoints")
            run = SmallRun(
                drill.config, folder, settings | ({"checkpoint.store": store} if bucket else {}), environment
            )
            hits = disturb(drill, Target(run, store, nodes, drill.chances), kinds)
            kinds = kinds[len(hits) :]
            found = [problem for hit in hits for problem in hit.problems] + compare(drill, part, run, store)
            problems += [f"{folder.name}: {problem}" for problem in found]
    return problems


def disturb(drill: Drill, target: Target, kinds: list[str]) -> list[Hit]:
    """One run, disturbed at growing places until each kind has hit, or until it ends."""
    run, hits = target.run, []
    run.start()
    for kind, moment in zip(kinds, sorted(drill.moment() for _ in kinds), strict=True):
        hit = strike(drill, target, kind, moment)
        if hit is None:
            break
        drill.kills += 1
        struck = time.monotonic()
        if hit.driver_ended:
            run.start(resume=True)
        try:
            began = run.wait_until(run.went_on, "the run went on")
        except Missed:  # it was stopped behind its last step, and nothing was left to do
            began = Place(len(PHASES) - 1, drill.steps[PHASES[-1]])
        if hit.keeps and began < hit.place:
            hit.problems.append(f"{hit.kind} at {hit.place}, but the run went on behind {began}")
        print(
            f"kill {drill.kills:>2}: {run.folder.name}, {kind} at {hit.place}: {hit.words}; went on behind {began} "
            f"{time.monotonic() - struck:.0f} s later",
            flush=True,
        )
        hits.append(hit)
    run.finish()
    return hits


def strike(drill: Drill, target: Target, kind: str, moment: Place) -> Hit | None:
    """Disturb a run when it has come to `moment`; one that misses is drawn again. None when the run ends first."""
    run = target.run
    while True:
        try:
            run.wait_until(lambda moment=moment: (now := run.attempt()) and now.last >= moment, str(moment))
            time.sleep(0.1 * drill.chances.random())  # somewhere in the step
            return KINDS[kind](target)
        except Missed as reason:
            print(f"missed:  {run.folder.name}, {kind} at {moment}: {reason}", flush=True)
        if run.driver.poll() is not None:
            return None
        moment = drill.moment(moment)


def compare(drill: Drill, part: Part, run: SmallRun, store: str) -> list[str]:
    """How a run differs from the undisturbed one and from the plan, in words."""
    undisturbed, problems, compared, attempts = drill.undisturbed[part.workers].folder, [], 0, 0
    for phase, plan in drill.plans.items():
        pairs = {
            "last checkpoint": (last_tensors(undisturbed / "checkpoints", phase), last_tensors(store, phase)),
            "stored averages": (snapshot_tensors(undisturbed, phase), snapshot_tensors(run.folder, phase)),
        }
        for what, pair in pairs.items():
            compared += len(pair[0])
            names = differing(*pair)
            if names or not pair[0]:
                problems.append(f"{phase}: {len(names)} of {len(pair[0])} tensors of the {what} differ: {names[:3]}")
        kept, expected = (CheckpointStore(place).names(phase) for place in (store, undisturbed / "checkpoints"))
        if kept != expected:
            problems.append(f"{phase}: checkpoints {kept} are kept, expected {expected}")
        problems += unplanned_samples(run.folder, phase, plan, drill.steps[phase])
        attempts += len(logged_samples(run.folder, phase))
    if not run.log.read_bytes().isascii():
        problems.append(f"{run.log} holds bytes that are not ASCII")
    words = "; ".join(problems) or f"{compared} tensors equal bit for bit, samples as planned in {attempts} attempts"
    print(f"{run.folder.name}: {words}", flush=True)
    return problems


@contextmanager
def s3_store(host: str = "127.0.0.1", within: Sequence[str] = ()) -> Iterator[str]:
    """moto's S3 in a process of its own on the loopback interface -> a URI with {run} to fill in.

    host: another address to listen on; within: words before the command, such as those of one that runs it elsewhere.
    """
    server = subprocess.Popen(
        [*within, sys.executable, "-u", "-c", _SERVE, host], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        port = int(server.stdout.readline())
        options = f"endpoint_override={host}:{port}&scheme=http"
        filesystem, _ = pyarrow.fs.FileSystem.from_uri(f"s3://drill?{options}&allow_bucket_creation=true")
        filesystem.create_dir("drill")
        yield f"s3://drill/{{run}}?{options}"
    finally:
        server.stdin.close()  # which ends it
        server.wait(60)


if __name__ == "__main__":
    sys.exit(main())
