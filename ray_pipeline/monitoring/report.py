"""report.html: one page, complete in itself, from which a person sees how a run goes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

from ray_pipeline.config import load_config
from ray_pipeline.errors import UserError
from ray_pipeline.monitoring import phase_state
from ray_pipeline.monitoring.events import STEP_PARTS
from ray_pipeline.monitoring.metrics_file import MetricsReader
from ray_pipeline.monitoring.pace import time_left
from ray_pipeline.monitoring.phase_state import PhaseProgress, PhaseState
from ray_pipeline.monitoring.progress import format_bytes, format_seconds, format_share
from ray_pipeline.monitoring.report_pictures import chart_pictures, embedded_picture, sample_pictures
from ray_pipeline.run_copy import location_of
from ray_pipeline.storage import Folder, replace_file
from ray_pipeline.sweep_records import SweepRecord, TrialRecord, Winner, read_sweep, read_winner, sweep_folder

FILE, TEMPLATE = "report.html", "report.html.j2"
# The newest of each are shown; logs/metrics.jsonl and phase_state.json hold all.
CHECKPOINTS, FAULTS, HISTORY = 20, 50, 100
_WHOLE = {"event", "time", "phase"}
_ENDED = ("finished", "stopped", "failed")
# so many times the validation loss at the start, and training has diverged
_DIVERGED = 5.0
_ALIVE = re.compile(rb'(<meta name="alive" content=")[^"]*')


@dataclass(frozen=True)
class _Run:
    """What the files of a run hold. order: names of its phases; troubles: files that cannot be read, in words."""

    folder: Path
    config: str
    order: list[str]
    state: PhaseState
    records: list[dict]
    sweep: SweepRecord | None
    winner: Winner | None
    troubles: list[str] = field(default_factory=list)

    @property
    def current(self) -> str | None:
        """The phase that is trained, was trained last or will be first."""
        return self.state.current_phase or next(iter(self.order), None)

    def progress(self, phase: str | None) -> PhaseProgress:
        return self.state.phases.get(phase or "", PhaseProgress())

    @cached_property
    def _by_event(self) -> dict[str, list[dict]]:
        found: dict[str, list[dict]] = {}
        for record in self.records:
            found.setdefault(record["event"], []).append(record)
        return found

    def events(self, event: str, phase: str | None = None) -> list[dict]:
        """Records of one kind, in order; of all phases by default."""
        return [record for record in self._by_event.get(event, []) if phase in (None, record["phase"])]


def write_report(
    run_dir: str | Path, out: Path | None = None, *, alive: bool = False, reader: MetricsReader | None = None
) -> Path:
    """Write <run_dir>/report.html, or `out`, anew from what the run has written so far, and return its path.

    The page loads nothing: style, script and pictures are in it. A file of the run that is missing or damaged is named
    there. alive: by a command that works on the run, which `mark_alive` tells again: the page warns of a run that may
    have ended by when it did so last, else by the run's newest record. reader: of who draws the page again and again.
    Raises UserError when there is no run in run_dir, OSError when the page cannot be written.
    """
    import jinja2

    run = _read(Path(run_dir), reader or MetricsReader(run_dir))
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": _number, "seconds": format_seconds, "time": _time, "share": format_share}
    template = environment.from_string(Path(__file__).with_name(TEMPLATE).read_text(encoding="ascii"))
    page = template.render(_contents(run), alive=phase_state.utc_now() if alive else None)
    path = out or run.folder / FILE
    replace_file(path, page.encode("utf-8", "replace"))
    return path


def mark_alive(run_dir: str | Path) -> None:
    """Write into a page that was drawn so that the command which works on the run still does; OSError when it cannot be
    written."""
    path = Path(run_dir) / FILE
    replace_file(path, _ALIVE.sub(rb"\g<1>" + phase_state.utc_now().encode(), path.read_bytes(), count=1))


def _read(folder: Path, reader: MetricsReader) -> _Run:
    config = folder / "config.yaml"
    if not config.is_file():
        what = "no run (no config.yaml)" if folder.is_dir() else "no run: there is no such folder"
        raise UserError(f"{folder} holds {what}, expected the output_dir of a training; correct the path")
    troubles: list[str] = []

    def tried(read: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return read()
        except (UserError, OSError) as error:
            troubles.append(str(error))
            return otherwise

    state = tried(lambda: phase_state.load(folder / phase_state.FILE), PhaseState())
    names = tried(lambda: [phase.name for phase in load_config(config).phases], [])
    return _Run(
        folder=folder.absolute(),
        config=config.read_text(encoding="utf-8", errors="replace"),
        order=list(dict.fromkeys([*names, *state.phases])),
        state=state,
        records=[record for record in tried(reader.events, []) if record.keys() >= _WHOLE],
        sweep=tried(lambda: read_sweep(folder), None),
        winner=tried(lambda: read_winner(folder), None),
        troubles=troubles,
    )


def _contents(run: _Run) -> dict[str, Any]:
    """What the template shows, by the names that it uses."""
    kind, words = _headline(run)
    history, faults, steps = run.state.history[::-1], run.events("fault")[::-1], run.events("step", run.current)
    checkpoints = run.events("checkpoint")[::-1]
    times = [record["time"] for record in run.records[-1:]] + [entry.time for entry in history[:1]]
    # the phase that one opens the page for comes first
    told = {record["phase"] for record in run.records}
    begun = [name for name in reversed(run.order) if name in told]
    samples = {name: sample_pictures(run.folder, run.events("sample", name)) for name in begun}
    return {
        "name": Folder(location_of(run.folder)).name,
        "folder": location_of(run.folder),
        "kind": kind,
        "words": words,
        "written": phase_state.utc_now(),
        "updated": max(times, default=""),
        "troubles": run.troubles,
        "facts": _facts(run, kind, steps[-1] if steps else {}, len(faults)),
        "bars": [_bar(name, run.progress(name)) for name in run.order],
        "charts": {name: _charts(run, name) for name in begun},
        "samples": {name: found for name, found in samples.items() if found},
        "parts": _parts(steps[-1] if steps else {}),
        "newest": steps[-1] if steps else None,
        "checkpoints": [_checkpoint(run, record) for record in checkpoints[:CHECKPOINTS]],
        "checkpoint_count": len(checkpoints),
        "sweep": _sweep(run),
        "faults": faults[:FAULTS],
        "fault_count": len(faults),
        "history": history[:HISTORY],
        "history_count": len(history),
        "about": {title: run.state.run.get(title.lower()) for title in ("Environment", "Resources")},
        "config": run.config,
    }


def _headline(run: _Run) -> tuple[str, str]:
    """Kind of state, and what it means in one sentence."""
    phase, progress, count = run.current, run.progress(run.current), len(run.order)
    place = f"{phase}, step {progress.step:,}" + (f" of {progress.steps:,}" if progress.steps else "")
    if count and all(run.progress(name).status == "finished" for name in run.order):
        return "finished", "The phase is trained." if count == 1 else f"All {count} phases are trained."
    if progress.status == "stopped":
        return "stopped", f"Training stands still: {place}. `train --resume` goes on from there."
    if progress.status == "pending":
        return "starting", "Nothing is trained yet."
    if progress.status == "starting":
        return "starting", f"Training is about to go on: {place}."
    if progress.status == "failed":
        told = [record["message"] for record in run.events("fault", phase) if record["kind"] == "failed"]
        _, _, error = told[-1].strip().rpartition("\n") if told else ("", "", "")
        why = f": {error.rstrip('.')}" if error else ""
        return "failed", f"Training has failed at {place}{why}. `train --resume` goes on from the last checkpoint."
    recent = _since_start_or_checkpoint(record for record in reversed(run.records) if record["phase"] == phase)
    faults = [record for record in recent if record["event"] == "fault"]
    losses = [record["loss"] for record in recent if record["event"] == "step"]
    if losses and not math.isfinite(losses[0]):
        return "faults", f"The newest training loss is not finite: {place}."
    start = progress.baseline_val_loss
    if losses and start and losses[0] > _DIVERGED * start:
        words = f"{_number(losses[0])}, and that of the validation was {_number(start)} at the start"
        return "faults", f"Training diverges: {place}. The newest training loss is {words}."
    if faults:
        trouble = f"{faults[0]['kind']}, {faults[0]['message']}"
        return "faults", f"Training goes on ({place}), but since the last checkpoint: {trouble}."
    if progress.status == "finished":
        return "healthy", f"{phase} is trained; {_between_phases(run)}."
    return "healthy", f"Training goes well: {place}."


def _between_phases(run: _Run) -> str:
    if run.sweep is None or run.winner is not None:
        return "the next phase begins"
    ended = sum(trial.status in _ENDED for trial in run.sweep.trials)
    return f"the sweep goes on, {ended} of {len(run.sweep.trials)} trials so far have ended"


def _since_start_or_checkpoint(newest_first: Iterator[dict]) -> list[dict]:
    """The newest of these records: trouble before them was overcome."""
    return list(
        takewhile(
            lambda record: record["event"] != "checkpoint" and record.get("status") not in ("started", "resumed"),
            newest_first,
        )
    )


def _facts(run: _Run, kind: str, newest: Mapping[str, Any], faults: int) -> list[tuple[str, str, str]]:
    """Name, value and a note of what one looks for first; newest: the last step record of the current phase."""
    progress = run.progress(run.current)
    left = time_left(run.state, run.records, run.order)
    loss, compared = _validation_loss(run, progress)
    of_steps = f"of {progress.steps:,} ({100 * progress.step // progress.steps}%)" if progress.steps else ""
    memory = newest.get("memory_bytes", math.nan)
    facts = [
        ("Phase", run.current or "none", progress.status),
        ("Step", f"{progress.step:,}", of_steps),
        ("Epoch", str(progress.epoch), f"of {progress.epochs}" if progress.epochs else ""),
    ]
    if kind != "finished":
        facts.append(
            ("Time left, this phase", _left(left.phase), "once it goes on" if kind in ("stopped", "failed") else "")
        )
        facts.append(("Time left, all phases", _left(left.run), ""))
    if newest:
        facts.append(("Training loss", _number(newest["loss"]), f"step {newest['step']:,}"))
    else:
        facts.append(("Training loss", "none yet", ""))
    return facts + [
        ("Validation loss", loss, compared),
        ("Samples a second", _measured(newest.get("samples_per_second", math.nan)), ""),
        ("Model FLOP utilisation", format_share(newest.get("utilisation", math.nan)), "of the device's peak"),
        ("Memory", format_bytes(memory) if math.isfinite(memory) else "not measured", "the most so far"),
        ("Faults", str(faults), "see Faults and history" if faults else ""),
    ]


def _validation_loss(run: _Run, progress: PhaseProgress) -> tuple[str, str]:
    """The newest of the current phase, of the average that is validated all along, and how it compares."""
    records = run.events("validation", run.current)
    losses = [record["loss"] for record in records if record["ema"] == records[0]["ema"]]
    if not losses:
        return "none yet", ""
    start, notes = progress.baseline_val_loss, []
    if start:
        notes.append(f"{_number(start)} at the start, ratio {_number(losses[-1] / start)}")
    if progress.best:
        notes.append(f"best {_number(progress.best.val_loss)} after epoch {progress.best.epoch}")
    return _number(losses[-1]), "; ".join(notes)


def _bar(name: str, progress: PhaseProgress) -> dict[str, Any]:
    """A phase's progress; rounded down, so that 100% is said only when all is done."""
    percent = 100 * progress.step // progress.steps if progress.steps else 0
    words = progress.status
    if progress.steps:
        words += f", {progress.step:,} of {progress.steps:,} steps ({percent}%)"
    if progress.epochs:
        words += f", epoch {progress.epoch} of {progress.epochs}"
    return {"name": name, "words": words, "step": progress.step, "steps": progress.steps or 1}


def _charts(run: _Run, phase: str) -> list[dict[str, str]]:
    records = [record for record in run.records if record["phase"] == phase]
    return chart_pictures(phase, records, run.progress(phase).baseline_val_loss)


def _parts(newest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Where the time of a step goes: name, seconds (nan: not measured) and share (0 to 1) of the whole step."""
    times = {name: newest.get(f"{part}_seconds", math.nan) for name, part in STEP_PARTS.items()}
    known = sum(seconds for seconds in times.values() if math.isfinite(seconds))
    whole = newest.get("step_seconds", math.nan)
    if math.isfinite(whole):
        times["everything else"] = max(0.0, whole - known)
        known = max(known, whole)
    return [
        {"name": name, "seconds": seconds, "share": seconds / known if known else math.nan}
        for name, seconds in times.items()
    ]


def _checkpoint(run: _Run, record: Mapping[str, Any]) -> dict[str, Any]:
    """Row of the table: `place` says what the checkpoint is now, of those that are kept."""
    progress = run.progress(record["phase"])
    best = progress.best is not None and progress.best.checkpoint == record["name"]
    words = ["best"] * best + ["last"] * (progress.last == record["name"])
    kept = "kept" if record["name"] in progress.checkpoints else "cleaned up"
    return {"write_seconds": math.nan, **record, "place": ", ".join(words) or kept}


def _sweep(run: _Run) -> dict[str, Any] | None:
    if run.sweep is None:
        return None
    picture, trouble = embedded_picture(sweep_folder(run.folder) / "sweep.png", run.folder)
    keys = list(dict.fromkeys(key for trial in run.sweep.trials for key in trial.values))
    won = run.winner.trial if run.winner else None
    rows = [{**_trial(run.sweep, trial, keys), "won": trial.number == won} for trial in run.sweep.trials]
    return {"keys": keys, "rows": rows, "winner": run.winner, "picture": picture, "trouble": trouble}


def _trial(sweep: SweepRecord, trial: TrialRecord, keys: Sequence[str]) -> dict[str, Any]:
    last = trial.results[-1] if trial.results else None
    return {
        "number": trial.number,
        "values": [trial.values.get(key, "") for key in keys],
        "status": trial.status,
        "message": trial.message,
        "epoch": last.epoch if last else "none",
        "loss": sweep.loss(last) if last else math.nan,
    }


def _number(value: float) -> str:
    """Four digits; what is not finite is said in words."""
    return f"{value:.4g}" if math.isfinite(value) else f"not finite ({value})"


def _measured(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "not measured"


def _left(seconds: float) -> str:
    return format_seconds(seconds) if math.isfinite(seconds) else "not known yet"


def _time(text: str) -> str:
    """ISO 8601 in UTC, to the second, as people write it."""
    return f"{text[:19].replace('T', ' ')} UTC"
