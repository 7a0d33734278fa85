"""Steps whose loss or gradient is not finite: which they were, of which tiles, and when they are too many."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from ray_pipeline.data.encode import STORED_TILES, STREAMED_TILES
from ray_pipeline.data.tile_table import TileTable
from ray_pipeline.retention import SKIP_WINDOW
from ray_pipeline.run_copy import location_of, run_path
from ray_pipeline.storage import replace_file
from ray_pipeline.training.setup import PhaseRun
from ray_pipeline.training.step import StepResult

_NAMED = 5


@dataclass(frozen=True)
class Trouble:
    """More steps without a finite loss than are allowed: `first` to `last` (from 1) are the range that holds them.
    again: the phase went back for such a range before."""

    first: int
    last: int
    again: bool
    report: str


class SkippedSteps:
    """The steps that had to be skipped; the same on all ranks, and after a resume."""

    def __init__(self, run: PhaseRun):
        self.run = run
        self.path = run_path(run.config.output_dir, "logs") / f"nonfinite_{run.phase.name}.json"
        self._steps: dict[int, StepResult] = {}

    def add(self, result: StepResult) -> Trouble | None:
        """Take in a skipped step; what it means if it is one too many."""
        run, now = self.run, self.run.state.step
        self._steps[now] = result
        recent = [step for step in run.state.skipped if step > now - SKIP_WINDOW and step not in run.start.forgiven]
        if len(recent) <= run.config.train.max_skipped_steps:
            return None
        return Trouble(recent[0], now, bool(run.start.forgiven), location_of(self.path))

    def describe(self) -> str:
        """The latest one in a sentence."""
        step, result = list(self._steps.items())[-1]
        words = f"step {step} left out: its loss is {result.loss} and its gradient {result.grad_norm}"
        if result.suspects:
            tiles = self._tiles(result.suspects[:_NAMED])
            more = f" and {len(result.suspects) - _NAMED} more" if len(result.suspects) > _NAMED else ""
            words += "; no finite loss of " + ", ".join(tile["path"] for tile in tiles) + more
        return words

    def write_report(self) -> None:
        """All of them with their samples, and those of earlier attempts, as JSON. suspects: those whose own loss is
        not finite."""
        plan = self.run.plan
        known = {entry["step"]: entry for entry in json.loads(self.path.read_bytes())} if self.path.exists() else {}
        new = {
            step: {
                "step": step,
                "loss": str(result.loss),
                "grad_norm": str(result.grad_norm),
                "suspects": self._tiles(result.suspects),
                "samples": self._tiles(plan.positions(step - 1).tolist()),
            }
            for step, result in self._steps.items()
        }
        report = [entry for _, entry in sorted((new | known).items())]
        replace_file(self.path, json.dumps(report, indent=1).encode())

    def _tiles(self, positions: Sequence[int]) -> list[dict]:
        """Of samples of the endless sequence: position, and id and file of the tile."""
        if not positions:
            return []
        run = self.run
        name = STREAMED_TILES if run.config.data.mode == "tiles" else STORED_TILES
        rows, _ = run.mixture.rows(list(positions))
        tiles = TileTable(run.train_store.folder, name).rows(rows)
        return [
            {"position": position, "id": tile.id, "path": tile.path}
            for position, tile in zip(positions, tiles, strict=True)
        ]
