"""From the config's words to network, optimizer, averages and state; and from phase to phase through checkpoints."""

import pytest
import torch

from ray_pipeline.checkpoints import CheckpointStore
from ray_pipeline.config import parse_config
from ray_pipeline.errors import UserError
from ray_pipeline.training.build import make_averages, make_edm, make_network, make_state, precision
from ray_pipeline.training.ema import EMA, PowerTrack
from ray_pipeline.training.loss import TrainingLoss
from ray_pipeline.training.state import load_weights

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = {"architecture": "custom", "latent_size": 8, "depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 4}
PRIOR = {"name": "prior", "epochs": 1}
HINTS = {"name": "hints", "epochs": 1, "condition_types": ["denoising", "canny"]}
LORA = HINTS | {"name": "lora", "trainable": "lora"}
OWN = ("aligned_hint.", "hint_lora.")


def make_config(*phases, **sections):
    """A config of these phases; sections add to the defaults."""
    tree = {"phases": list(phases or [PRIOR]), "data": {"tile_size": 64}, "model": MODEL}
    return parse_config({**tree, **sections, "model": MODEL | sections.get("model", {})})


def of_phase(config, name):
    return next(phase for phase in config.phases if phase.name == name)


def build(config, name, seed=0):
    torch.manual_seed(seed)
    return make_network(config, of_phase(config, name))


def trained(network):
    return {name for name, p in network.named_parameters() if p.requires_grad}


def everything(network):
    return {name for name, _ in network.named_parameters()} - {"pos_embed"}


@pytest.mark.parametrize(
    ("phases", "name", "has_lora", "has_aligned", "trains"),
    [
        ([PRIOR], "prior", False, False, "everything"),
        ([PRIOR, HINTS], "hints", False, True, "everything"),
        ([PRIOR, LORA], "lora", True, True, "hint control"),
        ([PRIOR, LORA], "prior", False, False, "everything"),
        ([PRIOR, HINTS, LORA], "hints", False, True, "everything"),
        ([PRIOR, HINTS, LORA], "lora", True, True, "hint control"),
        ([PRIOR, LORA, HINTS], "hints", True, True, "everything"),
        ([PRIOR, LORA, LORA | {"name": "again"}], "again", True, True, "hint control"),
        ([LORA | {"init": "a.ckpt"}, PRIOR], "prior", False, False, "everything"),
    ],
    ids=lambda value: "-".join(phase["name"] for phase in value) if isinstance(value, list) else str(value),
)
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "tokens only"])
def test_a_phase_has_and_trains_what_the_config_says(phases, name, has_lora, has_aligned, trains, aligned):
    control = {"aligned": aligned, "lora_rank": 5, "lora_targets": ["proj", "qkv"]}
    network = build(make_config(*phases, hint_control=control), name)
    assert (network.aligned_hint is not None) == (has_aligned and aligned)
    assert (network.hint_lora is not None) == has_lora
    if has_lora:
        assert (network.shape["lora_rank"], network.shape["lora_targets"]) == (5, ["proj", "qkv"])
        assert [set(block) for block in network.hint_lora.blocks] == [{"proj", "qkv"}, {"qkv"}]
        assert network.hint_lora.blocks[0]["proj"][0].weight.shape == (5, 32)
    own = {name for name, _ in network.named_parameters() if name.startswith(OWN)}
    assert trained(network) == (own if trains == "hint control" else everything(network))


def test_a_phase_that_would_train_nothing_is_refused():
    """In the last block, here the only one, hints pass no proj; without the aligned path nothing is left."""
    config = make_config(PRIOR, LORA, model={"depth": 1}, hint_control={"aligned": False, "lora_targets": ["proj"]})
    with pytest.raises(UserError, match=r"phase lora has nothing to train: .*lora_targets proj; add qkv"):
        build(config, "lora")


def test_low_rank_parts_are_of_rank_16_in_five_kinds_of_layers_unless_told():
    network = build(make_config(PRIOR, LORA), "lora")
    assert network.shape["lora_rank"] == 16
    assert set(network.hint_lora.blocks[0]) == {"adaLN_modulation", "qkv", "proj", "fc2"}
    assert network.hint_lora.x_embedder is not None


def test_the_model_section_reaches_the_network():
    model = {"dropout": 0.3, "qk_norm": True, "noise_embedding": "fourier"}
    config = make_config(HINTS, model=model, train={"activation_checkpointing": True})
    network = build(config, "hints")
    assert network.activation_checkpointing
    assert network.blocks[0].attn.proj_drop.p == network.blocks[1].mlp.drop1.p == 0.3
    assert isinstance(network.blocks[0].attn.q_norm, torch.nn.RMSNorm)
    assert network.t_embedder.fourier is not None
    shape = {k: v for k, v in MODEL.items() if k != "architecture"}
    assert network.shape.items() >= (shape | {"noise_embedding": "fourier", "qk_norm": True, "aligned": True}).items()
    plain = build(make_config(HINTS), "hints")
    assert not plain.activation_checkpointing
    assert not any(module.p for module in plain.modules() if isinstance(module, torch.nn.Dropout))


def test_the_scheduler_section_is_the_diffusion_process():
    values = {"sigma_min": 0.01, "sigma_max": 50.0, "sigma_data": 0.7, "rho": 5.0, "prediction_type": "epsilon"}
    values |= {"P_mean": -0.4, "P_std": 1.0}
    assert vars(make_edm(make_config(scheduler=values))) == values


def test_precision_is_the_one_that_is_asked_for():
    assert precision(make_config(train={"precision": "fp32"}), "cuda") == "fp32"
    assert precision(make_config(train={"precision": "bf16"}), "cpu") == "bf16"
    assert precision(make_config(), "cuda") == "bf16"


def test_averages_are_those_of_the_ema_section_the_first_for_validation():
    ema = {"decay": 0.99, "more_decays": [0.9, 0.9999], "power_stds": [0.05, 0.1, 0.2]}
    config = make_config(ema=ema | {"update_every": 4, "start_step": 30})
    averages = make_averages(config, build(config, "prior"))
    powers = ["ema_power_0.05", "ema_power_0.1", "ema_power_0.2"]
    decays = ["ema_decay_0.99", "ema_decay_0.9", "ema_decay_0.9999"]
    assert [average.group for average in averages] == decays + powers
    assert [type(average) for average in averages] == [EMA] * 3 + [PowerTrack] * 3
    assert {average.update_every for average in averages} == {4}
    assert {average.start_step for average in averages[:3]} == {30}
    assert make_state(config, build(config, "prior")).ema.group == "ema_decay_0.99"
    # by default one of each kind of use: validation, and two tracks that give any other width
    defaults = make_averages(make_config(), build(config, "prior"))
    assert [average.group for average in defaults] == ["ema_decay_0.9999", "ema_power_0.05", "ema_power_0.1"]


def test_without_ema_there_is_no_average_at_all():
    config = make_config(ema={"enabled": False, "more_decays": [0.9]})
    state = make_state(config, build(config, "prior"))
    assert state.averages == []
    assert state.ema is None
    assert set(state.groups()) == {"model", "optimizer"}


def test_optimizer_and_averages_take_what_is_trained_alone():
    settings = {"lr": 3e-4, "betas": [0.8, 0.95], "eps": 1e-7, "weight_decay": 0.02}
    config = make_config(PRIOR, LORA, optimizer=settings)
    network = build(config, "lora")
    state = make_state(config, network)
    given = [p for group in state.optimizer.param_groups for p in group["params"]]
    own = [p for name, p in network.named_parameters() if name.startswith(OWN)]
    assert {id(p) for p in given} == {id(p) for p in own}
    assert len(given) == len(own)
    assert all(set(average.tensors()) == trained(network) for average in state.averages)
    group = state.optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (3e-4, (0.8, 0.95), 1e-7, 0.02)
    assert group["fused"]


def train(state, config, steps, hints=0):
    """Optimizer steps on the objective, whose data is a function of the step alone."""
    loss = TrainingLoss(make_edm(config), state.network, state.uncertainty)
    for _ in range(steps):
        generator = torch.Generator().manual_seed(state.step)
        batch = {"x0": torch.randn(8, 4, 8, 8, generator=generator) * 0.5}
        batch["noise"] = torch.randn(8, 4, 8, 8, generator=generator)
        batch["z"] = torch.randn(8, generator=generator)
        if hints:
            noise = torch.randn(8, hints, 4, 8, 8, generator=generator)
            batch["hints"] = batch["x0"][:, None] + 0.05 * noise
            batch["mask"] = torch.rand(8, hints, generator=generator) > 0.2
        loss(**batch)[1].mean().backward()
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        for average in state.averages:
            average.update(state.step)


@pytest.fixture
def save(tmp_path, header_for):
    """(state, phase name) -> the committed checkpoint of a state, as training makes it."""

    def save(state, phase="prior"):
        header = header_for(state.network, phase=phase, step=state.step, ema=state.ema and state.ema.group)
        about = {"phase": phase, "step": state.step, "skipped": [], "weights": header.model_dump(mode="json")}
        store = CheckpointStore(tmp_path / "checkpoints")
        return store.load(store.save(f"{phase}_{state.step}", state.groups(), about, header.metadata()))

    return save


def assert_same(one, other):
    assert one.groups().keys() == other.groups().keys()
    for group, tensors in one.groups().items():
        assert tensors.keys() == other.groups()[group].keys()
        assert all(torch.equal(tensor, other.groups()[group][name]) for name, tensor in tensors.items()), group


UNCERTAIN = {"train": {"uncertainty_weighting": True}, "optimizer": {"lr": 1e-2}, "ema": {"start_step": 2}}


def test_an_uncertainty_is_trained_and_saved_with_the_network(save):
    config = make_config(**UNCERTAIN)
    state = make_state(config, build(config, "prior"))
    names = {"loss_uncertainty.linear.weight", "loss_uncertainty.linear.bias"}
    assert set(state.trained()) == trained(state.network) | names
    given = {id(p) for group in state.optimizer.param_groups for p in group["params"]}
    assert given == {id(p) for p in state.trained().values()}
    train(state, config, 3)
    assert state.uncertainty.linear.bias != 0
    assert (state.uncertainty.linear.weight != 0).all()
    checkpoint = save(state)
    assert set(checkpoint) == {
        "model", "optimizer", "loss_uncertainty", "ema_decay_0.9999", "ema_power_0.05", "ema_power_0.1",
    }  # fmt: skip
    assert set(checkpoint["loss_uncertainty"]) >= {"linear.weight", "linear.bias"}
    assert {f"{name}/exp_avg_sq" for name in names} <= set(checkpoint["optimizer"])
    # no part of the network or of its averages: those are used without it
    assert not any("uncertainty" in name for group in set(checkpoint) - {"optimizer"} for name in checkpoint[group])
    assert make_state(make_config(), build(config, "prior")).uncertainty is None


@pytest.mark.parametrize("phase", ["prior", "lora"])
def test_going_on_from_a_checkpoint_with_uncertainty_equals_never_having_stopped(save, phase):
    config, hints = make_config(PRIOR, LORA, **UNCERTAIN), 2 * (phase == "lora")
    whole = make_state(config, build(config, phase))
    train(whole, config, 7, hints)
    half = make_state(config, build(config, phase))
    train(half, config, 4, hints)
    resumed = make_state(config, build(config, phase, seed=99))
    resumed.restore(save(half, phase))
    assert_same(resumed, half)
    train(resumed, config, 3, hints)
    assert_same(resumed, whole)
    assert resumed.step == 7


def test_a_checkpoint_without_an_uncertainty_cannot_go_on_with_one(save):
    plain = make_config()
    checkpoint = save(make_state(plain, build(plain, "prior")))
    config = make_config(**UNCERTAIN)
    with pytest.raises(UserError, match=r"ema_power_0\.1, not loss_uncertainty; resume with the ema"):
        make_state(config, build(config, "prior")).restore(checkpoint)


def outputs(network, count=2):
    """Without hints, and with these many."""
    generator = torch.Generator().manual_seed(7)
    x, c_noise = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([-1.0, 0.3])
    hints = torch.randn(2, count, 4, 8, 8, generator=generator)
    with torch.no_grad():
        return network.eval()(x, c_noise), network(x, c_noise, hints)


def test_a_low_rank_phase_and_a_full_one_after_it_begin_where_the_phase_before_ended(save):
    settings = {"optimizer": {"lr": 1e-2}, "ema": {"decay": 0.8, "start_step": 0}, "hint_control": {"lora_rank": 3}}
    config = make_config(PRIOR, LORA, HINTS, **settings)
    prior = make_state(config, build(config, "prior"))
    train(prior, config, 30)
    with prior.ema.applied():
        unconditional, by_tokens = outputs(prior.network)
    assert unconditional.abs().max() > 0.01

    lora = build(config, "lora", seed=1)
    load_weights(lora, save(prior))
    assert torch.equal(outputs(lora)[0], unconditional)
    assert torch.equal(outputs(lora)[1], by_tokens)
    state = make_state(config, lora.train())
    train(state, config, 20, hints=2)
    with state.ema.applied():
        after = outputs(lora)
    assert torch.equal(after[0], unconditional)
    assert (after[1] - by_tokens).abs().max() > 0.01
    for name, tensor in prior.ema.tensors().items():
        assert torch.equal(lora.state_dict()[name], tensor), name

    full = build(config, "hints", seed=2)
    load_weights(full, save(state, "lora"))
    assert all(map(torch.equal, outputs(full), after))
    assert trained(full) == everything(full)
    state = make_state(config, full.train())
    train(state, config, 3, hints=2)
    moved = {name for name, tensor in full.state_dict().items() if not torch.equal(tensor, lora.state_dict()[name])}
    assert {name.partition(".")[0] for name in moved} >= {"hint_lora", "aligned_hint", "blocks", "x_embedder"}


def test_a_full_phase_with_hints_begins_as_the_unconditional_network(save):
    config = make_config(PRIOR, HINTS, optimizer={"lr": 1e-2}, ema={"start_step": 0, "decay": 0.5})
    prior = make_state(config, build(config, "prior"))
    train(prior, config, 10)
    with prior.ema.applied():
        expected = outputs(prior.network)
    full = build(config, "hints", seed=1)
    load_weights(full, save(prior))
    assert all(map(torch.equal, outputs(full), expected))


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"phases": [PRIOR | {"trainable": "lora"}]}, r"phase prior has no condition_types; give it some"),
        ({"phases": [LORA]}, r"phases\.0\.trainable: lora .* lora is the first phase, so its network is untrained"),
        ({"phases": [PRIOR | {"trainable": "LoRA"}]}, r"phases\.0\.trainable: input should be 'full' or 'lora'"),
        ({"hint_control": {"lora_targets": ["qkv", "q_proj"]}}, r"lora_targets\.1: input should be .*'fc2'.*'q_proj'"),
        ({"hint_control": {"lora_targets": ["qkv", "fc1", "qkv"]}}, r"lists an entry twice: qkv, fc1, qkv"),
        ({"hint_control": {"lora_targets": []}}, r"hint_control\.lora_targets: .*at least 1 item"),
        ({"hint_control": {"lora_rank": 0}}, r"hint_control\.lora_rank: .*greater than 0, found 0"),
        ({"hint_control": {"rank": 4}}, r"unknown key hint_control\.rank; the nearest .*hint_control\.lora_rank"),
        ({"ema": {"decay": 0.99, "more_decays": [0.9, 0.99]}}, r"ema: more_decays: two averages of 0\.99; name each"),
        ({"ema": {"more_decays": [0.9, 0.99, 0.9]}}, r"ema: more_decays: two averages of 0\.9; name each once"),
        ({"ema": {"more_decays": [0.9999]}}, r"ema: more_decays: two averages of 0\.9999; name each once"),
        ({"ema": {"power_stds": [0.05, 0.05]}}, r"ema: power_stds: two averages of 0\.05; name each once"),
        ({"ema": {"power_stds": [0.3]}}, r"ema\.power_stds\.0: .*less than or equal to 0\.25, found 0\.3"),
        ({"ema": {"more_decays": [1.0]}}, r"ema\.more_decays\.0: .*less than 1, found 1\.0"),
        ({"ema": {"snapshots": -1}}, r"ema\.snapshots: .*greater than or equal to 0, found -1"),
    ],
    ids=str,
)
def test_what_cannot_be_built_is_refused_by_its_key(tree, words):
    with pytest.raises(UserError, match=words):
        make_config(**({"phases": [PRIOR]} | tree))
