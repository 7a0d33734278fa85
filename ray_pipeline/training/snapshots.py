"""Stored power-function averages, from which `ray-pipeline ema` makes any other width after training.

<run>/ema_snapshots/<phase>/<phase>_step_00001234.ckpt: one safetensors file a track, half precision, committed as a
checkpoint is. Retention of checkpoints does not touch them.
"""

from __future__ import annotations

from ray_pipeline.checkpoints import CheckpointStore
from ray_pipeline.models.weights import WeightsHeader
from ray_pipeline.storage import Folder
from ray_pipeline.training.ema import PowerTrack
from ray_pipeline.training.saving import Save
from ray_pipeline.training.setup import PhaseRun

FOLDER = "ema_snapshots"


def snapshots_folder(output_dir: str, *phase: str) -> Folder:
    """Where a run keeps its stored averages, or those of a phase."""
    return Folder(output_dir).child(FOLDER, *phase)


def snapshot_is_due(step: int, total_steps: int, count: int) -> bool:
    """Whether step `step` (from 1) of `total_steps` ends one of `count` equal parts of a phase."""
    return step * count // total_steps > (step - 1) * count // total_steps


def snapshot(run: PhaseRun, header: WeightsHeader) -> Save | None:
    """The power-function averages of this step, to be stored; None if there are none.

    A resume makes those after its checkpoint again.
    """
    tracks = [average for average in run.state.averages if isinstance(average, PowerTrack)]
    updated = run.state.step - run.state.step % run.config.ema.update_every  # the last step that is in them
    if not tracks or not updated:
        return None
    header = header.model_copy(update={"step": updated})
    return Save(
        store=CheckpointStore(snapshots_folder(run.config.output_dir, run.phase.name), run.checkpoints.attempt),
        name=f"{run.phase.name}_step_{run.state.step:08d}",
        groups={track.group: {key: value.half() for key, value in track.tensors().items()} for track in tracks},
        state={
            "phase": run.phase.name,
            "step": updated,
            "position": updated * run.plan.global_batch,
            "stds": {track.group: track.std for track in tracks},
            "weights": header.model_dump(mode="json"),
        },
        metadata=header.metadata(),
        replaceable=False,
        overwrite=True,
    )
