"""Stored power-function averages give the one that was not tracked, as far from it as `profile_error` says."""

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import pytest
import torch

from ray_pipeline.models.posthoc_ema import (
    MAX_STD,
    Snapshot,
    combination,
    gamma_of_std,
    power_beta,
    profile_error,
    reconstruct,
    std_of_gamma,
)
from ray_pipeline.training.ema import PowerEMA

pytestmark = pytest.mark.usefixtures("one_thread")

STORED, WANTED = (0.05, 0.10), (0.03, 0.07, 0.08, 0.15, 0.20)
STEPS, INTERVAL = 2048, 128


def grid_profile(std, step, last, cells):
    """Profile on `cells` equal cells of (0, last], each the integral over the cell divided by its root width."""
    edges = np.minimum(np.linspace(0, last, cells + 1) / step, 1)
    return np.diff(edges ** (gamma_of_std(std) + 1)) / np.sqrt(last / cells)


def grid_combination(profiles, std, step, cells=40_000):
    """Weights that add up to 1 and their relative error, by QR on the grid: no inner products, no multiplier."""
    columns = np.stack([grid_profile(*profile, step, cells) for profile in profiles], axis=1)
    wanted = grid_profile(std, step, step, cells)
    differences = columns[:, :-1] - columns[:, -1:]
    free = np.linalg.lstsq(differences, wanted - columns[:, -1], rcond=None)[0]
    weights = np.append(free, 1 - free.sum())
    return weights, np.linalg.norm(columns @ weights - wanted) / np.linalg.norm(wanted)


class Walk:
    """Weights that drift and walk at random for `steps` steps, and PowerEMA tracks fed with them."""

    def __init__(self, steps=STEPS, interval=INTERVAL, update_every=1, seed=0):
        rng = np.random.default_rng(seed)
        network = torch.nn.Linear(16, 12)
        shape = (steps, sum(p.numel() for p in network.parameters()))
        walk = np.cumsum(rng.normal(size=shape), axis=0) * 0.3 / np.sqrt(steps)
        drift = np.arange(1, steps + 1)[:, None] / steps * rng.normal(scale=0.5, size=shape[1])
        self.weights = (rng.normal(size=shape[1]) + walk + drift).astype(np.float32)
        power = PowerEMA(network, (*STORED, *WANTED), update_every)
        self.snapshots: dict[tuple[float, int], Snapshot] = {}
        for step, weights in enumerate(torch.from_numpy(self.weights), start=1):
            torch.nn.utils.vector_to_parameters(weights, network.parameters())
            power.update(step)
            if step % interval == 0:
                for track in power.tracks:
                    copy = {name: tensor.clone() for name, tensor in track.tensors().items()}
                    self.snapshots[track.std, step] = Snapshot(track.std, step, copy)

    def stored(self, dtype=torch.float32):
        return [
            Snapshot(s.std, s.step, {name: tensor.to(dtype) for name, tensor in s.tensors.items()})
            for s in self.snapshots.values()
            if s.std in STORED
        ]

    def tracked(self, std, step=STEPS):
        return vector(self.snapshots[std, step].tensors)

    def nearest(self, wanted, step=STEPS):
        """Distance of the stored track that is nearest to `wanted`."""
        return min(distance(self.tracked(std, step), wanted) for std in STORED)


def vector(tensors):
    return torch.cat([tensor.double().flatten() for tensor in tensors.values()])


def distance(a, b):
    return float((a - b).norm())


def profiles(snapshots):
    return [(snapshot.std, snapshot.step) for snapshot in snapshots]


@pytest.fixture(scope="module")
def walk():
    return Walk()


@pytest.mark.parametrize(("std", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_gamma_is_the_papers(std, gamma):
    assert gamma_of_std(std) == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("std", [0.001, 0.03, 0.05, 0.1, 0.2, 0.28, MAX_STD])
def test_the_profile_of_gamma_has_the_relative_std(std):
    times = (np.arange(2_000_000) + 0.5) / 2_000_000
    profile = times ** gamma_of_std(std)
    profile /= profile.sum()
    mean = profile @ times
    assert np.sqrt(profile @ (times - mean) ** 2) == pytest.approx(std, rel=1e-6)
    assert std_of_gamma(gamma_of_std(std)) == pytest.approx(std, rel=1e-12)


@pytest.mark.parametrize("std", [0.0, -0.1, 0.2887, 1.0, float("nan")])
def test_a_std_that_no_profile_has_is_rejected(std):
    with pytest.raises(ValueError, match=r"relative std is .*, expected more than 0 and at most 0\.2887"):
        gamma_of_std(std)


def test_a_negative_gamma_is_rejected():
    with pytest.raises(ValueError, match=r"gamma is -0\.5"):
        std_of_gamma(-0.5)


@pytest.mark.parametrize("every", [1, 4])
def test_products_of_beta_are_the_integrals_of_the_continuous_profile(every):
    gamma, updates = 6.94, 500
    betas = np.array([power_beta(i * every, gamma, every) for i in range(1, updates + 1)])
    assert betas[0] == 0
    shares = (1 - betas) * np.append(np.cumprod(betas[:0:-1])[::-1], 1)
    edges = np.arange(updates + 1) / updates
    np.testing.assert_allclose(shares, np.diff(edges ** (gamma + 1)), rtol=1e-10)


@pytest.mark.parametrize(("std", "step"), [(0.03, 800), (0.07, 800), (0.2, 800), (0.07, 750), (0.07, 1000)])
def test_combination_and_its_error_are_those_of_a_fit_on_a_fine_grid(std, step):
    given = [(stored, at) for stored in STORED for at in (200, 400, 600, 800) if at <= step]
    weights, error = grid_combination(given, std, step)
    np.testing.assert_allclose(combination(given, std, step), weights, rtol=1e-4, atol=1e-4)
    assert profile_error(given, std, step) == pytest.approx(error, rel=1e-4)


def test_a_profile_that_was_stored_is_taken_alone():
    given = [(std, step) for std in STORED for step in range(100, 1700, 100)]
    weights = combination(given, 0.10, 900)
    assert given[int(weights.argmax())] == (0.10, 900)
    assert weights.max() == pytest.approx(1, abs=1e-9)
    assert np.abs(np.sort(weights)[:-1]).max() < 1e-9
    assert profile_error(given, 0.10, 900) < 1e-6


@pytest.mark.parametrize("count", [1, 4, 256])
@pytest.mark.parametrize("std", [0.01, 0.07, 0.28])
def test_weights_add_up_to_one(count, std):
    given = [(stored, 1000 * (i + 1)) for stored in STORED for i in range(count)]
    for step in (1000 * count, 1700 * count):
        assert combination(given, std, step).sum() == pytest.approx(1, abs=1e-12)


def test_more_snapshots_come_nearer():
    errors = [
        profile_error([(std, 4096 // n * (i + 1)) for std in STORED for i in range(n)], 0.07, 4096)
        for n in (4, 16, 64, 256)
    ]
    assert errors[0] < 0.05
    assert all(later < earlier / 8 for earlier, later in pairwise(errors))


@pytest.mark.parametrize(("std", "share"), [(0.03, 0.05), (0.07, 0.005), (0.08, 0.005), (0.15, 0.005), (0.20, 0.02)])
def test_reconstruction_is_the_average_that_was_tracked(walk, std, share):
    wanted, snapshots = walk.tracked(std), walk.stored()
    found = distance(vector(reconstruct(snapshots, std)), wanted)
    # the weights of the error add up to 0, so Cauchy-Schwarz bounds it whatever the path of the weights
    gamma = gamma_of_std(std)
    norm = (gamma + 1) / np.sqrt((2 * gamma + 1) * STEPS)
    spread = np.linalg.norm(walk.weights - wanted.numpy())
    assert found < profile_error(profiles(snapshots), std, STEPS) * norm * spread + 1e-6 * float(wanted.norm())
    assert found < share * walk.nearest(wanted)


def test_reconstruction_of_an_earlier_step_is_the_average_that_was_tracked_then(walk):
    wanted = walk.tracked(0.07, 1024)
    found = vector(reconstruct(walk.stored(), 0.07, target_step=1024))
    assert distance(found, wanted) < 0.02 * walk.nearest(wanted, 1024)
    assert distance(found, wanted) < 0.01 * distance(walk.tracked(0.07), wanted)


def test_reconstruction_with_an_update_every_few_steps_is_the_average_that_was_tracked():
    walk = Walk(steps=1024, interval=64, update_every=8)
    wanted = walk.tracked(0.07, 1024)
    assert distance(vector(reconstruct(walk.stored(), 0.07)), wanted) < 0.005 * walk.nearest(wanted, 1024)


def test_weights_that_never_change_are_returned():
    tensors = {"w": torch.tensor([1000.0, -3.0])}
    snapshots = [Snapshot(std, step, tensors) for std in STORED for step in (100, 200, 300)]
    for std, step in ((0.01, 300), (0.28, 300), (0.07, 500)):
        torch.testing.assert_close(reconstruct(snapshots, std, step)["w"], tensors["w"], rtol=1e-7, atol=0)


def test_sums_are_those_of_float64(walk):
    snapshots = walk.stored()
    shifted = [Snapshot(s.std, s.step, {"weight": s.tensors["weight"] + 1}) for s in snapshots]
    weights = combination(profiles(shifted), 0.03, STEPS)
    expected = sum(w * s.tensors["weight"].double().numpy() for w, s in zip(weights, shifted, strict=True))
    found = reconstruct(shifted, 0.03)["weight"]
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=1e-7, atol=1e-9)


def test_half_precision_snapshots_cost_no_more_than_their_rounding(walk):
    halves = walk.stored(torch.float16)
    for std in WANTED:
        found = reconstruct(halves, std)
        assert all(tensor.dtype == torch.float32 for tensor in found.values())
        wanted = vector(reconstruct(walk.stored(), std))
        amplification = np.linalg.norm(combination(profiles(halves), std, STEPS))
        # half precision rounds by 2^-11 at most, by about 2^-12 on average; independently between snapshots
        assert distance(vector(found), wanted) < 2**-11 * amplification * float(wanted.norm())


def test_the_order_of_snapshots_does_not_matter(walk):
    snapshots = walk.stored()
    expected = reconstruct(snapshots, 0.08)
    rng = np.random.default_rng(1)
    for order in (range(len(snapshots))[::-1], rng.permutation(len(snapshots)), rng.permutation(len(snapshots))):
        found = reconstruct([snapshots[i] for i in order], 0.08)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_a_snapshot_given_twice_changes_nothing(walk):
    snapshots = walk.stored()
    found = vector(reconstruct([*snapshots, *snapshots[5:9]], 0.08))
    torch.testing.assert_close(found, vector(reconstruct(snapshots, 0.08)), rtol=1e-6, atol=1e-7)


class Read(Mapping):
    """Tensors that are read when asked for; `log` tells which."""

    def __init__(self, tensors, log):
        self._tensors, self._log = tensors, log

    def __getitem__(self, name):
        self._log.append(name)
        return self._tensors[name]

    def __iter__(self):
        return iter(self._tensors)

    def __len__(self):
        return len(self._tensors)


def test_snapshots_after_the_target_are_not_read(walk):
    earlier = [s for s in walk.stored() if s.step <= 1024]
    log = []
    later = [Snapshot(s.std, s.step, Read({}, log)) for s in walk.stored() if s.step > 1024]
    expected = reconstruct(earlier, 0.08)
    found = reconstruct([*later, *earlier], 0.08, target_step=1024)
    assert log == []
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_one_parameter_is_read_at_a_time_and_once_from_each_snapshot(walk):
    log = []
    snapshots = [Snapshot(s.std, s.step, Read(s.tensors, log)) for s in walk.stored()]
    reconstruct(snapshots, 0.08)
    assert log == ["weight"] * len(snapshots) + ["bias"] * len(snapshots)


def test_no_snapshots_are_rejected():
    with pytest.raises(ValueError, match="no snapshots"):
        reconstruct([], 0.05)


def test_snapshots_that_are_all_later_are_rejected():
    with pytest.raises(ValueError, match=r"no average at or before step 9; the steps are \[10\.0, 20\.0\]"):
        reconstruct([Snapshot(0.05, step, {"w": torch.zeros(2)}) for step in (20, 10)], 0.07, target_step=9)


def test_a_step_before_the_first_is_rejected():
    with pytest.raises(ValueError, match="step is 0, expected at least 1"):
        reconstruct([Snapshot(0.05, 0, {"w": torch.zeros(2)})], 0.07)


def test_snapshots_of_other_names_are_rejected():
    given = [Snapshot(0.05, 10, {"w": torch.zeros(2)}), Snapshot(0.05, 20, {"w": torch.zeros(2), "b": torch.zeros(1)})]
    for snapshots in (given, given[::-1]):
        with pytest.raises(ValueError, match="not all snapshots have b"):
            reconstruct(snapshots, 0.07)


def test_snapshots_of_other_shapes_are_rejected():
    # (1,) would be broadcast without a word
    given = [Snapshot(0.05, 10, {"w": torch.zeros(2)}), Snapshot(0.10, 20, {"w": torch.zeros(1)})]
    with pytest.raises(ValueError, match=r"w of the snapshot of std 0\.1 at step 20 is \(1,\), expected \(2,\)"):
        reconstruct(given, 0.07)
