"""A phase on one worker without Ray, on latents that a test has written."""

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from ray_pipeline.checkpoints import CheckpointStore
from ray_pipeline.data.mixture import make_mixture
from ray_pipeline.training.build import make_edm, make_network, make_state
from ray_pipeline.training.loss import TrainingLoss
from ray_pipeline.training.setup import PhaseJob, PhaseRun, Start


def make_phase_run(config, store, *, number=0, rank=0, world_size=1, network=None, **fields):
    """Phase `number` of a config, with the rows of one store to train on and to validate."""
    phase, edm = config.phases[number], make_edm(config)
    if network is None:
        torch.manual_seed(config.seed)
        network = make_network(config, phase)
    state = make_state(config, network)
    if "model" not in fields:
        loss = TrainingLoss(edm, network, state.uncertainty)
        fields["model"] = loss if world_size == 1 else DistributedDataParallel(loss)
    rows = np.arange(4)
    plain = {
        "job": PhaseJob(config.dump(), number, str(store.folder), None),
        "config": config,
        "phase": phase,
        "rank": rank,
        "world_size": world_size,
        "device": torch.device("cpu"),
        "train_store": store,
        "val_store": store,
        "source": store,
        "mixture": make_mixture(config, phase, store.datasets, "store"),
        "val_rows": rows,
        "val_simulated": np.zeros(len(rows), bool),
        "checkpoints": CheckpointStore(config.checkpoint_store),
        "start": Start(),
        "newest": None,
        "edm": edm,
        "state": state,
    }
    return PhaseRun(**plain | fields)
