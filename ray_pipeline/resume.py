"""What a start finds in output_dir, whether it may go on from there, and with which changes of the config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ray_pipeline import attempts
from ray_pipeline.config import Config
from ray_pipeline.config_changes import Difference, accepted, check_named, differences, notes
from ray_pipeline.config_kinds import Kind, rule_of
from ray_pipeline.errors import UserError
from ray_pipeline.monitoring import phase_state
from ray_pipeline.monitoring.phase_state import PhaseState
from ray_pipeline.run_copy import run_path
from ray_pipeline.run_state import CONFIG_FILE, committed, mend_state, read_state, recorded_config
from ray_pipeline.storage import Folder, is_uri, replace_file
from ray_pipeline.sweep_records import read_sweep, read_winner
from ray_pipeline.sweep_space import with_winner

#: what --allow-change names when the latents are others although no key of the config differs
LATENTS = "latents"


@dataclass(frozen=True)
class Start:
    """A start, or a resume, that may be. begun: something was trained, or tried. changes: of the config since then."""

    config: Config
    begun: bool
    changes: Sequence[Difference]
    allow: Sequence[str]

    def state(self) -> PhaseState:
        """As its file says now; rebuilt, and written, where that is lost or damaged."""
        return mend_state(self.config)

    def is_finished(self) -> bool:
        """Whether nothing is left to train."""
        state = read_state(self.config).state
        return self.begun and all(state.phase(phase.name).is_done(phase.epochs) for phase in self.config.phases)

    def describe_changes(self) -> list[str]:
        """A line for each difference, with what a person might not think of."""
        noted = notes(self.changes, self.config)
        return [f"{change}" + (f" ({noted[change.key]})" if change.key in noted else "") for change in self.changes]

    def write_config(self) -> None:
        """Replace config.yaml."""
        replace_file(run_path(self.config.output_dir, CONFIG_FILE), self.config.to_yaml().encode())

    def accept(self, fingerprint: str) -> None:
        """Write down with what the run goes on: changes in its history, latents, config.yaml.

        UserError when the latents are no longer those that it was trained on.
        """
        state = self.state()
        trained_on = state.run.get("latents")
        differs = self.begun and trained_on not in (None, fingerprint)
        if differs and LATENTS not in self.allow and not any(map(_changes_latents, self.changes)):
            raise UserError(
                f"the run in {self.config.output_dir} was trained on other tiles, autoencoder or hint settings "
                f"(latents {trained_on[:12]}, now {fingerprint[:12]}); give it those again, say --allow-change "
                f"{LATENTS} to go on with these, or set another output_dir"
            )
        if LATENTS in self.allow and not differs:
            raise UserError(f"--allow-change {LATENTS}: they are those that the run was trained on; leave it out")
        if differs:
            state.record("config", f"{LATENTS}: {trained_on[:12]} -> {fingerprint[:12]}")
        for change in self.changes:
            state.record("config", str(change))
        state.run["latents"] = fingerprint
        # a phase has its place before it begins: who follows the run looks for it
        state.phases = {phase.name: state.phase(phase.name) for phase in self.config.phases} | state.phases
        for progress in state.phases.values():
            if progress.status in ("stopped", "failed"):
                progress.status = "starting"
        state.save(run_path(self.config.output_dir, phase_state.FILE))
        self.write_config()


def _changes_latents(change: Difference) -> bool:
    """Whether a change that was allowed gives the latent store another fingerprint."""
    field = change.key.rpartition(".")[2]
    return change.is_list or (
        rule_of(change.key).kind is Kind.TRAINING
        and (change.key.split(".")[0] in ("data", "vae") or field in ("condition_types", "datasets"))
    )


def open_run(config: Config, *, resume: bool, allow: Sequence[str] = ()) -> Start:
    """See what lies in output_dir; writes nothing but a state that is lost or damaged, and only where the run goes on.

    UserError: a run is there and `resume` is False, there is none to resume, its checkpoints are gone, or it cannot go
    on with this config.
    """
    if allow and not resume:
        raise UserError(f"--allow-change {allow[0]} is for a run that goes on; add --resume, or leave it out")
    where = config.output_dir
    state, checkpoints = read_state(config).state, committed(config)
    begun = bool(
        checkpoints
        or any(progress.has_begun() for progress in state.phases.values())
        or Folder(config.checkpoint_store).child(attempts.FOLDER).names()
    )
    if not resume:
        if begun:
            raise UserError(_occupied(config))
        return Start(config, begun, (), ())
    if not begun and not _is_there(where):
        raise UserError(f"output_dir={where} does not exist, so there is nothing to resume; leave out --resume")
    keys = [key for key in allow if key != LATENTS]
    before = recorded_config(where, config.checkpoint_store)
    winner, record = read_winner(where), read_sweep(where)
    # a kill may have come before config.yaml had what the sweep found
    if before is not None and winner is not None and record is not None:
        before = with_winner(before, record, winner)
    if not begun:  # a start that ended before its training did: nothing is stored that anything could differ from
        changes = [] if before is None else differences(before, config)
        check_named(where, changes, keys)
        return Start(config, begun, changes, allow)
    _check_checkpoints(config, state, checkpoints)
    for phase, names in checkpoints.items():  # a kill may have come between a save and the state file
        state.phase(phase).checkpoints = names
    changes = [] if before is None else accepted(where, before, config, state, keys)
    mend_state(config)
    return Start(config, begun, changes, allow)


def holds_run(config: Config) -> bool:
    """Whether `open_run` would have something to resume."""
    return _is_there(config.output_dir) and recorded_config(config.output_dir, config.checkpoint_store) is not None


def _is_there(output_dir: str) -> bool:
    folder = run_path(output_dir)
    return any(folder.iterdir()) if is_uri(output_dir) else folder.is_dir()


def _occupied(config: Config) -> str:
    files = (run_path(config.output_dir, name) for name in (CONFIG_FILE, phase_state.FILE))
    if any(path.is_file() for path in files):
        return f"output_dir={config.output_dir} holds a run already; go on with --resume or set another output_dir"
    return (
        f"{config.checkpoint_store} holds checkpoints of a run already, though {config.output_dir} has no "
        f"{CONFIG_FILE}; go on with --resume, which takes the config of the newest checkpoint, or set another "
        "output_dir and checkpoint.store"
    )


def _check_checkpoints(config: Config, state: PhaseState, checkpoints: dict[str, list[str]]) -> None:
    """A store that holds nothing of a phase that has saved is the wrong one, or has lost it: the phase would begin
    again."""
    for phase in config.phases:
        progress = state.phase(phase.name)
        if progress.last is not None and not progress.is_done(phase.epochs) and phase.name not in checkpoints:
            raise UserError(
                f"{config.checkpoint_store} holds no checkpoint of {phase.name}, but {phase_state.FILE} tells of "
                f"{progress.last}; copy the checkpoints there, set checkpoint.store to where they are, or begin again "
                "in another output_dir"
            )
