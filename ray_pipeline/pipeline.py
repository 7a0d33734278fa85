"""The main job: data, latents, then each phase; what runs next, and from which weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from ray_pipeline import estimate
from ray_pipeline.checkpoints import CheckpointStore, DamagedCheckpoint, open_checkpoint
from ray_pipeline.config import Config
from ray_pipeline.data.encode_job import encode_job
from ray_pipeline.data.mixture import make_mixture, validation_rows
from ray_pipeline.encoding import Prepared, check_locations, encode, has_data, look, prepare_data
from ray_pipeline.errors import UserError
from ray_pipeline.job_paths import check_paths_under_job
from ray_pipeline.models.autoencoder import load_autoencoder
from ray_pipeline.monitoring import phase_state
from ray_pipeline.monitoring.ending import ending_noted
from ray_pipeline.monitoring.environment import environment
from ray_pipeline.monitoring.live_report import LiveReport
from ray_pipeline.monitoring.sinks import chosen_sinks
from ray_pipeline.ray_session import ray_session
from ray_pipeline.resume import holds_run, open_run
from ray_pipeline.retention import best_of
from ray_pipeline.run_copy import location_of, reading_copy, run_path, working_copy
from ray_pipeline.run_state import mend_state
from ray_pipeline.storage import Folder, is_uri
from ray_pipeline.sweep_records import read_sweep, read_winner, sweep_folder
from ray_pipeline.sweep_space import check_space, continues, decays, phase_index
from ray_pipeline.sweeping import confirm, found_config, search, served_phase
from ray_pipeline.training.launch import check_resources, run_phase
from ray_pipeline.training.nodes import check_nodes
from ray_pipeline.training.placement import await_room, encoder_resources, worker_resources
from ray_pipeline.training.setup import PhaseJob, stream_cpus
from ray_pipeline.training.sweep import trials_at_once

Resume = bool | Literal["auto"]


def train(
    config: Config,
    *,
    resume: Resume = False,
    allow_changes: Sequence[str] = (),
    verbose: bool = False,
    profile: bool = False,
    say: Callable[[str], None] = print,
) -> str | None:
    """Do all that is missing, then every phase; returns where the run lies, None when all was done already.

    resume: "auto" goes on with a run that is there, and begins one where there is none. allow_changes: keys or sections
    in which a resume may differ from the run; `say` gets each difference. profile: write a trace of a few steps of each
    phase.
    UserError: a run is there already and `resume` is False, or it cannot go on with this config.
    """
    config = _absolute(config)
    estimate.check_writable(config.output_dir, "output_dir")
    estimate.check_writable(config.checkpoint_store, "checkpoint.store")
    chosen_sinks(config.monitoring)
    if config.sweep.enabled:
        check_space(config)
    with working_copy(config.output_dir, follow=True):
        return _train(config, resume, allow_changes, verbose, profile, say)


def _train(
    config: Config,
    resume: Resume,
    allow_changes: Sequence[str],
    verbose: bool,
    profile: bool,
    say: Callable[[str], None],
) -> str | None:
    config = found_config(config, say, allow_changes)
    start = open_run(config, resume=holds_run(config) if resume == "auto" else resume, allow=allow_changes)
    for line in start.describe_changes():
        say(f"changed   {line}")
    if start.is_finished():
        words = f"the run in {config.output_dir} is finished, so there is nothing to resume"
        say(f"{words}; phases[].epochs may give it more")
        return None
    if not start.begun:
        start.write_config()  # a start that fails over its data can be made again, with or without --resume
    prepare_data(config)
    prepared = look(config)
    samples = check_phases(config, prepared)
    check_room(config, samples)
    start.accept(prepared.fingerprint.store)
    note_plan(config, samples)
    with (
        LiveReport(config),
        ending_noted(config),
        ray_session(config.ray, more_cpus=stream_cpus(config), verbose=verbose),
    ):
        check_resources(config)
        _find_nodes(config, prepared)
        if config.sweep.enabled and read_winner(config.output_dir) is None:
            trials_at_once(config)
        encode(config, prepared)
        for index in range(len(config.phases)):
            swept = config.sweep.enabled or read_winner(config.output_dir) is not None
            if swept and index == served_phase(config):
                config = search(config, prepared.job.store, _first_weights(config), say)
                start = replace(start, config=config)
                start.write_config()
            phase = config.phases[index]
            if start.state().phase(phase.name).is_done(phase.epochs):
                confirm(config, index, say)  # a kill may have come before it
                continue
            job = PhaseJob(
                config=config.dump(),
                phase=index,
                latents=prepared.job.store,
                init=initial_weights(config, index),
                sample_flops=estimate.sample_flops(config, phase),
                profile=profile,
            )
            run_phase(config, job)
            confirm(config, index, say)
    return config.output_dir


def sweep(config: Config, *, resume: bool = False, verbose: bool = False, say: Callable[[str], None] = print) -> str:
    """Search alone, in a run whose phases before it are trained; `train --resume` goes on from the winner. Returns
    where the sweep lies. UserError: there is no such run, or its phases before are not finished."""
    config = _absolute(config)
    config = config.model_copy(update={"sweep": config.sweep.model_copy(update={"enabled": True})})
    check_space(config)
    with working_copy(config.output_dir, follow=True):
        return _sweep(config, resume, verbose, say)


def _sweep(config: Config, resume: bool, verbose: bool, say: Callable[[str], None]) -> str:
    if not holds_run(config):
        raise UserError(
            f"there is no run in {config.output_dir}; `ray-pipeline train` trains the phases before a sweep"
        )
    winner = read_winner(config.output_dir)
    if winner is None and read_sweep(config.output_dir) is not None and not resume:
        raise UserError(f"{sweep_folder(config.output_dir)} holds a sweep already; go on with --resume")
    if winner is not None:
        say(f"the sweep of {config.output_dir} is finished; another output_dir begins anew")
    config = found_config(config, say)
    start = open_run(config, resume=True)
    state = start.state()
    for phase in config.phases[: served_phase(config)]:
        if not state.phase(phase.name).is_done(phase.epochs):
            raise UserError(
                f"the sweep comes after phase {phase.name}, which is not finished in {config.output_dir}; train it "
                "first with `ray-pipeline train`"
            )
    prepared = look(config)
    check_room(config, check_phases(config, prepared))
    start.accept(prepared.fingerprint.store)
    with (
        LiveReport(config),
        ending_noted(config),
        ray_session(config.ray, more_cpus=stream_cpus(config), verbose=verbose),
    ):
        _find_nodes(config, prepared)
        encode(config, prepared)
        config = search(config, prepared.job.store, _first_weights(config), say)
    replace(start, config=config).write_config()
    return location_of(sweep_folder(config.output_dir))


def _find_nodes(config: Config, prepared: Prepared) -> None:
    """Before anything is computed: nodes with room, those of an autoscaler too, that find what the run reads and
    writes."""
    if not prepared.stored:
        await_room(config, encoder_resources(config), 1, "an actor that encodes")
    if config.ray.autoscaling:
        await_room(config, worker_resources(config), config.ray.min_workers, "the workers")
    check_nodes(config, encodes=not prepared.stored)


def _first_weights(config: Config) -> str | None:
    """What the trials of a sweep begin from; None where they continue a phase."""
    return None if continues(config) else initial_weights(config, phase_index(config))


def check_phases(config: Config, prepared: Prepared) -> list[int]:
    """Training samples of an epoch of each phase; UserError now for what it would find wrong hours later."""
    samples = []
    for phase in config.phases:
        if phase.init:
            open_checkpoint(phase.init)
        mixture = make_mixture(config, phase, prepared.listing.datasets["train"], f"{config.data.root} (train)")
        validation_rows(phase, prepared.listing.datasets["val"], f"{config.data.root} (val)")
        samples.append(mixture.plan.num_samples)
    return samples


def note_plan(config: Config, samples: list[int]) -> None:
    """Write down what is to come, in phase_state.json: the time left for all phases follows from it.

    samples: of an epoch of each phase.
    """
    state = mend_state(config)
    for phase, count in zip(config.phases, samples, strict=True):
        progress = state.phase(phase.name)
        progress.sample_flops = estimate.sample_flops(config, phase)
        if not progress.has_begun():
            progress.steps = estimate.estimate_phase(config, phase, count).steps
            progress.epochs = phase.epochs
    state.run["environment"] = environment()
    state.save(run_path(config.output_dir, phase_state.FILE))


def check_room(config: Config, samples: list[int]) -> None:
    """UserError when the disk cannot hold what is to come; a warning for a sweep whose averages will be equal.

    samples: of an epoch of each phase.
    """
    estimates = [estimate.estimate_phase(config, *pair) for pair in zip(config.phases, samples, strict=True)]
    sweep, store = estimate.estimate_sweep(config, estimates), config.checkpoint.store
    place, key = (store, "checkpoint.store") if store else (config.output_dir, "output_dir")
    need = estimate.output_bytes(estimates, sweep)
    estimate.check_disk(place, need if is_uri(place) else need - estimate.bytes_in(Path(place)), key)
    if sweep is not None and len(decays(config)) > 1 and sweep.last_step <= config.ema.start_step:
        warnings.warn(
            f"trials end at step {sweep.last_step}, and averages begin at ema.start_step={config.ema.start_step}: the "
            "sweep cannot tell values of ema.decay apart; lower ema.start_step, raise sweep.epochs, or leave ema.decay "
            "out of sweep.space",
            stacklevel=2,
        )


def initial_weights(config: Config, index: int) -> str | None:
    """Checkpoint folder that phase `index` begins from: phases[].init, else the best whole one of the phase before."""
    phase = config.phases[index]
    if phase.init:
        open_checkpoint(phase.init)
        return phase.init
    if index == 0:
        return None
    before = config.phases[index - 1].name
    store = CheckpointStore(config.checkpoint_store)
    begun = store.checkpoints(phase.name)
    if begun:  # what it began from then
        return begun[-1].state["init"]
    whole = {checkpoint.name: checkpoint for checkpoint in store.checkpoints(before)}
    while best := best_of({name: checkpoint.state for name, checkpoint in whole.items()}):
        try:
            whole[best.checkpoint].verify()
        except DamagedCheckpoint as error:
            warnings.warn(f"{error}; phase {phase.name} begins from the next best one of {before}", stacklevel=2)
            del whole[best.checkpoint]
            continue
        return store.path(best.checkpoint)
    raise UserError(
        f"phase {phase.name} begins from the best checkpoint of {before}, but {store.root} has none; train {before} "
        f"first, or set phases.{index}.init to a checkpoint folder"
    )


def dry_run(config: Config) -> str:
    """Steps, epochs, disk, memory and time of `train`, as text; writes nothing."""
    config = _absolute(config)
    if config.sweep.enabled:
        check_space(config)
    with reading_copy(config.output_dir):
        config = found_config(config, lambda line: None)
    estimate.check_writable(config.output_dir, "output_dir")
    check_locations(config)
    estimate.check_writable(encode_job(config).store, "data.latents")
    settings = config.data.simulate
    if settings is not None and not has_data(config):
        load_autoencoder(config.vae.pretrained, latent_channels=config.model.latent_channels)
        per_field = (settings.field_size // config.data.tile_size) ** 2
        val = max(1, round(settings.fields * settings.val_fraction))
        tiles = {"train": (settings.fields - val) * per_field, "val": val * per_field, "test": 0}
        samples = [tiles["train"]] * len(config.phases)
        return estimate.report(config, encode_job(config), tiles, samples, stored=False)
    prepared = look(config)
    samples = check_phases(config, prepared)
    return estimate.report(config, prepared.job, prepared.tiles, samples, prepared.stored)


def _absolute(config: Config) -> Config:
    """Paths made absolute: Ray's workers run in directories of their own."""
    check_paths_under_job(config)
    latents = config.data.latents
    data = config.data.model_copy(
        update={
            "root": Folder(config.data.root).location,
            "latents": None if latents is None else Folder(latents).location,
        }
    )
    phases = tuple(
        phase.model_copy(update={"init": str(Path(phase.init).absolute())})
        if phase.init and "://" not in phase.init
        else phase
        for phase in config.phases
    )
    folder = Path(config.vae.pretrained).expanduser()
    vae = config.vae.model_copy(update={"pretrained": str(folder.absolute())}) if folder.is_dir() else config.vae
    store = config.checkpoint.store
    checkpoint = config.checkpoint.model_copy(update={"store": None if store is None else Folder(store).location})
    return config.model_copy(
        update={
            "data": data,
            "vae": vae,
            "checkpoint": checkpoint,
            "phases": phases,
            "output_dir": Folder(config.output_dir).location,
        }
    )
