"""How a run ended, where that is not as planned: written down by the command that waited for it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from ray_pipeline.config import Config
from ray_pipeline.errors import RunStopped, UserError, find_user_error
from ray_pipeline.monitoring import phase_state
from ray_pipeline.monitoring.events import FaultEvent, PhaseEvent
from ray_pipeline.monitoring.metrics_file import MetricsFile
from ray_pipeline.run_copy import run_path
from ray_pipeline.run_state import mend_state

#: characters that are told of an error; Ray's tracebacks are long, and their last lines say what it was
_MOST_WORDS = 600


@contextmanager
def ending_noted(config: Config, phase: str | None = None) -> Iterator[None]:
    """Within, an error or a stop that the workers could not write down themselves goes into state, history and records
    of the run, and on to the caller. phase: which one ended, default the first that is not finished.

    Nothing is written for a run that was superseded: the files belong to the one that goes on.
    """
    try:
        yield
    except RunStopped as stopped:
        _note(config, phase, "stopped", str(stopped))
        raise
    except KeyboardInterrupt:
        _note(config, phase, "stopped", "stopped by Ctrl-C")
        raise
    except SystemExit:  # what SIGTERM raises in ray_session
        _note(config, phase, "stopped", "stopped by SIGTERM")
        raise
    except Exception as error:
        found = find_user_error(error)
        if found is None or not found.superseded:
            words = str(found)[:_MOST_WORDS] if found else f"{type(error).__name__}: {error}"[-_MOST_WORDS:]
            _note(config, phase, "failed", words)
        raise


def _note(config: Config, phase: str | None, status: str, words: str) -> None:
    try:
        state = mend_state(config)
        unfinished = [each.name for each in config.phases if not state.phase(each.name).is_done(each.epochs)]
        progress = state.phase(phase := phase or next(iter(unfinished), config.phases[-1].name))
        if progress.status in ("stopped", "failed"):  # written down already
            return
        if progress.status != "finished":
            progress.status, state.current_phase = status, phase
        _, _, last_line = words.strip().rpartition("\n")
        state.record(status, f"{phase}, step {progress.step}: {last_line}")
        state.save(run_path(config.output_dir, phase_state.FILE))
        records = MetricsFile(run_path(config.output_dir), phase, None)
        if status == "failed":
            records.emit(FaultEvent(phase, progress.step, status, words))
        else:
            records.emit(PhaseEvent(phase, status, progress.step, words))
        records.close()
    except (OSError, UserError) as error:  # what ended the run is what the caller must hear
        warnings.warn(f"how the run ended could not be written down: {error}", stacklevel=2)
