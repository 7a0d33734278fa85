"""Real jobs on a Ray with dashboard and token: submitted, followed, stopped, killed and submitted again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import yaml
from ray_head import PLANTED, ROOT, TIMEOUT_SECONDS, Head, Wire, answers, start, start_head, wait_for

from ray_pipeline.submission import STOP_WAIT

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
    for command in head.started:  # of a test that failed
        command.kill()
    family = process.children(recursive=True)
    process.terminate()
    _, alive = psutil.wait_procs([process, *family], timeout=30)
    for each in alive:
        each.kill()
    shutil.rmtree(folder, ignore_errors=True)


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
    (project / config).write_text("edited meanwhile")
    head.driver(first).kill()
    assert command.end() == 0, command.said
    said = command.said
    second = command.job_id
    lines = [
        f"job       {first}",
        "encode  ",
        f"job {first} was ended by SIGKILL",
        "this may pass: submitted again in 5 s, retry 1 of 1",
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


def test_plain_ray_job_submit_trains_from_the_repository_and_a_stop_commits(head, project, tmp_path):
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
    assert phase(run)["status"] == "stopped"
    assert phase(run)["last"] in checkpoints(run)
    last_step = [event["step"] for event in events(run) if event["event"] == "step"][-1]
    assert phase(run)["step"] == last_step  # nothing that was trained is lost
    told = f"stopped by SIGTERM; the newest checkpoint is {phase(run)['last']}, step {last_step}; go on with --resume"
    assert told in ray_job("logs", *place, "plain")


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
    command = start(replace(head, url=wire.url), project, *counting, "--wait")
    command.until(lambda: "count 8\n" in command.said)
    wire.cut()
    command.until(lambda: "the cluster does not answer" in command.said)
    wire.mend()
    assert command.end() == 0, command.said
    wire.cut()
    counted = [line.split()[1] for line in command.said.splitlines() if line.startswith("count ")]
    assert counted == [str(number) for number in range(1, 41)], command.said


def test_no_log_and_no_list_holds_a_secret_of_the_environment(head, project, tmp_path):
    run = tmp_path / "run"
    shown = [f"monitoring.{name}=true" for name in ("report", "tensorboard", "plot_loss")]
    words = [word for setting in (*shown, f"output_dir={run}") for word in ("--set", setting)]
    command = start(head, project, "--config", "config.yaml", *words, "--wait")
    command.until(lambda: checkpoints(run))
    assert head.driver(command.job_id).environ().items() >= (PLANTED | {"RAY_AUTH_TOKEN": head.token}).items()
    assert command.end() == 0, command.said
    lists = {
        path: head.get(path, head.token) for path in ("/api/jobs/", "/nodes?view=summary", "/api/v0/tasks?detail=1")
    }
    files = {str(path): path.read_bytes() for path in head.folder.rglob("*") if path.is_file()}

    def told(words: str) -> set[str]:
        return {name for name, data in (files | lists).items() if words.encode() in data}

    assert {"/api/jobs/", str(command.output)} <= told(str(run))
    assert any(Path(name).name.startswith("job-driver-") for name in told("phase1: finished"))
    assert any("/logs/worker-" in name for name in files)
    leaks = {secret: told(secret) for secret in (*PLANTED.values(), head.token)}
    assert not any(leaks.values()), leaks
    written = [path for path in run.rglob("*") if path.is_file()]
    assert {"report.html", "config.yaml", "latest_progress.png"} <= {path.name for path in written}
    assert not [path for path in written if b"planted-" in path.read_bytes()]


def test_nobody_gets_in_without_the_token(head, project, tmp_path):
    for token, code in ((None, 401), ("0" * 32, 403)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            head.get("/api/jobs/", token)
        assert refused.value.code == code
    stranger = replace(head, token="0" * 32)
    command = start(stranger, project, "--config", "config.yaml", "--set", f"output_dir={tmp_path / 'run'}")
    assert command.end() == 2
    assert "RAY_AUTH_TOKEN" in command.said
    assert "0" * 32 not in command.said
