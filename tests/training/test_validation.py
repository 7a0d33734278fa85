"""Two validations of one model are equal to the bit, and a tile's loss is its own, whatever is validated beside it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from phase_runs import make_phase_run
from scipy import stats

from ray_pipeline.config import parse_config
from ray_pipeline.data.latents import LatentStore
from ray_pipeline.data.listing import spread
from ray_pipeline.diffusion.edm import EDM
from ray_pipeline.diffusion.noise import draw
from ray_pipeline.training.build import make_network, make_optimizer
from ray_pipeline.training.ema import EMA
from ray_pipeline.training.state import TrainState
from ray_pipeline.training.validation import Validation, other_tiles, paired_gain, untrained_loss, validate

SHAPE = (4, 8, 8)
ROWS = 12
HINTS = ("denoising", "canny")
COLUMNS = ("latent", "hint.denoising", "hint.canny", "simulated.denoising")
MODEL = {"architecture": "custom", "latent_size": 8, "depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 4}
MODEL |= {"dropout": 0.3}  # not in validation
SIGMA_DATA = 0.5

pytestmark = pytest.mark.usefixtures("one_thread")


def random_latents() -> np.ndarray:
    """(rows, variants, columns, C, H, W) fp16."""
    return np.random.default_rng(5).normal(size=(ROWS, 1, len(COLUMNS), *SHAPE)).astype(np.float16)


@pytest.fixture
def write_store(write_latents):
    return lambda root, values, std=1.0: write_latents(root, values, HINTS, ["denoising"], std=std)


def make_run(store: LatentStore, rows=None, hints=(), fresh=False, batch_size=4, levels=3, **changes):
    """One worker's view of a phase, on the CPU; an untrained network returns zero, so its weights are drawn."""
    phase = {"name": "p", "epochs": 1, "condition_types": list(hints)}
    sections = {"train": {"batch_size": batch_size, "global_batch": 8, "precision": "fp32"}}
    config = parse_config(
        {"phases": [phase], "model": MODEL, "data": {"tile_size": 64}, "seed": changes.pop("seed", 0)}
        | {"monitoring": {"val_noise_levels": levels}}
        | sections
    )
    torch.manual_seed(0)
    network = make_network(config, config.phases[0])
    if not fresh:
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.normal_(0, 0.1)
    rows = np.arange(ROWS) if rows is None else np.asarray(rows)
    fields = {
        "val_rows": rows,
        "val_simulated": np.zeros(len(rows), bool),
        "state": TrainState(network, make_optimizer(config, network), averages=[]),
        "model": network,
    }
    return make_phase_run(config, store, network=network, **fields | changes)


@pytest.fixture
def store(tmp_path, write_store) -> LatentStore:
    return write_store(tmp_path / "store", random_latents())


@pytest.mark.parametrize("hints", [(), HINTS])
def test_two_validations_of_one_model_are_equal_to_the_bit(tmp_path, store, hints):
    run = make_run(store, hints=hints)
    first = validate(run)
    torch.manual_seed(99)  # nothing random is left to the process
    torch.randn(5)
    second = validate(run)
    assert first.losses.shape == (ROWS, 3)
    assert first.losses.dtype == np.float64
    np.testing.assert_array_equal(first.losses, second.losses)
    assert (first.loss, first.by_sigma) == (second.loss, second.by_sigma)
    assert len(np.unique(first.losses)) == first.losses.size
    again = validate(make_run(LatentStore.open(store.folder), hints=hints))
    np.testing.assert_array_equal(again.losses, first.losses)


@pytest.mark.parametrize("hints", [(), HINTS])
@pytest.mark.parametrize(("rows", "batch_size"), [([7, 2, 9], 4), ([11, 3, 0, 5, 1], 2), (range(ROWS), 1), ([4], 5)])
def test_the_loss_of_a_tile_depends_on_nothing_that_is_validated_beside_it(tmp_path, store, hints, rows, batch_size):
    # another batch may change the last bits of a matrix product, another noise the first digit
    whole = validate(make_run(store, hints=hints)).losses
    some = validate(make_run(store, rows, hints, batch_size=batch_size)).losses
    np.testing.assert_allclose(some, whole[list(rows)], rtol=1e-5)


def test_a_loss_is_the_weighted_error_of_the_denoised_tile(tmp_path, store, write_store):
    run = make_run(store)
    found = validate(run)
    # a network that returns zero leaves D = c_skip x, so that the loss tells the noise: with x0 = 0 its energy
    blank = write_store(tmp_path / "blank", np.zeros((ROWS, 1, len(COLUMNS), *SHAPE), np.float16))
    bare = validate(make_run(blank, fresh=True))
    energy = bare.losses * (bare.sigmas**2 + SIGMA_DATA**2) / SIGMA_DATA**2
    assert len(np.unique(energy.round(6))) == ROWS * 3  # each tile has noise of its own at each level
    assert stats.kstest(energy.ravel() * 256, "chi2", args=(256,)).pvalue > 1e-3
    # Karras et al. 2022, equation 8, from D itself
    x0 = torch.from_numpy(random_latents()[:, 0, 0].astype(np.float32)) * SIGMA_DATA
    expected = np.empty_like(found.losses)
    network = run.state.network.eval()
    for level, sigma in enumerate(found.sigmas):
        noise = torch.from_numpy(draw(0, "validation", np.arange(ROWS) * 1000 + level, SHAPE).noise)
        at = torch.full((ROWS,), sigma, dtype=torch.float32)
        with torch.no_grad():
            denoised = run.edm.denoise(network, x0 + sigma.astype(np.float32) * noise, at)
        weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
        expected[:, level] = weight * (denoised - x0).square().mean(dim=(1, 2, 3)).numpy()
    np.testing.assert_allclose(found.losses, expected, rtol=1e-3)


def test_the_noise_belongs_to_seed_and_row(tmp_path, store):
    # a tile that is there twice, with real and with simulated degradations, is compared on one noise
    twice = [*range(6), *range(6)]
    losses = validate(make_run(store, twice, batch_size=6)).losses
    np.testing.assert_array_equal(losses[:6], losses[6:])
    other = validate(make_run(store, range(6), seed=1)).losses
    assert (np.abs(other - losses[:6]) > 1e-4).all()


def test_ranks_share_the_tiles_and_their_sum_is_the_whole(tmp_path, store):
    whole = validate(make_run(store, hints=HINTS)).losses
    # a group of this process alone: the sum over ranks is left to the test
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        shares = [validate(make_run(store, hints=HINTS, rank=r, world_size=5)).losses for r in range(5)]
    finally:
        torch.distributed.destroy_process_group()
    computed = np.stack([share.any(axis=1) for share in shares])
    np.testing.assert_array_equal(computed.sum(axis=0), 1)
    assert set(computed.sum(axis=1)) == {2, 3}
    np.testing.assert_allclose(sum(shares), whole, rtol=1e-5)


def test_validation_judges_the_averaged_weights_and_leaves_the_trained_ones(tmp_path, store):
    run = make_run(store)
    plain = validate(run).losses
    run.state.averages = [EMA(run.state.network, decay=0.9)]
    np.testing.assert_array_equal(validate(run).losses, plain)  # a copy at first
    with torch.no_grad():
        for parameter in run.state.network.parameters():
            parameter.mul_(1.5)
    before = {name: tensor.clone() for name, tensor in run.state.network.state_dict().items()}
    run.state.network.train()
    losses = validate(run).losses
    assert run.state.network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.state.network.state_dict().items())
    averages, run.state.averages = run.state.ema.tensors(), []
    assert (validate(run).losses != losses).all()
    run.state.network.load_state_dict(averages, strict=False)
    np.testing.assert_array_equal(validate(run).losses, losses)


@pytest.mark.parametrize(
    "rows",
    [
        range(2),
        range(12),
        [*range(512)],
        [0, 1, 0, 1],
        [*range(20), *range(20, 30), *range(20)],  # another data set between real and simulated
        [*range(7), *range(100), *range(7)],
        [*range(3), *range(3), *range(3)],
        [5, 5, 6, 6, 7],
        np.array([*range(300), *range(1000, 1100), *range(300)])[spread(700, 128)],
        np.array([*range(64), *range(64)])[spread(128, 100)],
    ],
    ids=len,
)
def test_shuffled_hints_never_come_from_the_same_tile(rows):
    rows = np.asarray(rows)
    others = other_tiles(rows)
    np.testing.assert_array_equal(np.sort(others), np.arange(len(rows)))  # each tile's hints are used once
    assert (rows[others] != rows).all()


def test_shuffled_hints_come_from_far_away():
    # neighbours are cut from one image
    others = other_tiles(np.arange(1000, 1100))
    assert np.abs(others - np.arange(100)).min() >= 40


def test_a_tile_alone_keeps_its_hints():
    np.testing.assert_array_equal(other_tiles(np.array([8])), [0])


def test_a_shuffled_validation_gives_each_tile_the_hints_of_the_other(tmp_path, store, write_store):
    moved = random_latents()
    moved[:, :, 1:] = moved[other_tiles(np.arange(ROWS)), :, 1:]
    right = validate(make_run(store, hints=HINTS))
    shuffled = validate(make_run(store, hints=HINTS), shuffled=True)
    by_hand = validate(make_run(write_store(tmp_path / "moved", moved), hints=HINTS))
    np.testing.assert_array_equal(shuffled.losses, by_hand.losses)
    assert (shuffled.losses != right.losses).all()


def test_tiles_take_simulated_hints_where_their_data_set_says_so(tmp_path, store, write_store):
    simulated = np.arange(ROWS) % 3 == 0
    swapped = random_latents()
    swapped[simulated, :, 1] = swapped[simulated, :, 3]
    found = validate(make_run(store, hints=HINTS, val_simulated=simulated)).losses
    by_hand = validate(make_run(write_store(tmp_path / "swapped", swapped), hints=HINTS)).losses
    np.testing.assert_array_equal(found, by_hand)
    given = validate(make_run(store, hints=HINTS)).losses
    np.testing.assert_array_equal((found != given).any(axis=1), simulated)


@pytest.mark.parametrize(("levels", "p_std"), [(1, 1.2), (4, 1.2), (1000, 1.2), (1000, 0.01)])
def test_losses_by_noise_level_average_to_the_loss(levels, p_std):
    sigmas = EDM(P_std=p_std).validation_sigmas(levels).numpy()
    losses = np.random.default_rng(0).gamma(2, size=(7, levels))
    found = Validation(losses=losses, sigmas=sigmas)
    assert len(found.by_sigma) == levels  # none is lost to another of the same name
    assert np.mean(list(found.by_sigma.values())) == pytest.approx(found.loss, rel=1e-12)
    np.testing.assert_allclose(list(map(float, found.by_sigma)), sigmas, rtol=5e-3)
    np.testing.assert_allclose(list(found.by_sigma.values()), losses.mean(axis=0))


def test_noise_levels_are_the_middles_of_equal_shares_of_the_training_distribution(tmp_path, store):
    found = validate(make_run(store, levels=5))
    np.testing.assert_allclose(found.sigmas, stats.lognorm.ppf((np.arange(5) + 0.5) / 5, s=1.2, scale=np.exp(-1.2)))
    assert list(found.by_sigma) == [f"{sigma:.3g}" for sigma in found.sigmas]


def test_standard_errors_are_those_over_tiles():
    rng = np.random.default_rng(1)
    right, shuffled = (Validation(rng.gamma(2, size=(30, 4)) + k, np.arange(1.0, 5)) for k in (0, 0.5))
    assert right.standard_error == pytest.approx(stats.sem(right.losses.mean(axis=1)))
    gain, error = paired_gain(right, shuffled)
    test = stats.ttest_rel(shuffled.losses.mean(axis=1), right.losses.mean(axis=1))
    assert gain == pytest.approx(shuffled.loss - right.loss)
    assert gain / error == pytest.approx(test.statistic)
    assert np.isnan(replace(right, losses=right.losses[:1]).standard_error)


def test_a_fresh_network_scores_one_on_normalised_latents_alone(tmp_path, store, write_store):
    loss, error = untrained_loss(make_run(store, fresh=True))
    assert loss == pytest.approx(1, abs=0.05)
    losses = [untrained_loss(make_run(store, fresh=True, seed=seed))[0] for seed in range(30)]
    assert 0.6 < np.std(losses) / error < 1.2  # of all tiles only the noise is left to chance; error is a bound on it
    sampled, error = untrained_loss(make_run(store, fresh=True), limit=5)
    assert abs(sampled - 1) < 4 * error + 0.02
    wrong = write_store(tmp_path / "wrong", random_latents(), std=2.0)
    assert untrained_loss(make_run(wrong, fresh=True))[0] < 0.8
