"""Weights of an average that nobody tracked, made from the snapshots of a run (`ray-pipeline ema`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import safetensors
from torch import Tensor

from ray_pipeline.checkpoints import Checkpoint, CheckpointStore
from ray_pipeline.config import Config
from ray_pipeline.errors import UserError
from ray_pipeline.models.posthoc_ema import MAX_STD, Snapshot, profile_error, reconstruct
from ray_pipeline.models.weights import header_in, save_weights
from ray_pipeline.monitoring.phase_state import PhaseState
from ray_pipeline.run_copy import reading_copy, run_path
from ray_pipeline.run_state import Run, read_run
from ray_pipeline.storage import is_uri


@dataclass(frozen=True)
class Reconstruction:
    """What was made: the file, from how many snapshots of which phase, at which step, and how far (relative L2) the
    profile is from the wanted one."""

    path: Path
    phase: str
    step: int
    snapshots: int
    error: float


def make_average(
    run_dir: str | Path, std: float, *, phase: str | None = None, step: int | None = None, out: Path | None = None
) -> Reconstruction:
    """Write the power-function average of relative width `std` at a snapshot's `step` (default: the newest) of a phase
    (default: the last that has snapshots) as weights that `sample` takes (Karras et al. 2024, Algorithm 3).

    UserError: no run or snapshots there, a width or step that they cannot give.
    """
    if not 0 < std <= MAX_STD:
        raise UserError(
            f"--std {std}: a relative width is more than 0 and at most {MAX_STD:.3f}; EDM2 uses 0.02 to 0.2"
        )
    if out is not None and out.suffix != ".safetensors":
        raise UserError(f"--out {out}: expected a name that ends in .safetensors, which `sample` knows it by; add that")
    if out is None and is_uri(str(run_dir)):
        raise UserError(f"{run_dir} is a URI, so where to write the weights must be said; give --out FILE.safetensors")
    with reading_copy(run_dir, averages=True):
        return _make_average(read_run(run_dir), std, phase, step, out)


def _make_average(run: Run, std: float, phase: str | None, step: int | None, out: Path | None) -> Reconstruction:
    run_dir = run_path(run.config.output_dir)
    phase = _phase(run_dir, run.state, phase)
    stored = _snapshots(run_dir, phase)
    steps = sorted({checkpoint.state["step"] for checkpoint in stored})
    until = steps[-1] if step is None else step
    if until not in steps:  # the profile ends abruptly at its step, and only snapshots of that step do too
        raise UserError(
            f"--step {until}: {phase} has snapshots of steps {', '.join(map(str, steps))}; choose one of them"
        )
    used = [checkpoint for checkpoint in stored if checkpoint.state["step"] <= until]
    for checkpoint in used:
        checkpoint.verify()
    with ExitStack() as files:
        snapshots = [
            Snapshot(width, checkpoint.state["step"], _OpenTensors(checkpoint.path(group), files))
            for checkpoint in used
            for group, width in checkpoint.state["stds"].items()
        ]
        averages = reconstruct(snapshots, std, until)
    error = profile_error([(snapshot.std, snapshot.step) for snapshot in snapshots], std, until)
    header = header_in(used[-1].state, used[-1].folder)
    tensors = {**_untrained(run.config, phase), **averages}
    path = out or Path(run_dir, "weights", f"{phase}_step_{until:08d}_ema_power_{std}.safetensors")
    save_weights(path, tensors, header.model_copy(update={"step": until, "ema": f"ema_power_{std}"}))
    return Reconstruction(path, phase, until, len(snapshots), error)


class _OpenTensors(Mapping[str, Tensor]):
    """Tensors of a safetensors file, read one at a time."""

    def __init__(self, path: str, files: ExitStack):
        self._file = files.enter_context(safetensors.safe_open(path, framework="pt"))
        self._names = list(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _phase(run_dir: Path, state: PhaseState, phase: str | None) -> str:
    root = run_dir / "ema_snapshots"
    known = [name for name in state.phases if (root / name).is_dir()]
    if not known:
        raise UserError(f"{run_dir} holds no ema_snapshots; train with ema.power_stds and ema.snapshots above 0")
    if phase is not None and phase not in known:
        raise UserError(f"--phase {phase}: {root} has snapshots of {', '.join(known)}; choose one of them")
    return phase or known[-1]


def _snapshots(run_dir: Path, phase: str) -> list[Checkpoint]:
    """Committed snapshots of a phase in the order of their steps."""
    store = CheckpointStore(run_dir / "ema_snapshots" / phase)
    stored = [store.load(name) for name in store.names(phase)]
    if not stored:
        raise UserError(f"{store.root} holds no finished snapshot; train on, or choose another --phase")
    return stored


def _untrained(config: Config, phase: str) -> dict[str, Tensor]:
    """Weights of the phase's newest checkpoint: those that it does not train are the same in all of them."""
    checkpoint = CheckpointStore(config.checkpoint_store).latest(phase)
    if checkpoint is None:
        raise UserError(
            f"{config.checkpoint_store} holds no checkpoint of {phase}, which tells the weights not averaged"
        )
    return checkpoint["model"]
