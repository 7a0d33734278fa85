"""The trials of a sweep for TensorBoard's page of hyperparameters."""

from __future__ import annotations

import shutil
from pathlib import Path

from ray_pipeline.sweep_records import SweepRecord


def log_trials(run_dir: str | Path, record: SweepRecord) -> None:
    """Write <run>/logs/tensorboard/sweep anew: each trial's values, and its best loss by epoch."""
    from tensorboardX import SummaryWriter  # it imports torch, which readers of this module need not have loaded

    folder = Path(run_dir, "logs", "tensorboard", "sweep")
    shutil.rmtree(folder, ignore_errors=True)
    for trial in record.trials:
        if not trial.results:
            continue
        losses = [record.loss(result) for result in trial.results]
        values = {
            key: value if isinstance(value, int | float | str) else str(value) for key, value in trial.values.items()
        }
        with SummaryWriter(str(folder / trial.name)) as writer:
            writer.add_hparams(values, {"sweep/val_loss": losses[-1]}, name=".")
            for result, loss in zip(trial.results, losses, strict=True):
                writer.add_scalar("sweep/val_loss", loss, result.epoch)
