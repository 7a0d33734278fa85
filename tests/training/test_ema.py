"""EMA against its closed formula; the weights come back bit for bit."""

import pytest
import torch

from ray_pipeline.training.ema import EMA

DECAY = 0.9


def model(seed=0):
    torch.manual_seed(seed)
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    network[0].bias.requires_grad_(False)
    return network


def set_weights(network, step):
    """Weights after optimizer step `step`: any known sequence."""
    with torch.no_grad():
        for number, parameter in enumerate(network.parameters()):
            parameter.copy_(torch.sin(torch.arange(parameter.numel()) + 0.7 * step + number).view_as(parameter))


def history(network, steps):
    """[weights after step 0, 1, ...] of 0.weight, float64."""
    found = []
    for step in range(steps + 1):
        set_weights(network, step)
        found.append(network[0].weight.detach().double().clone())
    return found


def run(ema, network, steps, start=1):
    for step in range(start, steps + 1):
        set_weights(network, step)
        ema.update(step)


def weighted_sum(past, first, taken):
    """decay^n * past[first] + sum of (1 - decay) decay^(n - i) past[taken[i - 1]]."""
    n = len(taken)
    total = DECAY**n * past[first]
    for i, step in enumerate(taken, start=1):
        total = total + (1 - DECAY) * DECAY ** (n - i) * past[step]
    return total


def average(ema):
    return ema.tensors()["0.weight"].double()


def test_average_is_the_closed_formula():
    network = model()
    past = history(network, 20)
    set_weights(network, 0)
    ema = EMA(network, DECAY)
    run(ema, network, 20)
    torch.testing.assert_close(average(ema), weighted_sum(past, 0, range(1, 21)), rtol=1e-5, atol=1e-6)


def test_update_every_takes_every_nth_step_only():
    network = model()
    past = history(network, 20)
    set_weights(network, 0)
    ema = EMA(network, DECAY, update_every=3)
    run(ema, network, 20)
    torch.testing.assert_close(average(ema), weighted_sum(past, 0, [3, 6, 9, 12, 15, 18]), rtol=1e-5, atol=1e-6)


def test_up_to_start_step_the_average_is_a_copy():
    network = model()
    past = history(network, 12)
    set_weights(network, 0)
    ema = EMA(network, DECAY, start_step=5)
    for step in range(1, 6):
        run(ema, network, step, start=step)
        assert torch.equal(ema.tensors()["0.weight"], network[0].weight)
    run(ema, network, 12, start=6)
    torch.testing.assert_close(average(ema), weighted_sum(past, 5, range(6, 13)), rtol=1e-5, atol=1e-6)


def test_it_is_saved_under_its_decay_as_given():
    assert [EMA(model(), decay).group for decay in (0.9999, 0.5)] == ["ema_decay_0.9999", "ema_decay_0.5"]


def test_only_trained_parameters_are_averaged_and_none_shares_memory():
    network = model()
    ema = EMA(network, DECAY)
    assert list(ema.tensors()) == ["0.weight", "1.weight", "1.bias"]
    before = {name: tensor.clone() for name, tensor in ema.tensors().items()}
    set_weights(network, 3)
    assert all(torch.equal(ema.tensors()[name], before[name]) for name in before)


def test_within_applied_the_model_computes_with_the_averages_and_gets_its_bits_back():
    network = model()
    ema = EMA(network, DECAY)
    run(ema, network, 7)
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    averages = {name: tensor.clone() for name, tensor in ema.tensors().items()}
    x = torch.randn(5, 3)
    expected = torch.func.functional_call(network, averages, x)
    plain = network(x)
    with ema.applied():
        assert torch.equal(network(x), expected)
    assert torch.equal(network(x), plain)
    assert not torch.equal(expected, plain)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())
    assert all(torch.equal(tensor, averages[name]) for name, tensor in ema.tensors().items())


def test_an_exception_within_applied_leaves_weights_and_averages_in_their_places():
    network = model()
    ema = EMA(network, DECAY)
    run(ema, network, 7)
    weights, averages = network[0].weight.detach().clone(), ema.tensors()["0.weight"].clone()
    with pytest.raises(RuntimeError, match="validation failed"), ema.applied():
        raise RuntimeError("validation failed")
    assert torch.equal(network[0].weight, weights)
    assert torch.equal(ema.tensors()["0.weight"], averages)


def test_training_goes_on_after_applied_as_if_it_had_not_been():
    """The optimizer and the EMA must still hold the tensors that the model computes with."""
    results = []
    for interrupted in (False, True):
        network = model()
        optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=0.1, fused=True)
        ema = EMA(network, DECAY)
        for step in range(1, 6):
            network(torch.ones(2, 3) * step).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update(step)
            if interrupted:
                with ema.applied():
                    network(torch.ones(2, 3))
        results.append([*network.state_dict().values(), *ema.tensors().values()])
    assert all(map(torch.equal, *results))


def test_load_goes_on_from_the_saved_averages():
    network = model()
    ema = EMA(network, DECAY)
    run(ema, network, 10)
    saved = {name: tensor.clone() for name, tensor in ema.tensors().items()}
    run(ema, network, 15, start=11)
    other = model(seed=1)
    resumed = EMA(other, DECAY)
    resumed.load(saved)
    run(resumed, other, 15, start=11)
    for name, tensor in ema.tensors().items():
        assert torch.equal(resumed.tensors()[name], tensor)


def test_load_without_a_parameter_raises_and_changes_nothing():
    network = model()
    ema = EMA(network, DECAY)
    before = ema.tensors()["0.weight"].clone()
    with pytest.raises(KeyError, match=r"1\.bias"):
        ema.load({"0.weight": torch.zeros(4, 3), "1.weight": torch.zeros(2, 4)})
    assert torch.equal(ema.tensors()["0.weight"], before)
