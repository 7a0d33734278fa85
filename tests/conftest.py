"""What several test files share: one local Ray, one small data set, one small autoencoder."""

import logging
import os
from pathlib import Path

import pytest

# Ray reads it when it is imported
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"


@pytest.fixture(scope="session")
def ray_cluster():
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
