"""Which samples a rank took at each step: the proof that a disturbed run saw what was planned."""

from __future__ import annotations

import logging

from ray_pipeline.json_lines import JsonLines
from ray_pipeline.run_copy import run_path
from ray_pipeline.training.setup import PhaseRun
from ray_pipeline.training.step import StepInput

logger = logging.getLogger(__name__)


class SampleLog:
    """Context manager; <run>/logs/samples/<phase>/attempt_000002_rank_1.jsonl, one JSON object a step: step (from 1)
    and index, the positions in the phase's endless sequence. A file that cannot be kept whole is given up with a
    warning: it never stops training."""

    def __init__(self, run: PhaseRun):
        folder = run_path(run.config.output_dir, "logs", "samples", run.phase.name)
        self.lines = JsonLines(folder / f"attempt_{run.start.attempt:06d}_rank_{run.rank}.jsonl")
        self._given_up = False

    def __enter__(self) -> SampleLog:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.lines.close()
        except OSError as error:
            logger.warning("%s", error)

    def add(self, taken: StepInput) -> None:
        """Record a step that is done."""
        if self._given_up:
            return
        try:
            self.lines.append({"step": taken.step + 1, "index": taken.positions.tolist()})
        except OSError as error:
            self._given_up = True
            logger.warning("%s ends before step %d: %s", self.lines.path, taken.step + 1, error)
