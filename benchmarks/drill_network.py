"""Hosts drop out of the network while a run trains on them: does it end with the samples that were planned?

    python benchmarks/drill_network.py                  # as root, on Linux, with iproute2
    python benchmarks/drill_network.py --parts fixed

A head, two workers and a storage with moto's S3 server are hosts of their own: network namespaces with an address and a
name each, joined by a bridge. Ray asks for a token. Latents, checkpoints and records are on S3, and a host holds one
worker. In the middle of an epoch the host of rank 0 loses its link; when the others have given it up it gets the link
back, what is left of Ray there ends, and the drill starts Ray again, as systemd or KubeRay would. Once both hosts train
again, everything on the other one is killed, in the middle of an epoch too.

`fixed` trains on two workers: the run waits for the host, and after the kill for a fresh one; its last checkpoint must
be that of an undisturbed run, bit for bit. `elastic` trains on [1, 2]: it goes on without the host, and its last loss
must be that of the undisturbed run to 1e-3. Of both, each step must have taken the planned samples, the records on S3
be one curve, and the last checkpoint be whole. Prints how long each change took; exits 1 where anything differs. All
namespaces hang below one of the drill's own: the machine's network is left alone, and they end with the drill.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from disturbances import NODE_CPUS
from drill_elastic import GLOBAL_BATCH, TOLERANCE
from drill_training import s3_store
from run_proof import differing, last_tensors, unplanned_samples, world_sizes
from small_run import CREDENTIALS, PHASES, TRAIN_WORKER, Missed, SmallRun, prepare

from ray_pipeline.checkpoints import CheckpointStore, DamagedCheckpoint
from ray_pipeline.data.plan import SamplePlan
from ray_pipeline.monitoring import phase_state
from ray_pipeline.monitoring.metrics_file import read_events
from ray_pipeline.run_copy import reading_copy
from ray_pipeline.storage import Folder

PHASE = PHASES[0]
#: ray.num_workers
PARTS = {"fixed": "2", "elastic": "[1, 2]"}
ADDRESSES = {"storage": "10.77.0.1", "head": "10.77.0.2", "alpha": "10.77.0.3", "beta": "10.77.0.4"}
WORKERS = ("alpha", "beta")
PORT, BRIDGE, BRIDGE_ADDRESS, MASK = 6379, "switch", "10.77.0.254", 24
SETTINGS = {
    "checkpoint.every_minutes": 0.05,
    "ray.cpus_per_worker": 0.75 * NODE_CPUS,  # one worker a node
    "ray.resize_minutes": 0.02,
    "ray.timeout_minutes": 5,  # of collectives, too: none of them is waited for so long
    # steps of a tenth of a second and small checkpoints: a host must be gone and back before the run is done
    "train.batch_size": 1,
    "model.depth": 6,
    "model.patch_size": 1,
}
ENVIRONMENT = CREDENTIALS | {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
    "RAY_worker_niceness": "0",  # by Ray's own, all else on this machine would come first
    # of the head: a host that leaves 5 checks in turn unanswered is given up, here after 20 s; by Ray's own, 65 s
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
}
START_SECONDS, START_TRIES, END_SECONDS = 180, 3, 120
#: set in a process that has namespaces of its own already
_WITHIN = "RAY_PIPELINE_DRILL_NETWORK"


@dataclass
class Host:
    """A network namespace with an address and a name. folder: its disk. ray: the `ray start` that runs there."""

    name: str
    address: str
    folder: Path
    ray: psutil.Popen | None = None

    @property
    def within(self) -> tuple[str, ...]:
        """Words that make the command behind them run on this host."""
        rename = ("unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name)
        return ("ip", "netns", "exec", self.name, *rename, "env", f"TMPDIR={self.folder}")

    def start_ray(self, head: Host, token: str) -> None:
        """Start Ray, on the head itself that of the cluster."""
        words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={self.address}"]
        words += [f"--temp-dir={self.folder / 'ray'}", f"--object-store-memory={2**28}"]
        if self is head:
            words += ["--head", f"--port={PORT}", "--num-cpus=0", "--include-dashboard=false"]
        else:
            words += [f"--address={head.address}:{PORT}", f"--num-cpus={NODE_CPUS}"]
        with self.log.open("wb") as log:
            environment = os.environ | {"RAY_AUTH_TOKEN": token}
            self.ray = psutil.Popen([*self.within, *words], stdout=log, stderr=log, env=environment)

    def await_ray(self) -> bool:
        """Whether Ray runs, once it says so or has ended."""
        deadline = time.monotonic() + START_SECONDS
        while self.ray.poll() is None and time.monotonic() < deadline:
            if b"Ray runtime started" in self.log.read_bytes():
                return True
            time.sleep(0.05)
        return False

    @property
    def log(self) -> Path:
        """What `ray start` says."""
        return self.folder / "ray.log"

    def processes(self, title: str = "") -> list[psutil.Process]:
        """What runs there and has `title` in its command line."""
        found = []
        for pid in map(int, _ip("netns", "pids", self.name).split()):
            try:
                process = psutil.Process(pid)
                if title in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:  # it ended meanwhile
                continue
        return found

    def kill(self) -> int:
        """SIGKILL of everything there, until nothing is left -> how many processes."""
        killed: set[psutil.Process] = set()
        while processes := self.processes():
            killed.update(processes)
            for process in processes:
                process.kill()
            psutil.wait_procs(processes, timeout=5)
        return len(killed)

    def cut(self) -> None:
        """Pull the cable."""
        _ip("link", "set", "dev", self.name, "down")

    def heal(self) -> None:
        """Plug the cable in."""
        _ip("link", "set", "dev", self.name, "up")

    def run_copies(self) -> list[Path]:
        """Folders in which workers keep the records of a run on S3, those of killed ones included."""
        return list(self.folder.glob("ray_pipeline_run_*"))

    def keep_run_copies(self) -> None:
        """Copy them: a worker that ends in order takes its own away."""
        for copy in self.run_copies():
            with suppress(shutil.Error, FileNotFoundError):  # of files that were replaced meanwhile; none of the log
                shutil.copytree(copy, copy.with_name(f"{copy.name}_kept_{time.monotonic_ns()}"))

    def sample_logs(self) -> list[Path]:
        return [path for copy in self.run_copies() for path in copy.glob(f"logs/samples/{PHASE}/*.jsonl")]


@dataclass
class Training:
    """An attempt of a run that has done a step. hosts: of its ranks in turn; step: the last one that all have done."""

    attempt: int
    hosts: list[Host]
    step: int


@dataclass
class Network:
    """Hosts by name. bucket: a URI on the storage with {run} to fill in; token: of the Ray on them."""

    hosts: dict[str, Host]
    bucket: str
    token: str = field(default_factory=lambda: secrets.token_hex(32))

    @property
    def head(self) -> Host:
        return self.hosts["head"]

    def start_ray(self, *names: str) -> None:
        """Start Ray on these hosts; an end of the drill where it does not."""
        missing = [self.hosts[name] for name in names]
        # Ray waits 30 s for its own processes, which a busy machine may need longer to start
        for _ in range(START_TRIES):
            for host in missing:
                host.kill()
                host.start_ray(self.head, self.token)
            missing = [host for host in missing if not host.await_ray()]
            if not missing:
                return
        raise SystemExit(f"Ray did not start on {missing[0].name}:\n{missing[0].log.read_text(errors='replace')}")

    def training(self) -> Training | None:
        """The newest attempt that has done a step, as the disks of the hosts tell: no request goes over the network."""
        ranks: dict[int, dict[int, tuple[Host, int]]] = defaultdict(dict)
        for host in map(self.hosts.get, WORKERS):
            for log in host.sample_logs():
                _, attempt, _, rank = log.stem.split("_")
                with suppress(FileNotFoundError):  # a worker that ends in order takes its folder away
                    if lines := log.read_bytes().split(b"\n")[:-1]:
                        ranks[int(attempt)][int(rank)] = (host, json.loads(lines[-1])["step"])
        if not ranks:
            return None
        places = [place for _, place in sorted(ranks[max(ranks)].items())]
        return Training(max(ranks), [host for host, _ in places], min(step for _, step in places))


@dataclass
class Drill:
    """The hosts, and what the runs on them share."""

    work: Path
    config: Path
    network: Network
    plan: SamplePlan
    epochs: int

    def uri(self, name: str) -> str:
        return self.network.bucket.format(run=name)

    def run(self, name: str, workers: str) -> SmallRun:
        """A run on S3, with its command on the head."""
        head = self.network.head
        settings = SETTINGS | {
            "output_dir": self.uri(name),
            "data.latents": self.uri("latents"),
            "phases": f"[{{name: {PHASE}, epochs: {self.epochs}}}]",
            "ray.num_workers": workers,
        }
        environment = {"RAY_ADDRESS": f"{head.address}:{PORT}", "RAY_AUTH_TOKEN": self.network.token}
        return SmallRun(self.config, self.work / name, settings, environment, head.within)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--epochs", type=int, default=24, help="of 12 steps: more where a run ends too soon")
    parser.add_argument("--work", type=Path, help="an empty folder with a short path to work in, which is kept")
    arguments = parser.parse_args()
    enter_namespaces()
    os.environ.pop("RAY_ADDRESS", None)
    os.environ |= ENVIRONMENT
    started = time.monotonic()
    with nullcontext(arguments.work) if arguments.work else tempfile.TemporaryDirectory(prefix="net_") as folder:
        work = Path(folder).absolute()
        config, tiles = prepare(work, 32, (arguments.epochs, 1), dropout=0.0, precision="fp32")
        plan = SamplePlan(tiles, GLOBAL_BATCH, seed=0, phase=PHASE)
        with small_network(work) as network:
            drill = Drill(work, config, network, plan, arguments.epochs)
            network.start_ray("head", *WORKERS)
            undisturbed = drill.run("undisturbed", PARTS["fixed"])
            undisturbed.start()
            undisturbed.finish()
            problems = [words for part in arguments.parts.split(",") for words in disturb_part(drill, part)]
    print("\n".join(problems) or "each step took its samples, and the runs ended as the undisturbed one")
    print(f"{time.monotonic() - started:.0f} s in all")
    return 1 if problems else 0


def disturb_part(drill: Drill, part: str) -> list[str]:
    """A run that is disturbed -> what is wrong with it, in words."""
    run = drill.run(part, PARTS[part])
    try:
        problems = disturb(drill, run, part)
    except Missed as missed:
        raise SystemExit(f"{part}: the run ended before {missed}; --epochs makes it longer") from None
    run.finish()
    problems += compare(drill, part)
    for name in WORKERS:
        for copy in drill.network.hosts[name].run_copies():
            shutil.rmtree(copy, ignore_errors=True)
    return [f"{part}: {words}" for words in problems]


def disturb(drill: Drill, run: SmallRun, part: str) -> list[str]:
    """Cut the link of rank 0's host, heal it, kill the other host -> what went wrong meanwhile, in words."""
    network, elastic = drill.network, part == "elastic"

    def say(words: str, since: float | None = None) -> None:
        after = "" if since is None else f"{time.monotonic() - since:.0f} s later "
        print(f"{part}: {after}{words}", flush=True)

    def going_on(after: int, hosts: int) -> Training:
        """An attempt later than `after` that has done a step, on so many hosts."""

        def found() -> Training | None:
            now = network.training()
            return now if now and now.attempt > after and len(now.hosts) == hosts else None

        return run.wait_until(found, f"a step on {hosts} host(s) in an attempt after {after}", pause=0.05)

    def in_mid_epoch(attempt: int) -> Training:
        """The same attempt in the middle of an epoch, not the first one."""

        def found() -> Training | None:
            now = network.training()
            epochs = now.step * GLOBAL_BATCH / drill.plan.num_samples
            return now if now.attempt >= attempt and epochs > 1 and 0.25 < epochs % 1 < 0.75 else None

        return run.wait_until(found, f"the middle of an epoch in attempt {attempt}", pause=0.01)

    run.start()
    store = CheckpointStore(Folder(drill.uri(part)).child("checkpoints").location)
    run.wait_until(lambda: store.names(PHASE), "a checkpoint was committed", pause=0.1)
    now = in_mid_epoch(going_on(0, 2).attempt)
    lost, other = now.hosts
    waiting = other.processes(TRAIN_WORKER)
    cut = time.monotonic()
    lost.cut()
    say(f"link of {lost.name}, the host of rank 0, cut in mid-epoch, at step {now.step} (attempt {now.attempt})")
    run.wait_until(lambda: not any(map(psutil.Process.is_running, waiting)), "the cut was noticed", pause=0.05)
    say(f"the host was given up, and the worker on {other.name} that waited for it ended", cut)
    if elastic:
        now = going_on(now.attempt, 1)
        say(f"the run went on, on {now.hosts[0].name} alone (attempt {now.attempt})", cut)
        # records that S3 does not have yet, nobody could write over
        run.wait_until(lambda: stored_attempt(drill.uri(part)) == now.attempt, "its records were on S3", pause=0.1)
    lost.keep_run_copies()
    say("the link was healed", cut)
    healed = time.monotonic()
    lost.heal()
    problems = await_end(drill, lost, part, now.attempt)
    say(f"what was left of Ray on {lost.name} had ended by itself" if not problems else problems[0], healed)
    network.start_ray(lost.name)
    say(f"Ray was started again on {lost.name}", healed)
    now = going_on(now.attempt, 2)
    say(f"the run went on, on both hosts (attempt {now.attempt}); {time.monotonic() - cut:.0f} s after the cut", healed)
    now = in_mid_epoch(now.attempt)
    killed = time.monotonic()
    count = other.kill()
    say(f"all {count} processes of {other.name} killed in mid-epoch, at step {now.step} (attempt {now.attempt})")
    if not elastic:
        network.start_ray(other.name)
        say(f"Ray was started again on {other.name}", killed)
    now = going_on(now.attempt, 1 if elastic else 2)
    say(f"the run went on, on {' and '.join(host.name for host in now.hosts)} (attempt {now.attempt})", killed)
    if lost not in now.hosts:
        problems.append(f"{lost.name} did not train again")
    return problems


def await_end(drill: Drill, host: Host, part: str, attempt: int) -> list[str]:
    """Until nothing is left of Ray on a host that was given up -> whether that took too long, or wrote over the records
    of `attempt`, in words."""
    problems, deadline = [], time.monotonic() + END_SECONDS
    while host.ray.poll() is None or host.processes():
        if time.monotonic() > deadline:
            problems.append(f"{END_SECONDS} s after the link was healed, Ray still ran on {host.name}")
            break
        stored = stored_attempt(drill.uri(part))
        if stored < attempt and not problems:
            problems.append(f"attempt {stored}, superseded, wrote its records over those of attempt {attempt} on S3")
        time.sleep(0.1)
    return problems


def stored_attempt(uri: str) -> int:
    """Whose records S3 has."""
    while True:
        with suppress(ValueError):  # the file was replaced while it was read
            return json.loads(Folder(uri).read(phase_state.FILE))["phases"][PHASE]["attempt"]


def compare(drill: Drill, part: str) -> list[str]:
    """How a run differs from the undisturbed one and from the plan, in words."""
    problems, total = [], drill.plan.steps(drill.epochs)
    with reading_copy(drill.uri("undisturbed")) as expected, reading_copy(drill.uri(part)) as found:
        bring_sample_logs(drill.network, found)
        problems += unplanned_samples(found, PHASE, drill.plan, total)
        sizes = world_sizes(found, PHASE)
        if [record["step"] for record in read_events(found, PHASE, "step")] != list(range(1, total + 1)):
            problems.append(f"the records on S3 are not those of the steps 1 to {total}, one after the other")
        losses = {
            what: [read_events(folder, PHASE, event)[-1]["loss"] for folder in (expected, found)]
            for what, event in {"loss": "step", "validation loss": "validation"}.items()
        }
    changes = [size for size, before in zip(sizes, [0, *sizes], strict=False) if size != before]
    if changes != ([2, 1, 2, 1] if part == "elastic" else [2]):
        problems.append(f"it trained on {', '.join(map(str, sizes))} workers in turn")
    locations = [Folder(drill.uri(name)).child("checkpoints").location for name in ("undisturbed", part)]
    store = CheckpointStore(locations[1])
    last = store.names(PHASE)[-1]
    try:
        store.load(last).verify()
    except DamagedCheckpoint as error:
        problems.append(f"its last checkpoint is damaged: {error}")
    for what, (one, other) in losses.items():
        print(f"{part}: final {what} {other:.6f}, of the undisturbed run {one:.6f}", flush=True)
        if not abs(other - one) <= TOLERANCE * abs(one):
            problems.append(f"its final {what} is {other}, of the undisturbed run {one}")
    tensors = [last_tensors(location, PHASE) for location in locations]
    names = differing(*tensors)
    print(
        f"{part}: {total} steps in attempts from "
        + ", ".join(f"{attempt.start_step} on {attempt.world_size}" for attempt in store.attempts())
        + f" worker(s); {len(tensors[0]) - len(names)} of {len(tensors[0])} tensors of {last} equal bit for bit",
        flush=True,
    )
    if names and part == "fixed":
        problems.append(f"{len(names)} tensors of its last checkpoint differ: {names[:3]}")
    return problems


def bring_sample_logs(network: Network, run: Path) -> None:
    """Bring a copy of a run the logs of samples as the hosts' disks have them: what a worker that was killed did in its
    last seconds is nowhere else."""
    for host in network.hosts.values():
        for log in host.sample_logs():
            stored = run / "logs" / "samples" / PHASE / log.name
            if not stored.exists() or stored.stat().st_size < log.stat().st_size:
                stored.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(log, stored)


@contextmanager
def small_network(work: Path) -> Iterator[Network]:
    """Hosts on one bridge, which this process reaches too, with moto's S3 on the storage."""
    _run("mount", "-t", "tmpfs", "tmpfs", "/run/netns")
    names = work / "hosts"
    names.write_text("127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in ADDRESSES.items()))
    _run("mount", "--bind", str(names), "/etc/hosts")
    _ip("link", "set", "dev", "lo", "up")
    _ip("link", "add", BRIDGE, "type", "bridge")
    _ip("address", "add", f"{BRIDGE_ADDRESS}/{MASK}", "dev", BRIDGE)
    _ip("link", "set", "dev", BRIDGE, "up")
    hosts = {name: _add_host(name, address, work / name) for name, address in ADDRESSES.items()}
    storage = hosts["storage"]
    try:
        with s3_store(storage.address, storage.within) as bucket:
            yield Network(hosts, bucket)
    finally:
        for host in hosts.values():
            host.kill()


def _add_host(name: str, address: str, folder: Path) -> Host:
    folder.mkdir()
    _ip("netns", "add", name)
    _ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
    _ip("link", "set", "dev", name, "master", BRIDGE, "up")
    _ip("-n", name, "address", "add", f"{address}/{MASK}", "dev", "eth0")
    for device in ("lo", "eth0"):
        _ip("-n", name, "link", "set", "dev", device, "up")
    return Host(name, address, folder)


def enter_namespaces() -> None:
    """Go on in a network and a mount namespace of this process's own, which end with it and what it starts."""
    if os.environ.pop(_WITHIN, None):
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # hosts are taken down then, too
        return
    if sys.platform != "linux" or os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("unshare")):
        raise SystemExit("this drill makes network namespaces: run it as root, on Linux, with iproute2 and util-linux")
    Path("/run/netns").mkdir(exist_ok=True)
    os.execvpe("unshare", ["unshare", "--net", "--mount", sys.executable, *sys.argv], os.environ | {_WITHIN: "1"})


def _ip(*words: str) -> str:
    return _run("ip", *words)


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
