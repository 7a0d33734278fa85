"""logs/metrics.jsonl: every event of a run, one a line. It is what plots, reports and resumes read."""

from __future__ import annotations

import logging
from pathlib import Path

from ray_pipeline.json_lines import JsonLines, parse_line, whole_lines
from ray_pipeline.monitoring.events import EVENT_NAMES, Event, FaultEvent, restore_floats, to_record
from ray_pipeline.storage import replace_file

logger = logging.getLogger(__name__)


def metrics_path(run_dir: str | Path) -> Path:
    """Where the JSON lines of a run are kept."""
    return Path(run_dir) / "logs" / "metrics.jsonl"


def read_events(run_dir: str | Path, phase: str | None = None, event: str | None = None) -> list[dict]:
    """The records of a run in the order written, non-finite floats restored; [] when there are none yet.

    A last line torn by a kill is left out; a damaged line elsewhere is left out with a warning.
    """
    path = metrics_path(run_dir)
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(whole_lines(path.read_bytes()), start=1):
        record = parse_line(line)
        if record is None:
            logger.warning("%s line %d is damaged and was left out", path, number)
        elif phase in (None, record.get("phase")) and event in (None, record.get("event")):
            records.append(restore_floats(record))
    return records


def copy_records(source: str | Path, target: str | Path, phase: str, until: int) -> None:
    """Give the run `target` the steps, validations and faults of a phase of the run `source` up to a step, in place of
    those that it has of this phase."""
    path = metrics_path(target)
    lines = whole_lines(path.read_bytes()) if path.exists() else ()
    kept = [line for line in lines if (parse_line(line) or {}).get("phase") != phase]
    for line in whole_lines(metrics_path(source).read_bytes()):
        record = parse_line(line) or {}
        taken = record.get("event") in ("step", "validation", "fault") and record["phase"] == phase
        kept += [line] if taken and record["step"] <= until else []
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, b"".join(line + b"\n" for line in kept))


def cut_records(path: Path, phase: str, resume_step: int | None) -> None:
    """Drop the torn last line and, given `resume_step`, the records of `phase` after that step, but for faults.

    The file is replaced even when nothing is cut: a superseded writer that still lives keeps the old file.
    """
    if not path.exists():
        return
    kept = []
    for line in whole_lines(path.read_bytes()):
        record = parse_line(line)
        ours = record is not None and record.get("phase") == phase
        behind = resume_step is not None and ours and record.get("step", 0) > resume_step
        if not behind or record.get("event") == EVENT_NAMES[FaultEvent]:  # what went wrong did so for good
            kept.append(line + b"\n")
    replace_file(path, b"".join(kept))


class MetricsFile:
    """The open file, for the events of one phase. What earlier attempts wrote of it after `resume_step` is cut."""

    def __init__(self, run_dir: str | Path, phase: str, resume_step: int | None):
        path = metrics_path(run_dir)
        path.parent.mkdir(parents=True, exist_ok=True)
        cut_records(path, phase, resume_step)
        self._lines = JsonLines(path)

    def emit(self, event: Event) -> None:
        """One line, in one write: a killed process loses nothing that it has emitted."""
        self._lines.append(to_record(event))

    def close(self) -> None:
        self._lines.close()
