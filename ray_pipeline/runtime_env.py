"""What `ray.runtime_env` may hold: packages, variables and files that Ray brings to every node.

A config is data: it can start no program, and load no code but that of the packages (pip, uv; by their names alone, of
the index that the nodes use) and of the folders of the submitting machine (working_dir, py_modules) that it names; look
at these before using the config of somebody else. It holds no credentials: config.yaml is stored with the run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement

from ray_pipeline.errors import UserError
from ray_pipeline.passwords import holds_credential, names_credential, texts
from ray_pipeline.storage import is_uri

FIELDS = ("env_vars", "pip", "uv", "working_dir", "py_modules", "excludes", "config")
_CONFIG_FIELDS = ("setup_timeout_seconds", "eager_install", "log_files")
#: fields of Ray's that this refuses, and why
_REFUSED = {
    "py_executable": "is a command that would run on every node",
    "worker_process_setup_hook": "names code that would run in every process",
    "conda": "chooses another Python than this one",
    "container": "runs another image, with any options",
    "image_uri": "runs another image",
    "nsight": "is a command that would run on every node",
    "_nsight": "is a command that would run on every node",
    "rocprof_sys": "is a command that would run on every node",
    "_rocprof_sys": "is a command that would run on every node",
    "java_jars": "is code of another language",
}
#: variables by which a process loads code before ours, or takes another Python
_CODE_VARIABLES = (
    "LD_PRELOAD", "LD_AUDIT", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONBREAKPOINT", "BASH_ENV", "ENV",
    "RAY_RUNTIME_ENV_HOOK", "RAY_RUNTIME_ENV_PLUGINS",
)  # fmt: skip
#: all the variables that a config may set: none says where programs, code, plugins, their settings or credentials lie
_OF_CONFIG = re.compile(
    r"""[A-Z]+_NUM_THREADS|OMP_(PROC_BIND|PLACES|WAIT_POLICY|DYNAMIC)|KMP_(AFFINITY|BLOCKTIME)|MALLOC_ARENA_MAX
    |CUDA_(VISIBLE_DEVICES|DEVICE_ORDER|DEVICE_MAX_CONNECTIONS|LAUNCH_BLOCKING|MODULE_LOADING)
    |CUBLAS_WORKSPACE_CONFIG|NVIDIA_TF32_OVERRIDE|PYTORCH_(CUDA_)?ALLOC_CONF|TORCH_(DISTRIBUTED_DEBUG|CPP_LOG_LEVEL)
    |(TORCH_)?NCCL_(?!\w*(PLUGIN|LIB|FILE|PATH|COMM_ID))\w+|(GLOO|TP)_SOCKET_IFNAME
    |AWS_((DEFAULT_)?REGION|ENDPOINT_URL(_S3)?|EC2_METADATA_DISABLED|MAX_ATTEMPTS|RETRY_MODE)
    |HF_(HOME|HUB_(CACHE|OFFLINE|DISABLE_\w+|\w+_TIMEOUT))|TRANSFORMERS_OFFLINE|TOKENIZERS_PARALLELISM
    |WANDB_(MODE|ENTITY|SILENT)|PYTHON(UNBUFFERED|HASHSEED|FAULTHANDLER)|TZ|LANG|LC_[A-Z]+""",
    re.VERBOSE,
)
#: fields whose files are code
_CODE_FIELDS = ("working_dir", "py_modules")


def check_runtime_env(fields: Mapping[str, Any], *, of_submitter: bool = False) -> None:
    """ValueError for a field that is unknown, runs code, or holds a credential; values of fields are never told.

    of_submitter: whoever submits a job gave them, who may say where its code lies; else a config did.
    """
    for name in fields:
        if name in _REFUSED:
            raise ValueError(f"{name} {_REFUSED[name]}; take it out, known here are {', '.join(FIELDS)}")
        if name not in FIELDS:
            raise ValueError(f"unknown field {name!r}; known here are {', '.join(FIELDS)}")
    for name, known in (("env_vars", None), ("config", _CONFIG_FIELDS)):
        found = fields.get(name, {})
        if not isinstance(found, Mapping):
            raise ValueError(f"{name} is {type(found).__name__}, expected keys and values")
        unknown = [] if known is None else [key for key in found if key not in known]
        if unknown:
            raise ValueError(f"unknown field {name}.{unknown[0]}; known are {', '.join(known)}")
    for name, value in fields.get("env_vars", {}).items():
        _check_variable(name, value)
    if any(holds_credential(text) for _, text in texts(fields)):
        raise ValueError("a text or URL in it holds a password or key, which others would read; take it out")
    if not of_submitter:
        _check_of_config(fields)


def _check_of_config(fields: Mapping[str, Any]) -> None:
    """ValueError for what could bring other code than the packages and folders that a config names."""
    for name in fields.get("env_vars", {}):
        if not _OF_CONFIG.fullmatch(name):
            raise ValueError(
                f"env_vars.{name} is none of the variables that a config may set (of threads, devices, NCCL, the Hub's "
                "cache, S3's region and endpoint), since others may choose code or programs of processes; set it on "
                "the nodes, or for one job with `ray-pipeline submit --env`"
            )
    for name in _CODE_FIELDS:
        if any(is_uri(text) for _, text in texts(fields.get(name, ()))):
            raise ValueError(
                f"{name} is a URI, whose code would run on every node; give a path on the submitting machine"
            )
    for name in ("pip", "uv"):
        packages = fields.get(name, [])
        if not isinstance(packages, list) or not all(_is_plain(package) for package in packages):
            raise ValueError(
                f"{name} holds more than names of packages, such as [my-hints==1.0]; take URLs, paths and "
                "options out of it, or give them for one job to `ray-pipeline submit --pip`"
            )


def _is_plain(package: Any) -> bool:
    """Whether it is a name with or without extras and versions, on one line of the file that pip is given."""
    try:
        requirement = Requirement(package)
    except (InvalidRequirement, TypeError):
        return False
    # any text may follow ===, an option too
    plain = requirement.url is None and requirement.marker is None and "===" not in package
    return plain and package.isprintable()


def _check_variable(name: Any, value: Any) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(f"env_vars: {name!r} is no name of a variable")
    if name in _CODE_VARIABLES:
        raise ValueError(f"env_vars.{name} makes processes load other code; set it on the nodes where that is wanted")
    if names_credential(name):
        raise ValueError(
            f"env_vars.{name} looks like a credential, which others would read; set it in the environment of the "
            "nodes, or give a path to a file that holds it"
        )
    if not isinstance(value, str):
        raise ValueError(f"env_vars.{name} is no text; put its value in quotes")


def make_runtime_env(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """The fields as Ray checks and completes them, files that they name among it; None without any.

    UserError for what Ray refuses.
    """
    if not fields:
        return None
    from ray.runtime_env import RuntimeEnv

    try:
        return RuntimeEnv(**fields)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"ray.runtime_env is not what Ray takes ({' '.join(str(error).split())[:300]}); see Ray's documentation of "
            "runtime environments"
        ) from None
