"""bf16 autocast trains as fp32 does."""

import numpy as np
import pytest
from phase_runs import make_phase_run

from ray_pipeline.config import parse_config
from ray_pipeline.training.step import micro_batches, optimize

MODEL = {"architecture": "custom", "latent_size": 8, "depth": 2, "hidden_size": 64, "num_heads": 4, "patch_size": 2}
STEPS = 200

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def store(write_latents, tmp_path):
    """Smooth blobs, which a network can learn, of std 1."""
    rng = np.random.default_rng(0)
    grid = np.linspace(-1, 1, 8)
    places, widths = rng.uniform(-1, 1, (64, 4, 2)), rng.uniform(0.2, 0.8, (64, 4))
    away = (grid[:, None] - places[..., 0, None, None]) ** 2 + (grid[None, :] - places[..., 1, None, None]) ** 2
    values = np.exp(-away / widths[..., None, None] ** 2)
    values = (values - values.mean()) / values.std()
    return write_latents(tmp_path, values[:, None, None].astype(np.float16))


def losses(store, precision: str, **model) -> np.ndarray:
    config = parse_config(
        {
            "phases": [{"name": "p", "epochs": 1000}],
            "model": MODEL | model,
            "data": {"tile_size": 64},
            "train": {"precision": precision, "batch_size": 16, "global_batch": 16},
            "optimizer": {"lr": 1e-3},
        }
    )
    run = make_phase_run(config, store)
    seen = []
    for step in range(STEPS):
        index = run.plan.positions(step, 0, 1)
        rows, _ = run.mixture.rows(index)
        seen.append(optimize(run, step, micro_batches(run, {"index": index, **store.gather(rows)})).loss)
    return np.array(seen)


def test_the_loss_in_bf16_stays_within_1_percent_of_fp32_over_200_steps(store):
    exact, rough = losses(store, "fp32"), losses(store, "bf16")
    assert not np.array_equal(exact, rough)
    assert exact[-50:].mean() < 0.8 * exact[:10].mean()  # it learns
    assert rough.mean() == pytest.approx(exact.mean(), rel=0.01)
    assert rough[-50:].mean() == pytest.approx(exact[-50:].mean(), rel=0.01)
