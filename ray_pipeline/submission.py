"""Training as a Ray job: what is submitted, and to which cluster."""

from __future__ import annotations

import logging
import math
import os
import re
import shlex
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ray._private.ray_constants import RAY_RUNTIME_ENV_IGNORE_GITIGNORE, get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

import ray_pipeline
from ray_pipeline.config import Config, load_config
from ray_pipeline.errors import UserError
from ray_pipeline.job_paths import check_job_paths
from ray_pipeline.passwords import holds_credential, texts
from ray_pipeline.runtime_env import check_runtime_env
from ray_pipeline.storage import Folder, shown

#: Ray asks a stopped job with SIGTERM and kills it so many seconds later, by default 3; it wants a whole number, and
#: takes it from the environment of the job
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
#: what a driver may need beyond ray.stop_timeout_seconds: to end the controller, draw the report, leave Ray
_STOP_MARGIN_SECONDS = 90
#: of an archive that Ray uploads as it is
_PACKAGE = "working_dir.zip"
#: parts of Ray that tell of each upload and connection
_TALKATIVE = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")


def _new_id() -> str:
    return f"raypipeline_{uuid.uuid4().hex[:16]}"


@dataclass(frozen=True)
class Job:
    """What Ray's job API is given: the words of the entry point, the runtime environment, the metadata, a zip of the
    working directory and the submission id, by which a cluster starts the job once."""

    words: tuple[str, ...]
    runtime_env: dict[str, Any]
    metadata: dict[str, str]
    package: bytes = field(repr=False)
    job_id: str = field(default_factory=_new_id)

    @property
    def entrypoint(self) -> str:
        """The words for a shell, since Ray runs one: whatever stands in them is a word and no code."""
        return shlex.join(self.words)

    def again(self, retry: int, first: str) -> Job:
        """The job once more, with the same files: it goes on with the run, or begins it where nothing was begun."""
        words = tuple(word for word in self.words if not word.startswith("--resume"))
        return replace(
            self,
            words=(*words, "--resume=auto"),
            metadata=self.metadata | {"retry": str(retry), "retry_of": first},
            job_id=_new_id(),
        )


def plan_job(
    config_file: Path,
    overrides: Sequence[str] = (),
    *,
    working_dir: Path = Path(),
    resume: bool | Literal["auto"] = False,
    env: Sequence[str] = (),
    pip: Sequence[str] = (),
) -> Job:
    """The job that trains with a config below `working_dir`, which is uploaded.

    env: NAME=VALUE for driver and workers; pip: requirements to install; resume: as for `train`.
    UserError for a wrong config, and for what would fail, be lost or be read by others in a job.
    """
    config = load_config(config_file, overrides)
    if not working_dir.is_dir():
        raise UserError(f"--working-dir {working_dir} is no folder; give the one to upload, which holds the config")
    root, file = working_dir.resolve(), config_file.resolve()
    if not file.is_relative_to(root):
        raise UserError(
            f"{config_file} is not in {root}, which is all that a job gets; submit from a folder that holds it, or "
            "name one with --working-dir"
        )
    _check_config(config, overrides, root)
    runtime_env = _runtime_env(config, root, env, pip)
    # one word each, so that a value with a dash in front stays one
    words = [f"--config={file.relative_to(root)}", *(f"--set={override}" for override in overrides)]
    if resume:
        words.append("--resume" if resume is True else f"--resume={resume}")
    return Job(
        words=("python", "-m", "ray_pipeline", "train", *words),
        runtime_env=runtime_env,
        metadata={
            "job_name": f"ray-pipeline train {Folder(config.output_dir).name}",
            "config": str(file.relative_to(root)),
            "output_dir": shown(config.output_dir),
            "phases": ", ".join(phase.name for phase in config.phases),
            "ray_pipeline": ray_pipeline.__version__,
        },
        package=_package(root),
    )


def _check_config(config: Config, overrides: Sequence[str], working_dir: Path) -> None:
    # all overrides, though the last of a key counts
    named = [*texts(config.dump()), *(override.partition("=")[::2] for override in overrides)]
    for key, text in named:
        if holds_credential(text):
            raise UserError(
                f"{key} holds a password or key, which every list of jobs would show; leave it out and give it in the "
                "environment of every node"
            )
    check_job_paths(config, working_dir)
    if config.ray.address != "auto":
        raise UserError(
            f"ray.address={config.ray.address}: a job runs on the cluster that it is submitted to; leave it at auto"
        )


def _runtime_env(config: Config, working_dir: Path, env: Sequence[str], pip: Sequence[str]) -> dict[str, Any]:
    """What Ray brings to every process of the job; UserError for what is wrong, or what others should not read."""
    variables = {STOP_WAIT: str(math.ceil(config.ray.stop_timeout_seconds) + _STOP_MARGIN_SECONDS)}
    for text in env:
        name, mark, value = text.partition("=")
        if not mark:
            raise UserError(f"--env {name}: expected NAME=VALUE, such as HF_HOME=/shared/hub")
        variables[name] = value
    fields = {"working_dir": str(working_dir), "env_vars": variables} | ({"pip": list(pip)} if pip else {})
    try:
        check_runtime_env(fields, of_submitter=True)
    except ValueError as error:
        raise UserError(f"--env or --pip: {error}") from None
    if not re.fullmatch("[0-9]+", variables[STOP_WAIT]):  # Ray would fail over it when the job is to be stopped
        raise UserError(f"--env {STOP_WAIT}={variables[STOP_WAIT]}: expected a whole number of seconds")
    of_config = config.ray.runtime_env
    twice = [name for name in of_config if name != "env_vars" and name in fields]
    twice += [f"env_vars.{name}" for name in of_config.get("env_vars", {}) if name in variables]
    if twice:  # Ray would refuse the driver
        raise UserError(f"ray.runtime_env.{twice[0]} is what a job is given with its submission; take it out of one")
    return fields


def _package(working_dir: Path) -> bytes:
    """The folder as Ray would upload it now; kept, since it may be edited before a retry, and packages that no job uses
    any more are gone from the cluster."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / _PACKAGE
        create_package(
            str(working_dir),
            file,
            include_gitignore=os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE) != "1",
            excludes=get_runtime_env_default_excludes(),
            logger=logging.getLogger(__name__),
        )
        return file.read_bytes()


def connect(address: str | None) -> JobSubmissionClient:
    """Ray's client for the cluster at `address`, the URL of its dashboard; without one as Ray finds it
    (RAY_API_SERVER_ADDRESS, RAY_ADDRESS, a Ray on this machine). UserError where none answers, or wants a token."""
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    if address is not None:
        if "://" not in address:
            raise UserError(f"--address {address}: expected the URL of the dashboard, such as http://HEAD:8265")
        os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray lets this variable, and RAY_ADDRESS, overrule its argument
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise refusal(error) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"no Ray answers at {address or 'the address in the environment, nor on this machine'} "
            f"({on_one_line(error)}); give --address the URL of a cluster's dashboard, such as http://HEAD:8265"
        ) from error


def submit_job(client: JobSubmissionClient, job: Job) -> None:
    """Upload the working directory and start the job; of a job that the cluster has already, nothing.

    UserError where Ray refuses, or does not answer.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:  # for the upload alone: a job may outlive what lies in /tmp
            package = Path(folder) / _PACKAGE
            package.write_bytes(job.package)
            client.submit_job(
                entrypoint=job.entrypoint,
                runtime_env=job.runtime_env | {"working_dir": str(package)},
                metadata=dict(job.metadata),
                submission_id=job.job_id,
            )
    except AuthenticationError as error:
        raise refusal(error) from error
    except (OSError, RuntimeError, ValueError) as error:
        try:
            taken = job_record(client, job.job_id) is not None  # now or before: the answer alone was lost
        except (OSError, RuntimeError, ValueError, AuthenticationError):
            raise UserError(
                f"whether the cluster took job {job.job_id} is not known ({on_one_line(error)}); `ray job "
                f"status {job.job_id}` tells"
            ) from error
        if not taken:
            raise UserError(f"the cluster did not take the job ({on_one_line(error)})") from error


def job_record(client: JobSubmissionClient, job_id: str) -> JobDetails | None:
    """What the cluster says of a job; None when it does not know it."""
    try:
        return client.get_job_info(job_id)
    except RuntimeError as error:
        if "status code 404" in str(error):
            return None
        raise


def next_commands(client: JobSubmissionClient, job_id: str) -> list[str]:
    """Ray's own commands for a job that runs, in words."""
    address = re.sub(r"//[^/@]*@", "//", client.get_address())  # without a password
    words = shlex.join([job_id, "--address", address])
    return [f"logs      ray job logs --follow {words}", f"stop      ray job stop {words}"]


def refusal(error: AuthenticationError) -> UserError:
    """A missing or wrong token, in words."""
    return UserError(
        f"the cluster refuses this computer ({on_one_line(error.message)}); set RAY_AUTH_MODE=token, and the cluster's "
        "token in RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file that holds it"
    )


def on_one_line(error: object) -> str:
    """The beginning of a message, without its line breaks."""
    return " ".join(str(error).split())[:300].rstrip(".")
