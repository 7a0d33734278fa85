"""The whole demo as a job: a Ray with dashboard and token on loopback, and Ray's own `ray job submit`, status and logs.

    python benchmarks/drill_job.py

The job trains configs/demo.yaml as it is, both phases with the sweep between them, but for its folders, which must be
absolute in a job. Prints what Ray and `ray-pipeline status` say of it at the end; exits 1 where the job did not
succeed, a phase is not finished, or the page or the pictures of the last epochs are missing.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from ray_pipeline.config import load_config
from ray_pipeline.submission import STOP_WAIT

ROOT = Path(__file__).resolve().parent.parent
DEMO = "configs/demo.yaml"
#: until Ray's dashboard answers; until its processes have ended
START_SECONDS, END_SECONDS = 120, 60


def main() -> int:
    with (
        tempfile.TemporaryDirectory(prefix="job") as folder,  # short: Ray's sockets lie in it
        head(Path(folder)) as (url, environment),
    ):
        problems = drill(Path(folder), url, environment)
    print("\n".join(problems) or "the demo ran as a job, to its end")
    return 1 if problems else 0


def drill(work: Path, url: str, environment: dict[str, str]) -> list[str]:
    """Submit the demo, wait for it and look at what it left -> what is wrong, in words."""
    run, place = work / "run", ["--address", url]
    wait = json.dumps({"env_vars": {STOP_WAIT: "150"}})
    submit = ["job", "submit", *place, "--submission-id", "demo", "--working-dir", ".", "--runtime-env-json", wait]
    train = ["--", "python", "-m", "ray_pipeline", "train", "--config", DEMO]
    train += ["--set", f"output_dir={run}", "--set", f"data.root={work / 'data'}"]
    began = time.monotonic()
    problems = ["the job did not succeed"] * (ray(*submit, *train, env=environment) != 0)
    print(f"{time.monotonic() - began:.0f} s", flush=True)
    for words in (["job", "status", *place, "demo"], ["job", "list", *place]):
        problems += [f"`ray {' '.join(words[:2])}` failed"] * (ray(*words, env=environment) != 0)
    subprocess.run([sys.executable, "-m", "ray_pipeline", "status", str(run)], check=False, cwd=ROOT)
    phases = json.loads((run / "phase_state.json").read_text())["phases"] if run.exists() else {}
    for phase in load_config(ROOT / DEMO).phases:
        status = phases.get(phase.name, {}).get("status")
        problems += [f"{phase.name} is {status}, expected finished"] * (status != "finished")
        picture = run / "samples" / phase.name / f"samples_epoch_{phase.epochs:03d}.png"
        problems += [f"there is no {picture}"] * (not picture.exists())
    return problems + ["no report.html"] * (not (run / "report.html").exists())


def ray(*words: str, env: dict[str, str]) -> int:
    """Run one of Ray's commands in the repository, its words on ours -> its exit status."""
    return subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", *words], env=env, cwd=ROOT, check=False
    ).returncode


@contextmanager
def head(work: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A Ray on this machine for the length of the block; yields its address and the environment of who may use it."""
    gcs, dashboard, agent, client = free_ports(4)
    url, token = f"http://127.0.0.1:{dashboard}", secrets.token_hex(32)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    words = ["start", "--head", "--block", "--port", gcs, "--dashboard-port", dashboard, "--temp-dir", work / "ray"]
    words += ["--dashboard-agent-listen-port", agent, "--ray-client-server-port", client, "--disable-usage-stats"]
    with (work / "start.log").open("wb") as log:
        process = psutil.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", *map(str, words)], env=environment, cwd=work,
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        until = time.monotonic() + START_SECONDS
        while not answers(url, token):
            if process.poll() is not None or time.monotonic() > until:
                sys.exit((work / "start.log").read_text())
            time.sleep(0.5)
        yield url, environment
    finally:
        family = [process, *process.children(recursive=True)] if process.is_running() else []
        if family:
            process.terminate()
        for left in psutil.wait_procs(family, timeout=END_SECONDS)[1]:
            left.kill()


def answers(url: str, token: str) -> bool:
    """Whether the job API does."""
    try:
        request = urllib.request.Request(f"{url}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status == 200
    except OSError:
        return False


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody has."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


if __name__ == "__main__":
    sys.exit(main())
