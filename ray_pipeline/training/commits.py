"""The checkpoints of a phase while it trains: what is committed, what is being saved, and a storage that refuses."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from functools import partial

from ray_pipeline.errors import UserError
from ray_pipeline.retention import checkpoint_name, obsolete_names
from ray_pipeline.run_copy import share
from ray_pipeline.training.saving import Outcome, Save, Saver, fits_in_memory
from ray_pipeline.training.setup import PhaseRun

#: how long a phase that must have a commit waits for a storage that refuses
PATIENCE_SECONDS = 600.0
_PAUSE_SECONDS = 2.0
#: after a save that was refused and not kept, the next one comes so soon
_RETRY_SECONDS = 60.0


class Commits:
    """A context manager on rank 0.

    fault(kind, words) is told what goes wrong; committed(save, seconds training stood still, seconds of writing), of
    each commit; both only while a method of this class is called.
    """

    def __init__(
        self, run: PhaseRun, fault: Callable[[str, str], None], committed: Callable[[Save, float, float], None]
    ):
        self.run, self._fault, self._tell = run, fault, committed
        self.saver = Saver()
        found = run.checkpoints.listing(run.phase.name)
        states = {checkpoint.name: checkpoint.state for checkpoint in found.checkpoints}
        # those of steps to come were passed over as damaged: the steps are made again, and so are they
        passed_over = tuple(name for name, state in states.items() if state["step"] > run.state.step)
        #: of checkpoints that are committed, or are being saved, by name
        self.states: dict[str, Mapping] = {name: states[name] for name in states if name not in passed_over}
        self._pending: dict[str, float] = {}  # seconds that training stood still for it
        self._strays = (*found.strays, *passed_over)
        self._words = ""
        self._plan_next()

    def __enter__(self) -> Commits:
        self.saver.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.saver.__exit__(*exception)

    def committed(self) -> dict[str, Mapping]:
        """States of the committed checkpoints by name, in the order of their steps."""
        done = [(name, state) for name, state in self.states.items() if name not in self._pending]
        return dict(sorted(done, key=lambda item: item[1]["step"]))

    def due(self) -> bool:
        """Whether it is time for a save between those of epochs."""
        return time.monotonic() > self._due_at

    def has_step(self) -> bool:
        """Whether the step just done is committed or being saved."""
        return any(state["step"] == self.run.state.step for state in self.states.values())

    def save(self, state: Mapping, metadata: Mapping[str, str], epoch: int | None) -> None:
        """Have a checkpoint of this step written and, once it is committed, those deleted that are no longer kept.

        epoch: the one that it ends, if any.
        """
        run, started = self.run, time.perf_counter()
        name = checkpoint_name(run.phase.name, run.state.step, epoch)
        self.states[name], self._pending[name] = state, 0.0
        # what a kill or damage left of a checkpoint goes, unless a whole one of that name has taken its place
        strays = tuple(stray for stray in self._strays if stray not in self.states)
        obsolete = obsolete_names(run.phase, self.states, name) + strays
        replaceable = state["kind"] in ("safety", "stop")  # nothing makes an epoch's again
        # a run that goes on from this step has the records of all steps before
        records = partial(share, run.config.output_dir)
        groups = run.state.groups()
        self.submit(Save(run.checkpoints, name, groups, state, metadata, obsolete, replaceable, first=records))
        self._pending[name] = time.perf_counter() - started
        self._plan_next()
        self.collect()

    def submit(self, save: Save) -> None:
        """Write in the background; or here, where that is asked for or there is no memory for a copy."""
        background = self.run.config.checkpoint.background
        if fits_in_memory(save) if background == "auto" else background:
            self.saver.submit(save)
        else:
            self.wait(PATIENCE_SECONDS)  # what was to be saved before comes first
            self.saver.write(save)

    def secure(self, save: Callable[[], None], seconds: float) -> None:
        """Have the step just done committed when this returns, by `save` if need be; UserError when the storage refuses
        for so long."""
        until = time.monotonic() + seconds
        while True:
            if not self.has_step():
                save()
            self.wait(until - time.monotonic())
            if self.has_step():  # else it was written without a copy, and refused
                return
            if time.monotonic() > until:
                raise self._refused()
            time.sleep(_PAUSE_SECONDS)

    def wait(self, seconds: float) -> None:
        """Until all is committed; UserError when the storage refuses for so long."""
        until = time.monotonic() + seconds
        while not self.saver.drain(1.0):
            self.collect()
            if time.monotonic() > until:
                raise self._refused()
        self.collect()

    def collect(self) -> None:
        """Take note of what became of saves meanwhile. Raises what is no refusal of the storage."""
        for outcome in self.saver.outcomes():
            self._conclude(outcome)

    def _plan_next(self) -> None:
        minutes = self.run.config.checkpoint.every_minutes
        self._due_at = math.inf if minutes is None else time.monotonic() + 60 * minutes

    def _refused(self) -> UserError:
        return UserError(
            f"{self.run.checkpoints.root} does not take the checkpoint of step {self.run.state.step} ({self._words}); "
            "what was committed before stands: mend the storage and go on with --resume"
        )

    def _conclude(self, outcome: Outcome) -> None:
        save = outcome.save
        if outcome.error is not None:
            self._words = outcome.error
            if outcome.dropped:
                self._forget(save)
                self._fault("save", f"{save.name} was never saved: {outcome.error}")
            else:
                self._fault("save", f"{save.name} is not saved yet, training goes on meanwhile: {outcome.error}")
            return
        for words in outcome.left:
            self._fault("save", words)
        if save.store is not self.run.checkpoints:
            return
        self._strays = ()
        # a stray's name may have been given to a save that came after this one
        gone = set(save.obsolete) - set(self._pending)
        self.states = {name: state for name, state in self.states.items() if name not in gone}
        self._tell(save, self._pending.pop(save.name), outcome.seconds)

    def _forget(self, save: Save) -> None:
        """A save that was given up."""
        self.states.pop(save.name, None)
        self._pending.pop(save.name, None)
        if not any(state["step"] > save.state["step"] for state in self.states.values()):  # nothing comes by itself
            self._due_at = min(self._due_at, time.monotonic() + _RETRY_SECONDS)
