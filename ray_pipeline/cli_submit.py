"""The command submit: parses words, submits, follows; no logic."""

from __future__ import annotations

import argparse
from pathlib import Path

from ray_pipeline.cli_words import Add, add_config, ascii_text
from ray_pipeline.errors import UserError


def add_submit(add: Add) -> None:
    """Add the command."""
    parser = add(
        "submit",
        _submit,
        "train as a job on a Ray cluster, with this folder uploaded to it",
        "ray-pipeline submit --address http://HEAD:8265 --config configs/microscopy.yaml --wait\n"
        "         --set data.root=/shared/data --set output_dir=/shared/runs/first",
    )
    parser.add_argument("--address", metavar="URL", help="of the dashboard (default: RAY_API_SERVER_ADDRESS)")
    add_config(parser)
    parser.add_argument(
        "--resume", nargs="?", const=True, default=False, choices=[True, "auto"], metavar="auto", help="as for train"
    )
    parser.add_argument(
        "--wait", action=argparse.BooleanOptionalAction,
        help="follow its log and end with its exit status; Ctrl-C asks whether to stop the job too",
    )  # fmt: skip
    parser.add_argument(
        "--retries", type=_count, default=0, metavar="N",
        help="with --wait, which it implies: a job whose driver died, or that ended because storage did not answer, is "
        "submitted again, so many times",
    )  # fmt: skip
    parser.add_argument(
        "--working-dir", type=Path, default=Path(), metavar="DIR",
        help="folder to upload, which holds the config (default: this one); .rayignore and .gitignore say what stays",
    )  # fmt: skip
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE",
        help="set a variable for the job; credentials come from the cluster's own environment",
    )  # fmt: skip
    parser.add_argument(
        "--pip",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="install a package for the job, such as one of hints",
    )


def _submit(arguments) -> int:
    from ray_pipeline.job_attendance import ask_to_stop, attend_job
    from ray_pipeline.submission import connect, next_commands, plan_job, submit_job

    if arguments.retries and arguments.wait is False:
        raise UserError("--retries follows the job to submit it again, which --no-wait does not; leave one out")
    job = plan_job(
        arguments.config,
        arguments.overrides,
        working_dir=arguments.working_dir,
        resume=arguments.resume,
        env=arguments.env,
        pip=arguments.pip,
    )
    client = connect(arguments.address)
    submit_job(client, job)
    _say(f"job       {job.job_id}")
    for line in next_commands(client, job.job_id):
        _say(line)
    if not (arguments.wait or arguments.retries):
        return 0
    return attend_job(client, job, retries=arguments.retries, write=_write, say=_say, ask=ask_to_stop)


def _write(text: str) -> None:
    print(ascii_text(text), end="", flush=True)


def _say(line: str) -> None:
    _write(line + "\n")


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text}, expected 0 or more")
    return value
