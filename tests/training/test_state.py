"""What a checkpoint holds is enough: going on from it equals never having stopped, bit for bit."""

import pytest
import torch

from ray_pipeline.checkpoints import CheckpointStore
from ray_pipeline.errors import UserError
from ray_pipeline.models.dit import build_dit
from ray_pipeline.training.ema import EMA
from ray_pipeline.training.state import TrainState, load_weights

SIZES = {"latent_size": 8, "depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 4}


def make_state(seed=0, fused=True, decay=0.9, aligned=False, **overrides):
    torch.manual_seed(seed)
    network = build_dit("custom", **{**SIZES, **overrides}, aligned=aligned)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.01, fused=fused)
    return TrainState(network, optimizer, [EMA(network, decay)] if decay else [])


def train(state, steps):
    """Optimizer steps whose data is a function of the step alone."""
    for _ in range(steps):
        generator = torch.Generator().manual_seed(state.step)
        x, target = (torch.randn(4, 4, 8, 8, generator=generator) for _ in range(2))
        loss = (state.network(x, torch.rand(4, generator=generator)) - target).square().mean()
        loss.backward()
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        for average in state.averages:
            average.update(state.step)
    return state


@pytest.fixture
def save(tmp_path, header_for):
    """(state, name) -> the committed checkpoint of a state, as training makes it."""

    def save(state, name="phase1_epoch_001"):
        store = CheckpointStore(tmp_path / "checkpoints")
        header = header_for(state.network, step=state.step, ema=state.ema and state.ema.group)
        about = {"phase": "phase1", "step": state.step, "skipped": state.skipped}
        about["weights"] = header.model_dump(mode="json")
        store.save(name, state.groups(), about, header.metadata())
        return CheckpointStore(tmp_path / "checkpoints").load(name)

    return save


def assert_same_groups(one, other):
    one, other = one.groups(), other.groups()
    assert one.keys() == other.keys()
    for group in one:
        assert one[group].keys() == other[group].keys()
        for name, tensor in one[group].items():
            assert torch.equal(tensor, other[group][name]), f"{group}/{name}"
            assert tensor.dtype == other[group][name].dtype, f"{group}/{name}"


@pytest.mark.parametrize("fused", [True, False])
def test_n_plus_m_steps_equal_n_steps_a_save_a_load_and_m_steps(save, fused):
    whole = train(make_state(fused=fused), 7)
    half = train(make_state(fused=fused), 4)
    half.skipped.append(2)
    checkpoint = save(half)
    resumed = make_state(seed=99, fused=fused)
    resumed.restore(checkpoint)
    assert (resumed.step, resumed.skipped) == (4, [2])
    train(resumed, 3)
    assert resumed.step == whole.step
    assert_same_groups(resumed, whole)


def test_the_optimizer_state_is_needed_for_that(save):
    """Guards the test above: with the moments left out, the weights differ."""
    whole = train(make_state(), 7)
    half = train(make_state(), 4)
    resumed = make_state(seed=99)
    resumed.restore(save(half))
    resumed.optimizer.state.clear()
    train(resumed, 3)
    assert not torch.equal(resumed.network.x_embedder.proj.weight, whole.network.x_embedder.proj.weight)


def test_a_save_before_the_first_step_is_a_start(save):
    resumed = make_state(seed=99)
    resumed.restore(save(make_state()))
    assert_same_groups(train(resumed, 3), train(make_state(), 3))


def test_a_checkpoint_holds_network_optimizer_and_ema_by_parameter_name(save):
    checkpoint = save(train(make_state(decay=0.9999), 2))
    assert set(checkpoint) == {"model", "optimizer", "ema_decay_0.9999"}
    parameter = "blocks.1.attn.qkv.weight"
    assert parameter in checkpoint["model"]
    assert parameter in checkpoint["ema_decay_0.9999"]
    optimizer = checkpoint["optimizer"]
    assert {name.rpartition("/")[2] for name in optimizer} == {"step", "exp_avg", "exp_avg_sq"}
    assert float(optimizer[f"{parameter}/step"]) == 2
    assert "pos_embed/exp_avg" not in optimizer


@pytest.mark.parametrize("decay", [0.9, 0.9999, 0.99999995])
def test_an_ema_file_names_its_decay_exactly(decay):
    assert make_state(decay=decay).ema.group == f"ema_decay_{decay!r}"


def test_without_ema_none_is_saved_and_none_is_asked_for(save):
    state = train(make_state(decay=None), 2)
    checkpoint = save(state)
    assert set(checkpoint) == {"model", "optimizer"}
    resumed = make_state(seed=99, decay=None)
    resumed.restore(checkpoint)
    assert_same_groups(resumed, state)


def test_resuming_with_another_ema_decay_is_refused(save):
    checkpoint = save(make_state(decay=0.9))
    with pytest.raises(UserError, match=r"holds model, .*, ema_decay_0\.9, not ema_decay_0\.99; resume"):
        make_state(decay=0.99).restore(checkpoint)


@pytest.mark.parametrize("way", ["restore", "load_weights"])
@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        ({"depth": 3}, "depth 2, not 3"),
        ({"hidden_size": 64}, "hidden_size 32, not 64"),
        ({"patch_size": 2}, "patch_size 4, not 2"),
        ({"num_heads": 2}, "num_heads 4, not 2"),
        ({"noise_embedding": "reference"}, "noise_embedding scaled, not reference"),
        ({"num_heads": 2, "depth": 1}, "depth 2, not 1, num_heads 4, not 2"),
    ],
)
def test_another_architecture_is_named(save, way, overrides, found):
    """num_heads and noise_embedding change no shape: their weights would load and compute nonsense."""
    checkpoint, other = save(make_state()), make_state(**overrides)
    before = other.network.x_embedder.proj.weight.detach().clone()
    with pytest.raises(UserError, match=f"phase1_epoch_001.ckpt does not fit the model section .it has {found}"):
        other.restore(checkpoint) if way == "restore" else load_weights(other.network, checkpoint)
    assert torch.equal(other.network.x_embedder.proj.weight, before)


def test_a_checkpoint_that_does_not_say_what_it_is_is_refused(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save("old", make_state().groups(), {"step": 0, "phase": "phase1"})
    with pytest.raises(UserError, match=r"old\.ckpt does not say what its weights are"):
        load_weights(make_state().network, store.load("old"))


def test_a_phase_begins_with_the_averaged_weights_of_the_one_before(save):
    state = train(make_state(), 5)
    network = make_state(seed=99).network
    load_weights(network, save(state))
    for name, tensor in state.ema.tensors().items():
        assert torch.equal(network.state_dict()[name], tensor), name
    assert not torch.equal(network.x_embedder.proj.weight, state.network.x_embedder.proj.weight)
    assert torch.equal(network.pos_embed, state.network.pos_embed)


def test_without_an_average_a_phase_begins_with_the_plain_weights(save):
    state = train(make_state(decay=None), 3)
    network = make_state(seed=99).network
    load_weights(network, save(state))
    assert torch.equal(network.final_layer.linear.weight, state.network.final_layer.linear.weight)


def test_a_phase_with_hints_begins_as_the_unconditional_network(save):
    state = train(make_state(), 5)
    network = make_state(seed=99, aligned=True).network
    load_weights(network, save(state))
    assert (network.aligned_hint.embedder.proj.weight == 0).all()
    x, c_noise = torch.randn(2, 4, 8, 8), torch.zeros(2)
    with state.ema.applied():
        assert torch.equal(network(x, c_noise), state.network(x, c_noise))


def test_nothing_but_hint_control_may_be_new_or_left_over(save):
    state = make_state(aligned=True)
    checkpoint = save(state, "with_hints")
    with pytest.raises(UserError, match=r"first differing parameter: aligned_hint\.embedder"):
        load_weights(make_state().network, checkpoint)
    plain = make_state(decay=None)
    plain.network.final_layer.linear.register_parameter("bias", None)
    with pytest.raises(UserError, match=r"first differing parameter: final_layer\.linear\.bias"):
        load_weights(make_state(aligned=True).network, save(plain, "incomplete"))
