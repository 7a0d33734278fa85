"""Three Ray nodes on this machine, what is asked of them and trained on them; in a process beside the session's Ray.

    python nodes_program.py FOLDER

FOLDER/shared is the working directory of this process, of the head (no CPU) and of one node, FOLDER/elsewhere that of
the other: a path below /proc/self/cwd is another folder there, as one on a local disk would be. FOLDER/commands.json:
{"bare": words of the command `check` while there is only the head, "well": those of one with all nodes, "wrong": of
another, "train": of the command `train`}. Prints as JSON {name: [exit status, what was printed]}, "check_nodes": what
it says to the config of `well`, and to the same with the output_dir of `wrong`, and "silent": what is told of nodes
when one hangs.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

import psutil
from ray.cluster_utils import Cluster

from ray_pipeline.cli import main
from ray_pipeline.config import Config, load_config
from ray_pipeline.errors import UserError
from ray_pipeline.ray_session import ray_session
from ray_pipeline.training.nodes import Places, ask, check_nodes, find_problems, working_nodes


def add_node(nodes: Cluster, place: Path, cpus: int) -> None:
    place.mkdir(exist_ok=True)
    os.chdir(place)
    for tries_left in (2, 1, 0):  # Ray waits 30 s for its own processes, which a busy machine may need longer to start
        before = set(psutil.Process().children(recursive=True))
        try:
            nodes.add_node(num_cpus=cpus, include_dashboard=False)
            return
        except Exception:
            for process in set(psutil.Process().children(recursive=True)) - before:
                process.kill()
            if not tries_left:
                raise


def run(*words: str) -> tuple[int, str]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = main(list(words))
    return code, printed.getvalue()


def config_of(words: list[str], address: str) -> Config:
    settings = [word.removeprefix("--set=") for word in words if word.startswith("--set=")]
    return load_config(words[words.index("--config") + 1], [*settings, f"ray.address={address}"])


def refusal(config: Config) -> str:
    """What check_nodes says; nothing where it finds all well."""
    try:
        check_nodes(config)
    except UserError as error:
        return str(error)
    return ""


def ask_while_a_node_hangs(nodes: Cluster, config: Config) -> str:
    raylet = psutil.Process(nodes.list_all_nodes()[-1].all_processes["raylet"][0].process.pid)
    asked, places = working_nodes(config), Places([], [], {})
    raylet.suspend()
    try:
        return find_problems(places, asked, ask(asked, places, 3))["nodes"]
    finally:
        raylet.resume()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    commands = json.loads((folder / "commands.json").read_text())
    nodes = Cluster()
    try:
        add_node(nodes, folder / "shared", 0)
        answers = {"bare": run(*commands.pop("bare"), "--address", nodes.address)}
        add_node(nodes, folder / "shared", 2)
        add_node(nodes, folder / "elsewhere", 3)
        os.chdir(folder / "shared")
        train = commands.pop("train")
        answers |= {name: run(*words, "--address", nodes.address) for name, words in commands.items()}
        answers["train"] = run(*train, f"--set=ray.address={nodes.address}")
        config = config_of(commands["well"], nodes.address)
        local = config.model_copy(update={"output_dir": config_of(commands["wrong"], nodes.address).output_dir})
        with ray_session(config.ray):
            answers["check_nodes"] = [refusal(config), refusal(local)]
            answers["silent"] = ask_while_a_node_hangs(nodes, config)
    finally:
        nodes.shutdown()
    print(json.dumps(answers))
