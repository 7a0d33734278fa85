"""What one node of a cluster tells: whether it finds the folders of a run, and what it has and runs.

`probe` runs as a task on the node; it gets and gives plain values, so that another version of this package there can
still say so. Folders are looked at as any worker would, so a path that is another folder on that node is found out.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ray_pipeline.errors import UserError
from ray_pipeline.storage import Folder

#: begins the name of a file that only shows that a folder is the same one; whoever writes it takes it away
TOKEN = ".ray-pipeline-probe-"
PACKAGES = ("ray-pipeline", "ray", "torch", "diffusers")
#: for so long a file that another node wrote may take to be seen
SEEN_SECONDS = 3.0
_SAMPLE_BYTES = 2**20
_LIMIT_FILES = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
#: for so long the devices of a node may take to be counted
GPU_SECONDS = 60.0
_GPU_MEMORY = """
import json, torch
devices = range(torch.cuda.device_count())
print(json.dumps([torch.cuda.get_device_properties(device).total_memory for device in devices]))
"""


@dataclass(frozen=True)
class SharedFolder:
    """A folder that must be the same one on every node. place: `location`, or the nearest one above it that is there,
    in which the driver wrote a file named `token`."""

    key: str
    location: str
    place: str
    token: str


@dataclass(frozen=True)
class SameFiles:
    """Files in a folder that every node must have, shared or as copies. files: name -> what `glance` says of it."""

    key: str
    location: str
    files: dict[str, str]


def probe(node: str, shared: list[dict], same: list[dict], measure: bool, gpus: bool) -> dict[str, Any]:
    """Answer of the node that this runs on: {"unseen", "unusable", "other"}, each {key: words}, and with `measure`
    {"versions", "sources", "memory", "gpu_memory"}.

    shared, same: fields of SharedFolder and SameFiles; `node` ends the name of the file that answers a token. gpus:
    whether the node has any.
    """
    answer: dict[str, Any] = {"unseen": {}, "unusable": {}, "other": {}}
    for folder in (SharedFolder(**fields) for fields in shared):
        try:
            answer_token(folder, node)
        except FileNotFoundError:
            answer["unseen"][folder.key] = "does not see what the driver wrote there"
        except UserError as error:
            answer["unusable"][folder.key] = str(error)
    for files in (SameFiles(**fields) for fields in same):
        try:
            found = glance(Folder(files.location), files.files)
        except UserError as error:
            answer["unusable"][files.key] = str(error)
            continue
        wrong = [name for name, look in files.files.items() if found[name] != look]
        if wrong:
            answer["other"][files.key] = f"has {'another' if found[wrong[0]] else 'no'} {wrong[0]} there"
    if measure:
        answer |= {"versions": versions(), "sources": sources_hash(), "memory": node_memory()}
        answer |= {"gpu_memory": gpu_memory() if gpus else []}
    return answer


def answer_token(folder: SharedFolder, node: str) -> None:
    """Read what the driver wrote and write the same back under the node's name; FileNotFoundError where it is not
    there, and then nothing is written."""
    place = Folder(folder.place)
    place.write(f"{folder.token}.{node}", read_soon(place, folder.token))


def read_soon(folder: Folder, name: str, seconds: float = SEEN_SECONDS) -> bytes:
    """A file that another node has written just now; FileNotFoundError when it has not come after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return folder.read(name)
        except FileNotFoundError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def nearest_folder(location: str) -> Folder:
    """The folder at `location`, or the nearest one above it that is there; in object storage the location itself."""
    folder = Folder(location)
    while folder.local is not None and not os.path.exists(folder.local):
        folder = folder.parent
    return folder


def glance(folder: Folder, names: Iterable[str]) -> dict[str, str]:
    """Size and sha256 of the first MiB of files in a folder, by name; "" for one that is not there."""
    found = {}
    for name in names:
        *parents, file = name.split("/")
        place = folder.child(*parents)
        try:
            with place.reaching(file), place.open(file) as opened:
                found[name] = f"{opened.size()} {hashlib.sha256(opened.read(_SAMPLE_BYTES)).hexdigest()}"
        except FileNotFoundError:
            found[name] = ""
    return found


def versions() -> dict[str, str]:
    """Versions of Python and of PACKAGES; "none" for one that is not installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def sources_hash(folder: Path = Path(__file__).parent) -> str:
    """Hash of this package's source files: two versions under development have the same number."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size} ".encode() + path.read_bytes())
    return digest.hexdigest()


def node_memory() -> int:
    """Bytes of memory of this machine, or of the container that this runs in."""
    memory = psutil.virtual_memory().total
    for name in _LIMIT_FILES:
        try:
            text = Path(name).read_text().strip()
        except OSError:
            continue
        if text.isdecimal():
            memory = min(memory, int(text))
    return memory


def gpu_memory() -> list[int]:
    """Bytes of each CUDA device of this node. Asked in a process of its own, since Ray hides the devices from a task
    that takes none of them, and a process that has looked at CUDA keeps memory there."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _GPU_MEMORY], env=environment, capture_output=True, timeout=GPU_SECONDS, check=True
        )
        return json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return []
