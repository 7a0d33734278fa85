"""Weights & Biases, online or offline: one of its runs for all phases of a run directory, in logs/wandb."""

from __future__ import annotations

import uuid
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ray_pipeline.errors import UserError
from ray_pipeline.monitoring.events import Event, SampleEvent, curves, note
from ray_pipeline.monitoring.sink import SinkContext, read_picture
from ray_pipeline.storage import replace_file


def check_installed() -> None:
    """UserError where the package is missing."""
    if find_spec("wandb") is None:
        raise UserError(
            "monitoring.wandb needs the package wandb; install it with `pip install ray-pipeline[wandb]`, or set "
            "monitoring.wandb=disabled"
        )


class WandbLog:
    """Sink: curves and pictures under <phase>/, each over its own phase's steps, and the config.

    Its history cannot be cut: after a resume the steps since the last checkpoint stand there a second time.
    What could not be sent by the end of a phase stays in logs/wandb for `wandb sync`.
    """

    #: the upload of pictures and the last curves
    close_seconds = 120.0

    def __init__(self, context: SinkContext):
        import wandb

        folder = context.run_dir / "logs" / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        monitoring = context.config["monitoring"]
        self._run_dir, self._phase, self._image = context.run_dir, context.phase, wandb.Image
        self._run = wandb.init(
            dir=str(context.run_dir / "logs"),  # it adds the folder wandb itself
            mode=monitoring["wandb"],
            project=monitoring["wandb_project"],
            id=_run_id(folder / "run_id"),
            name=context.run_name,
            config=dict(context.config),
            resume="allow" if monitoring["wandb"] == "online" else None,
            reinit="create_new",
            settings=wandb.Settings(console="off", disable_git=True, save_code=False, silent=True),
        )
        self._run.define_metric(f"{context.phase}/step")
        self._run.define_metric(f"{context.phase}/*", step_metric=f"{context.phase}/step")

    def emit(self, event: Event) -> None:
        values: dict = dict(curves(event))
        if isinstance(event, SampleEvent):
            values["samples"] = self._image(np.asarray(read_picture(self._run_dir, event)))
        told = note(event)
        if told:
            values["/".join(("events", told[0]))] = told[1]
        if values:
            values["step"] = event.step
            self._run.log({f"{self._phase}/{name}": value for name, value in values.items()})

    def close(self) -> None:
        self._run.finish()


def _run_id(path: Path) -> str:
    """The same for every attempt of a run."""
    if not path.exists():
        replace_file(path, uuid.uuid4().hex[:12].encode())
    return path.read_text().strip()
