"""Do two runs end with equal bits, and did each step take the samples that were planned?"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ray_pipeline.checkpoints import CheckpointStore
from ray_pipeline.data.plan import SamplePlan

_SAMPLES_FILE = re.compile(r"attempt_(\d+)_rank_(\d+)\.jsonl")


def last_tensors(store: str | Path, phase: str) -> dict[str, Tensor]:
    """Every tensor of a phase's last checkpoint (weights, optimizer, averages), by group and name."""
    checkpoints = CheckpointStore(store)
    return dict(_tensors(checkpoints, checkpoints.names(phase)[-1]))


def snapshot_tensors(run: Path, phase: str) -> dict[str, Tensor]:
    """Every tensor of the stored averages of a phase, by checkpoint, group and name."""
    store = CheckpointStore(run / "ema_snapshots" / phase)
    return {f"{name}/{key}": tensor for name in store.names(phase) for key, tensor in _tensors(store, name)}


def _tensors(store: CheckpointStore, name: str) -> Iterator[tuple[str, Tensor]]:
    checkpoint = store.load(name)
    for group in checkpoint:
        for key, tensor in checkpoint[group].items():
            yield f"{group}/{key}", tensor


def differing(expected: dict[str, Tensor], found: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are missing, additional or not equal in every bit."""
    return sorted(
        name
        for name in expected.keys() | found.keys()
        if name not in expected or name not in found or not equal_bits(expected[name], found[name])
    )


def equal_bits(one: Tensor, other: Tensor) -> bool:
    """Equal type, shape and bytes: a NaN equals itself, 0 does not equal -0."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))


def logged_samples(run: Path, phase: str) -> dict[int, dict[int, dict[int, list[int]]]]:
    """{attempt: {step (from 1): {rank: positions in the endless sequence}}} from a run's sample log; a last line that
    a kill tore is left out. {} without a log."""
    attempts: dict[int, dict[int, dict[int, list[int]]]] = defaultdict(lambda: defaultdict(dict))
    for path in sorted((run / "logs" / "samples" / phase).glob("*")):
        attempt, rank = map(int, _SAMPLES_FILE.fullmatch(path.name).groups())
        for line in path.read_bytes().split(b"\n")[:-1]:
            record = json.loads(line)
            if record["step"] in attempts[attempt] and rank in attempts[attempt][record["step"]]:
                raise SystemExit(f"{path} has step {record['step']} twice")
            attempts[attempt][record["step"]][rank] = record["index"]
    return {number: dict(steps) for number, steps in sorted(attempts.items())}


def world_sizes(run: Path, phase: str) -> list[int]:
    """Ranks of each attempt that did a step, in turn."""
    return [max(map(len, steps.values())) for steps in logged_samples(run, phase).values() if steps]


def unplanned_samples(run: Path, phase: str, plan: SamplePlan, total_steps: int) -> list[str]:
    """What a phase's sample log has otherwise than planned, in words; [] where each step took its samples exactly.

    A kill may come between the lines of two ranks: the last step of an attempt may lack a rank, if another attempt
    did that step as a whole.
    """
    problems, done = [], set()
    for attempt, steps in logged_samples(run, phase).items():
        for step, ranks in sorted(steps.items()):
            taken = sorted(position for index in ranks.values() for position in index)
            planned = plan.positions(step - 1).tolist()
            if taken == planned:
                done.add(step)
            elif step != max(steps) or not set(taken) < set(planned) or len(set(taken)) < len(taken):
                problems.append(f"{phase} attempt {attempt} step {step} took {taken}, planned {planned}")
        if sorted(steps) != list(range(min(steps), max(steps) + 1)):
            problems.append(f"{phase} attempt {attempt} left out a step between {min(steps)} and {max(steps)}")
    undone = sorted(set(range(1, total_steps + 1)) ^ done)
    if undone:
        problems.append(
            f"{phase}: of {total_steps} steps, {np.array(undone)} were not done as a whole or not asked for"
        )
    return problems
