"""Power-function averages: their profile, read off by weights that are 1 at their own step alone."""

import numpy as np
import pytest
import torch

from ray_pipeline.training.ema import EMA, PowerEMA

pytestmark = pytest.mark.usefixtures("one_thread")

STDS = (0.05, 0.10)


def exponent(std):
    """gamma of a relative std, by bisection: the std falls as gamma grows."""
    low, high = 0.0, 1e4
    for _ in range(200):
        middle = (low + high) / 2
        is_wide = (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > std**2
        low, high = (middle, high) if is_wide else (low, middle)
    return low


def product_profile(gamma, updates):
    """Weight of each of the `updates` weights after the last: (1 - beta_i) times all later betas, float64."""
    betas = [(1 - 1 / i) ** (gamma + 1) for i in range(1, updates + 1)]
    return np.array([(1 - beta) * np.prod(betas[i:]) for i, beta in enumerate(betas, start=1)])


def measured_profile(std, steps, update_every=1):
    """Weight of each step's weights in the average after the last, (steps,), and that of the initial weights."""
    network = torch.nn.Linear(steps + 1, 1, bias=False, dtype=torch.float64)
    weights = torch.eye(steps + 1, dtype=torch.float64)[:, None]
    with torch.no_grad():
        network.weight.copy_(weights[0])
        power = PowerEMA(network, [std], update_every)
        for step in range(1, steps + 1):
            network.weight.copy_(weights[step])
            power.update(step)
    profile = power[std].tensors()["weight"].squeeze().numpy()
    return profile[1:], profile[0]


def model(seed=0):
    torch.manual_seed(seed)
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    network[0].bias.requires_grad_(False)
    return network


def run(tracks, network, steps, start=1):
    """Weights of any known sequence, taken in by each track."""
    for step in range(start, steps + 1):
        with torch.no_grad():
            for number, parameter in enumerate(network.parameters()):
                parameter.copy_(torch.sin(torch.arange(parameter.numel()) + 0.7 * step + number).view_as(parameter))
        for track in tracks:
            track.update(step)


def copies(track):
    return {name: tensor.clone() for name, tensor in track.tensors().items()}


def same(tensors, others):
    return tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)


@pytest.mark.parametrize("std", [*STDS, 0.25])
@pytest.mark.parametrize("steps", [1, 2, 150])
def test_the_average_is_the_weighted_sum_of_the_product_formula(std, steps):
    profile, initial = measured_profile(std, steps)
    np.testing.assert_allclose(profile, product_profile(exponent(std), steps), rtol=1e-9, atol=1e-15)
    assert initial == 0


def test_an_update_every_few_steps_has_the_profile_of_as_many_updates():
    profile, initial = measured_profile(0.10, 152, update_every=3)
    taken = np.arange(1, 153) % 3 == 0
    np.testing.assert_allclose(profile[taken], product_profile(exponent(0.10), 50), rtol=1e-9, atol=1e-15)
    assert not profile[~taken].any()
    assert initial == 0


def test_the_profile_tends_to_the_power_function():
    gamma, errors = exponent(0.10), []
    for steps in (100, 400, 1600):
        profile, _ = measured_profile(0.10, steps)
        times = np.arange(1, steps + 1) / steps
        power = (gamma + 1) * times**gamma / steps
        errors.append(np.linalg.norm(profile - power) / np.linalg.norm(power))
    assert errors[0] < 0.05
    assert errors[1] == pytest.approx(errors[0] / 4, rel=0.1)
    assert errors[2] == pytest.approx(errors[1] / 4, rel=0.1)


@pytest.mark.parametrize("std", [*STDS, 0.20])
def test_the_profile_has_the_relative_std_that_was_asked_for(std):
    steps = 1000
    profile, _ = measured_profile(std, steps)
    times = np.arange(1, steps + 1) / steps
    mean = profile @ times
    assert profile.sum() == pytest.approx(1, abs=1e-12)
    assert np.sqrt(profile @ (times - mean) ** 2) == pytest.approx(std, rel=1e-3)


def test_before_the_first_update_the_average_is_the_initial_weights_and_then_the_first_taken_in():
    network = model()
    power = PowerEMA(network, STDS, update_every=3)
    initial = {name: p.detach().clone() for name, p in network.named_parameters() if p.requires_grad}
    run([power], network, 2)
    assert all(same(track.tensors(), initial) for track in power.tracks)
    run([power], network, 3, start=3)
    for track in power.tracks:
        assert all(torch.equal(tensor, network.get_parameter(name)) for name, tensor in track.tensors().items())
    run([power], network, 5, start=4)
    assert not any(torch.equal(track.tensors()["1.weight"], network[1].weight) for track in power.tracks)


def test_only_trained_parameters_are_averaged_and_none_shares_memory():
    network = model()
    power = PowerEMA(network, STDS)
    before = [copies(track) for track in power.tracks]
    run([], network, 3)
    for track, tensors in zip(power.tracks, before, strict=True):
        assert list(track.tensors()) == ["0.weight", "1.weight", "1.bias"]
        assert same(track.tensors(), tensors)


def test_tracks_of_one_run_do_not_influence_each_other():
    network = model()
    together = [EMA(network, 0.9), EMA(network, 0.99, start_step=4), *PowerEMA(network, STDS).tracks]
    run(together, network, 10)
    with together[0].applied(), together[3].applied():
        pass
    run(together, network, 20, start=11)
    for index, track in enumerate(together):
        network = model()
        alone = [EMA(network, 0.9), EMA(network, 0.99, start_step=4), *PowerEMA(network, STDS).tracks][index]
        run([alone], network, 20)
        assert same(track.tensors(), alone.tensors())
    assert not same(together[2].tensors(), together[3].tensors())


def test_within_applied_the_model_computes_with_the_track_and_gets_its_bits_back_even_after_an_exception():
    network = model()
    power = PowerEMA(network, STDS)
    run([power], network, 9)
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    x = torch.randn(5, 3)
    for track in power.tracks:
        averages = copies(track)
        expected = torch.func.functional_call(network, averages, x)
        with track.applied():
            assert torch.equal(network(x), expected)
        assert same(network.state_dict(), weights)
        with pytest.raises(RuntimeError, match="validation failed"), track.applied():
            raise RuntimeError("validation failed")
        assert same(network.state_dict(), weights)
        assert same(track.tensors(), averages)


def test_saved_tracks_go_on_by_their_groups():
    network = model()
    tracks = [EMA(network, 0.9999), *PowerEMA(network, STDS).tracks]
    run(tracks, network, 10)
    saved = {track.group: copies(track) for track in tracks}
    assert list(saved) == ["ema_decay_0.9999", "ema_power_0.05", "ema_power_0.1"]
    run(tracks, network, 15, start=11)
    network = model(seed=1)
    resumed = [EMA(network, 0.9999), *PowerEMA(network, STDS).tracks]
    for track in resumed:
        track.load(saved[track.group])
    run(resumed, network, 15, start=11)
    assert all(same(track.tensors(), other.tensors()) for track, other in zip(tracks, resumed, strict=True))


def test_a_track_is_found_by_its_std():
    power = PowerEMA(model(), STDS)
    assert power[0.10] is power.tracks[1]
    with pytest.raises(KeyError):
        power[0.07]


def test_a_std_given_twice_is_rejected():
    with pytest.raises(ValueError, match=r"stds are \[0\.05, 0\.05\], expected each once"):
        PowerEMA(model(), (0.05, 0.05))


def test_a_std_that_no_profile_has_is_rejected():
    with pytest.raises(ValueError, match=r"relative std is 0\.3"):
        PowerEMA(model(), (0.05, 0.3))
