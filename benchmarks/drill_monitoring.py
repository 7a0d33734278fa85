"""A real run seen from outside: through Debian's prometheus, and in a browser in the Ray dashboard and TensorBoard.

    python benchmarks/drill_monitoring.py
    python benchmarks/drill_monitoring.py --screens /tmp/screens

Trains both phases small on a Ray of its own with a dashboard, and spoils the latents of one tile before the second, so
that steps are skipped. Prometheus runs with cluster/monitoring/prometheus.yml, of which the path of Ray's temporary
folder alone is changed. Prints a line a finding; exits 1 where a series that the Grafana dashboard or an alert asks for
is missing or tells another number than logs/metrics.jsonl, where an alert that should fire does not, where a page does
not show the run under readable names, or a page asks another machine. Wants prometheus, chromium, node and npm, which
gets playwright-core for it into a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from drill_report import CHROMIUM_FLAGS, find_chromium
from small_run import PHASES, SmallRun, prepare

from ray_pipeline.errors import UserError
from ray_pipeline.monitoring.events import curves, from_record
from ray_pipeline.monitoring.metrics_file import read_events

MONITORING = Path(__file__).resolve().parent.parent / "cluster" / "monitoring"
RAY_FOLDER = "/tmp/ray"  # in prometheus.yml: Ray's usual temporary folder
#: tiles are 4 a field; the second phase trains until the drill has seen enough
FIELDS, EPOCHS = 16, (22, 5000)
SETTINGS = {
    "ray.dashboard": True,
    "monitoring.tensorboard": True,
    "monitoring.plot_samples": True,
    "monitoring.num_samples": 4,
    "monitoring.sample_steps": 4,
    "monitoring.sample_every_n_epochs": 15,
    "train.max_skipped_steps": 10**6,  # the spoilt tile comes once an epoch
    "checkpoint.every_minutes": 0.2,
}
#: two scrapes after a value was set: Ray collects them every 10 s, Prometheus every 15 s
PATIENCE_SECONDS = 120
#: of the browser, of npm, and of the run's end
TIMEOUT = 240
#: series that appear with the first bad step
BAD_STEPS = {"ray_pipeline_skipped_steps_total", "ray_pipeline_faults_total"}
#: alerts that a tile without finite latents must raise
EXPECTED_ALERTS = {"StepsAreSkipped", "SomethingWentWrong"}
#: of Ray's dashboard outside Kubernetes; what it knows of Train it tells by its API alone
TABS = ("Overview", "Jobs", "Serve", "Cluster", "Actors", "Metrics", "Logs")
ACTORS = ("TrainController", "RayTrainWorker", "Board", "MapWorker(MapBatches(Gather))")
TENSORBOARD_CARDS = ("train/loss", "validation/loss/ema_decay_0.9", "checkpoint/seconds", "samples")

LOOK = r"""
const { chromium } = require("playwright-core");
const { browser: executablePath, flags, screens, ray, token, tensorboard } = JSON.parse(process.argv[2]);
const seen = { requests: [] };

async function shoot(page, name) {
  if (!screens) return;
  const before = page.viewportSize();
  const height = await page.evaluate(() => document.documentElement.scrollHeight);
  await page.setViewportSize({ width: 1600, height: Math.max(before.height, height) });
  await page.waitForTimeout(500);
  await page.screenshot({ path: `${screens}/${name}.png` });
  await page.setViewportSize(before);
}

async function lookAtRay(page) {
  await page.goto(ray);
  const box = page.locator("input[type=password]");
  await box.waitFor();
  await shoot(page, "ray_sign_in");
  await box.fill(token);
  await Promise.all([page.waitForEvent("load"), page.getByRole("button", { name: "Submit" }).click()]);
  await page.getByText("Recent jobs").waitFor();
  await shoot(page, "ray_overview");
  const links = page.locator("a[href^='#/']").filter({ hasNot: page.locator("svg, img") });
  seen.tabs = (await links.allInnerTexts()).map((text) => text.trim());
  await page.goto(ray + "/#/jobs");
  const job = page.getByRole("link", { name: /^[0-9a-f]{8}$/ });
  await job.waitFor();
  seen.jobs = await page.locator("table").innerText();
  await shoot(page, "ray_jobs");
  await job.click();
  await page.getByText("Ray Data Overview").click();
  const closed = page.locator("svg", { has: page.locator("title", { hasText: "Expand Dataset" }) });
  await closed.first().waitFor();
  seen.datasets = (await closed.locator("title").allTextContents()).map((text) => text.replace("Expand Dataset ", ""));
  while (await closed.count()) await closed.first().click();
  seen.data = await page.locator("table").first().innerText();
  await shoot(page, "ray_job_data");
  await page.goto(ray + "/#/actors");
  await page.getByLabel("Page Size").fill("100");
  await page.getByText("TrainController").first().waitFor();
  seen.actors = await page.locator("table").innerText();
  await shoot(page, "ray_actors");
}

async function lookAtTensorBoard(page) {
  await page.setViewportSize({ width: 1600, height: 3200 });  // cards out of sight stay empty
  await page.goto(tensorboard + "/#timeseries");
  const groups = page.locator("metrics-card-group-toolbar");
  await groups.first().waitFor();
  for (const group of await groups.all())
    if (!(await group.locator("xpath=following-sibling::*").locator("card-view").count())) await group.click();
  await page.locator("scalar-card line-chart").nth(12).waitFor();
  await page.waitForTimeout(3000);
  const cards = await page.locator("scalar-card .tag, image-card .tag").allInnerTexts();
  seen.cards = [...new Set(cards.map((text) => text.replace(/\s/g, "")))].sort();
  await shoot(page, "tensorboard_time_series");
  await page.setViewportSize({ width: 1600, height: 1000 });
  const elements = { scalars: "tf-scalar-card", images: "tf-image-loader", text: "tf-text-loader",
                     hparams: "tf-hparams-table-view" };
  for (const [tab, element] of Object.entries(elements)) {
    await page.goto(`${tensorboard}/#${tab}`);
    await page.reload();
    await page.locator(element).first().waitFor();
    await page.waitForTimeout(2000);
    seen[tab] = await page.evaluate(wholeText);
    await shoot(page, `tensorboard_${tab}`);
  }
}

function wholeText() {  // with that of shadow roots, which innerText passes over
  const text = (node) => node.nodeType === Node.TEXT_NODE ? node.data
    : /^(STYLE|SCRIPT|TEMPLATE)$/.test(node.nodeName) ? ""
    : [...(node.shadowRoot ? node.shadowRoot.childNodes : []), ...node.childNodes].map(text).join(" ");
  return text(document.body).replace(/\s+/g, " ");
}

(async () => {
  const browser = await chromium.launch({ executablePath, args: flags });
  const context = await browser.newContext({ viewport: { width: 1600, height: 1000 } });
  context.setDefaultTimeout(60000);
  context.on("request", (request) => {
    const url = request.url();
    if (![ray, tensorboard, "data:", "blob:"].some((start) => url.startsWith(start))) seen.requests.push(url);
  });
  for (const look of [lookAtRay, lookAtTensorBoard]) await look(await context.newPage());
  await browser.close();
  console.log(JSON.stringify(seen));
})().catch((error) => { console.error(error); process.exit(1); });
"""


@dataclass
class Prometheus:
    """A server that runs, asked by its HTTP API."""

    address: str

    def ask(self, path: str, **parameters: str) -> Any:
        """The data of an answer of /api/v1/<path>."""
        return get_json(f"{self.address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}")["data"]

    def names(self, run: str, phase: str) -> set[str]:
        """Names of our series of a phase."""
        series = self.ask("series", **{"match[]": f'{{__name__=~"ray_pipeline_.+",run="{run}",phase="{phase}"}}'})
        return {one["__name__"] for one in series}

    def scrapes(self, name: str, run: str, phase: str) -> dict[float, float]:
        """What each scrape found: value by time."""
        found = self.ask("query", query=f'{name}{{run="{run}",phase="{phase}"}}[1h]')["result"]
        return {moment: float(value) for series in found for moment, value in series["values"]}

    def alerts(self) -> set[str]:
        """Names of the alerts that fire."""
        return {alert["labels"]["alertname"] for alert in self.ask("alerts")["alerts"] if alert["state"] == "firing"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--screens", type=Path, help="folder for screenshots")
    arguments = parser.parse_args()
    try:
        browser = find_chromium()
        if None in (shutil.which("prometheus"), shutil.which("promtool")):
            raise UserError("prometheus is missing; install it (Debian, as root: apt-get install prometheus)")
        with tempfile.TemporaryDirectory() as folder:
            problems = check_made_up_runs() + drill(Path(folder), browser, arguments.screens)
    except UserError as error:
        print(error)
        return 1
    print("\n".join(problems) or "every series, alert and page shows the run as it was")
    return 1 if problems else 0


def drill(work: Path, browser: str, screens: Path | None) -> list[str]:
    """A run, and all who look at it -> what is wrong, in words."""
    token, host = work / "token", f"127.0.0.1:{free_port()}"
    token.write_text(secrets.token_hex(32))
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        os.environ.pop(name, None)
    os.environ |= {"RAY_TMPDIR": str(work), "RAY_AUTH_TOKEN_PATH": str(token)}
    config, _ = prepare(work, FIELDS, EPOCHS)
    run = SmallRun(config, work / "monitoring_drill", SETTINGS, {"RAY_PROMETHEUS_HOST": f"http://{host}"})
    began = time.monotonic()
    with training(run) as problems, playwright(work) as installed:
        nodes = work / "ray" / "prom_metrics_service_discovery.json"
        run.wait_until(lambda: nodes.exists() and json.loads(nodes.read_text())[0]["targets"], "Ray's nodes", pause=0.1)
        with started(prometheus_command(work, host), work / "prometheus.log"), tensorboard(run, work) as curves_address:
            run.wait_until(lambda: told(run, PHASES[0], "finished"), "the end of the first phase", pause=0.1)
            spoil_a_tile(work / "data" / "latents")
            run.wait_until(lambda: any(step["skipped"] for step in steps(run, PHASES[1])), "a bad step", pause=0.1)
            print(f"{time.monotonic() - began:.0f} s: the second phase skips a step an epoch", flush=True)
            dashboard, key = dashboard_address(work), token.read_text()
            problems += check_state(dashboard, key, run)
            if installed.wait(TIMEOUT) != 0:
                raise UserError("npm could not install playwright-core; is there a network?")
            seen = look(work, browser, screens, ray=dashboard, token=key, tensorboard=curves_address)
            problems += check_dashboard(seen, run) + check_tensorboard(seen, curves_address, run)
            problems += [f"a page asks for {url[:200]}" for url in seen["requests"]]
            prometheus = Prometheus(f"http://{host}")  # it has seen more of the run by now
            problems += check_series(prometheus, run) + check_values(prometheus, run) + check_rules(prometheus)
            problems += check_ends(prometheus, run)
            print(f"{time.monotonic() - began:.0f} s: all looked at", flush=True)
    return problems


def check_series(prometheus: Prometheus, run: SmallRun) -> list[str]:
    """Each name that a panel or an alert asks for is there, with the labels run and phase."""
    asked, name, problems = asked_names(), run.folder.name, []
    for phase, wanted in ((PHASES[0], asked - BAD_STEPS), (PHASES[1], asked)):
        found = patiently(
            lambda phase=phase: prometheus.names(name, phase), lambda found, wanted=wanted: wanted <= found
        )
        print(f'prometheus: {len(found)} series with run="{name}", phase="{phase}"', flush=True)
        problems += [f"prometheus has no {one} of {phase}" for one in sorted(wanted - found)]
        problems += [f"no panel and no alert asks for {one}" for one in sorted(found - asked)]
    return problems


def asked_names() -> set[str]:
    """Names of our series in the Grafana dashboard and in the alerts."""
    text = (MONITORING / "grafana_dashboard.json").read_text() + (MONITORING / "alerts.yml").read_text()
    return set(re.findall(r"ray_pipeline_\w+", text))


def check_values(prometheus: Prometheus, run: SmallRun) -> list[str]:
    """Each scrape of a phase tells what logs/metrics.jsonl tells of the step it was at."""
    problems, compared = [], 0
    for phase in PHASES:
        recorded = steps(run, phase)
        series = {
            name: prometheus.scrapes(f"ray_pipeline_{name}", run.folder.name, phase)
            for name in ("step", "train_loss", "learning_rate", "skipped_steps_total")
        }
        for moment, step in series["step"].items():
            compared += 1
            # the values of a step are set one after another, so a scrape may find some of them of the next step
            near = [expected_values(recorded, number) for number in (step - 1, step, step + 1)]
            for name in ("train_loss", "learning_rate", "skipped_steps_total"):
                value = series[name].get(moment, 0.0)
                if not any(math.isclose(value, one[name], rel_tol=1e-9) for one in near):
                    told_there = ", ".join(str(one[name]) for one in near)
                    problems.append(f"{phase}, step {step:.0f}: {name} is {value}, in metrics.jsonl {told_there}")
        if len(series["step"]) < 2:
            problems.append(f"{phase}: {len(series['step'])} scrape(s), expected two or more")
    print(f"prometheus: {compared} scrapes compared with metrics.jsonl, {len(problems)} problem(s)", flush=True)
    return problems


def expected_values(recorded: list[dict], step: float) -> dict[str, float]:
    """What the series should tell behind a step; one that is not finite leaves the value before."""
    done = recorded[: bisect_right([record["step"] for record in recorded], step)]
    values = {"skipped_steps_total": float(sum(record["skipped"] for record in done))}
    for name, key in (("train_loss", "loss"), ("learning_rate", "lr")):
        values[name] = next((record[key] for record in reversed(done) if math.isfinite(record[key])), math.nan)
    return values


def check_rules(prometheus: Prometheus) -> list[str]:
    """Each panel has something to draw, the rules were loaded, and those fire that should."""
    board, problems = json.loads((MONITORING / "grafana_dashboard.json").read_text()), []
    targets = [(panel["title"], target["expr"]) for panel in board["panels"] for target in panel.get("targets", ())]
    for title, expression in targets:
        if not prometheus.ask("query", query=re.sub(r"\$\w+", ".+", expression.replace("$__range", "1h")))["result"]:
            problems.append(f"the panel {title} has nothing to draw: {expression}")
    rules = [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]
    problems += [f"the rule {rule['name']} is {rule['health']}" for rule in rules if rule["health"] != "ok"]
    firing = patiently(prometheus.alerts, lambda found: found >= EXPECTED_ALERTS)
    words = f"{len(targets)} queries of the Grafana dashboard asked, {len(rules)} rules loaded"
    print(f"prometheus: {words}, firing: {', '.join(sorted(firing)) or 'none'}", flush=True)
    problems += [f"the alert {name} does not fire" for name in sorted(EXPECTED_ALERTS - firing)]
    return problems + [f"the alert {name} fires" for name in sorted(firing - EXPECTED_ALERTS)]


def check_ends(prometheus: Prometheus, run: SmallRun) -> list[str]:
    """Prometheus saw that the first phase finished, though its worker was killed at once, and the other goes on."""
    problems = []
    for phase, wanted in zip(PHASES, (2.0, 0.0), strict=True):
        seen = prometheus.scrapes("ray_pipeline_status", run.folder.name, phase)
        last = seen[max(seen)] if seen else math.nan
        print(f"prometheus: the last status of {phase} is {last:.0f}", flush=True)
        problems += [f"the last status of {phase} is {last}, expected {wanted}"] * (last != wanted)
    return problems


def check_made_up_runs() -> list[str]:
    """The rules say of made-up runs what they should."""
    command = ["promtool", "test", "rules", str(Path(__file__).with_name("alert_tests.yml"))]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    print(f"promtool: {' '.join(found.stdout.split())}", flush=True)
    return [f"promtool: {found.stdout}{found.stderr}"] * (found.returncode != 0)


def check_state(dashboard: str, token: str, run: SmallRun) -> list[str]:
    """Train's state, which a dashboard gives to those with the token alone."""
    problems = []
    try:
        get_json(f"{dashboard}/api/train/v2/runs/v1")
    except urllib.error.HTTPError as error:
        print(f"Ray dashboard without a token: {error.code} {error.reason}", flush=True)
        if error.code != 401:
            problems.append(f"the dashboard answers {error.code} without a token, expected 401")
    else:
        problems.append("the dashboard answers without a token")
    runs = get_json(f"{dashboard}/api/train/v2/runs/v1", token)["train_runs"]
    states = {one["name"]: one["status"] for one in runs}
    print(f"Ray's state of Train: {', '.join(f'{name} {state}' for name, state in states.items())}", flush=True)
    for phase, wanted in zip(PHASES, ("FINISHED", "RUNNING"), strict=True):
        if wanted not in [state for name, state in states.items() if name.startswith(phase)]:
            problems.append(f"Train has no {phase} that is {wanted}")
    folders = {one["run_settings"]["train_loop_config"]["config"]["output_dir"] for one in runs}
    return problems + [f"Train tells another output_dir: {folders}"] * (folders != {str(run.folder)})


def check_dashboard(seen: dict, run: SmallRun) -> list[str]:
    """The run, its data sets and actors are on the pages, under names that one can read."""
    tabs = list(dict.fromkeys(seen["tabs"]))
    print(f"Ray dashboard, tabs: {', '.join(tabs)}", flush=True)
    print(f"Ray dashboard, data sets: {', '.join(seen['datasets'])}", flush=True)
    problems = [f"the dashboard has no tab {name}" for name in TABS if name not in tabs]
    problems += ["the dashboard has a tab Train: README.md says that it has none"] * ("Train" in tabs)
    problems += ["the page Jobs does not show the run's folder"] * (run.folder.name not in seen["jobs"])
    for phase in PHASES:
        if not any(name.startswith(f"{phase}-rank0") for name in seen["datasets"]):
            problems.append(f"no data set of {phase} on the job's page")
    problems += [f"the data set {name} has no name" for name in seen["datasets"] if name.startswith("dataset_")]
    return problems + [f"no actor {name} on the page Actors" for name in ACTORS if name not in seen["actors"]]


def check_tensorboard(seen: dict, address: str, run: SmallRun) -> list[str]:
    """Each curve of each phase is there, and charts, pictures, texts and hyperparameters are shown."""
    tags, problems = get_json(f"{address}/data/plugin/scalars/tags"), []
    print(f"TensorBoard, cards: {', '.join(seen['cards'])}", flush=True)
    for phase in PHASES:
        wanted = {tag for record in read_events(run.folder, phase=phase) for tag in curves(from_record(record))}
        problems += [f"TensorBoard has no {tag} of {phase}" for tag in sorted(wanted - tags.get(phase, {}).keys())]
        expected = {"scalars": "train/loss", "images": phase, "text": "started at step 0", "hparams": phase}
        problems += [f"TensorBoard's tab {tab} does not show {words!r}" for tab, words in expected.items()
                     if words not in seen[tab]]  # fmt: skip
    problems += [f"TensorBoard shows no card {tag}" for tag in TENSORBOARD_CARDS if tag not in seen["cards"]]
    bad_step = "its loss is nan"
    return problems + [f"TensorBoard's tab text does not show {bad_step!r}"] * (bad_step not in seen["text"])


def look(work: Path, browser: str, screens: Path | None, **addresses: str) -> dict:
    """Open all pages -> what was seen there, by page."""
    if screens:
        screens.mkdir(parents=True, exist_ok=True)
    (work / "look.js").write_text(LOOK)
    folder = str(screens.absolute()) if screens else None
    task = {"browser": browser, "flags": CHROMIUM_FLAGS, "screens": folder, **addresses}
    command = ["node", str(work / "look.js"), json.dumps(task)]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    if found.returncode:
        raise UserError(f"the browser failed: {found.stderr.strip()[-2000:]}")
    return json.loads(found.stdout)


@contextmanager
def training(run: SmallRun) -> Iterator[list[str]]:
    """The run for the length of the block; then it is asked to stop. Yields a list for what is wrong, complete when the
    block has ended."""
    problems: list[str] = []
    run.start()
    try:
        yield problems
        family = run.driver.children(recursive=True)
        end(run.driver)
        print(f"the run ended with {run.driver.returncode} on SIGTERM", flush=True)
        if run.driver.returncode != 128 + signal.SIGTERM:
            problems.append(f"the run ended with {run.driver.returncode} on SIGTERM, expected {128 + signal.SIGTERM}")
        _, alive = psutil.wait_procs(family, timeout=TIMEOUT)
        problems += [f"process {process.pid} outlived the run" for process in alive]
    finally:
        if run.driver.poll() is None:
            end(run.driver)


@contextmanager
def started(command: list[str], log: Path) -> Iterator[psutil.Popen]:
    """A process for the length of the block."""
    with log.open("wb") as file:
        process = psutil.Popen(command, stdout=file, stderr=file)
    try:
        yield process
    finally:
        if process.poll() is None:
            end(process)


def end(process: psutil.Popen) -> None:
    """End a process that was started here, in order if it can."""
    process.terminate()
    try:
        process.wait(TIMEOUT)
    except psutil.TimeoutExpired:
        process.kill()
        process.wait()


def playwright(work: Path) -> AbstractContextManager[psutil.Popen]:
    """The process that installs it, while the training starts."""
    command = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(work), "playwright-core"]
    return started(command, work / "npm.log")


def prometheus_command(work: Path, host: str) -> list[str]:
    """Prometheus with our configuration, in which Ray's temporary folder is replaced."""
    config = (MONITORING / "prometheus.yml").read_text()
    if RAY_FOLDER not in config:
        raise UserError(f"{MONITORING / 'prometheus.yml'} does not name {RAY_FOLDER}, which this drill replaces")
    (work / "prometheus.yml").write_text(config.replace(RAY_FOLDER, str(work / "ray")))
    shutil.copy(MONITORING / "alerts.yml", work)
    return [
        "prometheus", f"--config.file={work / 'prometheus.yml'}", f"--storage.tsdb.path={work / 'prometheus'}",
        f"--web.listen-address={host}",
    ]  # fmt: skip


@contextmanager
def tensorboard(run: SmallRun, work: Path) -> Iterator[str]:
    """TensorBoard on the run's curves; yields its address."""
    port = free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run.folder / "logs" / "tensorboard")]
    with started([*command, "--host", "127.0.0.1", "--port", str(port)], work / "tensorboard.log"):
        yield f"http://127.0.0.1:{port}"


def free_port() -> int:
    """A port of the loopback interface that nobody has."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def dashboard_address(work: Path) -> str:
    """Of the Ray whose temporary folder is in `work`."""
    os.environ["RAY_AUTH_MODE"] = "token"  # of this process, before it imports Ray, which looks at it then
    from ray.job_submission import JobSubmissionClient

    (port,) = (work / "ray" / "session_latest").glob("gcs_server_port_*")
    return JobSubmissionClient(f"127.0.0.1:{port.read_text()}").get_address()


def get_json(url: str, token: str = "") -> Any:
    """The answer of an HTTP server on this machine."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
        return json.load(answer)


def patiently(ask: Callable[[], set[str]], enough: Callable[[set[str]], bool]) -> set[str]:
    """The first answer that is enough, or the last one when patience ends."""
    until = time.monotonic() + PATIENCE_SECONDS
    while not enough(found := ask()) and time.monotonic() < until:
        time.sleep(1)
    return found


def steps(run: SmallRun, phase: str) -> list[dict]:
    """Records of a phase's steps so far."""
    return [record for record in read_events(run.folder, phase=phase) if record["event"] == "step"]


def told(run: SmallRun, phase: str, status: str) -> bool:
    """Whether a phase has told of a change."""
    return any(record.get("status") == status for record in read_events(run.folder, phase=phase))


def spoil_a_tile(latents: Path) -> None:
    """Overwrite the stored latents of a training tile by NaN."""
    shard = np.load(latents / "train" / "shard-00000.npy", mmap_mode="r+")
    shard[0] = np.nan
    shard.flush()


if __name__ == "__main__":
    sys.exit(main())
