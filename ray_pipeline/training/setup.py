"""What a worker needs before its first step: device, data plan, network, optimizer, and the state to go on from."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray.train
import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ray_pipeline.checkpoints import Checkpoint, CheckpointStore, open_checkpoint
from ray_pipeline.config import Config, parse_config
from ray_pipeline.data.block_cache import block_cache
from ray_pipeline.data.encode import STREAMED_TILES
from ray_pipeline.data.encode_job import encode_job
from ray_pipeline.data.latents import LatentStore
from ray_pipeline.data.listing import spread
from ray_pipeline.data.mixture import Mixture, make_mixture, validation_rows
from ray_pipeline.data.plan import Plan
from ray_pipeline.data.stream import ENCODER_CPUS, GATHER_CPUS, StreamSettings
from ray_pipeline.data.tile_source import TileSource
from ray_pipeline.data.tile_table import TileTable
from ray_pipeline.diffusion.edm import EDM
from ray_pipeline.errors import UserError
from ray_pipeline.phase_sections import PhaseConfig
from ray_pipeline.storage import Folder
from ray_pipeline.training.build import make_edm, make_network, make_state, precision, prepare_torch
from ray_pipeline.training.loss import TrainingLoss
from ray_pipeline.training.state import TrainState, load_weights
from ray_pipeline.training.step_clock import StepClock


@dataclass(frozen=True)
class PhaseJob:
    """What the driver tells each worker. init: checkpoint folder to begin from, or None. stop: the Board (stopping.py)
    of the run; None where nobody may ask it to stop. mark: by which a worker knows the run's folder (nodes.py). epochs:
    leave the phase after so many, to be gone on with; None: train it to its end. judged: wait after each epoch until
    the board says whether to go on. sample_flops: of one trained sample. profile: write a trace of a few steps."""

    config: dict
    phase: int
    latents: str
    init: str | None
    stop: Any = None
    mark: str = ""
    epochs: int | None = None
    judged: bool = False
    sample_flops: float = math.nan
    profile: bool = False


def job_values(job: PhaseJob) -> dict:
    """A PhaseJob as Ray Train's train_loop_config."""
    return dict(vars(job))


@dataclass(frozen=True)
class Start:
    """Where this attempt begins, the same on all ranks.

    checkpoint: name of the one to go on from, or None. avoid: steps (from 1) that earlier attempts found without a
    finite loss; those in `forgiven` have made the phase go back once. passed_over: in words, newer checkpoints that
    cannot be used.
    """

    attempt: int = 0
    checkpoint: str | None = None
    avoid: frozenset[int] = frozenset()
    forgiven: frozenset[int] = frozenset()
    passed_over: tuple[str, ...] = ()


@dataclass
class PhaseData:
    """What one worker of a phase knows before it has a network.

    train_store, val_store: stored latents, in data.mode tiles a sample of the training ones. source, mixture: what the
    training samples are read from, and which of its rows make which batch. val_rows, val_simulated: the tiles that
    every validation takes, and whether with simulated hints. start, newest: where this attempt begins, and the
    checkpoint it goes on from.
    """

    job: PhaseJob
    config: Config
    phase: PhaseConfig
    rank: int
    world_size: int
    device: torch.device
    train_store: LatentStore
    val_store: LatentStore
    source: LatentStore | TileSource
    mixture: Mixture
    val_rows: np.ndarray
    val_simulated: np.ndarray
    checkpoints: CheckpointStore
    start: Start
    newest: Checkpoint | None

    @property
    def plan(self) -> Plan:
        return self.mixture.plan

    @property
    def first_step(self) -> int:
        """Steps that the newest checkpoint has behind it."""
        return 0 if self.newest is None else self.newest.state["step"]

    @property
    def total_steps(self) -> int:
        return self.plan.steps(self.phase.epochs)

    @property
    def end_step(self) -> int:
        """Steps after which this job leaves the phase."""
        return self.total_steps if self.job.epochs is None else self.plan.steps(self.job.epochs)

    @property
    def hints(self) -> tuple[str, ...]:
        return self.phase.condition_types


@dataclass
class PhaseRun(PhaseData):
    """One worker's view of one phase; model: the TrainingLoss of the network, compiled or not, under DDP when there are
    several workers."""

    edm: EDM
    state: TrainState
    model: nn.Module
    clock: StepClock = field(init=False)

    def __post_init__(self):
        self.clock = StepClock(self.device)

    def autocast(self) -> AbstractContextManager:
        """bf16 autocast, or nothing in fp32."""
        if precision(self.config, self.device.type) == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def ema_weights(self) -> AbstractContextManager:
        """Within, the network computes with its EMA weights, where EMA is enabled."""
        return nullcontext() if self.state.ema is None else self.state.ema.applied()


def open_data(job: PhaseJob) -> PhaseData:
    """Open the stores and find where to go on; UserError when they do not hold what the phase needs."""
    config = parse_config(job.config, source="the run's config")
    phase = config.phases[job.phase]
    context = ray.train.get_context()
    store = Folder(job.latents)
    cache = block_cache(config)
    train_store = LatentStore.open(store.child("train"), cache, config.data.shuffle_window)
    val_store = LatentStore.open(store.child("val"), cache)
    _check_hints(phase, train_store)
    source: LatentStore | TileSource = train_store
    datasets = train_store.datasets
    if config.data.mode == "tiles":
        table = TileTable(store.child("train"), STREAMED_TILES)
        source, datasets = TileSource(encode_job(config), table, stream_gpus(config) > 0), table.datasets
    val_rows, val_simulated = validation_rows(phase, val_store.datasets, str(val_store.folder))
    shown = spread(len(val_rows), config.monitoring.val_tiles)
    checkpoints = CheckpointStore(config.checkpoint_store)
    start = _begin(checkpoints, phase.name, context.get_world_rank(), context.get_world_size())
    return PhaseData(
        job=job,
        config=config,
        phase=phase,
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=ray.train.torch.get_device(),
        train_store=train_store,
        val_store=val_store,
        source=source,
        mixture=make_mixture(config, phase, datasets, str(train_store.folder)),
        val_rows=val_rows[shown],
        val_simulated=val_simulated[shown],
        checkpoints=checkpoints,
        start=start,
        newest=None if start.checkpoint is None else checkpoints.load(start.checkpoint),
    )


def _begin(store: CheckpointStore, phase: str, rank: int, world_size: int) -> Start:
    """Rank 0 takes an attempt and chooses the checkpoint, so that all ranks go on from the same one."""
    told: list[Start | None] = [None]
    if rank == 0:
        attempt = store.begin(phase, world_size)
        found = store.search(phase)  # after the attempt was taken: what is committed from now on by others is not seen
        if found.checkpoint is None and store.names(phase):
            raise UserError(
                f"no checkpoint of {phase} in {store.root} is whole ({found.passed_over[-1]}); bring one back, or "
                "delete them all to begin the phase again"
            )
        attempt.update(start_step=0 if found.checkpoint is None else found.checkpoint.state["step"])
        earlier = [record for record in store.attempts() if record.phase == phase]
        told[0] = Start(
            attempt=attempt.number,
            checkpoint=None if found.checkpoint is None else found.checkpoint.name,
            avoid=frozenset().union(*(record.skipped for record in earlier)),
            forgiven=frozenset().union(*(record.skipped for record in earlier if record.valid_until is not None)),
            passed_over=found.passed_over,
        )
    if world_size > 1:
        torch.distributed.broadcast_object_list(told)
    return told[0]


def open_phase(data: PhaseData) -> PhaseRun:
    """Build network, optimizer and EMA, and restore the newest whole checkpoint, or begin from `job.init`."""
    config, job = data.config, data.job
    prepare_torch(config, data.device, ray.train.get_context().get_local_world_size())
    torch.manual_seed(config.seed)  # initial weights, the same on every rank
    network = make_network(config, data.phase).to(data.device)
    if data.newest is None and job.init is not None:
        load_weights(network, open_checkpoint(job.init))
    state = make_state(config, network)
    if data.newest is not None:
        state.restore(data.newest)
    edm = make_edm(config)
    loss = TrainingLoss(edm, torch.compile(network) if config.train.compile else network, state.uncertainty)
    return PhaseRun(**vars(data), edm=edm, state=state, model=_parallel(loss, data.device, data.world_size))


def resources(run: PhaseRun) -> dict[str, str]:
    """What a phase trains with, by name, for people."""
    gpu = run.device.type == "cuda"
    return {
        "workers": str(run.world_size),
        "device": torch.cuda.get_device_name(run.device) if gpu else "CPU",
        "threads a worker": str(torch.get_num_threads()),
        "precision": precision(run.config, run.device.type),
        "global batch": str(run.plan.global_batch),
        "training tiles": str(len(run.train_store)),
    }


def stream_settings(data: PhaseData) -> StreamSettings:
    """What this rank streams in training."""
    return StreamSettings(
        mixture=data.mixture,
        source=data.source,
        hints=data.hints,
        rank=data.rank,
        world_size=data.world_size,
        name=f"{data.phase.name}-rank{data.rank}",
        workers=stream_workers(data.config),
        gpus_per_worker=stream_gpus(data.config),
        timeout=60 * data.config.ray.timeout_minutes,
    )


def stream_workers(config: Config) -> int:
    """Actors that feed one rank: those that gather, or in data.mode tiles the rank's share of those that encode."""
    if config.data.mode == "latents":
        return config.train.dataloader_workers
    return max(1, (config.vae.actors or 0) // config.ray.max_workers)


def stream_cpus(config: Config) -> float:
    """Logical CPUs that the streams of all ranks take at most, beside those of the training workers."""
    each = ENCODER_CPUS if config.data.mode == "tiles" else GATHER_CPUS
    return config.ray.max_workers * stream_workers(config) * each


def stream_gpus(config: Config) -> float:
    """GPUs (or the share of one) of an actor that feeds a rank."""
    return (config.vae.gpus_per_actor or 0.0) if config.data.mode == "tiles" else 0.0


def _parallel(loss: TrainingLoss, device: torch.device, world_size: int) -> nn.Module:
    if world_size == 1:
        return loss
    # the only buffers are constants
    return DistributedDataParallel(
        loss, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False
    )


def _check_hints(phase: PhaseConfig, store: LatentStore) -> None:
    missing = [name for name in phase.condition_types if name not in store.hint_names]
    if missing:
        raise UserError(
            f"phase {phase.name} needs the hint {missing[0]}, but {store.folder} holds "
            f"{', '.join(store.hint_names) or 'no hints'}; encode again with `ray-pipeline encode --overwrite`"
        )
