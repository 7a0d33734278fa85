"""Low-rank parts of the hint branch: W + B A where hints pass, W alone, to the bit, where image tokens do."""

import pytest
import torch

from ray_pipeline.diffusion.edm import EDM
from ray_pipeline.models.architectures import LORA_TARGETS
from ray_pipeline.models.dit import build_dit
from ray_pipeline.models.lora import HintLoRA

SIZES = {"latent_size": 8, "depth": 3, "hidden_size": 32, "num_heads": 4, "patch_size": 2}
LAYERS = {
    "adaLN_modulation": "adaLN_modulation.1",
    "qkv": "attn.qkv",
    "proj": "attn.proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
EACH_AND_ALL = [*((target,) for target in LORA_TARGETS), LORA_TARGETS]

pytestmark = pytest.mark.usefixtures("one_thread")


def of_targets(function):
    return pytest.mark.parametrize("targets", EACH_AND_ALL, ids=lambda targets: "+".join(targets))(function)


def draw_weights(module, seed, std=0.1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, std, generator=generator)


def make_base(**overrides):
    """A network whose every trained parameter is non-zero."""
    network = build_dit("custom", **(SIZES | overrides))
    draw_weights(network, seed=0)
    return network.eval()


def make_lora(base, targets=LORA_TARGETS, trained=True, **overrides):
    """The network with the weights of `base` and low-rank parts, of which B is random, or zero if not `trained`."""
    network = build_dit("custom", **(SIZES | overrides), lora_rank=3, lora_targets=targets)
    missing, unexpected = network.load_state_dict(base.state_dict(), strict=False)
    assert {name.partition(".")[0] for name in missing} <= {"hint_lora", "aligned_hint"}
    assert not unexpected
    if trained:
        for seed, part in enumerate((network.hint_lora, network.aligned_hint), start=1):
            if part is not None:
                draw_weights(part, seed, std=0.3)
    return network.eval()


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(2, 4, 8, 8, generator=generator),
        "c_noise": torch.tensor([-1.2, 0.4]),
        "hints": torch.randn(2, 3, 4, 8, 8, generator=generator),
    }


@pytest.fixture(scope="module")
def base():
    return make_base()


def differs(one, other):
    return float((one - other).detach().abs().max()) > 1e-3


def loss_of(network, batch, mask=None):
    """A weighted EDM loss; its noise is the batch's."""
    generator = torch.Generator().manual_seed(2)
    x0 = torch.randn(batch["x"].shape, generator=generator)
    sigma = torch.tensor([0.3, 2.0])
    return EDM().loss(network, x0, sigma, batch["x"], hints=batch["hints"], hint_mask=mask).mean()


@of_targets
def test_a_fresh_one_changes_no_bit_of_any_output(base, batch, targets):
    fresh = make_lora(base, targets, trained=False)
    with torch.no_grad():
        for hints in (None, batch["hints"]):
            output = fresh(batch["x"], batch["c_noise"], hints)
            assert torch.equal(output, base(batch["x"], batch["c_noise"], hints))
        ours, theirs = fresh.encode_hints(batch["hints"]), base.encode_hints(batch["hints"])
    assert all(map(torch.equal, ours.keys + ours.values, theirs.keys + theirs.values))


def test_the_initial_weights_of_the_network_do_not_depend_on_it():
    networks = []
    for rank in (0, 3):
        torch.manual_seed(5)
        networks.append(build_dit("custom", **SIZES, aligned=True, lora_rank=rank, lora_targets=LORA_TARGETS))
    plain, adapted = (network.state_dict() for network in networks)
    assert all(torch.equal(tensor, adapted[name]) for name, tensor in plain.items())
    assert {name.partition(".")[0] for name in adapted.keys() - plain.keys()} == {"hint_lora"}


@of_targets
@pytest.mark.parametrize("aligned", [False, True], ids=["tokens only", "aligned"])
def test_a_trained_one_acts_on_hints_alone(base, batch, targets, aligned):
    trained = make_lora(base, targets, aligned=aligned)
    with torch.no_grad():
        plain = base(batch["x"], batch["c_noise"])
        assert torch.equal(trained(batch["x"], batch["c_noise"]), plain)
        assert differs(trained(**batch), base(**batch))


def merge(network):
    """An independent plain network whose layers have the weights W + B A of the hint branch."""
    shape = network.shape | {"lora_rank": 0, "lora_targets": (), "aligned": False}
    merged = build_dit("custom", **shape).eval()
    own = {name for name, _ in merged.named_parameters()} | {name for name, _ in merged.named_buffers()}
    merged.load_state_dict({name: tensor for name, tensor in network.state_dict().items() if name in own})
    lora = network.hint_lora
    with torch.no_grad():
        if lora.x_embedder is not None:
            down, up = lora.x_embedder
            kernel = up.weight.double() @ down.proj.weight.double().flatten(1)
            merged.x_embedder.proj.weight += kernel.view_as(merged.x_embedder.proj.weight).float()
        for block, parts in zip(merged.blocks, lora.blocks, strict=True):
            for target, (down, up) in parts.items():
                product = up.weight.double() @ down.weight.double()
                block.get_submodule(LAYERS[target]).weight += product.float()
    return merged


@of_targets
@pytest.mark.parametrize("overrides", [{}, {"qk_norm": True}, {"patch_size": 4, "depth": 1}], ids=str)
def test_hints_pass_the_merged_weights_and_the_image_the_frozen_ones(batch, targets, overrides):
    base = make_base(**overrides)
    trained = make_lora(base, targets, **overrides)
    merged = merge(trained)
    mask = torch.tensor([[True, False, True], [True, True, True]])
    with torch.no_grad():
        found, expected = trained.encode_hints(batch["hints"], mask), merged.encode_hints(batch["hints"], mask)
        for ours, theirs in zip(found.keys + found.values, expected.keys + expected.values, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        output = trained(**batch, hint_mask=mask)
        torch.testing.assert_close(output, base(batch["x"], batch["c_noise"], expected), atol=1e-5, rtol=1e-5)
        reaches = overrides.get("depth") != 1 or set(targets) & {"x_embedder", "adaLN_modulation", "qkv"}
        assert differs(output, base(**batch, hint_mask=mask)) == bool(reaches)


def test_freezing_the_base_leaves_what_hints_alone_use():
    for aligned in (False, True):
        network = make_lora(make_base(), aligned=aligned)
        network.freeze_base()
        trained = {name for name, p in network.named_parameters() if p.requires_grad}
        own = {name for name, _ in network.named_parameters() if name.startswith(("aligned_hint.", "hint_lora."))}
        assert trained == own
        assert {name.partition(".")[0] for name in trained} == {"hint_lora"} | ({"aligned_hint"} if aligned else set())


@of_targets
@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("mask", ["none", "all", "some"])
def test_every_batch_gives_each_trained_parameter_a_finite_gradient_and_no_other(base, batch, targets, trained, mask):
    """DistributedDataParallel waits for a gradient of every trained parameter, also where all hints are dropped."""
    masks = {"none": None, "all": torch.zeros(2, 3, dtype=torch.bool), "some": torch.eye(3)[1:].bool()}
    network = make_lora(base, targets, trained, aligned=True).train()
    network.freeze_base()
    loss_of(network, batch, masks[mask]).backward()
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        if mask == "all":
            assert (parameter.grad == 0).all(), name
        elif trained:
            assert (parameter.grad != 0).any(), name


@pytest.mark.parametrize("depth", [1, 2])
def test_of_the_last_block_only_what_gives_keys_and_values_has_one(depth):
    blocks = build_dit("custom", **(SIZES | {"depth": depth}), lora_rank=2, lora_targets=LORA_TARGETS).hint_lora.blocks
    inner = {"adaLN_modulation", "qkv", "proj", "fc1", "fc2"}
    assert [set(block) for block in blocks] == [inner] * (depth - 1) + [{"adaLN_modulation", "qkv"}]


def test_training_it_leaves_the_unconditional_network_as_it_was_to_the_bit(base, batch):
    network = make_lora(base, trained=False, aligned=True).train()
    network.freeze_base()
    plain, hinted = network(batch["x"], batch["c_noise"]), network(**batch)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(8):
        loss = loss_of(network, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    state = network.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in base.state_dict().items())
    assert torch.equal(network(batch["x"], batch["c_noise"]), plain)
    assert differs(network(**batch), hinted)


def test_it_comes_back_from_the_state_of_the_network(base, batch):
    trained = make_lora(base, aligned=True)
    again = build_dit("custom", **trained.shape).eval()
    again.load_state_dict(trained.state_dict())
    assert torch.equal(again(**batch), trained(**batch))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_activation_checkpointing_changes_no_gradient(batch, qk_norm):
    base, gradients = make_base(qk_norm=qk_norm), []
    for checkpointing in (False, True):
        network = make_lora(base, aligned=True, qk_norm=qk_norm, activation_checkpointing=checkpointing).train()
        network.freeze_base()
        loss_of(network, batch, torch.tensor([[True, False, True], [True, True, False]])).backward()
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.requires_grad})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(gradient, recomputed[name]) for name, gradient in plain.items())


@pytest.mark.parametrize(
    ("rank", "targets", "found"),
    [
        (4, ("qkv", "q_proj"), r"found 4, \('qkv', 'q_proj'\)"),
        (0, ("qkv",), r"found 0, \('qkv',\)"),
        (-1, ("qkv",), r"found -1, \('qkv',\)"),
        (4, (), r"found 4, \(\)"),
    ],
)
def test_unknown_targets_and_no_rank_are_refused(rank, targets, found):
    embedder = build_dit("custom", **SIZES).x_embedder
    with pytest.raises(ValueError, match=rf"expected rank >= 1 and targets of x_embedder, .*, fc2, {found}"):
        HintLoRA(rank, targets, depth=2, hidden_size=32, embedder=embedder)
    if rank:
        with pytest.raises(ValueError, match=found):
            build_dit("custom", **SIZES, lora_rank=rank, lora_targets=targets)
