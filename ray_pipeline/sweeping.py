"""The sweep in a run: when it comes, what the run goes on with, and whether the winner held at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ray_pipeline.checkpoints import CheckpointStore
from ray_pipeline.config import Config
from ray_pipeline.config_changes import differences
from ray_pipeline.errors import UserError
from ray_pipeline.estimate import sample_flops
from ray_pipeline.monitoring import phase_state
from ray_pipeline.run_copy import run_path
from ray_pipeline.run_state import mend_state
from ray_pipeline.storage import replace_file
from ray_pipeline.sweep_records import SweepRecord, read_sweep, read_winner, sweep_folder
from ray_pipeline.sweep_space import continues, count, phase_index, with_winner
from ray_pipeline.training.sweep import run_sweep
from ray_pipeline.training.sweep_winner import adopt, choose, compare, discard_trials, table, write_results
from ray_pipeline.training.trial import SweepJob, searched_averages


def found_config(config: Config, say: Callable[[str], None] = print, allow_changes: Sequence[str] = ()) -> Config:
    """The config with what the winner of the run's sweep sets, where there is one, but for the keys in `allow_changes`,
    now and from now on."""
    winner = read_winner(config.output_dir)
    if winner is None:
        return config
    overruled = [key for key in winner.overrides if key in allow_changes and key not in winner.overruled]
    if overruled:
        winner.overruled += overruled
        winner.save(sweep_folder(config.output_dir))
    settings = [
        str(found)
        for found in differences(Config.model_validate(_record(config).base), config)
        if found.key.startswith("sweep.") and found.key not in ("sweep.enabled", "sweep.keep_trials")
    ]
    if settings:
        say(f"sweep     it is finished, so this changes nothing: {'; '.join(settings)}")
    say(f"sweep     {winner.in_words} (trial {winner.trial}, {sweep_folder(config.output_dir) / 'winner.json'})")
    return with_winner(config, _record(config), winner)


def _record(config: Config) -> SweepRecord:
    record = read_sweep(config.output_dir)
    if record is None:
        folder = sweep_folder(config.output_dir)
        raise UserError(f"{folder / 'sweep.json'} is gone, and winner.json is not; bring it back from a copy")
    return record


def served_phase(config: Config) -> int:
    """Number of the phase that goes on, or begins, from the sweep's winner."""
    return phase_index(config) + continues(config)


def search(config: Config, latents: str, init: str | None, say: Callable[[str], None]) -> Config:
    """Train what is left of the sweep and adopt its winner, on the Ray that is running -> the config to go on with.

    init: checkpoint that the trials begin from; None where they continue a finished phase.
    """
    folder = sweep_folder(config.output_dir)
    winner = read_winner(config.output_dir)
    name, adopted = config.phases[served_phase(config)].name, False
    if winner is None:
        begun = CheckpointStore(config.checkpoint_store).names(name)
        if begun:
            raise UserError(
                f"phase {name} has begun ({', '.join(begun)} in {config.checkpoint_store}), and the sweep comes before "
                "it; set sweep.enabled=false, take these checkpoints away, or set another output_dir"
            )
        _note(config, "sweep", f"sweep of {config.sweep.trains}: {count(config)} trials")
        record = run_sweep(config, _sweep_job(config, latents, init), say)
        candidates = compare(config, record)
        write_results(config, record, candidates)
        winner = choose(config, record, candidates)
        if continues(config):  # the winner's overrides name what it has learnt, so that comes first
            adopted = adopt(with_winner(config, record, winner), record.trials[winner.trial], winner)
        winner.save(folder)
        for line in table(config, record, candidates):
            say(line)
        tied = len(winner.ties)
        words = f"trial {winner.trial} wins: {winner.in_words}, validation loss {winner.loss:.4f}"
        words += f"; {tied} other(s) within a paired standard error of it" if tied else ""
        _note(config, "sweep", words)
        say(f"sweep     {words}")
    record = _record(config)
    now = with_winner(config, record, winner)
    alone = now.model_copy(update={"sweep": now.sweep.model_copy(update={"enabled": False})})
    replace_file(folder / "winner.yaml", alone.to_yaml().encode())
    if adopt(now, record.trials[winner.trial], winner) or adopted:
        verb = "begins" if continues(config) else "resumes"
        say(f"sweep     {name} {verb} from {winner.checkpoint} (step {winner.step}, position {winner.position})")
    if not config.sweep.keep_trials:
        discard_trials(config, record)
    return now


def _sweep_job(config: Config, latents: str, init: str | None) -> SweepJob:
    phase, store = config.phases[phase_index(config)], CheckpointStore(config.checkpoint_store)
    flops = sample_flops(config, phase)
    if init is not None:
        return SweepJob(config.dump(), latents, init, epochs_before=0, sample_flops=flops)
    last = store.latest(phase.name)
    if last is None:
        raise UserError(f"{store.root} holds no whole checkpoint of {phase.name} to continue from; train it first")
    return SweepJob(config.dump(), latents, last.folder, epochs_before=phase.epochs, sample_flops=flops)


def confirm(config: Config, index: int, say: Callable[[str], None]) -> None:
    """After the phase that went on from a sweep: is the average that won still the best?"""
    winner = read_winner(config.output_dir)
    if winner is None or winner.confirmed or index != served_phase(config) or winner.track is None:
        return
    metrics = mend_state(config).phase(config.phases[index].name).metrics
    found = {key.removeprefix("val_loss/"): loss for key, loss in metrics.items() if key.startswith("val_loss/")}
    searched = {name: found[name] for name in searched_averages(config) if name in found}
    if len(searched) < 2:  # one alone has nothing to be compared with
        return
    winner.confirmed = found
    winner.save(sweep_folder(config.output_dir))
    best = min(searched, key=lambda name: (not math.isfinite(searched[name]), searched[name]))
    words = f"{winner.track} is confirmed: of the decays searched, it is the best at the end of "
    words += f"{config.phases[index].name}, too"
    if best != winner.track and winner.track in searched:
        words = (
            f"{winner.track} won the sweep, but {best} is better at the end of {config.phases[index].name}: "
            f"{searched[best]:.4f} against {searched[winner.track]:.4f}"
        )
    _note(config, "sweep", words)
    say(f"sweep     {words}")


def _note(config: Config, event: str, words: str) -> None:
    """A line in the run's history."""
    state = mend_state(config)
    state.record(event, words)
    state.save(run_path(config.output_dir, phase_state.FILE))
