"""Jobs on a real head of a Ray with dashboard and token: submitted, followed, stopped, killed and submitted again."""

import fcntl
import io
import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
import time
import urllib.error
import urllib.request
import uuid
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from ray.job_submission import JobDetails

from ray_pipeline.cli import main
from ray_pipeline.config import load_config
from ray_pipeline.errors import UserError
from ray_pipeline.job_attendance import ask_to_stop, how_it_ended
from ray_pipeline.job_paths import JOB_VARIABLE, check_job_paths
from ray_pipeline.submission import STOP_WAIT, plan_job

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_SECONDS = 300
HOSTILE = "$(touch pwned) ; touch pwned `touch pwned` & 'touch pwned' \"| touch pwned\n#"
TINY = {
    "data": {"tile_size": 64, "shard_rows": 8},
    "model": {"architecture": "custom", "latent_size": 8, "depth": 1, "hidden_size": 32, "num_heads": 2,
              "patch_size": 2},
    "ema": {"decay": 0.9, "start_step": 4, "power_stds": []},
    "train": {"batch_size": 4, "global_batch": 4, "threads": 1, "precision": "fp32"},
    "monitoring": {"log_every_n_steps": 1, "val_tiles": 4, "val_noise_levels": 1, "plot_samples": False,
                   "plot_loss": False, "plot_lr": False, "tensorboard": False, "report": False, "ray_metrics": False},
    "checkpoint": {"every_minutes": 0.02},
    "vae": {"actors": 1},
    "ray": {"use_gpu": False, "stop_timeout_seconds": 40.5},
}  # fmt: skip


@dataclass
class Head:
    """A Ray that `ray start --head` started; `token` opens it."""

    url: str
    token: str
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """Of a command that uses it."""
        return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
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
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # the path of a Unix socket is short
    for _ in range(3):  # a port may be taken meanwhile, and Ray gives its processes 30 s to start
        head, process = start_head(folder)
        if answers(head, process):
            break
    else:
        pytest.fail((folder / "start.log").read_text())
    yield head
    family = process.children(recursive=True)
    process.terminate()
    _, alive = psutil.wait_procs([process, *family], timeout=30)
    for each in alive:
        each.kill()
    shutil.rmtree(folder, ignore_errors=True)


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


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_data) -> Path:
    """A folder to submit from: config.yaml, whose tiles and latents lie elsewhere, and a hostile file name."""
    folder = tmp_path_factory.mktemp("project")
    tree = TINY | {
        "data": TINY["data"] | {"root": str(tiny_data), "latents": str(tmp_path_factory.mktemp("latents"))},
        "phases": [{"name": "phase1", "epochs": 12, "epochs_to_save": [12]}],
    }
    for name in ("config.yaml", "con'fig $(touch pwned);.yaml"):
        (folder / name).write_text(yaml.safe_dump(tree))
    return folder


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


def start(head: Head, project: Path, *words: str, terminal: bool = False) -> Command:
    """Start `ray-pipeline submit` in a project."""
    output = Path(tempfile.mkstemp(dir=head.folder, suffix=".log")[1])
    ours, theirs = pty.openpty() if terminal else (None, subprocess.DEVNULL)

    def begin() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests that run in the background have it ignored
        if terminal:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    with output.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray_pipeline", "submit", "--address", head.url, *words],
            env=head.environment, cwd=project, stdin=theirs, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=begin,
        )  # fmt: skip
    if terminal:
        os.close(theirs)
    return Command(process, output, ours)


def events(run: Path) -> list[dict]:
    path = run / "logs" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []


def checkpoints(run: Path) -> list[str]:
    return sorted(path.parent.name for path in run.glob("checkpoints/*.ckpt/state.json"))


def phase(run: Path) -> dict:
    return json.loads((run / "phase_state.json").read_text())["phases"]["phase1"]


def test_a_job_whose_driver_is_killed_is_submitted_again_and_its_words_are_no_code(head, project, tmp_path):
    run = tmp_path / HOSTILE.replace("/", "")
    config = "con'fig $(touch pwned);.yaml"
    command = start(head, project, "--config", config, "--set", f"output_dir={json.dumps(str(run))}", "--retries", "1")
    first = command.job_id
    command.until(lambda: checkpoints(run))
    head.driver(first).kill()
    assert command.end() == 0, command.said
    said = command.said
    second = command.job_id
    lines = [
        f"job       {first}",
        "encode  ",
        f"job {first} was ended by SIGKILL",
        "its driver died: submitted again in 5 s, retry 1 of 1",
        f"job {second} goes on with the run of job {first}",
        "phase1: finished",
        f"job {second} succeeded",
    ]
    places = [said.index(line) for line in lines]
    assert places == sorted(places), said
    assert phase(run)["status"] == "finished"
    assert phase(run)["attempt"] == 2
    jobs = head.jobs()
    assert jobs[first]["status"] == "FAILED"
    assert jobs[second]["status"] == "SUCCEEDED"
    assert jobs[second]["metadata"].items() >= {
        "retry": "1", "retry_of": first, "config": config, "output_dir": str(run), "phases": "phase1"
    }.items()  # fmt: skip
    assert jobs[second]["runtime_env"]["env_vars"][STOP_WAIT] == "131"
    places = [ROOT, project, head.folder, tmp_path]
    assert not [found for place in places for found in place.rglob("pwned*") if found.is_file()]


def test_plain_ray_job_submit_trains_the_demo_from_the_repository_and_a_stop_commits(head, project, tmp_path):
    run = tmp_path / "run"
    tiny = yaml.safe_load((project / "config.yaml").read_text())
    settings = {section: tiny[section] for section in ("data", "model", "ema", "train", "monitoring", "vae", "ray")}
    settings |= {"sweep.enabled": False, "output_dir": str(run), "phases": [{"name": "phase1", "epochs": 3000}]}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    wait = {"env_vars": {STOP_WAIT: "100"}}
    place = ["--address", head.url]

    def ray_job(*words: str) -> str:
        done = subprocess.run(
            [Path(sys.executable).parent / "ray", "job", *words],
            cwd=ROOT, env=head.environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    submit = ["submit", *place, "--submission-id", "plain", "--no-wait", "--working-dir", "."]
    submit += ["--runtime-env-json", json.dumps(wait), "--", "python", "-m", "ray_pipeline", "train"]
    ray_job(*submit, "--config", "configs/demo.yaml", *words)
    wait_for(
        lambda: len([event for event in events(run) if event["event"] == "step"]) > 3,
        lambda: ray_job("logs", *place, "plain"),
        lambda: head.jobs()["plain"]["status"] == "FAILED",
    )
    assert head.jobs()["plain"]["driver_info"] is not None  # it joined this Ray, and started none of its own
    assert "RUNNING" in ray_job("status", *place, "plain")
    assert "Job 'plain' was stopped" in ray_job("stop", *place, "plain")
    said = ray_job("logs", *place, "plain")
    assert "stopped by SIGTERM; the newest checkpoint is phase1_step_" in said
    assert "go on with --resume" in said
    assert phase(run)["status"] == "stopped"
    assert phase(run)["last"] in checkpoints(run)
    last_step = [event["step"] for event in events(run) if event["event"] == "step"][-1]
    assert phase(run)["step"] == last_step  # nothing that was trained is lost


def test_a_job_with_wrong_input_ends_with_our_words_and_status(head, project, tmp_path):
    words = ["--config", "config.yaml", "--set", "data.root=/no/such/data", "--set", f"output_dir={tmp_path / 'run'}"]
    command = start(head, project, *words, "--retries", "3")
    assert command.end() == 2, command.said
    assert "/no/such/data" in command.said.partition("error: ")[2]
    assert f"job {command.job_id} failed with exit status 2" in command.said
    assert "submitted again" not in command.said


@pytest.fixture
def counting(tmp_path) -> list[str]:
    """Words by which a job counts to 40 in 8 s, in the place of Python, which takes its time to begin."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\nfor i in $(seq 40); do echo count $i; sleep 0.2; done\n")
    python.chmod(0o755)
    place = f"PATH={python.parent}:/usr/bin:/bin"
    return ["--config", "config.yaml", "--set", f"output_dir={tmp_path / 'run'}", "--env", place]


def test_ctrl_c_and_yes_on_a_terminal_stops_the_job(head, project, counting):
    command = start(head, project, *counting, "--retries", "3", terminal=True)
    command.until(lambda: "count 3\n" in command.said)
    os.write(command.terminal, b"\x03")
    command.until(lambda: "stop the job too? [y/N]" in command.said)
    os.write(command.terminal, b"y\n")
    assert command.end() == 143, command.said
    assert f"stopping job {command.job_id}" in command.said
    assert f"job {command.job_id} was stopped" in command.said
    assert "count 40" not in command.said
    assert head.jobs()[command.job_id]["status"] == "STOPPED"


def test_ctrl_c_without_a_terminal_leaves_the_job_running(head, project, counting):
    command = start(head, project, *counting, "--wait")
    command.until(lambda: "count 3\n" in command.said)
    command.process.send_signal(signal.SIGINT)
    assert command.end() == 130, command.said
    assert f"job {command.job_id} goes on without this command" in command.said
    assert command.said.count(f"ray job stop {command.job_id} --address {head.url}") == 2
    wait_for(lambda: head.jobs()[command.job_id]["status"] == "SUCCEEDED", lambda: str(head.jobs()))


def test_a_log_whose_connection_breaks_is_shown_once_and_whole(head, project, counting):
    wire = Wire(int(head.url.rpartition(":")[2]))
    command = start(Head(wire.url, head.token, head.folder), project, *counting, "--wait")
    command.until(lambda: "count 8\n" in command.said)
    wire.cut()
    command.until(lambda: "the cluster does not answer" in command.said)
    wire.mend()
    assert command.end() == 0, command.said
    wire.cut()
    counted = [line.split()[1] for line in command.said.splitlines() if line.startswith("count ")]
    assert counted == [str(number) for number in range(1, 41)], command.said


def test_nobody_gets_in_without_the_token(head, project, tmp_path):
    for token, code in ((None, 401), ("0" * 32, 403)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            head.get("/api/jobs/", token)
        assert refused.value.code == code
    stranger = Head(head.url, "0" * 32, head.folder)
    command = start(stranger, project, "--config", "config.yaml", "--set", f"output_dir={tmp_path / 'run'}")
    assert command.end() == 2
    assert "RAY_AUTH_TOKEN" in command.said
    assert "0" * 32 not in command.said


def test_submit_has_help_with_an_example(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["submit", "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "example: ray-pipeline submit --address http" in text
    assert text.isascii()


@pytest.fixture
def submitted(project, tmp_path) -> Callable:
    """(*overrides, **words of `plan_job`) -> the Job, its run in a folder that all nodes share."""

    def plan(*overrides: str, **words):
        overrides = (f"output_dir={tmp_path / 'run'}", *overrides)
        return plan_job(project / "config.yaml", overrides, working_dir=project, **words)

    return plan


def test_a_shell_takes_every_word_of_the_entry_point_for_what_it_is(project, tmp_path):
    hostile = [f"output_dir={json.dumps(str(tmp_path / HOSTILE))}", "monitoring.wandb_project=--resume"]
    for name in ("con'fig $(touch pwned);.yaml", "-x.yaml"):
        shutil.copy(project / "config.yaml", tmp_path / name)
        job = plan_job(tmp_path / name, hostile, working_dir=tmp_path, resume="auto")
        shell = subprocess.run(
            ["sh", "-c", f"set -- {job.entrypoint}\nprintf '%s\\0' \"$@\""],
            cwd=tmp_path,
            capture_output=True,
            check=True,
        )
        assert tuple(shell.stdout.decode().split("\0")[:-1]) == job.words
    assert job.words[:4] == ("python", "-m", "ray_pipeline", "train")
    assert f"--set={hostile[0]}" in job.words
    assert not list(tmp_path.rglob("pwned*"))


def test_a_job_submitted_again_goes_on_once(submitted):
    job = submitted(resume=True)
    assert job.words[-1] == "--resume"
    job = job.again(2, "first")
    assert [word for word in job.words if "resume" in word] == ["--resume=auto"]
    assert job.metadata.items() >= {"retry": "2", "retry_of": "first"}.items()


@pytest.mark.parametrize(
    "override",
    ["output_dir=runs/first", "data.root=data", "data.latents=latents", "checkpoint.store=./store",
     "phases.0.init=a.ckpt", "vae.pretrained=autoencoder", "vae.pretrained=../autoencoder"],
)  # fmt: skip
def test_paths_that_would_lie_in_the_cache_of_a_job_are_refused(submitted, project, override):
    (project / "autoencoder").mkdir(exist_ok=True)
    with pytest.raises(UserError, match=f"{override}: relative paths"):
        submitted(override)


def test_all_relative_paths_are_told_at_once_and_encode_minds_its_own(project):
    config = load_config(project / "config.yaml", ["output_dir=run", "data.root=data", "phases.0.init=a.ckpt"])
    with pytest.raises(UserError, match=r"output_dir=run and data\.root=data and phases\.0\.init=a\.ckpt"):
        check_job_paths(config, project)
    with pytest.raises(UserError) as refused:
        check_job_paths(config, project, data_alone=True)
    assert str(refused.value).startswith("data.root=data: relative")


def test_hub_ids_uris_and_home_are_no_relative_paths(submitted):
    job = submitted("vae.pretrained=stabilityai/sd-vae", "checkpoint.store=s3://bucket/run", "data.root=~/data")
    assert job.metadata["output_dir"].startswith("/")


@pytest.mark.parametrize("command", ["train", "encode", "sweep"])
def test_commands_that_run_as_a_job_refuse_relative_paths(project, monkeypatch, capsys, command):
    monkeypatch.chdir(project)
    monkeypatch.setenv(JOB_VARIABLE, "{}")
    assert main([command, "--config", "config.yaml", "--set", "data.root=data"]) == 2
    said = capsys.readouterr().err
    assert "data.root=data" in said
    assert ("output_dir=training_output" in said) == (command != "encode")
    assert sorted(path.name for path in project.iterdir() if path.is_dir() and path.name != "autoencoder") == []


def test_what_others_could_read_or_a_job_could_not_use_is_refused(submitted, project, tmp_path):
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "WANDB_API_KEY", "wandb_apikey", "DB_PASSWORD"):
        with pytest.raises(UserError, match=f"env_vars.{name} looks like a credential") as refused:
            submitted(env=[f"{name}=hunter2"])
        assert "hunter2" not in str(refused.value)
    for words in ({"pip": ["git+https://hunter2@host/x.git"]}, {"env": ["PROXY=http://me:hunter2@host"]}):
        with pytest.raises(UserError, match="holds a password") as refused:
            submitted(**words)
        assert "hunter2" not in str(refused.value)
    with pytest.raises(UserError, match="holds a password"):
        submitted("checkpoint.store=s3://key:hunter2@bucket/run")
    with pytest.raises(UserError, match="expected NAME=VALUE"):
        submitted(env=["HF_HOME"])
    with pytest.raises(UserError, match="env_vars: 'A B' is no name"):
        submitted(env=["A B=1"])
    with pytest.raises(UserError, match="LD_PRELOAD makes processes load other code"):
        submitted(env=["LD_PRELOAD=x.so"])
    with pytest.raises(UserError, match=r"ray\.runtime_env\.env_vars\.HF_HOME is what a job is given"):
        submitted("ray.runtime_env={env_vars: {HF_HOME: /a}}", env=["HF_HOME=/b"])
    with pytest.raises(UserError, match=r"ray\.runtime_env\.working_dir is what a job is given"):
        submitted("ray.runtime_env={working_dir: /a}")
    with pytest.raises(UserError, match="whole number"):
        submitted(env=[f"{STOP_WAIT}=1.5"])
    with pytest.raises(UserError, match="leave it at auto"):
        submitted("ray.address=local")
    with pytest.raises(UserError, match="is not in"):
        plan_job(project / "config.yaml", [f"output_dir={tmp_path}"], working_dir=tmp_path)
    with pytest.raises(UserError, match="unknown key"):
        submitted("optimizer.learning_rate=1")


def test_variables_and_packages_reach_the_job(submitted):
    job = submitted(env=["HF_HOME=/shared/hub", "AWS_SHARED_CREDENTIALS_FILE=/etc/aws"], pip=["my-hints==1.0"])
    variables = {"HF_HOME": "/shared/hub", "AWS_SHARED_CREDENTIALS_FILE": "/etc/aws", STOP_WAIT: "131"}
    assert job.runtime_env["env_vars"] == variables
    assert job.runtime_env["pip"] == ["my-hints==1.0"]
    assert submitted(env=[f"{STOP_WAIT}=5"]).runtime_env["env_vars"] == {STOP_WAIT: "5"}


class Terminal(io.StringIO):
    """Somebody who types."""

    def isatty(self) -> bool:
        return True


class Impatient(Terminal):
    """Somebody who presses Ctrl-C again."""

    def readline(self, *_):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("typed", "stops"),
    [("y\n", True), ("YES \n", True), ("n\n", False), ("\n", False), ("", False), ("yeah, no\n", False)],
)
def test_only_a_yes_on_a_terminal_stops_the_job(monkeypatch, capsys, typed, stops):
    monkeypatch.setattr(sys, "stdin", Terminal(typed))
    assert ask_to_stop() is stops
    assert "stop the job too? [y/N]" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    assert ask_to_stop() is False
    assert capsys.readouterr().err == ""


def test_ctrl_c_at_the_question_is_a_no(monkeypatch):
    monkeypatch.setattr(sys, "stdin", Impatient())
    assert ask_to_stop() is False


@pytest.mark.parametrize(
    ("record", "exit_status", "driver_died"),
    [
        ({"status": "SUCCEEDED", "driver_exit_code": 0}, 0, False),
        ({"status": "STOPPED"}, 143, False),
        ({"status": "FAILED", "driver_exit_code": 1}, 1, False),
        ({"status": "FAILED", "driver_exit_code": 2}, 2, False),
        ({"status": "FAILED", "driver_exit_code": 137}, 137, True),
        ({"status": "FAILED", "driver_exit_code": -signal.SIGSEGV}, 139, True),
        ({"status": "FAILED", "driver_exit_code": 143}, 143, False),
        ({"status": "FAILED", "driver_exit_code": 130}, 130, False),
        ({"status": "FAILED", "driver_exit_code": 255}, 255, False),
        ({"status": "FAILED", "error_type": "JOB_SUPERVISOR_ACTOR_DIED"}, 1, True),
        ({"status": "FAILED", "error_type": "RUNTIME_ENV_SETUP_FAILURE"}, 1, False),
    ],
)
def test_a_driver_that_died_is_told_from_one_that_failed(record, exit_status, driver_died):
    ended = how_it_ended(JobDetails(type="SUBMISSION", entrypoint="python", **record))
    assert (ended.exit_status, ended.driver_died) == (exit_status, driver_died)


def test_a_job_that_the_cluster_forgot_died():
    assert how_it_ended(None).driver_died


def test_the_upload_of_the_repository_is_small_and_whole(tmp_path):
    from ray._private.runtime_env.packaging import create_package

    for include_gitignore in (True, False):
        package = tmp_path / f"{include_gitignore}.zip"
        create_package(str(ROOT), package, include_gitignore=include_gitignore)
        with zipfile.ZipFile(package) as archive:
            names = set(archive.namelist())
        assert package.stat().st_size < 4_000_000
        sources = {str(path.relative_to(ROOT)) for path in (ROOT / "ray_pipeline").rglob("*.py")}
        assert sources <= names
        weights = {
            str(path.relative_to(ROOT)) for path in (ROOT / "ray_pipeline/models/embedded_autoencoder").iterdir()
        }
        assert weights <= names
        assert {"configs/demo.yaml", "configs/microscopy.yaml"} <= names
        tops = {name.split("/")[0] for name in names}
        assert not tops & {".git", ".venv", "demo_output", "training_output", "tests", "runs", "data"}
        assert not [name for name in names if "__pycache__" in name or ".egg-info" in name or name.endswith(".ckpt")]
