"""What a job will take, before it runs: steps, memory, disk and time. `train --dry-run` shows it."""

from __future__ import annotations

import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ray_pipeline.config import Config, PhaseConfig
from ray_pipeline.data.encode import EncodeJob
from ray_pipeline.errors import UserError
from ray_pipeline.monitoring.progress import format_bytes, format_count, format_seconds
from ray_pipeline.training.setup import make_network, make_plan, precision

#: share of the measured matrix-multiply rate that a whole training step is assumed to reach
ASSUMED_EFFICIENCY = 0.5
_FLOAT = 4
_MARGIN = 1.05  # room for logs, pictures and file headers


@dataclass(frozen=True)
class PhaseEstimate:
    """One phase: parameters (trainable), optimizer steps, samples, floating-point operations of all of it, bytes of
    one checkpoint, and how many are kept at once at most."""

    name: str
    parameters: int
    steps: int
    samples: int
    flops: float
    checkpoint_bytes: int
    checkpoints: int


def estimate_phase(config: Config, phase: PhaseConfig, num_samples: int) -> PhaseEstimate:
    """Count, do not run: the network is built without memory."""
    with torch.device("meta"):
        network = make_network(config, bool(phase.condition_types))
    parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in network.parameters()) - parameters
    copies = 4 if config.ema.enabled else 3  # weights, two Adam moments, EMA
    return PhaseEstimate(
        name=phase.name,
        parameters=parameters,
        steps=make_plan(config, phase, num_samples).steps(phase.epochs),
        samples=num_samples * phase.epochs,
        flops=num_samples * phase.epochs * sample_flops(config, phase),
        checkpoint_bytes=_FLOAT * (copies * parameters + frozen),
        checkpoints=len(phase.save_epochs) + 2,
    )


def sample_flops(config: Config, phase: PhaseConfig) -> float:
    """Floating-point operations of one trained sample: 2 a multiply-accumulate, backward twice the forward pass.

    A block has 12 hidden^2 parameters a token, 6 hidden^2 of adaLN a group, and attention over all keys.
    """
    shape = config.model.shape
    hidden, depth = shape["hidden_size"], shape["depth"]
    tokens = (config.model.latent_size // shape["patch_size"]) ** 2
    groups = 1 + len(phase.condition_types)
    linear = depth * groups * (12 * tokens * hidden**2 + 6 * hidden**2)
    attention = depth * 2 * hidden * tokens * (groups * tokens + (groups - 1) * tokens)
    return 6.0 * (linear + attention)


def worker_memory(config: Config, phase: PhaseConfig) -> int:
    """Bytes a worker needs for weights, gradients, Adam, EMA and the activations of one micro-step, about."""
    estimate = estimate_phase(config, phase, 1)
    shape = config.model.shape
    tokens = (config.model.latent_size // shape["patch_size"]) ** 2 * (1 + len(phase.condition_types))
    width = 2 if config.train.precision == "bf16" else 4
    # about 34 numbers of hidden size a token and block are kept for the backward pass
    activations = config.train.batch_size * tokens * shape["depth"] * 34 * shape["hidden_size"] * width
    return estimate.checkpoint_bytes + _FLOAT * estimate.parameters + activations


def output_bytes(phases: list[PhaseEstimate]) -> int:
    """Disk that the run directory needs at most."""
    return int(_MARGIN * sum(phase.checkpoint_bytes * phase.checkpoints for phase in phases)) + 64 * 2**20


def latents_bytes(job: EncodeJob, tiles: int) -> int:
    """Disk that the latent store needs."""
    return int(_MARGIN * tiles * job.row_bytes)


def check_disk(folder: str | Path, need: int, key: str) -> None:
    """UserError when the file system of `folder` (which need not exist yet) has less than `need` bytes free."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < need:
        raise UserError(
            f"{key}={folder} has {format_bytes(free)} free, but {format_bytes(need)} are needed; free some space, "
            f"choose another disk with --set {key}=FOLDER, or keep fewer checkpoints"
        )


def check_writable(folder: str | Path, key: str) -> None:
    """UserError when nothing can be written below `folder`."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"{key}={folder} cannot be written ({place} is no writable folder); choose another one")


def matmul_rate(device: torch.device, kind: str) -> float:
    """Floating-point operations a second of a 1024 x 1024 matrix product on this device, measured for 0.5 s."""
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    a = torch.randn(1024, 1024, device=device).to(dtype)
    (a @ a).sum().item()
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < 0.5:
        (a @ a).sum().item()
        count += 1
    return 2 * 1024**3 * count / (time.perf_counter() - started)


def report(config: Config, job: EncodeJob, tiles: dict[str, int], stored: bool) -> str:
    """The text of `train --dry-run`."""
    phases = [estimate_phase(config, phase, tiles["train"]) for phase in config.phases]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = precision(config, device.type)
    rate = matmul_rate(device, kind)
    workers = config.ray.num_workers if device.type == "cuda" else 1
    accumulation = math.ceil(config.train.global_batch / config.ray.num_workers / config.train.batch_size)
    lines = [
        f"tiles        train {tiles['train']}, val {tiles['val']}, test {tiles['test']}",
        f"latents      {job.store}: {format_bytes(latents_bytes(job, sum(tiles.values())))}"
        + (" (stored already)" if stored else ""),
        f"workers      {config.ray.num_workers}, global batch {config.train.global_batch} = "
        f"{accumulation} micro-step(s) of {config.train.batch_size} on each",
    ]
    total = 0.0
    for phase, estimate in zip(config.phases, phases, strict=True):
        seconds = estimate.flops / (rate * ASSUMED_EFFICIENCY * workers)
        total += seconds
        lines += [
            f"{phase.name}",
            f"  network    {format_count(estimate.parameters)} trainable parameters, "
            f"{sample_flops(config, phase) / 1e9:.1f} GFLOP a sample",
            f"  steps      {estimate.steps} in {phase.epochs} epochs, {format_count(estimate.samples)} samples",
            f"  saves      epochs {', '.join(map(str, phase.save_epochs))}, best, last: "
            f"{format_bytes(estimate.checkpoint_bytes)} each",
            f"  memory     {format_bytes(worker_memory(config, phase))} a worker, about",
            f"  time       {format_seconds(seconds)}, about",
        ]
    lines += [
        f"output       {config.output_dir}: up to {format_bytes(output_bytes(phases))}",
        f"time         {format_seconds(total)} for all phases, if a step reaches {ASSUMED_EFFICIENCY:.0%} of the "
        f"{rate / 1e9:.0f} GFLOP/s ({kind} matrix product on {device.type}) measured on this machine just now",
    ]
    return "\n".join(lines)
