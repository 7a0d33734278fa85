"""What planning costs: one rank's batches of a billion samples, beside a permutation array of numpy's, in one run.

The array is the usual way: every rank draws the order of an epoch and cuts its slice out. It is drawn over fewer
samples, for a billion would fill 8 GB; time and memory grow with them, those of a plan do not. Each is measured in a
process of its own that imported nothing else.

    python benchmarks/plan.py                          # 1e9 samples, 1024 ranks of 8, arrays of 1e7
    python benchmarks/plan.py --ranks 64 --batch 128 --samples 100000000
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import numpy as np

KINDS = ("full", "windowed", "mixed", "mixed windowed", "array")
EPOCHS = 50
MEGABYTE = 1e6


def main() -> None:
    arguments = _parse()
    if arguments.child:
        print(json.dumps(_measure(arguments)))
        return
    print(f"{arguments.samples:,} samples, {arguments.ranks} ranks of {arguments.batch} samples")
    results = {}
    for kind in KINDS:
        results[kind] = result = _run_child(kind)
        print(
            f"{kind:<15} construction {_milliseconds(result['construction'])}, a rank's batch median "
            f"{_milliseconds(result['median'])}, 99 % {_milliseconds(result['worst'])}, "
            f"memory {result['memory'] / MEGABYTE:.0f} MB, {EPOCHS} epochs {result['steps']:,} steps",
            flush=True,
        )
    ours, array = results["full"], results["array"]
    added = (array["memory"] - array["empty"]) / max(ours["memory"] - ours["empty"], 4096)
    print(
        f"array is over {arguments.array_samples:,} samples only; numpy alone takes {ours['empty'] / MEGABYTE:.0f} MB"
    )
    print(f"ratio  array / full: construction {array['construction'] / ours['construction']:.0f}, "
          f"memory on top of numpy {added:.0f}")  # fmt: skip


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10**9, help="of the plans")
    parser.add_argument("--array-samples", type=int, default=10**7, help="of the permutation array")
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8, help="samples of a rank's batch")
    parser.add_argument("--calls", type=int, default=1000, help="timed batches, in runs of 10 steps anywhere")
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    return parser.parse_args()


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3f} ms"


def _run_child(kind: str) -> dict:
    done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--child", kind], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{kind} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def _resident() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def _measure(arguments: argparse.Namespace) -> dict:
    empty = _resident()
    make = _array if arguments.child == "array" else _plan
    if make is _plan:
        import ray_pipeline.data.plan  # noqa: F401  what an import takes is no part of a construction
    started = time.perf_counter()
    steps, rank_batch = make(arguments)
    construction = time.perf_counter() - started
    rng = np.random.default_rng(0)
    seconds = []
    # a run of steps from each of many places: as a worker asks, and with the keys of an epoch or window often new
    for first in rng.integers(0, steps - 10, arguments.calls // 10).tolist():
        rank = int(rng.integers(arguments.ranks))
        for step in range(first, first + 10):
            started = time.perf_counter()
            rank_batch(step, rank)
            seconds.append(time.perf_counter() - started)
    median, worst = np.percentile(seconds, (50, 99))
    return {
        "construction": construction,
        "median": median,
        "worst": worst,
        "memory": _resident(),
        "empty": empty,
        "steps": steps,
    }


def _plan(arguments: argparse.Namespace):
    from ray_pipeline.data.plan import MixedPlan, SamplePlan

    global_batch = arguments.ranks * arguments.batch
    windowed = {"shard_rows": 1024, "window": 100_000} if "windowed" in arguments.child else {}
    if "mixed" in arguments.child:
        small, middle = arguments.samples // 100, arguments.samples // 4
        sizes = (arguments.samples - middle - small, middle, small)
        plans = [SamplePlan(size, global_batch, 0, str(number), **windowed) for number, size in enumerate(sizes)]
        plan = MixedPlan(plans, (5, 3, 2), global_batch, seed=0)
    else:
        plan = SamplePlan(arguments.samples, global_batch, seed=0, **windowed)
    return plan.steps(EPOCHS), lambda step, rank: plan.rank_batch(step, rank, arguments.ranks)


def _array(arguments: argparse.Namespace):
    samples, global_batch = arguments.array_samples, arguments.ranks * arguments.batch
    order = np.random.default_rng(0).permutation(samples)

    def rank_batch(step: int, rank: int) -> np.ndarray:
        # of the epoch that is in memory; each further epoch costs another construction
        start = step * global_batch % (samples - global_batch) + rank * arguments.batch
        return order[start : start + arguments.batch].copy()

    return -(-samples * EPOCHS // global_batch), rank_batch


if __name__ == "__main__":
    main()
