"""What a worker needs before its first step: device, data plan, network, optimizer, and the state to go on from."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray.train
import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ray_pipeline.checkpoints import CheckpointStore, open_checkpoint
from ray_pipeline.config import Config, PhaseConfig, parse_config
from ray_pipeline.data.latents import LatentStore
from ray_pipeline.data.plan import SamplePlan
from ray_pipeline.diffusion.edm import EDM
from ray_pipeline.errors import UserError
from ray_pipeline.models.dit import DiT, build_dit
from ray_pipeline.training.ema import EMA
from ray_pipeline.training.state import TrainState, load_weights


@dataclass(frozen=True)
class PhaseJob:
    """What the driver tells each worker; plain values only. `init`: checkpoint folder to begin from, or None."""

    config: dict
    phase: int
    attempt: int
    run_dir: str
    latents: str
    init: str | None


@dataclass
class PhaseRun:
    """One worker's view of one phase."""

    job: PhaseJob
    config: Config
    phase: PhaseConfig
    rank: int
    world_size: int
    device: torch.device
    edm: EDM
    plan: SamplePlan
    train_store: LatentStore
    val_store: LatentStore
    rows: np.ndarray
    val_rows: np.ndarray
    checkpoints: CheckpointStore
    state: TrainState
    model: nn.Module  # what runs the training passes: the network, compiled or not, under DDP when there are several

    @property
    def total_steps(self) -> int:
        return self.plan.steps(self.phase.epochs)

    @property
    def hints(self) -> tuple[str, ...]:
        return self.phase.condition_types

    def autocast(self) -> AbstractContextManager:
        """bf16 autocast, or nothing in fp32."""
        if precision(self.config, self.device.type) == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def ema_weights(self) -> AbstractContextManager:
        """Within, the network computes with its EMA weights, where EMA is enabled."""
        return nullcontext() if self.state.ema is None else self.state.ema.applied()


def checkpoint_folder(run_dir: str) -> str:
    """Where the checkpoints of a run lie."""
    return f"{run_dir}/checkpoints"


def precision(config: Config, device_type: str) -> str:
    """fp32 or bf16; `auto` is bf16 on CUDA and on a CPU that multiplies bf16 matrices itself, else fp32."""
    if config.train.precision != "auto":
        return config.train.precision
    native = device_type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if native else "fp32"


def make_edm(config: Config) -> EDM:
    """The diffusion process of the scheduler section."""
    keys = ("sigma_data", "sigma_min", "sigma_max", "rho", "prediction_type", "P_mean", "P_std")
    return EDM(**{key: getattr(config.scheduler, key) for key in keys})


def make_network(config: Config, hint_control: bool) -> DiT:
    """The network of the model section; hint-conditioned phases have the aligned hint path."""
    model = config.model
    return build_dit(
        "custom",
        latent_size=model.latent_size,
        latent_channels=model.latent_channels,
        dropout=model.dropout,
        noise_embedding=model.noise_embedding,
        hint_control=hint_control,
        **model.shape,
    )


def make_optimizer(config: Config, network: nn.Module) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters."""
    settings = config.optimizer
    return torch.optim.AdamW(
        [p for p in network.parameters() if p.requires_grad],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def make_plan(config: Config, phase: PhaseConfig, num_samples: int) -> SamplePlan:
    """The order of a phase's samples."""
    window = config.data.shuffle_window
    return SamplePlan(
        num_samples=num_samples,
        global_batch=config.train.global_batch,
        seed=config.seed,
        phase=phase.name,
        shard_rows=config.data.shard_rows if window else None,
        window=window,
    )


def open_phase(job: PhaseJob) -> PhaseRun:
    """Build this worker's PhaseRun and restore the newest whole checkpoint, or begin from `job.init`."""
    config = parse_config(job.config, source="the run's config")
    phase = config.phases[job.phase]
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    prepare_torch(config, device, context.get_local_world_size())
    train_store = LatentStore.open(f"{job.latents}/train")
    val_store = LatentStore.open(f"{job.latents}/val")
    _check_hints(phase, train_store)
    rows, val_rows = train_store.rows(phase.datasets), val_store.rows(phase.datasets)
    for split, found in (("train", rows), ("val", val_rows)):
        if not len(found):
            raise UserError(f"phase {phase.name}: its data sets have no tile in split {split}; prepare some")
    torch.manual_seed(config.seed)  # initial weights, the same on every rank
    network = make_network(config, bool(phase.condition_types)).to(device)
    checkpoints = CheckpointStore(checkpoint_folder(job.run_dir))
    newest = checkpoints.latest(phase.name)
    if newest is None and job.init is not None:
        load_weights(network, open_checkpoint(job.init))
    state = TrainState(network=network, optimizer=make_optimizer(config, network), ema=make_ema(config, network))
    if newest is not None:
        state.restore(newest)
    return PhaseRun(
        job=job,
        config=config,
        phase=phase,
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=device,
        edm=make_edm(config),
        plan=make_plan(config, phase, len(rows)),
        train_store=train_store,
        val_store=val_store,
        rows=rows,
        val_rows=spread(val_rows, config.monitoring.val_tiles),
        checkpoints=checkpoints,
        state=state,
        model=_parallel(config, network, device, context.get_world_size()),
    )


def run_folder(job: PhaseJob, *parts: str) -> Path:
    """A folder of this phase under the run directory, such as samples/<phase>."""
    return Path(job.run_dir, *parts)


def make_ema(config: Config, network: nn.Module) -> EMA | None:
    """The average of the ema section; None when it is disabled."""
    settings = config.ema
    if not settings.enabled:
        return None
    return EMA(network, settings.decay, settings.update_every, settings.start_step)


def prepare_torch(config: Config, device: torch.device, local_workers: int) -> None:
    """Threads and determinism of this process."""
    if device.type == "cpu":
        # Ray sets OMP_NUM_THREADS to the worker's logical CPUs, which says nothing about the cores it may use
        torch.set_num_threads(config.train.threads or max(1, (os.cpu_count() or 1) // local_workers))
    else:
        torch.backends.cudnn.deterministic = True
        torch.backends.cuda.matmul.allow_tf32 = True


def _parallel(config: Config, network: nn.Module, device: torch.device, world_size: int) -> nn.Module:
    model = torch.compile(network) if config.train.compile else network
    if world_size == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def _check_hints(phase: PhaseConfig, store: LatentStore) -> None:
    missing = [name for name in phase.condition_types if name not in store.hint_names]
    if missing:
        raise UserError(
            f"phase {phase.name} needs the hint {missing[0]}, but {store.folder} holds "
            f"{', '.join(store.hint_names) or 'no hints'}; encode again with `ray-pipeline encode --overwrite`"
        )


def spread(rows: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the rows, evenly spaced."""
    if len(rows) <= count:
        return rows
    return rows[np.linspace(0, len(rows) - 1, count).round().astype(np.int64)]
