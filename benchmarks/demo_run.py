"""The demo's training in this process, without Ray: what benchmarks of training share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ray_pipeline import encoding
from ray_pipeline.config import Config
from ray_pipeline.data.encode_job import encode_job
from ray_pipeline.data.latents import LatentStore
from ray_pipeline.data.mixture import make_mixture
from ray_pipeline.models.dit import DiT
from ray_pipeline.ray_session import ray_session
from ray_pipeline.training.build import make_edm, make_network, make_state
from ray_pipeline.training.loss import TrainingLoss
from ray_pipeline.training.setup import PhaseRun, Start
from ray_pipeline.training.step import MicroBatch, micro_batches


def encode(config: Config) -> None:
    """Write the sample data and its latents."""
    encoding.prepare_data(config)
    with ray_session(config.ray):
        encoding.encode(config, encoding.look(config))


def open_run(config: Config, number: int, network: DiT | None = None) -> PhaseRun:
    """One worker's phase without Ray, its network fresh or given."""
    torch.manual_seed(config.seed)
    phase, store = config.phases[number], Path(encode_job(config).store)
    train_store, val_store = LatentStore.open(store / "train"), LatentStore.open(store / "val")
    state, edm = make_state(config, network or make_network(config, phase)), make_edm(config)
    rows = np.arange(len(val_store))
    return PhaseRun(
        job=None, config=config, phase=phase, rank=0, world_size=1, device=torch.device("cpu"), edm=edm,
        mixture=make_mixture(config, phase, train_store.datasets, "train"), train_store=train_store,
        val_store=val_store, source=train_store, val_rows=rows, val_simulated=np.zeros(len(rows), bool),
        checkpoints=None, start=Start(), newest=None, state=state,
        model=TrainingLoss(edm, state.network, state.uncertainty),
    )  # fmt: skip


def next_batches(run: PhaseRun) -> tuple[list[np.ndarray], list[MicroBatch]]:
    """Rows and micro-batches of the next step."""
    index = run.plan.positions(run.state.step, 0, 1)
    rows, simulated = run.mixture.rows(index)
    values = {"index": index, **run.train_store.gather(rows, None, run.hints, simulated)}
    size = run.config.train.batch_size
    return [rows[start : start + size] for start in range(0, len(rows), size)], micro_batches(run, values)
