"""A phase of configs/microscopy.yaml without data, checkpoints and records: all that an optimizer step touches."""

from __future__ import annotations

import torch

from ray_pipeline.config import Config
from ray_pipeline.data.mixture import Member, Mixture
from ray_pipeline.data.plan import SamplePlan
from ray_pipeline.training.build import make_edm, make_network, make_state
from ray_pipeline.training.loss import TrainingLoss
from ray_pipeline.training.setup import PhaseRun, Start


def bare_run(config: Config) -> PhaseRun:
    """The first phase, on one worker and on the CPU."""
    torch.manual_seed(config.seed)
    phase, edm = config.phases[0], make_edm(config)
    state = make_state(config, make_network(config, phase))
    plan = SamplePlan(1000, config.train.global_batch, config.seed, phase.name)
    return PhaseRun(
        job=None, config=config, phase=phase, rank=0, world_size=1, device=torch.device("cpu"), edm=edm,
        mixture=Mixture((Member("rows", 0, 1000, None, simulated=False),), plan), train_store=None, val_store=None,
        source=None, val_rows=None, val_simulated=None, checkpoints=None, start=Start(), newest=None,
        state=state, model=TrainingLoss(edm, state.network, state.uncertainty),
    )  # fmt: skip
