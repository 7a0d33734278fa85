"""Which checkpoints of a phase are kept: the epochs of epochs_to_save, the best by validation loss, and the last."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ray_pipeline.checkpoints import SUFFIX
from ray_pipeline.monitoring.phase_state import BestCheckpoint
from ray_pipeline.phase_sections import PhaseConfig

#: train.max_skipped_steps is a limit within so many steps
SKIP_WINDOW = 100
#: kinds of checkpoints that end an epoch, so that their validation loss is their own
_OF_EPOCHS = ("epoch", "best", "last")


def checkpoint_name(phase: str, step: int, epoch: int | None) -> str:
    """Name of a checkpoint that ends an epoch, or (None) does not."""
    return f"{phase}_step_{step:08d}{SUFFIX}" if epoch is None else f"{phase}_epoch_{epoch:03d}{SUFFIX}"


def obsolete_names(phase: PhaseConfig, states: Mapping[str, Mapping], newest: str) -> tuple[str, ...]:
    """Of checkpoints by name with their states, those that need not be kept once `newest` is committed.

    Kept, too, is the one before the steps that were skipped lately: the run may have to go back to it.
    """
    best = best_of(states)
    kept = {checkpoint_name(phase.name, 0, epoch) for epoch in phase.save_epochs}
    kept |= {newest, best.checkpoint if best else newest}
    now = states[newest]
    lately = [step for step in now["skipped"] if step > now["step"] - SKIP_WINDOW]
    before = [name for name, state in states.items() if lately and state["step"] < lately[0]]
    kept |= set(sorted(before, key=lambda name: states[name]["step"])[-1:])
    return tuple(name for name in states if name not in kept)


def best_of(states: Mapping[str, Mapping]) -> BestCheckpoint | None:
    """Of checkpoints by name with their states, the one that ends an epoch with the lowest validation loss."""
    scored = {
        name: state
        for name, state in states.items()
        if state["kind"] in _OF_EPOCHS and state["val_loss"] is not None and math.isfinite(state["val_loss"])
    }
    if not scored:
        return None
    name = min(scored, key=lambda name: (scored[name]["val_loss"], scored[name]["step"]))
    return BestCheckpoint(checkpoint=name, val_loss=scored[name]["val_loss"], epoch=scored[name]["epoch"])
