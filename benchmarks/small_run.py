"""A small real run in a subprocess, both phases: what the drills start, watch and disturb."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from ray_pipeline.data.sources.simulate import simulate
from ray_pipeline.monitoring.phase_state import utc_now

PHASES = ("phase1_unconditional", "phase2_conditional")
TIMEOUT_SECONDS = 600
#: in the title of a process of Ray Train that trains
TRAIN_WORKER = "RayTrainWorker"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "drill", "AWS_SECRET_ACCESS_KEY": "drill", "AWS_EC2_METADATA_DISABLED": "true"}
_CONFIG = """
data: {{root: {work}/data, tile_size: 64, shard_rows: 8}}
model:
  {{architecture: custom, latent_size: 8, depth: 2, hidden_size: 64, num_heads: 2, patch_size: 2, dropout: {dropout}}}
ema: {{decay: 0.9, start_step: 4, more_decays: [0.99]}}
optimizer: {{lr: 1.0e-3, warmup_steps: 2, schedule: cosine}}
train: {{batch_size: 3, global_batch: 8, threads: 1, precision: {precision}}}
monitoring:
  {{log_every_n_steps: 1, val_tiles: 4, val_noise_levels: 1, plot_samples: false, tensorboard: false,
    log_samples: true}}
checkpoint: {{every_minutes: 0.02}}
vae: {{actors: 1}}
phases:
  - {{name: phase1_unconditional, epochs: {epochs[0]}}}
  - {{name: phase2_conditional, epochs: {epochs[1]}, condition_types: [super_resolution, denoising], trainable: lora}}
ray: {{max_failures: 30, use_gpu: false}}
"""


class Missed(Exception):
    """The moment for a disturbance went by."""


def prepare(
    work: Path, fields: int, epochs: tuple[int, int], dropout: float = 0.1, precision: str = "bf16"
) -> tuple[Path, int]:
    """Write tiles (4 a field, a quarter of the fields for validation) and a config -> its path, training tiles."""
    made = simulate(work / "data", fields=fields, seed=3, field_size=128, tile_size=64, val_fraction=0.25)
    config = work / "config.yaml"
    config.write_text(_CONFIG.format(work=work, epochs=epochs, dropout=dropout, precision=precision))
    return config, made.tiles["train"]


def descendants(process: psutil.Process, title: str) -> list[psutil.Process]:
    """Processes under `process` that call themselves by a name with `title` in it; others may run Ray here too."""
    found = []
    for child in process.children(recursive=True):
        try:
            if title in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:  # it ended meanwhile
            continue
    return found


@dataclass(frozen=True, order=True)
class Place:
    """A step (from 1) of a phase (from 0) that is done."""

    phase: int
    step: int

    def __str__(self) -> str:
        return f"phase {self.phase + 1} step {self.step}"


@dataclass(frozen=True)
class Attempt:
    """Where an attempt of a phase began, and the last step that it recorded."""

    began: Place
    last: Place


@dataclass
class SmallRun:
    """A run directory and the command that works on it. settings: --set words; within: words before it, as of a
    command that runs it elsewhere; disturbed: when it was so last, in UTC; superseded: workers from before that."""

    config: Path
    folder: Path
    settings: dict[str, object] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    within: tuple[str, ...] = ()
    driver: psutil.Popen | None = None
    disturbed: str = ""
    superseded: set[psutil.Process] = field(default_factory=set)

    @property
    def log(self) -> Path:
        """What the command says."""
        return self.folder.with_suffix(".log")

    def start(self, resume: bool = False) -> None:
        """Start the command, in a process group of its own."""
        words = [*self.within, sys.executable, "-m", "ray_pipeline", "train", "--config", str(self.config)]
        for key, value in {"output_dir": self.folder, **self.settings}.items():
            words += ["--set", f"{key}={value}"]
        environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"} | self.environment
        with self.log.open("ab") as log:
            self.driver = psutil.Popen(
                words + ["--resume"] * resume, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def finish(self) -> None:
        """Wait for the end of a run that must succeed."""
        if self.driver.wait(TIMEOUT_SECONDS) != 0:
            self.fail(f"the command ended with {self.driver.returncode}")

    def fail(self, why: str) -> None:
        """End the drill with what the command said last."""
        if self.driver.is_running():
            self.driver.kill()
        tail = self.log.read_text(errors="replace").replace("\r", "\n").splitlines()[-40:]
        raise SystemExit("\n".join([f"{self.folder}: {why}; {self.log} ends with", *tail]))

    def wait_until(self, ready: Callable[[], object], what: str, pause: float = 0.005) -> object:
        """First true value of `ready`; Missed when the command succeeds before, an end of the drill when it fails."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not (value := ready()):
            if self.driver.poll() is not None:
                if self.driver.returncode != 0:
                    self.fail(f"the command ended with {self.driver.returncode} before {what}")
                if value := ready():  # it came with the end
                    break
                raise Missed(what)
            if time.monotonic() > deadline:
                self.fail(f"waited {TIMEOUT_SECONDS} s for {what}")
            time.sleep(pause)
        return value

    def workers(self) -> list[psutil.Process]:
        """Training processes of the attempt that runs now."""
        return [process for process in descendants(psutil.Process(), TRAIN_WORKER) if process not in self.superseded]

    def writer(self) -> psutil.Process | None:
        """Rank 0 of the attempt that runs now: the one that has the records open."""
        for process in self.workers():
            try:
                if any(opened.path == str(self.folder / "logs" / "metrics.jsonl") for opened in process.open_files()):
                    return process
            except psutil.Error:
                continue
        return None

    def supersede(self) -> None:
        """From now on only an attempt that starts later counts."""
        self.superseded |= set(self.workers())
        self.disturbed = utc_now()

    def attempt(self) -> Attempt | None:
        """What is recorded of the attempt that runs now; None before its first step and after its phase is finished."""
        last = None
        for record in reversed(self._records()):
            place = Place(PHASES.index(record["phase"]), record["step"])
            if record["event"] == "phase":
                return Attempt(place, last) if last is not None and record["time"] > self.disturbed else None
            last = last or place
        return None

    def went_on(self) -> Place | None:
        """Where the first attempt since the last disturbance began, though it may have ended again."""
        for record in self._records():
            if record.get("status") in ("started", "resumed") and record["time"] > self.disturbed:
                return Place(PHASES.index(record["phase"]), record["step"])
        return None

    def _records(self) -> list[dict]:
        """Steps, and the starts and ends of attempts."""
        path = self.folder / "logs" / "metrics.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return [record for record in map(json.loads, lines) if record["event"] in ("step", "phase")]
