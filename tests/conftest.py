"""What several test files share: one local Ray, one S3 server, one small data set, one small autoencoder."""

import json
import logging
import os
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest

pytest_plugins = ("encoded_data", "made_runs")

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
    secret = {name: f"planted-{name}" for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    os.environ |= secret | {"AWS_EC2_METADATA_DISABLED": "true"}
    yield
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ |= before


@dataclass
class S3Server:
    """A server of the S3 protocol on the loopback interface. requests: (method, path, range) of each in turn.
    meanwhile: by path, what happens just before its bytes are sent next."""

    endpoint: str
    requests: list[tuple[str, str, str]]
    meanwhile: dict[str, Callable[[], None]]

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
    application, requests, meanwhile = DomainDispatcherApplication(create_backend_app), [], {}

    def recorded(environ, start_response):
        requests.append((environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("HTTP_RANGE", "")))
        if environ["REQUEST_METHOD"] == "GET":
            meanwhile.pop(environ["PATH_INFO"], lambda: None)()
        return application(environ, start_response)

    server = make_server("127.0.0.1", 0, recorded, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield S3Server(f"http://127.0.0.1:{server.server_port}", requests, meanwhile)
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
