"""Paths of a config in a Ray job: its working directory is a cache on each node, which Ray deletes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ray_pipeline.config import Config
from ray_pipeline.errors import UserError
from ray_pipeline.storage import is_uri

#: set by Ray for the entry point of a submitted job, not for its tasks and actors (JobSupervisor._get_driver_env_vars)
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def runs_as_job() -> bool:
    """Whether this process is the driver of a submitted Ray job."""
    return JOB_VARIABLE in os.environ


def check_paths_under_job(config: Config, *, data_alone: bool = False) -> None:
    """UserError for a relative path where this process is the driver of a Ray job; as `check_job_paths`."""
    if runs_as_job():
        check_job_paths(config, Path.cwd(), data_alone=data_alone)


def check_job_paths(config: Config, working_dir: Path, *, data_alone: bool = False) -> None:
    """UserError for paths of `config` that would lie in a job's working directory, a copy of `working_dir`.

    data_alone: of tiles, latents and autoencoder only, which is what `encode` reads and writes.
    """
    found = [f"{key}={path}" for key, path in _paths(config, working_dir, data_alone) if not _is_absolute(path)]
    if found:
        raise UserError(
            f"{' and '.join(found)}: relative paths, but a Ray job runs in a cache that Ray deletes; give absolute "
            "paths that all nodes share, such as --set output_dir=/shared/runs/first"
        )


def _paths(config: Config, working_dir: Path, data_alone: bool) -> Iterator[tuple[str, str]]:
    """Keys of what the config reads and writes, and their paths; nothing for what is left out."""
    if not data_alone:
        yield "output_dir", config.output_dir
    yield "data.root", config.data.root
    if config.data.latents is not None:
        yield "data.latents", config.data.latents
    pretrained = config.vae.pretrained  # a hub id looks like a relative path
    if pretrained.startswith(".") or (working_dir / pretrained).is_dir():
        yield "vae.pretrained", pretrained
    if data_alone:
        return
    if config.checkpoint.store is not None:
        yield "checkpoint.store", config.checkpoint.store
    for number, phase in enumerate(config.phases):
        if phase.init is not None:
            yield f"phases.{number}.init", phase.init


def _is_absolute(path: str) -> bool:
    return is_uri(path) or path.startswith("~") or Path(path).is_absolute()
