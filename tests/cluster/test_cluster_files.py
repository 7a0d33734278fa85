"""The files for clusters: valid for what reads them, in words that our commands and Ray know, and safe as they are."""

import contextlib
import copy
import importlib.metadata
import io
import mmap
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement

from ray_pipeline.config import Config, load_config
from ray_pipeline.sections import RayConfig

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
LAUNCHER = sorted((CLUSTER / "launcher").glob("*.yaml"))
KUBERAY = [CLUSTER / "kuberay" / name for name in ("raycluster.yaml", "rayjob.yaml")]
SLURM = CLUSTER / "slurm" / "train.sh"
DOCKERFILE = CLUSTER / "Dockerfile"
README = CLUSTER / "README.md"
#: cluster/monitoring has tests of its own
FILES = [path for path in sorted(CLUSTER.rglob("*")) if path.is_file() and "monitoring" not in path.parts]
SHARED = ROOT.parent / "shared" / "kuberay"
BIN = Path(sys.executable).parent  # hadolint and shellcheck come as wheels


def by_name(paths: list[Path]) -> Any:
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(CLUSTER)))


def at(tree: Any, *keys: str | int) -> Any:
    for key in keys:
        tree = tree[key]
    return tree


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def test_there_is_a_file_for_each_way():
    names = {str(path.relative_to(CLUSTER)) for path in FILES}
    assert names == {
        "Dockerfile",
        "README.md",
        "kuberay/network_policy.yaml",
        "kuberay/raycluster.yaml",
        "kuberay/rayjob.yaml",
        "kuberay/storage.yaml",
        "launcher/aws.yaml",
        "launcher/gcp.yaml",
        "launcher/on_premises.yaml",
        "slurm/train.sh",
    }
    readme = README.read_text()
    for name in names - {"README.md"}:
        assert name in readme, f"README.md does not say what to do with {name}"


@by_name(FILES)
def test_every_file_is_ascii(path):
    assert path.read_text().isascii()


# --- Ray's cluster launcher


def validated(config: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` makes of a file before it asks the cloud; raises as it would."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(copy.deepcopy(config))
    validate_config(config)
    return config


@by_name(LAUNCHER)
def test_launcher_files_pass_rays_own_validator(path):
    config = validated(load(path))
    workers = [node for name, node in config["available_node_types"].items() if name != config["head_node_type"]]
    assert sum(node["max_workers"] for node in workers or config["available_node_types"].values()) >= 1


@pytest.mark.parametrize(
    ("name", "where"),
    [
        *((name, where) for name in ("aws", "gcp", "on_premises") for where in ((), ("auth",))),
        *((name, where) for name in ("aws", "gcp") for where in (("docker",), ("available_node_types", "gpu"))),
    ],
)
def test_a_typo_in_a_launcher_file_is_refused(name, where):
    config = load(CLUSTER / "launcher" / f"{name}.yaml")
    section = at(config, *where)
    key = next(iter(section))
    section[key + "x"] = section[key]
    with pytest.raises(jsonschema.ValidationError, match=f"'{key}x' was unexpected"):
        validated(config)


def test_the_machines_of_aws_are_asked_for_in_words_of_its_api():
    from botocore.loaders import Loader
    from botocore.model import ServiceModel
    from botocore.validate import ParamValidator

    shape = ServiceModel(Loader().load_service_model("ec2", "service-2")).operation_model("RunInstances").input_shape
    nodes = load(CLUSTER / "launcher" / "aws.yaml")["available_node_types"]
    problems = {
        name: ParamValidator().validate(node["node_config"] | {"MinCount": 1, "MaxCount": 1}, shape).generate_report()
        for name, node in nodes.items()
    }
    assert problems == dict.fromkeys(nodes, "")
    typo = nodes["gpu"]["node_config"] | {"MinCount": 1, "MaxCount": 1, "InstanceTypes": "m6i.large"}
    assert "InstanceTypes" in ParamValidator().validate(typo, shape).generate_report()


@by_name(LAUNCHER)
def test_what_the_launcher_copies_to_the_nodes_is_there(path):
    mounts = load(path)["file_mounts"]
    assert mounts.pop("~/.ray/auth_token") == "~/.ray/auth_token"
    assert all(remote == f"~/ray-pipeline/{local}" for remote, local in mounts.items())
    assert all((ROOT / local).exists() for local in mounts.values())
    # all that setup.py reads; .venv must not be among it: Ray hashes and copies what is named
    assert {"setup.py", "pyproject.toml", "README.md", "ray_pipeline", "configs"} == set(mounts.values())


# --- KubeRay


def crd(kind: str) -> dict[str, Any]:
    """The schema of a custom resource, version v1, in which unknown fields are refused."""
    path = SHARED / f"ray.io_{kind.lower()}s.yaml"
    if not path.is_file():
        pytest.skip(f"no shared schema at {path}")
    found = yaml.load(path.read_bytes(), Loader=yaml.CSafeLoader)
    (version,) = (version for version in found["spec"]["versions"] if version["name"] == "v1")
    return strict(version["schema"]["openAPIV3Schema"])


def strict(schema: Any) -> Any:
    """A copy in which an object with named fields takes no others."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: strict(value) for key, value in schema.items()}
    is_object = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if is_object and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    return schema


def fits(document: Any, schema: dict[str, Any]) -> None:
    """As jsonschema.validate, which would check all of the schema each time, and print it."""
    for error in jsonschema.Draft202012Validator(schema).iter_errors(document):
        raise AssertionError(f"{error.json_path}: {error.message}")


@pytest.fixture(scope="module")
def crds() -> dict[str, dict[str, Any]]:
    return {kind: crd(kind) for kind in ("RayCluster", "RayJob")}


def cluster_spec(path: Path) -> dict[str, Any]:
    spec = load(path)["spec"]
    return spec.get("rayClusterSpec", spec)


def ray_containers(path: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Pod and container of the head and of each group of workers."""
    spec = cluster_spec(path)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        yield pod, pod["containers"][0]


@by_name(KUBERAY)
def test_kuberay_files_fit_the_schemas_of_kuberay(path, crds):
    document = load(path)
    assert document["apiVersion"] == "ray.io/v1"
    fits(document, crds[document["kind"]])


@pytest.mark.parametrize(
    "where",
    [
        ("spec", "rayClusterSpec"),
        ("spec", "rayClusterSpec", "authOptions"),
        ("spec", "rayClusterSpec", "autoscalerOptions"),
        ("spec", "rayClusterSpec", "headGroupSpec", "template", "spec"),
        ("spec", "rayClusterSpec", "workerGroupSpecs", 0),
        ("spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "containers", 0),
        ("spec",),
    ],
    ids=lambda where: ".".join(map(str, where)),
)
@by_name(KUBERAY)
def test_a_typo_in_a_kuberay_file_is_refused(path, where, crds):
    document = load(path)
    if path.name == "raycluster.yaml":
        where = tuple(key for key in where if key != "rayClusterSpec")
    section = at(document, *where)
    key = next(iter(section))
    section[key + "x"] = section[key]
    with pytest.raises(AssertionError, match=f"'{key}x' was unexpected"):
        fits(document, crds[document["kind"]])


def test_storage_and_network_policy_fit_what_the_schemas_know_of_their_kinds(crds):
    spec = at(crds["RayCluster"], "properties", "spec", "properties")
    pod = at(spec, "headGroupSpec", "properties", "template", "properties", "spec", "properties")
    claim = at(pod, "volumes", "items", "properties", "ephemeral", "properties", "volumeClaimTemplate", "properties")
    storage = load(CLUSTER / "kuberay" / "storage.yaml")
    assert (storage["apiVersion"], storage["kind"]) == ("v1", "PersistentVolumeClaim")
    fits(storage["spec"], claim["spec"])
    assert storage["spec"]["accessModes"] == ["ReadWriteMany"]
    policy = load(CLUSTER / "kuberay" / "network_policy.yaml")
    assert (policy["apiVersion"], policy["kind"]) == ("networking.k8s.io/v1", "NetworkPolicy")
    assert policy["spec"].keys() == {"podSelector", "policyTypes", "ingress"}
    rules = at(spec, "networkPolicy", "properties", "head", "properties", "ingressRules")
    fits(policy["spec"]["ingress"], rules)
    policy["spec"]["ingress"][1]["port"] = policy["spec"]["ingress"][1].pop("ports")
    with pytest.raises(AssertionError, match="'port' was unexpected"):
        fits(policy["spec"]["ingress"], rules)


@by_name(KUBERAY)
def test_pods_name_what_the_other_manifests_make(path):
    claim = load(CLUSTER / "kuberay" / "storage.yaml")["metadata"]["name"]
    for pod, container in ray_containers(path):
        (volume,) = pod["volumes"]
        (mount,) = container["volumeMounts"]
        assert volume["persistentVolumeClaim"] == {"claimName": claim}
        assert mount == {"name": volume["name"], "mountPath": "/shared"}
    readme = README.read_text()
    assert f"create secret generic {cluster_spec(path)['authOptions']['secretName']} " in readme
    assert "--from-file=auth_token=" in readme  # the key that KubeRay reads


def test_a_rayjob_has_the_cluster_of_the_other_file():
    job, cluster = (cluster_spec(path) for path in (KUBERAY[1], KUBERAY[0]))
    # the operator and the submitter, which are other pods, ask a RayJob's dashboard
    assert cluster["headGroupSpec"]["rayStartParams"].pop("dashboard-host") == "127.0.0.1"
    assert job == cluster


def test_a_rayjob_is_made_again_when_its_driver_died():
    spec = load(KUBERAY[1])["spec"]
    assert spec["backoffLimit"] >= 1
    assert "--resume=auto" in spec["entrypoint"].split()
    assert not set(spec["entrypoint"]) & set("'\"$;&|<>*?~#"), "two shells read it"


def test_a_rayjob_runs_the_config_that_the_image_holds():
    lines = DOCKERFILE.read_text().splitlines()
    (folder,) = (line.split()[1] for line in lines if line.startswith("WORKDIR"))
    assert any(re.fullmatch(r"COPY( --\S+)* configs configs", line) for line in lines)
    assert f"--config {folder}/configs/microscopy.yaml" in load(KUBERAY[1])["spec"]["entrypoint"]


# --- what a stop may take


def environment(text: str) -> dict[str, str]:
    """Variables that a text sets: NAME=value."""
    return dict(re.findall(r"\b(RAY_[A-Z_]+)=\"?([\w./-]+)", text))


def variables(path: Path) -> list[dict[str, str]]:
    """Variables of Ray on each kind of node."""
    if path in KUBERAY:
        return [{each["name"]: each["value"] for each in container["env"]} for _, container in ray_containers(path)]
    config = load(path)
    shared = environment(" ".join(config.get("docker", {}).get("run_options", ())))
    starts = (config["head_start_ray_commands"], config["worker_start_ray_commands"])
    return [shared | environment(" ".join(commands)) for commands in starts]


@by_name([*LAUNCHER, *KUBERAY])
def test_a_stopped_job_has_the_time_to_commit(path):
    head, *_ = variables(path)
    assert int(head["RAY_JOB_STOP_WAIT_TIME_S"]) >= RayConfig().stop_timeout_seconds + 60


@by_name(KUBERAY)
def test_a_pod_that_goes_has_the_time_to_commit(path):
    for (pod, _), values in zip(ray_containers(path), variables(path), strict=True):
        drain = int(values["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert RayConfig().stop_timeout_seconds < drain < pod["terminationGracePeriodSeconds"]


# --- security


@by_name([*LAUNCHER, *KUBERAY])
def test_every_node_wants_the_token_and_tells_nobody_of_its_use(path):
    for values in variables(path):
        assert values["RAY_USAGE_STATS_ENABLED"] == "0"
        if path in LAUNCHER:
            assert values["RAY_AUTH_MODE"] == "token"
    if path in KUBERAY:
        auth = cluster_spec(path)["authOptions"]
        assert auth["mode"] == "token"
        assert auth["secretName"]


@by_name(LAUNCHER)
def test_the_dashboard_of_a_launched_head_listens_on_loopback(path):
    starts = [command for command in load(path)["head_start_ray_commands"] if "ray start" in command]
    assert len(starts) == 1
    assert "--dashboard-host=127.0.0.1" in starts[0].split()


@by_name([path for path in FILES if path != README])
def test_no_file_opens_the_dashboard_or_turns_the_token_off(path):
    text = path.read_text()
    assert "0.0.0.0" not in text
    assert not re.search(r"(?i)auth\w*[\"': =]+disabled", text)


@by_name(FILES)
def test_no_file_holds_a_secret(path):
    text = path.read_text()
    assert not re.search(r"\b(AKIA|ASIA)[0-9A-Z]{16}\b|-----BEGIN|\b[0-9a-f]{32,}\b|\b\d{12}\b", text)
    assert not re.search(
        r"(?i)(secret|password|access_key|auth_token|api_key)[a-z_]*[\"']?\s*[:=]\s*[\"']?[\w+]{8,}", text
    )
    if path.suffix == ".yaml":
        assert load(path).get("kind") != "Secret"


@by_name(KUBERAY)
def test_pods_have_no_more_rights_than_they_need(path):
    for pod, container in ray_containers(path):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] >= 1000
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


# --- our commands and Ray's, as they are written


def code_of(text: str) -> Iterator[str]:
    """Blocks of shell and spans of code in Markdown."""
    blocks = re.findall(r"^ *```sh\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    yield from blocks
    yield from (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", re.sub(r"(?s)```.*?```", "", text)))


def strings(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict):
        yield from (text for value in tree.values() for text in strings(value))
    elif isinstance(tree, list):
        yield from (text for value in tree for text in strings(value))


def shell_of(path: Path) -> Iterator[str]:
    """What a shell is to read of a file, and strings that may be such; what train.sh runs is seen by running it."""
    if path.suffix == ".md":
        yield from code_of(path.read_text())
    elif path.suffix == ".yaml":
        yield from strings(load(path))


def words_of(line: str) -> list[str]:
    """Words of a line as a shell splits them, operators apart; none where it is no shell."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, "#"
    try:
        return list(lexer)
    except ValueError:
        return []


def commands(text: str, names: tuple[tuple[str, ...], ...]) -> Iterator[list[str]]:
    """Words that follow one of `names` in a text, up to the command's end; inside quoted words too."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        words = words_of(line)
        for number, word in enumerate(words):
            if " " in word and word != line:
                yield from commands(word, names)
            for name in names:
                if tuple(words[number : number + len(name)]) == name:
                    rest = words[number + len(name) :]
                    end = next((at for at, other in enumerate(rest) if set(other) <= set("();<>|&")), len(rest))
                    if rest[:end]:
                        yield rest[:end]


OURS = (("ray-pipeline",), (".venv/bin/ray-pipeline",), ("python", "-m", "ray_pipeline"))


def command_lines() -> list[tuple[str, list[str]]]:
    texts = [(path.name, text) for path in FILES if path not in (SLURM, DOCKERFILE) for text in shell_of(path)]
    blocks = re.findall(r"^```\w*\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    texts += [("/README.md", text) for text in blocks]
    found = [(name, words) for name, text in texts for words in commands(text, OURS)]
    return [(name, words) for at, (name, words) in enumerate(found) if words not in [w for _, w in found[:at]]]


def parse(words: list[str]) -> None:
    """Our parser and, where there is a config, its validation; raises with what they say."""
    from ray_pipeline.cli import _parser

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            arguments = _parser().parse_args(words)
        except SystemExit as stopped:
            raise AssertionError(f"{shlex.join(words)}: {said.getvalue()}") from stopped
    if getattr(arguments, "config", None) is not None:
        # in the image the config lies elsewhere
        load_config(ROOT / "configs" / arguments.config.name, arguments.overrides)


@pytest.mark.parametrize(
    ("name", "words"), command_lines(), ids=lambda value: value if isinstance(value, str) else value[0]
)
def test_our_commands_are_ones_that_our_parser_knows(name, words):
    parse(words)


def test_the_commands_that_matter_are_among_those_that_are_checked():
    seen = {(name, words[0]) for name, words in command_lines()}
    assert {("README.md", name) for name in ("submit", "train", "status", "check")} <= seen
    assert {
        ("rayjob.yaml", "train"),
        ("/README.md", "submit"),
        ("/README.md", "train"),
        ("/README.md", "prepare"),
    } <= seen
    assert all(
        "--resume=auto" in words
        for name, words in command_lines()
        if name != "/README.md" and words[0] in ("train", "submit") and words[1:]
    )


def test_on_clusters_that_begin_without_workers_a_run_waits_for_them_and_for_their_gpus():
    groups = [
        at(load(path), "spec", *keys, "workerGroupSpecs", 0)
        for path, keys in zip(KUBERAY, ((), ("rayClusterSpec",)), strict=True)
    ]
    assert [(group["minReplicas"], group["replicas"]) for group in groups] == [(0, 0)] * 2
    for path in LAUNCHER:
        types = load(path).get("available_node_types", {})
        assert {kind["min_workers"] for name, kind in types.items() if "head" not in name} <= {0}
    runs = [words for _, words in command_lines() if any(word.startswith("ray.num_workers=") for word in words)]
    assert len(runs) >= 4
    for words in runs:
        overrides = [word for before, word in pairwise(words) if before == "--set"]
        settings = load_config(ROOT / "configs" / "microscopy.yaml", overrides).ray
        assert settings.autoscaling
        assert settings.use_gpu is True


@pytest.mark.parametrize("words", [["train", "--confg", "c"], ["train", "--config", "demo.yaml", "--set", "ray.gpu=1"]])
def test_a_wrong_command_would_be_seen(words):
    with pytest.raises((AssertionError, ValueError), match=r"--config|ray\.gpu"):
        parse(words)


def ray_lines() -> list[list[str]]:
    names = (("ray",), ("~/ray-pipeline/.venv/bin/ray",))
    paths = [path for path in FILES if path not in (SLURM, DOCKERFILE)]
    found = [words for path in paths for text in shell_of(path) for words in commands(text, names)]
    return [words for at, words in enumerate(found) if words not in found[:at]]


@pytest.mark.parametrize("words", ray_lines(), ids=" ".join)
def test_rays_commands_are_ones_that_ray_knows(words):
    from ray.scripts.scripts import cli

    command = cli
    while hasattr(command, "commands"):
        assert words, "a group of commands alone"
        assert words[0] in command.commands, f"ray has no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    if words:  # else it is named in a sentence
        command.make_context(command.name, [*words])


def test_settings_named_in_words_exist():
    sections = {name for name, field in Config.model_fields.items() if hasattr(field.annotation, "model_fields")}
    named = [
        (path.name, section, key)
        for path in FILES
        for section, key in re.findall(r"(?<![\w./{-])([a-z_]+)\.([a-z_]+)\b(?![/.(])", path.read_text())
        if section in sections and key not in ("sh", "io")
    ]
    assert ("README.md", "ray", "stop_timeout_seconds") in named
    unknown = [each for each in named if each[2] not in Config.model_fields[each[1]].annotation.model_fields]
    assert not unknown


def test_variables_of_ray_exist_in_this_ray():
    import ray

    named = {name for path in FILES for name in re.findall(rb"\bRAY_[A-Z0-9_]+\b", path.read_bytes())}
    named.discard(b"RAY_VERSION")  # of the Dockerfile
    assert {b"RAY_AUTH_MODE", b"RAY_JOB_STOP_WAIT_TIME_S"} <= named
    missing, folder = set(named), Path(ray.__file__).parent
    for path in [*folder.glob("_raylet*.so"), *folder.rglob("*.py")]:
        if not missing:
            break
        if path.stat().st_size:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                missing -= {name for name in missing if content.find(name) >= 0}
    assert not missing


def test_all_files_name_one_ray_which_the_package_takes():
    named = {
        version
        for path in FILES
        for version in re.findall(
            r"(?:rayproject/ray:|\]==|rayVersion: \"|RAY_VERSION=)(\d+\.\d+\.\d+)", path.read_text()
        )
    }
    assert len(named) == 1
    wanted = [Requirement(text) for text in importlib.metadata.requires("ray-pipeline")]
    (requirement,) = (each for each in wanted if each.name == "ray" and each.marker is None)
    assert requirement.specifier.contains(named.pop())


# --- shells and the image


def shellcheck(script: str, dialect: str = "bash") -> str:
    words = [BIN / "shellcheck", f"--shell={dialect}", "--severity=warning", "--format=gcc", "-"]
    return subprocess.run(words, input=script, capture_output=True, text=True, timeout=60).stdout


def test_shellcheck_has_nothing_to_say_of_the_slurm_script():
    done = subprocess.run([BIN / "shellcheck", SLURM], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")
    assert os.access(SLURM, os.X_OK)


@by_name([*LAUNCHER, README])
def test_shellcheck_has_nothing_to_say_of_other_commands(path):
    if path == README:
        script = "\n".join(re.findall(r"^ *```sh\n(.*?)^ *```", path.read_text(), re.MULTILINE | re.DOTALL))
    else:
        script = "\n".join(text for key, value in load(path).items() if key.endswith("_commands") for text in value)
    assert len(script) > 200
    assert shellcheck(script) == ""
    assert "SC2154" in shellcheck("cd $nowhere || exit")


def test_hadolint_has_nothing_to_say_of_the_dockerfile():
    done = subprocess.run([BIN / "hadolint", "--no-color", DOCKERFILE], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_hadolint_would_see_what_is_wrong(tmp_path):
    wrong = tmp_path / "Dockerfile"
    wrong.write_text("FROM debian:latest\nRUN apt-get update && apt-get install gcc\n")
    done = subprocess.run([BIN / "hadolint", "--no-color", wrong], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert {"DL3007", "DL3009", "DL3015"} <= set(re.findall(r"DL\d+", done.stdout))


def test_the_image_runs_without_root_and_with_every_extra_of_a_user():
    lines = DOCKERFILE.read_text().splitlines()
    assert [line for line in lines if line.startswith("USER")][-1] == "USER 1000"
    assert not any(line.startswith("ADD") for line in lines)
    (extras,) = re.findall(r"\}\[([\w,]+)\]", DOCKERFILE.read_text())
    provided = set(importlib.metadata.metadata("ray-pipeline").get_all("Provides-Extra"))
    assert set(extras.split(",")) == provided - {"dev", "bench"}


def test_the_build_context_is_what_the_dockerfile_copies():
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        word
        for line in DOCKERFILE.read_text().splitlines()
        if line.startswith("COPY") and "--from" not in line
        for word in line.split()[1:-1]
        if not word.startswith("--")
    }
    assert kept == copied
    assert all((ROOT / name).exists() for name in kept)


# --- Slurm, with stand-ins for its commands


class Slurm:
    """One node with the commands that train.sh needs; the driver does what `driver` says, in shell."""

    def __init__(self, folder: Path, driver: str):
        self.folder = folder
        self.requeued, self.argv, self.started = (folder / name for name in ("requeued", "argv", "started"))
        bin_folder = folder / "venv" / "bin"
        bin_folder.mkdir(parents=True)
        for name, script in {
            "srun": 'while [ "$1" != ray ]; do shift; done; exec "$@"',
            "scontrol": f'[ "$1" = requeue ] && echo "$2" >>{self.requeued} || echo node1',
            "ray": f'[ "$1" = get-auth-token ] && exit; [ -v NO_RAY ] && exit; printf "%s\\0" "$@" >{folder}/ray_argv\n'
            'while [ "$1" != -- ]; do shift; done; shift; "$@"',  # as symmetric-run, it waits for its driver
            "python": f'printf "%s\\0" "$RAY_ADDRESS" "$@" >{self.argv}; touch {self.started}\n{driver}',
        }.items():
            (bin_folder / name).write_text(f"#!/bin/bash\n{script}\n")
            (bin_folder / name).chmod(0o755)
        self.deaths = folder / "ray-pipeline-4711.deaths"
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "VENV": str(folder / "venv"),
            "SLURM_SUBMIT_DIR": str(folder),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "8",
            "SLURM_GPUS_ON_NODE": "4",
        }

    def run(self, signal_name: str | None = None, **environment: str) -> int:
        """Exit status of the script, which gets a signal once its driver runs."""
        script = subprocess.Popen(
            ["bash", SLURM], env=self.environment | environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        if signal_name:
            waits = f"until [ -e {self.started} ]; do sleep 0.05; done; kill -{signal_name} {script.pid}"
            subprocess.run(["bash", "-c", waits], timeout=30, check=True)
        return script.wait(timeout=30)


COMMITS = 'trap "exit 143" TERM; for _ in {1..200}; do sleep 0.05; done; exit 9'


@pytest.mark.parametrize(
    ("driver", "signal_name", "deaths", "status", "requeued", "deaths_after"),
    [
        ("exit 0", None, None, 0, False, None),
        ("exit 0", None, 3, 0, False, None),
        (COMMITS, "USR1", None, 0, True, None),  # the time limit comes near
        (COMMITS, "USR1", 20, 0, True, None),
        (COMMITS, "TERM", 3, 143, False, None),  # somebody stops it
        ("kill -9 $$", None, None, 0, True, 1),  # the driver dies
        ("exit 1", None, 3, 0, True, 4),
        ("exit 1", None, 19, 0, True, 20),
        ("exit 1", None, 20, 1, False, None),
        ("exit 75", None, 3, 0, True, 4),  # storage does not answer
        ("exit 2", None, 3, 2, False, None),  # wrong input
    ],
)
def test_slurm_requeues_a_run_that_can_go_on(driver, signal_name, deaths, status, requeued, deaths_after, tmp_path):
    slurm = Slurm(tmp_path, driver)
    if deaths is not None:
        slurm.deaths.write_text(f"{deaths}\n")
    assert slurm.run(signal_name, SLURM_RESTART_COUNT="999") == status  # which counts time limits and lost nodes, too
    assert slurm.requeued.exists() == requeued
    assert (int(slurm.deaths.read_text()) if slurm.deaths.exists() else None) == deaths_after


def test_slurm_gives_up_a_driver_that_dies_at_once_every_time(tmp_path):
    slurm, runs = Slurm(tmp_path, "exit 1"), 0
    while slurm.run(SLURM_RESTART_COUNT=str(365 + runs)) == 0:  # after a year of daily time limits
        runs += 1
        assert len(slurm.requeued.read_text().split()) == runs
    assert runs == 20


def test_slurm_requeues_when_ray_did_not_start(tmp_path):
    slurm = Slurm(tmp_path, "exit 0")
    assert slurm.run(NO_RAY="1") == 0  # as symmetric-run ends then
    assert slurm.requeued.exists()
    assert not slurm.started.exists()


def test_slurm_starts_one_ray_over_its_nodes_and_trains_on_all_their_gpus(tmp_path):
    from ray.scripts.scripts import cli

    slurm = Slurm(tmp_path, "exit 0")
    assert slurm.run() == 0
    address, *words = slurm.argv.read_text().split("\0")[:-1]
    assert words[:2] == ["-m", "ray_pipeline"]
    assert "--resume=auto" in words
    assert "ray.num_workers=8" in words
    parse(words[2:])
    name, *started = (tmp_path / "ray_argv").read_text().split("\0")
    started = started[: started.index("--")]
    assert name == "symmetric-run"
    assert started[:4] == ["--address", address, "--min-nodes", "2"]
    assert address.startswith("node1:")
    # symmetric-run hands what it does not know itself to `ray start`
    cli.commands["start"].make_context("start", started[4:])


def test_slurm_is_told_to_warn_in_time_and_to_give_whole_nodes():
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", SLURM.read_text(), re.MULTILINE))
    signalled = re.fullmatch(r"B:USR1@(\d+)", options["signal"])  # the script alone, which tells the driver alone
    assert int(signalled[1]) >= RayConfig().stop_timeout_seconds + 120
    # symmetric-run ends every Ray of the user on its nodes
    assert {"requeue", "exclusive"} <= options.keys()
    assert options["ntasks-per-node"] == "1"
