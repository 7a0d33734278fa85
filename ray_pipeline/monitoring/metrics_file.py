"""logs/metrics.jsonl: every event of a run, one a line. It is what plots, reports and resumes read.

Of a run in object storage, which cannot append, they are logs/metrics/000001.jsonl and so on: a segment an attempt,
whose first line says what it cuts away of those before. Readers join them.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from sys import intern

from ray_pipeline.json_lines import JsonLines, parse_line, whole_lines
from ray_pipeline.monitoring.events import EVENT_NAMES, Event, FaultEvent, restore_floats, to_record
from ray_pipeline.run_copy import is_copy
from ray_pipeline.storage import replace_file

logger = logging.getLogger(__name__)

_SEGMENT = "segment"


def metrics_path(run_dir: str | Path) -> Path:
    """Where the JSON lines of a run are kept."""
    return Path(run_dir) / "logs" / "metrics.jsonl"


def metrics_files(run_dir: str | Path) -> list[Path]:
    """The file, or the segments in their order; [] when there are none yet."""
    path = metrics_path(run_dir)
    return [path] if path.exists() else sorted(path.with_suffix("").glob("*.jsonl"))


def metrics_sizes(run_dir: str | Path) -> dict[Path, int]:
    """Bytes of each of `metrics_files` now."""
    return {path: path.stat().st_size for path in metrics_files(run_dir)}


def read_events(
    run_dir: str | Path, phase: str | None = None, event: str | None = None, sizes: Mapping[Path, int] | None = None
) -> list[dict]:
    """The records of a run in the order written, non-finite floats restored; [] when there are none yet.

    A last line torn by a kill is left out; a damaged line elsewhere is left out with a warning. sizes: without what was
    appended since `metrics_sizes` gave them.
    """
    return [
        record
        for _, record in _told(run_dir, phase, sizes)
        if phase in (None, record.get("phase")) and event in (None, record.get("event"))
    ]


@dataclass(frozen=True)
class _Parsed:
    """Lines of a file with their records, non-finite floats restored; of its first `size` bytes, which are `lines`
    lines and have this hash."""

    size: int = 0
    lines: int = 0
    digest: bytes = hashlib.sha256().digest()
    told: tuple[tuple[bytes, dict], ...] = ()

    def read_on(self, path: Path, most: int | None = None) -> _Parsed:
        """As the file is now, up to so many bytes; only what was appended is parsed."""
        data = path.read_bytes()[:most]
        data = data[: data.rfind(b"\n") + 1]
        if hashlib.sha256(data[: self.size]).digest() != self.digest:  # a resume has cut it
            return _Parsed().read_on(path, most)
        told, number = list(self.told), self.lines
        for number, line in enumerate(whole_lines(data[self.size :]), start=self.lines + 1):
            record = parse_line(line)
            if record is None:
                logger.warning("%s line %d is damaged and was left out", path, number)
            else:
                record = {intern(name): value for name, value in record.items()}  # a long run has 100,000 such
                told.append((line, restore_floats(record)))
        return _Parsed(len(data), number, hashlib.sha256(data).digest(), tuple(told))


class MetricsReader:
    """`read_events` of a run again and again, at the cost of what was appended."""

    def __init__(self, run_dir: str | Path):
        self.run_dir = run_dir
        self._files: dict[Path, _Parsed] = {}

    def events(self) -> list[dict]:
        """The records of the run as they are now."""
        paths = metrics_files(self.run_dir)
        self._files = {path: self._files.get(path, _Parsed()).read_on(path) for path in paths}
        return [record for _, record in _joined(self._files.values())]


def _told(
    run_dir: str | Path, phase: str | None = None, sizes: Mapping[Path, int] | None = None
) -> list[tuple[bytes, dict]]:
    """Lines that hold, with their records, at least those of a phase."""
    sizes = dict.fromkeys(metrics_files(run_dir)) if sizes is None else sizes
    return _joined((_Parsed().read_on(path, most) for path, most in sizes.items()), phase)


def _joined(files: Iterable[_Parsed], phase: str | None = None) -> list[tuple[bytes, dict]]:
    """Of the files of a run in their order, without what a later one cuts away."""
    told: list[tuple[bytes, dict]] = []
    for line, record in chain.from_iterable(file.told for file in files):
        if record.get("event") == _SEGMENT:
            told = [one for one in told if not _is_cut(one[1], record["phase"], record["resume_step"])]
        elif phase in (None, record.get("phase")):
            told.append((line, record))
    return told


def copy_records(source: str | Path, target: str | Path, phase: str, until: int) -> None:
    """Give the run `target` the steps, validations and faults of a phase of the run `source` up to a step, in place of
    those that it has of this phase."""
    taken = [
        line + b"\n"
        for line, record in _told(source, phase)
        if record.get("event") in ("step", "validation", "fault") and record["step"] <= until
    ]
    path = metrics_path(target)
    if is_copy(target):
        replace_file(_next_segment(target), b"".join([_first_line(phase, -1), *taken]))
        return
    lines = whole_lines(path.read_bytes()) if path.exists() else ()
    kept = [line + b"\n" for line in lines if (parse_line(line) or {}).get("phase") != phase]
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, b"".join(kept + taken))


def cut_records(path: Path, phase: str, resume_step: int | None) -> None:
    """Drop the torn last line and, given `resume_step`, the records of `phase` after that step, but for faults.

    The file is replaced even when nothing is cut: a superseded writer that still lives keeps the old file.
    """
    if not path.exists():
        return
    lines = whole_lines(path.read_bytes())
    replace_file(path, b"".join(line + b"\n" for line in lines if not _is_cut(parse_line(line), phase, resume_step)))


def _is_cut(record: dict | None, phase: str, resume_step: int | None) -> bool:
    """Whether an attempt at `phase` that goes on behind `resume_step` makes this record anew; faults stay: what went
    wrong did so for good."""
    if record is None or resume_step is None or record.get("phase") != phase:
        return False
    return record.get("step", 0) > resume_step and record.get("event") != EVENT_NAMES[FaultEvent]


def _next_segment(run_dir: str | Path) -> Path:
    folder = metrics_path(run_dir).with_suffix("")
    numbers = [int(path.stem) for path in folder.glob("*.jsonl")]
    return folder / f"{max(numbers, default=0) + 1:06d}.jsonl"


def _first_line(phase: str, resume_step: int | None) -> bytes:
    return json.dumps({"event": _SEGMENT, "phase": phase, "resume_step": resume_step}).encode() + b"\n"


class MetricsFile:
    """The open file, for the events of one phase. What earlier attempts wrote of it after `resume_step` is cut."""

    def __init__(self, run_dir: str | Path, phase: str, resume_step: int | None):
        if is_copy(run_dir):
            path = _next_segment(run_dir)
            replace_file(path, _first_line(phase, resume_step))
        else:
            path = metrics_path(run_dir)
            path.parent.mkdir(parents=True, exist_ok=True)
            cut_records(path, phase, resume_step)
        self._lines = JsonLines(path)

    def emit(self, event: Event) -> None:
        """One line, in one write: a killed process loses nothing that it has emitted."""
        self._lines.append(to_record(event))

    def close(self) -> None:
        self._lines.close()
