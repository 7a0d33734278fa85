"""What a job will take, before it runs: steps, memory, disk and time. `train --dry-run` shows it."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ray_pipeline.config import Config
from ray_pipeline.data.encode_job import EncodeJob
from ray_pipeline.data.plan import SamplePlan
from ray_pipeline.data.reachable import check_reachable, naming
from ray_pipeline.errors import UserError
from ray_pipeline.models.noise_embedding import FREQUENCIES
from ray_pipeline.monitoring.progress import format_bytes, format_count, format_seconds
from ray_pipeline.phase_sections import PhaseConfig
from ray_pipeline.storage import Folder, is_uri
from ray_pipeline.sweep_records import read_winner
from ray_pipeline.sweep_space import continues, count, decays, phase_index
from ray_pipeline.training.build import make_network, precision
from ray_pipeline.training.device_peak import matmul_rate

#: share of the measured matrix-multiply rate that a whole training step is assumed to reach
ASSUMED_EFFICIENCY = 0.5
_FLOAT, _HALF = 4, 2
#: kept for the backward pass, a token, block and unit of hidden size; counted with saved-tensor hooks
_ACTIVATION_BYTES = {"fp32": 85, "bf16": 55}
_PROBE = "ray_pipeline_writes_here"
_MARGIN = 1.05  # room for logs, pictures and file headers


@dataclass(frozen=True)
class PhaseEstimate:
    """One phase: parameters (trainable), optimizer steps, samples, floating-point operations of all of it, bytes of
    one checkpoint, how many are kept at once at most, and bytes of all snapshots of averages."""

    name: str
    parameters: int
    steps: int
    samples: int
    flops: float
    checkpoint_bytes: int
    checkpoints: int
    snapshot_bytes: int


def estimate_phase(config: Config, phase: PhaseConfig, num_samples: int) -> PhaseEstimate:
    """Count, do not run: the network is built without memory."""
    with torch.device("meta"):
        network = make_network(config, phase)
    parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in network.parameters()) - parameters
    ema = config.ema
    tracks = 1 + len(ema.more_decays) + len(ema.power_stds) if ema.enabled else 0
    copies = 3 + tracks  # weights, two Adam moments, averages
    return PhaseEstimate(
        name=phase.name,
        parameters=parameters,
        steps=SamplePlan(num_samples, config.train.global_batch, config.seed).steps(phase.epochs),
        samples=num_samples * phase.epochs,
        flops=num_samples * phase.epochs * sample_flops(config, phase),
        checkpoint_bytes=_FLOAT * (copies * parameters + frozen),
        # the best and the last beside those of save_epochs, and a new one is committed before an old one goes; the
        # last epoch, where it is one of save_epochs, is not there before it is the new one
        checkpoints=len(phase.save_epochs) + (2 if phase.epochs in phase.save_epochs else 3),
        snapshot_bytes=_HALF * parameters * len(ema.power_stds) * ema.snapshots if ema.enabled else 0,
    )


@dataclass(frozen=True)
class SweepEstimate:
    """A sweep: trainings, optimizer steps of each, the step at which they end, floating-point operations of all, and
    disk until the best one is gone on from."""

    trials: int
    steps: int
    last_step: int
    flops: float
    bytes: int


def estimate_sweep(config: Config, phases: Sequence[PhaseEstimate]) -> SweepEstimate | None:
    """None where there is no sweep to come."""
    if not config.sweep.enabled or read_winner(config.output_dir):
        return None
    sweep, index = config.sweep, phase_index(config)
    share, estimate = sweep.epochs / config.phases[index].epochs, phases[index]
    followed = {config.ema.decay, *config.ema.more_decays}
    more = len({*decays(config), *followed}) - len(followed)
    checkpoint = estimate.checkpoint_bytes + _FLOAT * estimate.parameters * more
    trials, steps = count(config), math.ceil(estimate.steps * share)
    kept = sum(epoch <= sweep.epochs for epoch in config.phases[index].save_epochs) if not continues(config) else 0
    return SweepEstimate(
        trials=trials,
        steps=steps,
        last_step=steps + (estimate.steps if continues(config) else 0),
        flops=trials * share * estimate.flops,
        # of each trial the best and the last beside those of save_epochs, and a new one before an old one goes
        bytes=int(trials * ((3 + kept) * checkpoint + share * estimate.snapshot_bytes)),
    )


def sample_flops(config: Config, phase: PhaseConfig) -> float:
    """Floating-point operations of one trained sample: 2 a multiply-accumulate, backward twice the forward pass, or as
    much as it where the weights are frozen.

    A block has 12 hidden^2 parameters a token, 6 hidden^2 of adaLN a condition, and attention over all keys. The last
    block gives only queries, keys and values of the hints; one clean condition serves all hints of a micro-step.
    """
    shape = config.model.shape
    hidden, depth = shape["hidden_size"], shape["depth"]
    tokens, hints = _tokens(config), len(phase.condition_types)
    patch = config.model.latent_channels * shape["patch_size"] ** 2 * hidden
    blocks = tokens * hidden**2 * (12 * depth + hints * (12 * (depth - 1) + 3))
    attention = 2 * hidden * tokens**2 * (depth * (1 + hints) + hints * (depth - 1))
    embedding = FREQUENCIES * hidden + hidden**2
    conditions = (6 * depth * hidden**2 + embedding) * (1 + bool(hints) / config.train.batch_size) + 2 * hidden**2
    final = tokens * patch
    # images and hints need no gradient themselves; a hint may pass the aligned patch embedding too
    aligned = tokens * patch * hints * config.hint_control.aligned
    embedded = tokens * patch * (1 + hints)
    if phase.trainable == "lora":
        return (
            4.0 * (blocks + final + aligned)
            + 6.0 * (attention + _lora_products(config, hints))
            + 2.0 * (conditions + embedded)
        )
    return 6.0 * (blocks + attention + conditions + final) + 4.0 * (embedded + aligned)


def _lora_products(config: Config, hints: int) -> float:
    """Multiply-accumulates of the low-rank parts that hint tokens pass, a forward pass."""
    hidden, depth, control = config.model.shape["hidden_size"], config.model.shape["depth"], config.hint_control
    width = {"qkv": 4 * depth, "proj": 2 * (depth - 1), "fc1": 5 * (depth - 1), "fc2": 5 * (depth - 1)}
    total = sum(width.get(name, 0) for name in control.lora_targets)
    return hints * _tokens(config) * control.lora_rank * hidden * total


def worker_memory(config: Config, phase: PhaseConfig, device_type: str) -> int:
    """Bytes a worker on such a device needs for weights, gradients, Adam, EMA and the activations of one micro-step,
    about.

    In bf16, autocast keeps a bf16 copy of the weights as well.
    """
    kind = precision(config, device_type)
    estimate = estimate_phase(config, phase, 1)
    shape = config.model.shape
    hints, width = len(phase.condition_types), config.train.batch_size * _tokens(config) * shape["hidden_size"]
    one_block = width * (1 + hints) * _ACTIVATION_BYTES[kind]
    activations = shape["depth"] * one_block
    if config.train.activation_checkpointing:
        # what enters each block: tokens, and keys and values of hints; and all of the block that is computed again
        activations = shape["depth"] * width * (1 + 3 * hints) * _FLOAT + one_block
    copies = 2 * estimate.parameters if kind == "bf16" else 0
    return estimate.checkpoint_bytes + _FLOAT * estimate.parameters + copies + activations


def _tokens(config: Config) -> int:
    """Tokens of an image, and of each hint."""
    return (config.model.latent_size // config.model.shape["patch_size"]) ** 2


def output_bytes(phases: Sequence[PhaseEstimate], sweep: SweepEstimate | None = None) -> int:
    """Disk that the run directory needs at most."""
    needed = sum(phase.checkpoint_bytes * phase.checkpoints + phase.snapshot_bytes for phase in phases)
    needed += sweep.bytes if sweep else 0
    return int(_MARGIN * needed) + 64 * 2**20


def latents_bytes(job: EncodeJob, tiles: int) -> int:
    """Disk that the latent store needs."""
    return int(_MARGIN * tiles * job.row_bytes)


def bytes_in(folder: str | Path) -> int:
    """What lies in a folder already, and so needs no further room; 0 in object storage."""
    if is_uri(str(folder)) or not Path(folder).is_dir():
        return 0
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def check_disk(folder: str | Path, need: int, key: str) -> None:
    """UserError when the file system of `folder` (which need not exist yet) has less than `need` bytes free."""
    if is_uri(str(folder)):  # object storage has no size
        return
    place = _existing(folder)
    free = shutil.disk_usage(place).free
    if free < need:
        raise UserError(
            f"{key}={folder} has {format_bytes(free)} free, but {format_bytes(need)} are needed; free some space, "
            f"choose another disk with --set {key}=FOLDER, or keep fewer checkpoints"
        )


def check_writable(folder: str | Path, key: str) -> None:
    """UserError when nothing can be written below `folder`; in object storage a small file is."""
    if is_uri(str(folder)):
        check_reachable(key, str(folder))
        with naming(key, str(folder)):
            Folder(folder).write(_PROBE, b"")
            Folder(folder).remove([_PROBE])
        return
    place = _existing(folder)
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"{key}={folder} cannot be written ({place} is no writable folder); choose another one")


def _existing(folder: str | Path) -> Path:
    """`folder`, or the nearest one above it that is there; os.path, as Path.exists raises where it may not look."""
    place = Path(folder).absolute()
    while not os.path.exists(place):
        place = place.parent
    return place


def report(config: Config, job: EncodeJob, tiles: dict[str, int], samples: list[int], stored: bool) -> str:
    """The text of `train --dry-run`; tiles: stored ones a split, samples: of an epoch of each phase."""
    phases = [estimate_phase(config, *pair) for pair in zip(config.phases, samples, strict=True)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = precision(config, device.type)
    rate = matmul_rate(device, kind)
    most, fewest = config.ray.max_workers, config.ray.min_workers
    workers = most if device.type == "cuda" else 1
    accumulation = math.ceil(config.train.global_batch / most / config.train.batch_size)
    lines = [
        f"tiles        train {tiles['train']}, val {tiles['val']}, test {tiles['test']}",
        f"latents      {job.store}: {format_bytes(latents_bytes(job, sum(tiles.values())))}"
        + (" (stored already)" if stored else ""),
        f"workers      {f'{fewest} to {most}' if config.ray.elastic else most}, global batch "
        f"{config.train.global_batch} = {accumulation} micro-step(s) of {config.train.batch_size} on each"
        + (f" of {most}" if config.ray.elastic else ""),
    ]
    total = 0.0
    for phase, estimate in zip(config.phases, phases, strict=True):
        again = 4 / 3 if config.train.activation_checkpointing else 1  # one more forward pass
        seconds = again * estimate.flops / (rate * ASSUMED_EFFICIENCY * workers)
        total += seconds
        lines += [
            f"{phase.name}",
            f"  network    {format_count(estimate.parameters)} trainable parameters, "
            f"{sample_flops(config, phase) / 1e9:.1f} GFLOP a sample",
            f"  steps      {estimate.steps} in {phase.epochs} epochs, {format_count(estimate.samples)} samples",
            f"  saves      epochs {', '.join(map(str, phase.save_epochs))}, best, last: "
            f"{format_bytes(estimate.checkpoint_bytes)} each; averages for `ray-pipeline ema`: "
            f"{format_bytes(estimate.snapshot_bytes)}",
            f"  memory     {format_bytes(worker_memory(config, phase, device.type))} a worker, about",
            f"  time       {format_seconds(seconds)}, about",
        ]
    sweep = estimate_sweep(config, phases)
    if sweep:
        seconds = sweep.flops / (rate * ASSUMED_EFFICIENCY * workers)
        total += seconds
        lines += [
            f"sweep        {sweep.trials} trials of {sweep.steps} steps ({config.sweep.epochs} epochs of "
            f"{config.sweep.trains}), those of the best are not lost: {format_bytes(sweep.bytes)} meanwhile, "
            f"{format_seconds(seconds)} on one group of workers, about"
        ]
    lines += [
        f"output       {config.output_dir}: up to {format_bytes(output_bytes(phases, sweep))}",
        f"time         {format_seconds(total)} for all phases, if a step reaches {ASSUMED_EFFICIENCY:.0%} of the "
        f"{rate / 1e9:.0f} GFLOP/s ({kind} matrix product on {device.type}) measured on this machine just now",
    ]
    return "\n".join(lines)
