"""What is submitted as a job, what is refused, and what the end of a job means; without Ray."""

import io
import json
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

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
HOSTILE = "$(touch pwned) ; touch pwned `touch pwned` & 'touch pwned' \"| touch pwned\n#"


@pytest.fixture
def project(tmp_path) -> Path:
    """A folder to submit from, with a config.yaml."""
    folder = tmp_path / "project"
    folder.mkdir()
    tree = {
        "data": {"root": "/shared/data"},
        "ray": {"stop_timeout_seconds": 40.5},
        "phases": [{"name": "one", "epochs": 1}],
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder


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


def test_a_job_submitted_again_brings_the_files_of_the_first_time(submitted, project):
    (project / ".rayignore").write_text("/left_out")
    (project / ".gitignore").write_text("*.ckpt")
    for name in ("left_out/a.py", "code/a.py", "code/a.ckpt", ".git/HEAD"):
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_text("before")
    job = submitted()
    (project / "code" / "a.py").write_text("after")
    (project / "code" / "b.py").write_text("after")
    with zipfile.ZipFile(io.BytesIO(job.again(1, "first").package)) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        assert archive.read("code/a.py") == b"before"
    assert names == {".rayignore", ".gitignore", "config.yaml", "code/a.py"}


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
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="is not in"):
        plan_job(project / "config.yaml", [f"output_dir={tmp_path}"], working_dir=tmp_path / "other")
    with pytest.raises(UserError, match="unknown key"):
        submitted("optimizer.learning_rate=1")


@pytest.mark.parametrize(
    "key",
    ["output_dir", "data.root", "data.latents", "checkpoint.store", "phases.0.init", "vae.pretrained",
     "monitoring.wandb_project"],
)  # fmt: skip
@pytest.mark.parametrize("value", ["s3://key:hunter2@bucket/run", "https://host/run?token=hunter2", "ghp_hunter2" * 3])
def test_a_credential_anywhere_in_a_config_is_refused_at_submission(submitted, key, value):
    with pytest.raises(UserError, match=f"^{key} holds a password or key.*environment") as refused:
        submitted(f"{key}={value}")
    assert "hunter2" not in str(refused.value)


def test_a_credential_in_a_setting_that_another_replaces_is_refused(submitted):
    with pytest.raises(UserError, match=r"^vae\.pretrained holds a password or key"):
        submitted("vae.pretrained=https://me:hunter2@host/vae", "vae.pretrained=embedded")


def test_a_credential_in_the_file_of_a_config_is_refused_at_submission(submitted, project):
    (project / "config.yaml").write_text("phases: [{name: one, epochs: 1, init: 's3://key:hunter2@bucket/a.ckpt'}]")
    with pytest.raises(UserError, match=r"^phases\.0\.init holds a password or key"):
        submitted()


def test_the_lists_of_jobs_show_no_options_of_a_uri(submitted):
    job = submitted("output_dir=s3://bucket/run?endpoint_override=inner:9000")
    assert job.metadata["output_dir"] == "s3://bucket/run"
    assert "--set=output_dir=s3://bucket/run?endpoint_override=inner:9000" in job.words


def test_variables_and_packages_reach_the_job(submitted):
    variables = {"HF_HOME": "/shared/hub", "AWS_SHARED_CREDENTIALS_FILE": "/etc/aws", STOP_WAIT: "131"}
    variables["GOOGLE_APPLICATION_CREDENTIALS"] = "/shared/key.json"
    env = [f"{name}={value}" for name, value in variables.items() if name != STOP_WAIT]
    job = submitted(env=env, pip=["my-hints==1.0"])
    assert job.runtime_env["env_vars"] == variables
    assert job.runtime_env["pip"] == ["my-hints==1.0"]
    assert submitted(env=["PATH=/my/bin:/bin"]).runtime_env["env_vars"]["PATH"] == "/my/bin:/bin"
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
    ("record", "exit_status", "may_pass"),
    [
        ({"status": "SUCCEEDED", "driver_exit_code": 0}, 0, False),
        ({"status": "STOPPED"}, 143, False),
        ({"status": "FAILED", "driver_exit_code": 1}, 1, False),
        ({"status": "FAILED", "driver_exit_code": 2}, 2, False),
        ({"status": "FAILED", "driver_exit_code": 75}, 75, True),  # storage did not answer
        ({"status": "FAILED", "driver_exit_code": 137}, 137, True),
        ({"status": "FAILED", "driver_exit_code": -signal.SIGSEGV}, 139, True),
        ({"status": "FAILED", "driver_exit_code": 143}, 143, True),  # nobody stopped the job: its node is drained
        ({"status": "FAILED", "driver_exit_code": -signal.SIGTERM}, 143, True),
        ({"status": "STOPPED", "driver_exit_code": 143}, 143, False),
        ({"status": "FAILED", "driver_exit_code": 130}, 130, False),
        ({"status": "FAILED", "driver_exit_code": 255}, 255, False),
        ({"status": "FAILED", "error_type": "JOB_SUPERVISOR_ACTOR_DIED"}, 1, True),
        ({"status": "FAILED", "error_type": "JOB_SUPERVISOR_ACTOR_START_TIMEOUT"}, 1, True),
        ({"status": "FAILED", "error_type": "JOB_SUPERVISOR_ACTOR_UNSCHEDULABLE"}, 1, True),
        ({"status": "FAILED", "error_type": "JOB_ENTRYPOINT_COMMAND_START_ERROR"}, 1, False),
        ({"status": "FAILED", "error_type": "RUNTIME_ENV_SETUP_FAILURE"}, 1, False),
    ],
)
def test_an_end_that_may_pass_is_told_from_one_that_does_not(record, exit_status, may_pass):
    ended = how_it_ended(JobDetails(type="SUBMISSION", entrypoint="python", **record))
    assert (ended.exit_status, ended.may_pass) == (exit_status, may_pass)


def test_every_failure_of_the_driver_that_ray_knows_is_judged():
    from ray.dashboard.modules.job.common import JobErrorType

    died = {
        kind.value
        for kind in JobErrorType
        if how_it_ended(JobDetails(type="SUBMISSION", entrypoint="a", status="FAILED", error_type=kind)).may_pass
    }
    assert died == {kind.value for kind in JobErrorType if kind.value.startswith("JOB_SUPERVISOR_ACTOR_")}


def test_a_job_that_the_cluster_forgot_died():
    assert how_it_ended(None).may_pass


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


@pytest.mark.parametrize(
    ("ignores", "include_gitignore"), [(".rayignore", True), (".rayignore", False), (".gitignore", True)]
)
def test_the_upload_takes_no_secrets_along(tmp_path, ignores, include_gitignore):
    from ray._private.runtime_env.packaging import create_package

    folder = tmp_path / "project"
    secrets = [".env", ".env.local", ".envrc", "server.pem", "tls.key", "store.p12", "credentials", "credentials.json",
               "id_rsa", "id_ed25519", ".netrc", ".git-credentials", ".pypirc", ".aws/config", ".ssh/config",
               ".kube/config"]  # fmt: skip
    wanted = ["train.py", "credentials.py", "keys.yaml", "environment.yaml", "monkey", "id.csv"]
    for name in (*secrets, *wanted):
        for place in (folder / name, folder / "configs" / "below" / name):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text("hunter2")
    shutil.copy(ROOT / ignores, folder)
    package = tmp_path / "package.zip"
    create_package(str(folder), package, include_gitignore=include_gitignore)
    with zipfile.ZipFile(package) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")} - {ignores}
    assert names == {*wanted, *(f"configs/below/{name}" for name in wanted)}
