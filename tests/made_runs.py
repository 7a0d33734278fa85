"""Run directories as training leaves them, without training."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass
class MadeRun:
    """A run directory as training leaves it, with tiny tensors: phase "one" of 4 epochs, "two" of 2; 3 steps each."""

    config: Any
    store: Any

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def state_file(self) -> Path:
        return self.folder / "phase_state.json"

    def train(self, phase: str, until: int, *, finish: bool = False) -> None:
        """Epochs 1 to `until` of a phase, as rank 0 writes them down; validation losses 0.9, 0.5, 0.7, 0.6."""
        import torch

        from ray_pipeline.monitoring import phase_state
        from ray_pipeline.monitoring.event_log import EventLog
        from ray_pipeline.monitoring.events import CheckpointEvent, PhaseEvent

        state = phase_state.load(self.state_file)
        progress, epochs = state.phase(phase), {p.name: p.epochs for p in self.config.phases}[phase]
        progress.status, progress.attempt, progress.steps, progress.epochs = "running", 1, 3 * epochs, epochs
        progress.baseline_val_loss, state.current_phase = 1.0, phase
        state.run["latents"] = "f" * 64
        with EventLog(self.folder, phase) as events:

            def tell(status: str, step: int) -> None:
                events.emit(PhaseEvent(phase, status, step, f"{status} at step {step}"))
                state.record(status, f"{phase}: {status} at step {step}")

            tell("started", 0)
            for epoch, loss in zip(range(1, until + 1), (0.9, 0.5, 0.7, 0.6), strict=False):
                step = 3 * epoch
                progress.metrics = {"untrained_loss": 1.0, "val_loss": loss}
                committed = {
                    "phase": phase, "step": step, "position": 8 * step, "epoch": epoch, "attempt": 1, "kind": "epoch",
                    "val_loss": loss, "baseline_val_loss": 1.0, "metrics": progress.metrics, "total_steps": 3 * epochs,
                    "weights": {"latents": {"fingerprint": "f" * 64}}, "config": self.config.dump(),
                }  # fmt: skip
                name = f"{phase}_epoch_{epoch:03d}"
                name = self.store.save(name, {"model": {"w": torch.full((2,), float(step))}}, committed)
                progress.step, progress.position, progress.epoch = step, 8 * step, epoch
                if progress.best is None or loss < progress.best.val_loss:
                    progress.best = phase_state.BestCheckpoint(checkpoint=name, val_loss=loss, epoch=epoch)
                progress.last, progress.checkpoints = name, [*progress.checkpoints, name]
                events.emit(CheckpointEvent(phase, step, epoch, name, "epoch", 0.1, 0.2))
                state.record("checkpoint", f"{name} (epoch)")
            if finish:
                tell("finished", progress.step)
                progress.status = "finished"
        state.save(self.state_file)


@pytest.fixture
def make_run(tmp_path) -> Callable[..., MadeRun]:
    """(**sections of the config) -> a MadeRun in <tmp>/run with its config.yaml, nothing trained yet."""
    from ray_pipeline.checkpoints import CheckpointStore
    from ray_pipeline.config import parse_config

    def make(**sections) -> MadeRun:
        plain = {
            "output_dir": str(tmp_path / "run"),
            "data": {"root": str(tmp_path / "no_data"), "latents": str(tmp_path / "no_latents"), "tile_size": 64},
            "model": {"architecture": "DiT-S/8", "latent_size": 8},
            "phases": [{"name": "one", "epochs": 4}, {"name": "two", "epochs": 2, "condition_types": ["canny"]}],
        }
        run = MadeRun(config := parse_config(plain | sections), CheckpointStore(config.checkpoint_store))
        run.folder.mkdir()
        (run.folder / "config.yaml").write_text(config.to_yaml())
        return run

    return make


@pytest.fixture
def half_run(make_run) -> MadeRun:
    """Phase "one" is finished, "two" has one of its two epochs."""
    run = make_run()
    run.train("one", 4, finish=True)
    run.train("two", 1)
    return run
