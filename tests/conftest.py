"""What several test files share: one local Ray, one S3 server, one small data set, one small autoencoder."""

import json
import logging
import os
import shutil
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest

# Ray reads it when it is imported
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"


@pytest.fixture(scope="session")
def ray_cluster(aws_environment):
    """A local Ray with six logical CPUs, for all tests of the session; yields its resources."""
    import ray

    for attempt in range(3):
        try:
            ray.init(
                address="local",
                num_cpus=6,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            break
        except Exception:  # Ray waits 30 s for its own processes, which a busy machine may need longer to start
            ray.shutdown()
            if attempt == 2:
                raise
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    yield ray.cluster_resources()
    ray.shutdown()


@pytest.fixture(scope="session")
def aws_environment() -> Iterator[None]:
    """Credentials for S3 in the environment alone, and no search for others; the environment is put back."""
    before = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    for name in before:
        del os.environ[name]
    os.environ |= {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests", "AWS_EC2_METADATA_DISABLED": "true"}
    yield
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ |= before


@dataclass
class S3Server:
    """A server of the S3 protocol on the loopback interface. requests: (method, path, range) of each in turn."""

    endpoint: str
    requests: list[tuple[str, str, str]]

    def make_bucket(self, name: str, policy: dict | None = None) -> str:
        """Make a bucket; returns its URI."""
        self.put(name)
        if policy is not None:
            self.put(f"{name}?policy", json.dumps(policy).encode())
        return f"s3://{name}?endpoint_override={quote(self.endpoint, safe='')}"

    def put(self, path: str, data: bytes = b"") -> None:
        headers = {"Content-Type": "application/octet-stream"}
        request = urllib.request.Request(f"{self.endpoint}/{path}", data=data, method="PUT", headers=headers)
        urllib.request.urlopen(request, timeout=30).close()


@pytest.fixture(scope="session")
def s3_server(aws_environment) -> Iterator[S3Server]:
    """moto's S3 on a free port of 127.0.0.1, for all tests of the session."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it prints each request
    application, requests = DomainDispatcherApplication(create_backend_app), []

    def recorded(environ, start_response):
        requests.append((environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("HTTP_RANGE", "")))
        return application(environ, start_response)

    server = make_server("127.0.0.1", 0, recorded, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield S3Server(f"http://127.0.0.1:{server.server_port}", requests)
    server.shutdown()
    thread.join()


@pytest.fixture(scope="session")
def s3(s3_server) -> str:
    """URI of an S3 bucket, s3://tests?endpoint_override=...; `Folder(s3).child(tmp_path.name)` is a test's own."""
    return s3_server.make_bucket("tests")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """Data root with the data set "simulated": 24 training and 8 validation tiles of 64 px, in 8 fields of 128 px, each
    with a noisy partner and one of low resolution (16 px). Not to be changed by a test; copy it."""
    from ray_pipeline.data.sources.simulate import simulate

    root = tmp_path_factory.mktemp("tiny_data")
    simulate(root, fields=8, seed=3, field_size=128, tile_size=64, val_fraction=0.25)
    return root


@pytest.fixture(scope="session")
def tiny_autoencoder(tmp_path_factory) -> Path:
    """Folder of an untrained AutoencoderTiny in diffusers format: one channel, 4 latent channels, width 8."""
    import torch

    from ray_pipeline.training.autoencoder import build_tiny_autoencoder

    folder = tmp_path_factory.mktemp("tiny_autoencoder")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        build_tiny_autoencoder(width=8, blocks=(0, 1, 1, 1)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_kl(tmp_path_factory) -> Path:
    """Folder of an untrained AutoencoderKL in diffusers format: one channel, 4 latent channels, width 8."""
    import torch
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("tiny_kl")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoencoderKL(1, 1, **blocks, block_out_channels=(8,) * 4, norm_num_groups=4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch as in the actors; two threads wait for each other where other processes are busy."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def job_for(tiny_autoencoder) -> Callable:
    """(data root, *hints, **changes) -> the EncodeJob of 64 px tiles and these hints (all, where none is named), with
    the tiny autoencoder."""
    from ray_pipeline.config import parse_config
    from ray_pipeline.data.encode_job import encode_job
    from ray_pipeline.sections import CONDITION_TYPES

    def make(root: Path | str, *hints: str, **changes):
        config = {
            "data": {"root": str(root), "tile_size": 64},
            "model": {"architecture": "DiT-S/8", "latent_size": 8},
            "vae": {"pretrained": str(tiny_autoencoder), "batch_size": 4},
            "phases": [{"name": "one", "epochs": 1, "condition_types": hints or CONDITION_TYPES}],
        }
        changes = {name: str(value) if name == "store" else value for name, value in changes.items()}
        return replace(encode_job(parse_config(config)), **changes)

    return make


@pytest.fixture(scope="session")
def fingerprint_of() -> Callable:
    """EncodeJob -> what its store is recognised by."""
    from ray_pipeline.data.encode import fingerprint
    from ray_pipeline.data.listing import list_tiles
    from ray_pipeline.models.autoencoder import load_autoencoder

    return lambda job: fingerprint(job, list_tiles(job), load_autoencoder(job.autoencoder, posterior=job.posterior))


@pytest.fixture(scope="session")
def run_job(ray_cluster) -> Callable:
    """(EncodeJob, progress, actors) -> the listing that it encoded."""
    from ray_pipeline.data.encode import encode, fingerprint
    from ray_pipeline.data.listing import list_tiles
    from ray_pipeline.models.autoencoder import load_autoencoder

    def run(job, progress=lambda tiles: None, actors=1):
        listing = list_tiles(job)
        expected = fingerprint(job, listing, load_autoencoder(job.autoencoder, posterior=job.posterior))
        encode(job, listing, expected, actors=actors, gpus_per_actor=0, progress=progress)
        return listing

    return run


@pytest.fixture(scope="session")
def run_job_here() -> Callable:
    """EncodeJob of good tiles -> the listing that it encoded, with the job's actor in this process: no Ray."""
    from ray_pipeline.data.encode import encode, fingerprint
    from ray_pipeline.data.listing import list_tiles
    from ray_pipeline.data.manifest import SPLITS
    from ray_pipeline.data.shard_encoder import LISTED_TILES, ShardEncoder
    from ray_pipeline.data.tile_table import write_tile_table
    from ray_pipeline.models.autoencoder import load_autoencoder
    from ray_pipeline.storage import Folder

    def run(job):
        listing = list_tiles(job)
        expected = fingerprint(job, listing, load_autoencoder(job.autoencoder, posterior=job.posterior))
        encoder = ShardEncoder(job, expected.store, use_gpu=False)
        for split in SPLITS:
            write_tile_table(Folder(job.store).child(split), LISTED_TILES, listing.rows[split], listing.datasets[split])
            for number in range(-(-len(listing.rows[split]) // job.shard_rows)):
                encoder({"split": np.array([split], dtype=object), "shard": np.array([number])})
        encode(job, listing, expected, actors=1, gpus_per_actor=0, progress=lambda tiles: None)
        return listing

    return run


@pytest.fixture(scope="session")
def encoded(run_job, job_for, tiny_data, tmp_path_factory):
    """A finished store of tiny_data with every hint, denoising also simulated, in two variants and in shards of 7 rows,
    as the job that made it. Not to be changed by a test; copy it."""
    store = tmp_path_factory.mktemp("encoded") / "latents"
    job = job_for(tiny_data, store=store, simulated=("denoising",), variants=2, shard_rows=7)
    run_job(job)
    return job


@pytest.fixture
def copy_of_data(tiny_data, tmp_path) -> Path:
    """A copy of tiny_data that a test may change."""
    return Path(shutil.copytree(tiny_data, tmp_path / "data", ignore=shutil.ignore_patterns("latents")))


@pytest.fixture(scope="session")
def write_latents() -> Callable:
    """(root, values (rows, variants, columns, C, H, W) fp16, hints, simulated, **index) -> the LatentStore of a
    training split with these latents and mean 0, std `std`, in shards of `shard_rows`; all rows are of one data set
    unless `index` tells otherwise."""
    from ray_pipeline.data.latents import FORMAT_VERSION, LatentStats, LatentStore
    from ray_pipeline.data.shards import write_shard
    from ray_pipeline.storage import Folder

    def write(root, values, hints=(), simulated=(), *, shard_rows=None, std=1.0, **index):
        root, rows, channels = Folder(root), len(values), values.shape[3]
        starts = range(0, rows, shard_rows or rows)
        shards = [
            write_shard(root.child("train"), f"shard-{number:05d}.npy", values[start : start + (shard_rows or rows)])
            for number, start in enumerate(starts)
        ]
        index = {
            "version": FORMAT_VERSION,
            "fingerprint": "f",
            "shape": values.shape[3:],
            "posterior": "mode",
            "hints": hints,
            "simulated": simulated,
            "variants": values.shape[1],
            "rejected": 0,
            "datasets": [{"name": "a", "start": 0, "count": rows, "partners": dict.fromkeys(simulated, rows)}],
            "shards": shards,
            "autoencoder": {"pretrained": "embedded", "sha256": "a"},
            "intensity": [],
        } | index
        root.child("train").write("index.json", json.dumps(index).encode())
        stats = LatentStats(np.zeros(channels), np.full(channels, std), rows, "f")
        root.write("stats.json", json.dumps(stats.as_json()).encode())
        return LatentStore.open(root)

    return write


@pytest.fixture(scope="session")
def header_for() -> Callable:
    """(network, **fields) -> the WeightsHeader of a network's weights; `ema` and whatever else differs as fields."""
    from ray_pipeline.models.weights import WeightsHeader

    def header(network, **fields):
        plain = {
            "phase": "phase1",
            "step": 0,
            "network": network.shape,
            "edm": {"sigma_data": 0.5},
            "latents": {"mean": [0.0] * 4, "std": [1.0] * 4, "count": 10, "fingerprint": "f"},
            "autoencoder": {"pretrained": "embedded", "sha256": "a"},
            "intensity": [],
            "hints": {},
            "ema": None,
        }
        return WeightsHeader(**(plain | fields))

    return header


@dataclass
class MadeRun:
    """A run directory as training leaves it, with tiny tensors: phase "one" of 4 epochs, "two" of 2; 3 steps each."""

    config: Any
    store: Any

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def state_file(self) -> Path:
        return self.folder / "phase_state.json"

    def train(self, phase: str, until: int, *, finish: bool = False) -> None:
        """Epochs 1 to `until` of a phase, as rank 0 writes them down; validation losses 0.9, 0.5, 0.7, 0.6."""
        import torch

        from ray_pipeline.monitoring import phase_state
        from ray_pipeline.monitoring.events import CheckpointEvent, EventLog, PhaseEvent

        state = phase_state.load(self.state_file)
        progress, epochs = state.phase(phase), {p.name: p.epochs for p in self.config.phases}[phase]
        progress.status, progress.attempt, progress.steps, progress.epochs = "running", 1, 3 * epochs, epochs
        progress.baseline_val_loss, state.current_phase = 1.0, phase
        state.run["latents"] = "f" * 64
        with EventLog(self.folder, phase, tensorboard=False) as events:

            def tell(status: str, step: int) -> None:
                events.emit(PhaseEvent(phase, status, step, f"{status} at step {step}"))
                state.record(status, f"{phase}: {status} at step {step}")

            tell("started", 0)
            for epoch, loss in zip(range(1, until + 1), (0.9, 0.5, 0.7, 0.6), strict=False):
                step = 3 * epoch
                progress.metrics = {"untrained_loss": 1.0, "val_loss": loss}
                committed = {
                    "phase": phase, "step": step, "position": 8 * step, "epoch": epoch, "attempt": 1, "kind": "epoch",
                    "val_loss": loss, "baseline_val_loss": 1.0, "metrics": progress.metrics, "total_steps": 3 * epochs,
                    "weights": {"latents": {"fingerprint": "f" * 64}}, "config": self.config.dump(),
                }  # fmt: skip
                name = f"{phase}_epoch_{epoch:03d}"
                name = self.store.save(name, {"model": {"w": torch.full((2,), float(step))}}, committed)
                progress.step, progress.position, progress.epoch = step, 8 * step, epoch
                if progress.best is None or loss < progress.best.val_loss:
                    progress.best = phase_state.BestCheckpoint(checkpoint=name, val_loss=loss, epoch=epoch)
                progress.last, progress.checkpoints = name, [*progress.checkpoints, name]
                events.emit(CheckpointEvent(phase, step, epoch, name, "epoch", 0.1, 0.2))
                state.record("checkpoint", f"{name} (epoch)")
            if finish:
                tell("finished", progress.step)
                progress.status = "finished"
        state.save(self.state_file)


@pytest.fixture
def make_run(tmp_path) -> Callable[..., MadeRun]:
    """(**sections of the config) -> a MadeRun in <tmp>/run with its config.yaml, nothing trained yet."""
    from ray_pipeline.checkpoints import CheckpointStore
    from ray_pipeline.config import parse_config

    def make(**sections) -> MadeRun:
        plain = {
            "output_dir": str(tmp_path / "run"),
            "data": {"root": str(tmp_path / "no_data"), "latents": str(tmp_path / "no_latents"), "tile_size": 64},
            "model": {"architecture": "DiT-S/8", "latent_size": 8},
            "phases": [{"name": "one", "epochs": 4}, {"name": "two", "epochs": 2, "condition_types": ["canny"]}],
        }
        run = MadeRun(config := parse_config(plain | sections), CheckpointStore(config.checkpoint_store))
        run.folder.mkdir()
        (run.folder / "config.yaml").write_text(config.to_yaml())
        return run

    return make


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """In CI a test may skip only for want of CUDA or of the shared files; any other skip is a failure."""
    report = yield
    if report.skipped and os.environ.get("CI") and not hasattr(report, "wasxfail"):
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        if "CUDA" not in reason and "shared" not in reason:
            report.outcome = "failed"
            report.longrepr = f"skipped in CI for another reason than CUDA or ../shared: {reason}"
    return report
