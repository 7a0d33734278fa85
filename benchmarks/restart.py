"""How soon training goes on after the SIGKILL of a worker, beside an empty Ray Train loop killed in the same way.

    python benchmarks/restart.py

One Ray, on which both run in turn. The empty loop only writes down that it started; ours counts from the kill to the
first step that is recorded after it. Exits 1 where ours goes on more than 5 s later.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from disturbances import small_cluster
from small_run import TRAIN_WORKER, SmallRun, descendants, prepare

MOST_SECONDS_LATER = 5.0
#: between a start and the next kill; ours commits meanwhile
_SECONDS_OF_TRAINING = 5.0
_EMPTY_LOOP = """
import sys, time
import ray, ray.train, ray.train.torch

def loop(config):
    with open(config["starts"], "a") as file:
        file.write("started\\n")
    while True:
        time.sleep(0.05)

ray.init(log_to_driver=False)
ray.train.torch.TorchTrainer(
    loop,
    train_loop_config={"starts": sys.argv[1]},
    scaling_config=ray.train.ScalingConfig(num_workers=1),
    run_config=ray.train.RunConfig(
        storage_path=sys.argv[2], failure_config=ray.train.FailureConfig(max_failures=1000)
    ),
).fit()
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2, help="of each kind, in turn")
    parser.add_argument("--kills", type=int, default=3, help="a round")
    arguments = parser.parse_args()
    os.environ.pop("RAY_ADDRESS", None)
    seconds: dict[str, list[float]] = {"empty": [], "ours": []}
    with tempfile.TemporaryDirectory() as folder, small_cluster((2,)) as nodes:
        config, _ = prepare(Path(folder), 8, (100_000, 1))
        for number in range(arguments.rounds):
            work = Path(folder, str(number))
            work.mkdir()
            for kind, kill in (("empty", kill_empty_loop), ("ours", kill_ours)):
                found = kill(config, work, nodes.address, arguments.kills)
                print(f"round {number + 1} {kind:<5} {' '.join(f'{s:.1f}' for s in found)} s", flush=True)
                seconds[kind] += found
    median = {kind: statistics.median(values) for kind, values in seconds.items()}
    later = median["ours"] - median["empty"]
    print(f"from kill to training, median: empty loop {median['empty']:.1f} s, ours {median['ours']:.1f} s")
    print(f"ours is {later:.1f} s later (at most {MOST_SECONDS_LATER:.0f})")
    return 0 if later <= MOST_SECONDS_LATER else 1


def kill_empty_loop(_config: Path, work: Path, address: str, kills: int) -> list[float]:
    """Seconds from each kill of its worker until the loop runs again."""
    starts, log = work / "starts", work / "empty.log"
    starts.touch()
    words = [sys.executable, "-c", _EMPTY_LOOP, str(starts), str(work / "storage")]
    environment = os.environ | {"RAY_ADDRESS": address, "RAY_USAGE_STATS_ENABLED": "0"}
    with log.open("wb") as file:
        driver = psutil.Popen(words, stdout=file, stderr=file, env=environment)

    def wait_for_start(number: int) -> None:
        while len(starts.read_text().splitlines()) < number:
            if driver.poll() is not None:
                raise SystemExit(f"the empty loop ended:\n{log.read_text()}")
            time.sleep(0.01)

    seconds = []
    for number in range(kills):
        wait_for_start(number + 1)
        time.sleep(_SECONDS_OF_TRAINING)
        seconds.append(timed(lambda number=number: wait_for_start(number + 2)))
    end(driver)
    return seconds


def kill_ours(config: Path, work: Path, address: str, kills: int) -> list[float]:
    """Seconds from each kill of its worker until a step is recorded again."""
    run = SmallRun(config, work / "run", {"ray.max_failures": 1000}, {"RAY_ADDRESS": address})
    run.start()
    seconds = []
    for _ in range(kills):
        run.wait_until(run.attempt, "training")
        time.sleep(_SECONDS_OF_TRAINING)
        run.supersede()
        seconds.append(timed(lambda: run.wait_until(run.attempt, "training again")))
    end(run.driver)
    return seconds


def timed(wait: Callable[[], object]) -> float:
    """Kill the worker and wait -> seconds."""
    (worker,) = descendants(psutil.Process(), TRAIN_WORKER)
    started = time.perf_counter()
    worker.kill()
    wait()
    return time.perf_counter() - started


def end(driver: psutil.Popen) -> None:
    """End a driver, and wait until Ray has ended its workers."""
    workers = descendants(psutil.Process(), TRAIN_WORKER)
    driver.kill()
    driver.wait()
    if psutil.wait_procs(workers, timeout=120)[1]:
        raise SystemExit("workers outlived their driver by 120 s")


if __name__ == "__main__":
    sys.exit(main())
