"""A Ray with dashboard and token that `ray start --head` starts on this machine, and commands that use it."""

import json
import os
import pty
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from ray_pipeline.job_paths import JOB_VARIABLE

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_SECONDS = 600
#: credentials in the environment of the Ray and of its commands, for a test to look for
PLANTED = {
    name: f"planted-{name}"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "WANDB_API_KEY")
}
# Tests that run in the background have SIGINT ignored. Not as subprocess's preexec_fn, which forks this process: the
# requests that its Ray client has under way may then never be answered.
_ON_TERMINAL = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGINT, signal.SIG_DFL)
if os.isatty(0):
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "ray_pipeline", *sys.argv[1:]])
"""


@dataclass
class Head:
    """A Ray that `ray start --head` started; `token` opens it. started: commands that use it."""

    url: str
    token: str
    folder: Path
    started: list[subprocess.Popen] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """Of a command that uses it."""
        return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
            **PLANTED,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }

    def jobs(self) -> dict[str, dict]:
        """What the job API says of each, by submission id."""
        return {job["submission_id"]: job for job in json.loads(self.get("/api/jobs/", self.token))}

    def get(self, path: str, token: str | None) -> bytes:
        request = urllib.request.Request(self.url + path)
        if token is not None:
            request.add_header("Authorization", f"Bearer {token}")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def driver(self, job_id: str) -> psutil.Process:
        """The Python that the job's entry point runs."""
        found = []
        for process in psutil.process_iter(["environ", "name"]):
            environ = process.info["environ"] or {}
            if f'"job_submission_id": "{job_id}"' in environ.get(JOB_VARIABLE, "") and "python" in process.info["name"]:
                found.append(process)
        return found[0]


@dataclass
class Command:
    """A command that runs, on a terminal of its own where `terminal` is open."""

    process: subprocess.Popen
    output: Path
    terminal: int | None

    @property
    def said(self) -> str:
        return self.output.read_text()

    @property
    def job_id(self) -> str:
        """Of the job that it submitted last."""
        return self.until(lambda: [line.split()[1] for line in self.said.splitlines() if line.startswith("job ")])[-1]

    def until(self, ready: Callable[[], Any]) -> Any:
        """First true value, which must come before the command ends."""
        return wait_for(ready, lambda: self.said, lambda: self.process.poll() is not None)

    def end(self) -> int:
        try:
            return self.process.wait(TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            pytest.fail(self.said)


def wait_for(ready: Callable[[], Any], words: Callable[[], str], too_late: Callable[[], bool] = bool) -> Any:
    """First true value; a failure with these words when it is too late."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not (value := ready()):
        if time.monotonic() > deadline or (too_late() and not ready()):
            pytest.fail(words())
        time.sleep(0.1)
    return value


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on; not of those that the system and Ray's workers take at any time."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("", port))
            if port not in found:
                found.append(port)
    return found


def start(head: Head, project: Path, *words: str, terminal: bool = False) -> Command:
    """Start `ray-pipeline submit` in a project."""
    output = Path(tempfile.mkstemp(dir=head.folder, suffix=".log")[1])
    ours, theirs = pty.openpty() if terminal else (None, subprocess.DEVNULL)

    with output.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", _ON_TERMINAL, "submit", "--address", head.url, *words],
            env=head.environment, cwd=project, stdin=theirs, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    if terminal:
        os.close(theirs)
    head.started.append(process)
    return Command(process, output, ours)


def start_head(folder: Path) -> tuple[Head, psutil.Popen]:
    gcs, dashboard, agent, client = free_ports(4)
    head = Head(f"http://127.0.0.1:{dashboard}", uuid.uuid4().hex, folder)
    words = ["--port", gcs, "--dashboard-port", dashboard, "--dashboard-agent-listen-port", agent]
    words += ["--ray-client-server-port", client, "--temp-dir", folder, "--num-cpus", 4]
    words += ["--object-store-memory", 200_000_000, "--disable-usage-stats"]
    with (folder / "start.log").open("wb") as log:
        process = psutil.Popen(
            [Path(sys.executable).parent / "ray", "start", "--head", "--block", *map(str, words)],
            env=head.environment | {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"},
            cwd=folder, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    return head, process


def answers(head: Head, process: psutil.Popen) -> bool:
    """Whether its job API does, before it ends."""

    def ready() -> bool:
        try:
            return head.jobs() == {}
        except OSError:
            return process.poll() is not None

    wait_for(ready, (head.folder / "start.log").read_text)
    return process.poll() is None


class Wire:
    """A connection to a port of this machine by way of another port, which can be cut and mended."""

    def __init__(self, port: int):
        self.port, self.own_port, self.sockets = port, free_ports(1)[0], []
        self.url = f"http://127.0.0.1:{self.own_port}"
        self.mend()

    def mend(self) -> None:
        self.sockets = [socket.create_server(("127.0.0.1", self.own_port))]
        threading.Thread(target=self._accept, args=(self.sockets[0],), daemon=True).start()

    def cut(self) -> None:
        for each in self.sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self, server: socket.socket) -> None:
        with suppress(OSError):
            while True:
                ours, _ = server.accept()
                theirs = socket.create_connection(("127.0.0.1", self.port))
                self.sockets += [ours, theirs]
                for pair in ((ours, theirs), (theirs, ours)):
                    threading.Thread(target=self._carry, args=pair, daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
