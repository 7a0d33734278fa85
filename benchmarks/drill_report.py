"""The report page in a real browser: does it read well on a phone and on a desk, for people with and without a mouse,
and does it keep off the network?

    python benchmarks/drill_report.py
    python benchmarks/drill_report.py --run training_output --screens /tmp/screens

Makes up a run (two phases, faults, a resume, a sweep), or takes that of --run as it is and writes its report.html anew,
and opens the page in headless Chromium, light and dark, at three sizes. Prints a line a view; exits 1 where axe finds a
barrier, where the console tells of an error, a request goes out, the page scrolls sideways, the slider does not answer
to the keyboard, or the made-up run is warned of wrongly after an hour without a record. Wants node and npm, which get
playwright-core and axe-core for it into a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from ray_pipeline.config import load_config
from ray_pipeline.errors import UserError
from ray_pipeline.json_lines import JsonLines
from ray_pipeline.monitoring.events import (
    CheckpointEvent,
    Event,
    FaultEvent,
    PhaseEvent,
    SampleEvent,
    StepEvent,
    ValidationEvent,
    to_record,
)
from ray_pipeline.monitoring.metrics_file import metrics_path
from ray_pipeline.monitoring.phase_state import FILE, BestCheckpoint, HistoryEntry, PhaseState
from ray_pipeline.monitoring.report import write_report
from ray_pipeline.monitoring.sweep_chart import plot_sweep
from ray_pipeline.monitoring.tile_grid import sample_grid
from ray_pipeline.sweep_records import Candidate, EpochResult, SweepRecord, TrialRecord, Winner, sweep_folder

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "demo.yaml"
SIZES = ((360, 740), (820, 1180), (1600, 1000))
CHROMIUM_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
STEPS, GLOBAL_BATCH, STEP_SECONDS, AVERAGE = (400, 300), 16, 2.4, "ema_decay_0.999"

LOOK = r"""
const { chromium } = require("playwright-core");
const { address, browser: executablePath, flags, sizes, screens, silent, alive } = JSON.parse(process.argv[2]);

async function look(browser, colorScheme, [width, height]) {
  const context = await browser.newContext({ viewport: { width, height }, colorScheme });
  const page = await context.newPage(), problems = [];
  page.on("console", (message) => message.type() === "error" && problems.push("console: " + message.text()));
  page.on("pageerror", (error) => problems.push("error: " + error.message));
  page.on("request", (request) => {
    const url = request.url();
    if (url !== address && !url.startsWith("data:")) problems.push("request: " + url.slice(0, 200));
  });
  await page.goto(address, { waitUntil: "load" });
  if (screens) {
    await page.screenshot({ path: `${screens}/${width}_${colorScheme}_top.png` });
    await page.screenshot({ path: `${screens}/${width}_${colorScheme}.png`, fullPage: true });
  }
  problems.push(...(await turn(page)));
  await page.evaluate(() => document.querySelectorAll("details").forEach((fold) => { fold.open = true; }));
  const wide = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
  if (wide > 0) problems.push(`the page is ${wide} px wider than the screen`);
  await page.addScriptTag({ path: require.resolve("axe-core/axe.min.js") });
  const found = await page.evaluate(() => axe.run({ rules: { "target-size": { enabled: true } } }));
  for (const { id, help, nodes } of found.violations)
    problems.push(`axe ${id}: ${help} (${nodes.map((node) => node.target.join(" ")).slice(0, 5).join(", ")})`);
  await context.close();
  return { view: `${width} x ${height} ${colorScheme}`, checked: found.passes.length, problems };
}

async function turn(page) {
  const shown = (box) => box.locator("img:visible").getAttribute("alt"), problems = [];
  for (const box of await page.locator(".epochs:has(input[type=range])").all()) {
    const newest = await shown(box), slider = box.locator("input[type=range]");
    await slider.focus();
    await page.keyboard.press("ArrowLeft");
    const before = await shown(box);
    if (before === newest) problems.push("the left arrow does not turn to the epoch before");
    if (!before.includes(await slider.getAttribute("aria-valuetext"))) problems.push("the slider tells another epoch");
    await page.reload();
    if ((await shown(box)) !== before) problems.push("the chosen epoch is forgotten when the page is loaded again");
    await slider.focus();
    await page.keyboard.press("End");
    if ((await shown(box)) !== newest) problems.push("the End key does not turn to the newest epoch");
  }
  return problems;
}

async function withoutScript(browser) {
  const context = await browser.newContext({ javaScriptEnabled: false }), page = await context.newPage();
  await page.goto(address);
  const problems = [];
  for (const box of await page.locator(".epochs:has(input[type=range])").all())
    if (!(await box.locator("img").last().isVisible())) problems.push("without script the newest picture is not shown");
  await context.close();
  return { view: "without script", checked: 0, problems };
}

async function silence(browser) {
  const page = await browser.newPage(), problems = [];
  for (const [from, warns] of [[silent, true], [alive, false]]) {
    await page.goto(from);
    if (Boolean(await page.locator("#silent").textContent()) !== warns)
      problems.push(warns ? "no warning of an old page" : "a warning though the command of the run lives");
  }
  return { view: "an hour without a record", checked: 0, problems };
}

(async () => {
  const browser = await chromium.launch({ executablePath, args: flags });
  for (const scheme of ["light", "dark"])
    for (const size of sizes) console.log(JSON.stringify(await look(browser, scheme, size)));
  console.log(JSON.stringify(await withoutScript(browser)));
  console.log(JSON.stringify(await silence(browser)));
  await browser.close();
})().catch((error) => { console.error(error); process.exit(1); });
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="output_dir of a training whose report is to be looked at")
    parser.add_argument("--screens", type=Path, help="folder for screenshots")
    arguments = parser.parse_args()
    try:
        browser = find_chromium()
        with tempfile.TemporaryDirectory() as folder:
            made_up = make_run(Path(folder) / "made_up_run")
            run = arguments.run or made_up
            began = time.perf_counter()
            page = write_report(run)
            seconds, size = time.perf_counter() - began, page.stat().st_size
            print(f"{page}: {size / 2**20:.2f} MB, written in {seconds:.1f} s", flush=True)
            silent, alive = (without_records(made_up, Path(folder), alive) for alive in (False, True))
            problems = look(page, silent, alive, browser, Path(folder), arguments.screens)
    except UserError as error:
        print(error)
        return 1
    print("\n".join(problems) or "no barriers, no errors, no requests, no sideways scrolling; the slider answers")
    return 1 if problems else 0


def find_chromium() -> str:
    """Path of Chromium, which is installed where it is missing and may be; UserError where it may not."""
    for tool in ("node", "npm"):
        if shutil.which(tool) is None:
            raise UserError(f"{tool} is missing; install it (Debian: apt-get install nodejs npm)")
    if shutil.which("chromium") is None and os.geteuid() == 0 and shutil.which("apt-get"):
        subprocess.run(["apt-get", "update", "-qq"], check=False)
        subprocess.run(["apt-get", "install", "-y", "-qq", "chromium"], check=False)
    found = shutil.which("chromium")
    if found is None:
        raise UserError("chromium is missing; install it (Debian, as root: apt-get install chromium)")
    return found


def without_records(run: Path, folder: Path, alive: bool) -> Path:
    """A page of the run, made to have no record for an hour; alive: its command has said just now that it works."""
    page = write_report(run, folder / f"alive_{alive}.html", alive=alive)
    long_ago = (datetime.now(UTC) - timedelta(hours=1)).isoformat(timespec="milliseconds")
    page.write_text(re.sub('(?<=id="updated" datetime=")[^"]*', long_ago, page.read_text()))
    return page


def look(page: Path, silent: Path, alive: Path, browser: str, work: Path, screens: Path | None) -> list[str]:
    """Open the page in every view, and two of a run without new records -> what is wrong, in words."""
    command = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(work)]
    if subprocess.run([*command, "playwright-core", "axe-core"], check=False).returncode:
        raise UserError("npm could not install playwright-core and axe-core; is there a network?")
    if screens:
        screens.mkdir(parents=True, exist_ok=True)
    (work / "look.js").write_text(LOOK)
    task = {
        "address": page.absolute().as_uri(), "browser": browser, "flags": CHROMIUM_FLAGS, "sizes": SIZES,
        "screens": str(screens.absolute()) if screens else None,
        "silent": silent.absolute().as_uri(), "alive": alive.absolute().as_uri(),
    }  # fmt: skip
    command = ["node", str(work / "look.js"), json.dumps(task)]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    views = [json.loads(line) for line in found.stdout.splitlines()]
    for view in views:
        rules = f"{view['checked']} rules of axe kept, " if view["checked"] else ""
        print(f"{view['view']}: {rules}{len(view['problems'])} problem(s)", flush=True)
    problems = [f"{view['view']}: {problem}" for view in views for problem in view["problems"]]
    return problems + [f"the browser failed: {found.stderr.strip()[-2000:]}"] * (found.returncode != 0)


def make_run(folder: Path) -> Path:
    """A run in the midst of its second phase, with all that a report shows."""
    folder.mkdir(parents=True)
    shutil.copy(CONFIG, folder / "config.yaml")
    first, second = (phase.name for phase in load_config(CONFIG).phases)
    state = PhaseState(current_phase=second)
    clock = datetime.now(UTC) - timedelta(seconds=STEP_SECONDS * (STEPS[0] + 0.6 * STEPS[1]))
    lines = JsonLines(metrics_path(folder))
    for phase, steps, until in ((first, STEPS[0], STEPS[0]), (second, STEPS[1], int(0.6 * STEPS[1]))):
        for step, event in phase_events(folder, phase, steps, until):
            moment = (clock + timedelta(seconds=STEP_SECONDS * step)).isoformat(timespec="milliseconds")
            lines.append({**to_record(event), "time": moment})
            note(state, event, moment)
        clock += timedelta(seconds=STEP_SECONDS * until)
        progress, epochs = state.phase(phase), math.ceil(steps / 20)
        progress.steps, progress.step, progress.epochs, progress.epoch = steps, until, epochs, math.ceil(until / 20)
        progress.status = "finished" if until == steps else "running"
        progress.sample_flops = 2.1e9 if phase == first else 3.4e9
        progress.baseline_val_loss = 0.98
    lines.close()
    state.run = {
        "environment": {
            "python": "3.11.9",
            "ray": "2.60.0",
            "torch": "2.7.1",
            "GPU": "none",
            "host": "drill <made up>",
        },
        "resources": {"workers": 2, "CPUs": 16, "memory": "64 GiB", "disk free": "412 GiB"},
    }
    state.save(folder / FILE)
    make_sweep(folder, second)
    return folder


def phase_events(folder: Path, phase: str, steps: int, until: int) -> list[tuple[int, Event]]:
    """What a phase of so many steps, 20 an epoch, tells up to a step, each with that step."""
    random = np.random.default_rng(steps)
    events: list[tuple[int, Event]] = [(0, PhaseEvent(phase, "started", 0, f"started at step 0 of {steps}"))]
    for step in range(1, until + 1):
        epoch, decay = math.ceil(step / 20), 0.35 + 0.6 * math.exp(-step / 90)
        loss = math.nan if step in (131, 132) else decay + 0.04 * random.standard_normal()
        lr = 2e-4 * min(1, step / 40) * 0.5 * (1 + math.cos(math.pi * step / steps))
        told = StepEvent(
            phase, step, GLOBAL_BATCH * step, epoch, loss, lr, abs(1.2 * decay + 0.2 * random.standard_normal()),
            GLOBAL_BATCH / STEP_SECONDS + 0.2 * random.standard_normal(), abs(0.05 * random.standard_normal()),
            int(math.isnan(loss)), STEP_SECONDS, 1.9, 0.21, 0.06, 0.01, 0.08, 0.38, 5.1e9,
        )  # fmt: skip
        events.append((step, told))
        if math.isnan(loss):
            events.append((step, FaultEvent(phase, step, "skip", f"step {step} had no finite loss and was skipped")))
        if step == 150:
            events.append((step, PhaseEvent(phase, "resumed", step, f"resumed at step {step} of {steps}")))
        if step % 20 == 0:
            events += [(step, event) for event in epoch_events(folder, phase, step, epoch, decay)]
    if until == steps:
        events.append((until, PhaseEvent(phase, "finished", until, f"finished after {steps} steps")))
    return events


def epoch_events(folder: Path, phase: str, step: int, epoch: int, decay: float) -> list[Event]:
    """Validation of two averages, a picture of samples and a checkpoint."""
    events: list[Event] = []
    for average, loss in ((AVERAGE, decay), ("ema_power_0.05", 1.03 * decay)):
        levels = {"0.0757": 1.3 * loss, "0.205": loss, "0.441": 0.9 * loss, "1.2": 0.8 * loss}
        events.append(ValidationEvent(phase, step, GLOBAL_BATCH * step, epoch, loss, 0.02, levels, average))
    path = Path("samples", phase, f"samples_epoch_{epoch:03d}.png")
    tiles = made_up_tiles(decay)
    columns = [("sample", tiles)] if phase.startswith("phase1") else [(name, tiles[:3]) for name in ("hint", "sample")]
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    sample_grid(columns, folder / path, title=f"{phase}, epoch {epoch}, step {step}")
    events.append(SampleEvent(phase, step, epoch, str(path)))
    events.append(CheckpointEvent(phase, step, epoch, f"{phase}_epoch_{epoch:03d}.ckpt", "epoch", 0.31, 2.4))
    return events


def made_up_tiles(noise: float) -> np.ndarray:
    """(9, 96, 96) bright spots under noise, in [-1, 1]."""
    random = np.random.default_rng(7)
    rows, columns = np.mgrid[:96, :96]
    tiles = np.full((9, 96, 96), -0.9)
    for tile in tiles:
        for row, column in random.uniform(8, 88, (7, 2)):
            tile += 1.5 * np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / 60)
    return np.clip(tiles + noise * random.standard_normal(tiles.shape), -1, 1)


def note(state: PhaseState, event: Event, moment: str) -> None:
    """Keep in the state what a run keeps there of an event."""
    progress = state.phase(event.phase)
    if isinstance(event, ValidationEvent) and event.ema == AVERAGE:
        progress.metrics["val_loss"] = event.loss
    if isinstance(event, CheckpointEvent):
        progress.checkpoints, progress.last = [*progress.checkpoints[-3:], event.name], event.name
        loss = progress.metrics["val_loss"]
        progress.best = BestCheckpoint(checkpoint=event.name, val_loss=loss, epoch=event.epoch)
        words = ("checkpoint", f"{event.name} ({event.kind})")
    elif isinstance(event, FaultEvent):
        words = ("fault", f"{event.phase}, step {event.step}: {event.message}")
    elif isinstance(event, PhaseEvent):
        words = (event.status, f"{event.phase}: {event.message}")
    else:
        return
    state.history.append(HistoryEntry(time=moment, event=words[0], message=words[1]))


def make_sweep(folder: Path, phase: str) -> None:
    """Six trials, one of them failed."""
    trials = []
    for number in range(6):
        curve = [0.8 - 0.05 * number * (number < 5) - 0.08 * epoch for epoch in range(1, 4)]
        results = [
            EpochResult(epoch=epoch, step=20 * epoch, position=320 * epoch, losses={AVERAGE: loss},
                        standard_errors={AVERAGE: 0.01})
            for epoch, loss in enumerate(curve, start=1)
        ]  # fmt: skip
        status = ("stopped", "stopped", "finished", "finished", "finished", "failed")[number]
        values = {"optimizer.lr": 1e-4 * 2**number, "model.dropout": 0.1 * (number % 2)}
        message = "the GPU's memory did not suffice" if status == "failed" else ""
        trials.append(TrialRecord(number=number, values=values, status=status, message=message, results=results))
    sweep, best = SweepRecord(averages=[AVERAGE], trials=trials), trials[4].results[-1]
    sweep_folder(folder).mkdir()
    sweep.save(sweep_folder(folder))
    Winner(
        trial=4, overrides=trials[4].values, track=AVERAGE, checkpoint="trial_004", phase=phase, epoch=3,
        step=best.step, position=best.position, loss=best.losses[AVERAGE], standard_error=0.01,
    ).save(sweep_folder(folder))  # fmt: skip
    candidates = [
        Candidate(trial=trial.number, track=AVERAGE, loss=sweep.loss(trial.results[-1]), standard_error=0.01)
        for trial in trials[4::-1]
    ]
    plot_sweep(sweep, candidates, {}, sweep_folder(folder) / "sweep.png", title="sweep")


if __name__ == "__main__":
    sys.exit(main())
