"""Whether this machine is set up: what `ray-pipeline check` tries."""

from __future__ import annotations

import importlib.metadata
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import ray
import torch

from ray_pipeline import estimate
from ray_pipeline.check_cluster import check_cluster
from ray_pipeline.config import Config
from ray_pipeline.data.reachable import check_reachable
from ray_pipeline.encoding import remote_locations
from ray_pipeline.errors import UserError
from ray_pipeline.job_paths import check_paths_under_job
from ray_pipeline.models.autoencoder import load_autoencoder
from ray_pipeline.ray_session import ray_session, session_address
from ray_pipeline.storage import is_uri
from ray_pipeline.training.build import make_edm, make_network, make_optimizer
from ray_pipeline.training.nodes import shown
from ray_pipeline.training.placement import alive_nodes, check_resources
from ray_pipeline.training.setup import stream_cpus

_PACKAGES = (
    "torch", "ray", "diffusers", "timm", "numpy", "pillow", "pandas", "opencv-python-headless", "pyarrow",
    "tensorboardx", "tifffile", "scikit-image", "pydantic", "safetensors",
)  # fmt: skip


def check(config: Config) -> Iterator[tuple[str, bool, str]]:
    """Yield (what, works, in words) for versions, devices, autoencoder, Ray and one tiny training step; on a cluster
    also for the job's plan against what it has."""
    yield "python", sys.version_info >= (3, 11), sys.version.split()[0]
    for package in _PACKAGES:
        yield _attempt(package, lambda package=package: importlib.metadata.version(package))
    yield "device", True, _describe_devices()
    yield _attempt("autoencoder", lambda: _try_autoencoder(config))
    yield _attempt("training step", lambda: _try_step(config))
    yield from _ray_lines(config)
    yield _attempt("output_dir", lambda: _try_output(config))
    for key, location in remote_locations(config).items():
        yield _attempt(key, lambda key=key, location=location: _try_bucket(key, location))


def _attempt(what: str, action: Callable[[], str]) -> tuple[str, bool, str]:
    try:
        return what, True, action()
    except Exception as error:  # whatever is wrong with a set-up is a line of the answer, not a traceback
        return _failed(what, error)


def _failed(what: str, error: Exception) -> tuple[str, bool, str]:
    return what, False, f"{type(error).__name__}: {' '.join(str(error).split())}"


def _describe_devices() -> str:
    if not torch.cuda.is_available():
        return f"CPU with {torch.get_num_threads()} threads; no CUDA device"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{len(names)} CUDA device(s): {', '.join(names)}"


def _try_autoencoder(config: Config) -> str:
    autoencoder = load_autoencoder(config.vae.pretrained, latent_channels=config.model.latent_channels)
    tile = torch.linspace(-1, 1, 64).expand(1, 64, 64).contiguous()
    latents = autoencoder.encode(tile)
    back = autoencoder.decode(latents)
    if back.shape != tile.shape:
        raise UserError(f"a tile of {tuple(tile.shape)} came back as {tuple(back.shape)}")
    return f"{config.vae.pretrained}: 64x64 px -> {'x'.join(map(str, latents.shape[1:]))}"


def _try_step(config: Config) -> str:
    """One step of a network two blocks deep, otherwise as the config's."""
    shape = {**config.model.shape, "depth": 2, "architecture": "custom"}
    small = config.model_copy(update={"model": config.model.model_copy(update=shape)})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network, edm = make_network(small, small.phases[0]).to(device), make_edm(config)
    optimizer = make_optimizer(small, network)
    size = (2, config.model.latent_channels, config.model.latent_size, config.model.latent_size)
    x0 = config.scheduler.sigma_data * torch.randn(size, device=device)
    losses = []
    for _ in range(2):
        loss = edm.loss(network, x0, torch.full((2,), 0.5, device=device), torch.randn_like(x0)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if not all(0 < loss < 10 for loss in losses):
        raise RuntimeError(f"the loss of a tiny network is {losses}, expected about 1")
    return f"loss {losses[0]:.3f} on {device.type}"


def _ray_lines(config: Config) -> Iterator[tuple[str, bool, str]]:
    try:
        with ray_session(config.ray, more_cpus=stream_cpus(config)):
            joined = session_address(config.ray) != "local" or len(alive_nodes()) > 1
            if not joined:
                check_resources(config)
            have = ray.cluster_resources()
            answer = ray.get(ray.remote(num_cpus=0)(lambda: "answers").remote(), timeout=60)
            yield "ray", True, f"{answer}; {have.get('CPU', 0):g} logical CPUs, {have.get('GPU', 0):g} GPUs"
            if joined:
                yield from check_cluster(config)
    except Exception as error:  # as in _attempt
        yield _failed("ray", error)


def _try_bucket(key: str, location: str) -> str:
    check_reachable(key, location)
    return f"{shown(location)} answers"


def _try_output(config: Config) -> str:
    check_paths_under_job(config)
    folder = config.output_dir
    if is_uri(folder):
        estimate.check_writable(folder, "output_dir")
        return f"{shown(folder)} can be written"
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    with tempfile.TemporaryFile(dir=place) as file:
        file.write(b"x")
    return f"{folder} can be written"
