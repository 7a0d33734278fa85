"""What all monitoring together costs a step: DiT-S/8 with every sink, charts and the report, and with none of them.

    python benchmarks/monitoring.py [--epochs 160]
    python benchmarks/monitoring.py --control

A machine's own pace changes by more than what is looked for, within minutes, and of two equal processes one may be
faster by as much. So one process trains, epochs of 10 steps in the order off, on, on, off. While monitoring is off, the
sinks get no events, the processes of Weights & Biases are stopped, and so is the one that draws charts and the page as
the command does (stoppable_pictures.py); what telling an event takes the training thread is then not counted either.
Compared is the time between the records of steps, after one chart and one page: by then the libraries are loaded. The
events of all epochs are told to the sinks while they are on, the last of an epoch in the validation that ends it. Ray's
agent, which serves metrics to Prometheus, is there in any Ray and runs on.

Nothing is learnt, so that no best epoch is saved: writing a checkpoint takes a core meanwhile, with monitoring or not.
The time of validation and of drawing samples is left out (the config asks for them, at an epoch's end), what sinks do
with the pictures is not.

Prints the pace with and without, the charts and pages drawn meanwhile, and the mean over all fours of epochs with its
standard error. Exits 1 where the mean is above 1 %, where two standard errors are (then it says nothing), where no
chart or no page came, and where a sink was given up or a process that watches is not there. --control: nothing is
monitored or switched, which shows what is found where there is nothing; it exits 0.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from contextlib import suppress
from datetime import datetime
from itertools import pairwise
from math import sqrt
from pathlib import Path

import psutil
from small_run import SmallRun, descendants
from switched_sinks import SWITCH

from ray_pipeline.data.sources.simulate import simulate
from ray_pipeline.monitoring.metrics_file import MetricsReader, metrics_files

PHASE = "phase1_unconditional"
_EPOCH_STEPS = 10
_CONFIG = """
data: {{root: {work}/data, tile_size: 512}}
model: {{architecture: DiT-S/8, hidden_size: 384}}
ema: {{start_step: 1, snapshots: 1}}
optimizer: {{lr: 1.0e-12}}
train: {{batch_size: 8, global_batch: 8, precision: fp32}}
monitoring:
  {{val_check_interval: 1000000, val_tiles: 2, val_noise_levels: 1, num_samples: 2, sample_steps: 2,
    sample_every_n_epochs: 8, nearest_tiles: 0, log_every_n_steps: 10}}
checkpoint: {{every_minutes: null}}
phases: [{{name: phase1_unconditional, epochs: {epochs}, epochs_to_save: [{epochs}]}}]
ray: {{use_gpu: false}}
"""
_OFF = {"tensorboard": "false", "ray_metrics": "false", "report": "false", "plot_loss": "false", "plot_lr": "false"}
_ON = _OFF | {"sinks": "[switched]"}
_MOST = 0.01
_DRAWN = {"charts": f"plots/{PHASE}/latest_progress.png", "pages": "report.html"}
#: titles of what does nothing but watch the run
_WATCHING = ("stoppable_pictures", "wandb-core", "wandb-symon")
#: before those that are compared, at least: libraries are loaded, the first best epoch is saved
_EPOCHS_BEFORE = 8
#: that the phase has beyond those that are compared; it is stopped before its end
_EPOCHS_MORE = 1000


class Switched:
    """A command that trains, and its monitoring, on or off. drawn: sizes of the files of each kind, which every new one
    changes."""

    def __init__(self, run: SmallRun, monitored: bool):
        self.run, self.monitored = run, monitored
        self.drawn: dict[str, list[int]] = {kind: [] for kind in _DRAWN}
        self.stopped: list[psutil.Process] = []
        self.reader = MetricsReader(run.folder)

    def switch(self, on: bool) -> None:
        """Nothing where nothing is monitored."""
        if not self.monitored:
            return
        found = {title: descendants(psutil.Process(), title) for title in _WATCHING}  # in both, as it takes time
        if missing := [title for title, processes in found.items() if not processes]:
            sys.exit(f"no process of {' and '.join(missing)} is there to be stopped")
        switch = self.run.folder / SWITCH
        switch.unlink(missing_ok=True) if on else switch.touch()
        self.resume()
        if not on:
            self.stopped = [process for processes in found.values() for process in processes]
        for process in self.stopped:
            process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let the processes go on that were stopped."""
        for process in self.stopped:
            with suppress(psutil.NoSuchProcess):  # the run has ended
                process.send_signal(signal.SIGCONT)
        self.stopped = []

    def epochs(self) -> int:
        """That are recorded; the validation of one ends it, and that of the untrained network comes before them."""
        return sum(record["event"] == "validation" for record in self.reader.events()) - 1

    def faults(self) -> list[str]:
        """What went wrong, a sink that was given up among it."""
        return [record["message"] for record in self.reader.events() if record["event"] == "fault"]

    def train_until(self, epochs: int) -> None:
        """And where it is monitored, until something of each kind was drawn."""

        def ready() -> bool:
            for kind, name in _DRAWN.items():
                path = self.run.folder / name
                if path.exists() and (size := path.stat().st_size) not in self.drawn[kind][-1:]:
                    self.drawn[kind].append(size)
            return self.epochs() >= epochs and (not self.monitored or all(self.drawn.values()))

        self.run.wait_until(ready, f"epoch {epochs}", pause=0.05)

    def step_seconds(self) -> list[tuple[float, float]]:
        """Of each epoch the mean seconds of a step, and without those that its records took."""
        means, spent, telling = [], 0.0, 0.0
        for before, record in pairwise(self.reader.events()):
            if record["event"] == "step":
                begin, end = (datetime.fromisoformat(one["time"]).timestamp() for one in (before, record))
                spent += end - begin
                telling += record["logging_seconds"] * (record["step"] - before["step"])
            elif record["event"] == "validation" and record["step"]:
                means.append((spent / _EPOCH_STEPS, (spent - telling) / _EPOCH_STEPS))
                spent, telling = 0.0, 0.0
        return means


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=160, help="with, and as many without; an even number, 4 or more")
    parser.add_argument("--control", action="store_true", help="compare no monitoring with no monitoring")
    arguments = parser.parse_args()
    if arguments.epochs < 4 or arguments.epochs % 2:
        parser.error(f"--epochs is {arguments.epochs}: an even number of 4 or more is needed")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        simulate(work / "data", fields=25, seed=3, field_size=1024, tile_size=512, val_fraction=0.2)
        config = work / "config.yaml"
        config.write_text(_CONFIG.format(work=work, epochs=2 * arguments.epochs + _EPOCHS_MORE))
        install(work / "site")
        settings = {f"monitoring.{key}": value for key, value in (_OFF if arguments.control else _ON).items()}
        environment = {"PYTHONPATH": str(work / "site"), "WANDB_ERROR_REPORTING": "false"}
        run = Switched(SmallRun(config, work / "run", settings, environment), not arguments.control)
        off, on, drawn = in_turn(run, arguments.epochs)
    shares = [sum(on[at : at + 2]) / sum(off[at : at + 2]) - 1 for at in range(0, arguments.epochs, 2)]
    print(f"off {statistics.fmean(off):.4f} s a step, on {statistics.fmean(on):.4f}")
    print(", ".join(f"{count} {kind}" for kind, count in drawn.items()))
    mean, error = statistics.fmean(shares), statistics.stdev(shares) / sqrt(len(shares))
    print(f"all monitoring: {100 * mean:+.2f} +- {100 * error:.2f} % of a step, in {len(shares)} fours of epochs")
    if arguments.control:
        return 0
    if blind := [kind for kind, count in drawn.items() if not count]:
        print(f"no {' and no '.join(blind)} came meanwhile: give it more --epochs")
    if 2 * error > _MOST:
        print("the error is too large to tell: give it more --epochs, and nothing else to run beside it")
    return 1 if max(mean, 2 * error) > _MOST or blind else 0


def install(site: Path) -> None:
    """The sinks that can be switched, for a command that has this folder on its path."""
    shutil.copytree(Path(__file__).parent, site, ignore=lambda _, names: set(names) - {"switched_sinks.py"})
    info = site / "switched_sinks-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: switched_sinks\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ray_pipeline.sinks]\nswitched = switched_sinks:SwitchedSinks\n")


def in_turn(run: Switched, epochs: int) -> tuple[list[float], list[float], dict[str, int]]:
    """Train so many epochs with monitoring and as many without -> mean seconds of a step in each of those without, and
    of those with it, and what was drawn meanwhile."""
    run.run.start()
    pictures = None
    try:
        if run.monitored:
            run.run.wait_until(lambda: metrics_files(run.run.folder), "the first record")
            words = [Path(__file__).with_name("stoppable_pictures.py"), run.run.config, run.run.folder, PHASE]
            with run.run.log.with_suffix(".pictures").open("wb") as log:
                pictures = subprocess.Popen([sys.executable, *words], stdout=log, stderr=log)
        run.train_until(_EPOCHS_BEFORE)
        begin, before = run.epochs(), {kind: len(sizes) for kind, sizes in run.drawn.items()}
        order = [number % 4 in (1, 2) for number in range(2 * epochs)]
        for number, on in enumerate(order, start=1):
            run.switch(on)
            run.train_until(begin + number)
        meanwhile = {kind: len(sizes) - before[kind] for kind, sizes in run.drawn.items()}
        seconds = run.step_seconds()[begin:][: 2 * epochs]
        if faults := run.faults():
            sys.exit("not what was to be measured: " + "; ".join(faults))
    finally:
        (run.run.folder / SWITCH).unlink(missing_ok=True)
        run.resume()
        if run.run.driver.poll() is None:
            run.run.driver.terminate()
            run.run.driver.wait()
        if pictures is not None:
            pictures.kill()
            pictures.wait()
    off, on = (
        [pair[not on] for pair, with_ in zip(seconds, order, strict=True) if with_ is on] for on in (False, True)
    )
    return off, on, meanwhile


if __name__ == "__main__":
    sys.exit(main())
