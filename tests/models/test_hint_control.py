"""Hints: each one counts, none depends on what it must not depend on, and an absent one leaves no trace."""

import pytest
import torch

from ray_pipeline.diffusion.edm import EDM
from ray_pipeline.models.architectures import LORA_TARGETS
from ray_pipeline.models.dit import build_dit

SIZES = {"latent_size": 8, "depth": 3, "hidden_size": 32, "num_heads": 4, "patch_size": 2}

pytestmark = pytest.mark.usefixtures("one_thread")


def network_with_hints(aligned=True, seed=0, **overrides):
    torch.manual_seed(seed)
    network = build_dit("custom", **SIZES, aligned=aligned, **overrides)
    for parameter in network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


LORA = {"lora_rank": 2, "lora_targets": LORA_TARGETS}
KINDS = {
    "aligned": {},
    "tokens only": {"aligned": False},
    "lora": LORA,
    "lora, tokens only": {"aligned": False} | LORA,
}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def network(request):
    return network_with_hints(**request.param)


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(2, 4, 8, 8, generator=generator),
        "c_noise": torch.tensor([-1.2, 0.4]),
        "hints": torch.randn(2, 3, 4, 8, 8, generator=generator),
    }


def mask_of(*present):
    return torch.tensor([present, present])


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_without_hints_the_network_is_the_unconditional_one_bit_for_bit(network, batch):
    unconditional = build_dit("custom", **SIZES)
    own = ("aligned_hint.", "hint_lora.")
    unconditional.load_state_dict({k: v for k, v in network.state_dict().items() if not k.startswith(own)})
    assert torch.equal(network(batch["x"], batch["c_noise"]), unconditional.eval()(batch["x"], batch["c_noise"]))


def test_every_hint_masked_equals_no_hints(network, batch):
    masked = network(**batch, hint_mask=mask_of(False, False, False))
    close(masked, network(batch["x"], batch["c_noise"]))


def test_masked_hint_equals_an_absent_one(network, batch):
    masked = network(**batch, hint_mask=mask_of(True, False, True))
    absent = network(batch["x"], batch["c_noise"], batch["hints"][:, [0, 2]])
    close(masked, absent)
    assert (masked - network(**batch)).abs().max() > 1e-3


@pytest.mark.parametrize("garbage", [1e30, float("inf"), float("nan")])
def test_what_a_masked_hint_holds_changes_no_bit_and_no_gradient(network, batch, garbage):
    mask, results = mask_of(True, False, True), []
    for value in (0.0, garbage):
        hints = batch["hints"].clone()
        hints[:, 1] = value
        network.zero_grad()
        output = network(batch["x"], batch["c_noise"], hints, mask)
        output.square().sum().backward()
        results.append([output.detach()] + [p.grad.clone() for p in network.parameters() if p.requires_grad])
    assert all(torch.isfinite(tensor).all() for tensor in results[1])
    assert all(map(torch.equal, *results))


def test_a_mask_belongs_to_its_sample(network, batch):
    mask = torch.tensor([[True, False, True], [False, True, True]])
    together = network(**batch, hint_mask=mask)
    for row in range(2):
        alone = network(batch["x"][[row]], batch["c_noise"][[row]], batch["hints"][[row]][:, mask[row]])
        close(together[[row]], alone)


def test_order_of_hints_does_not_matter(network, batch):
    order, mask = [2, 0, 1], torch.tensor([[True, True, False], [True, False, True]])
    expected = network(**batch, hint_mask=mask)
    close(network(batch["x"], batch["c_noise"], batch["hints"][:, order], mask[:, order]), expected)


@pytest.mark.parametrize("mask", [None, mask_of(True, False, True)], ids=["all", "one masked"])
@pytest.mark.parametrize("strength", [None, torch.tensor([[1.0, 0.3, 2.0]]).expand(2, 3)], ids=["plain", "strength"])
def test_cached_hints_give_exactly_the_uncached_result_at_every_noise_level(network, batch, mask, strength):
    cache = network.encode_hints(batch["hints"], mask)
    for shift in (0.0, 0.5, 1.0):
        c_noise = batch["c_noise"] - shift
        uncached = network(batch["x"], c_noise, batch["hints"], mask, strength)
        assert torch.equal(network(batch["x"], c_noise, cache, hint_strength=strength), uncached)


def test_a_mask_given_with_a_cache_masks_further_hints(network, batch):
    cache = network.encode_hints(batch["hints"], mask_of(True, True, False))
    both = network(batch["x"], batch["c_noise"], cache, mask_of(True, False, True))
    close(both, network(**batch, hint_mask=mask_of(True, False, False)))


def test_mask_of_another_shape_is_refused(network, batch):
    with pytest.raises(ValueError, match=r"hint_mask has shape \(2, 2\), expected \(2, 3\)"):
        network(**batch, hint_mask=torch.ones(2, 2, dtype=torch.bool))


def test_image_output_depends_on_each_hint(network, batch):
    hints = batch["hints"].clone().requires_grad_()
    network(batch["x"], batch["c_noise"], hints).square().sum().backward()
    per_hint = hints.grad.abs().amax(dim=(2, 3, 4))
    assert (per_hint > 1e-4).all()


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def trained(request):
    """A network of its own, with its base frozen where it has low-rank parts."""
    network = network_with_hints(**request.param)
    if network.hint_lora is not None:
        network.freeze_base()
    return network.train()


def loss_and_gradients(network, batch, hints, mask=None):
    """The losses (B,) of Phase 2 at two noise levels, and the gradients of their mean by parameter name."""
    network.zero_grad()
    x0 = torch.linspace(-1, 1, batch["x"].numel()).view_as(batch["x"])
    sigma = torch.tensor([0.2, 3.0])
    losses = EDM().loss(network, x0, sigma, batch["x"], hints=hints, hint_mask=mask)
    losses.mean().backward()
    gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.requires_grad}
    return losses.detach(), gradients


def farthest(gradients, others):
    """The largest difference of each parameter's gradients, as a share of the largest gradient."""
    return {
        name: float((gradient - others[name]).abs().max() / gradient.abs().max())
        for name, gradient in gradients.items()
    }


@pytest.mark.parametrize("changed", range(3))
def test_loss_and_every_gradient_depend_on_each_hint(trained, batch, changed):
    losses, gradients = loss_and_gradients(trained, batch, batch["hints"])
    hints = batch["hints"].clone()
    hints[:, changed] = hints[:, changed].flip(-1)
    others, other_gradients = loss_and_gradients(trained, batch, hints)
    assert ((losses - others).abs() > 1e-4).all()
    assert min(farthest(gradients, other_gradients).values()) > 1e-3


def test_a_masked_hint_has_no_part_in_loss_and_gradients(trained, batch):
    mask = mask_of(True, False, True)
    losses, gradients = loss_and_gradients(trained, batch, batch["hints"], mask)
    absent, absent_gradients = loss_and_gradients(trained, batch, batch["hints"][:, [0, 2]])
    close(losses, absent)
    assert max(farthest(gradients, absent_gradients).values()) < 1e-4


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 0, 2]], ids=str)
def test_order_of_hints_changes_neither_loss_nor_gradients(trained, batch, order):
    mask = torch.tensor([[True, True, False], [True, False, True]])
    losses, gradients = loss_and_gradients(trained, batch, batch["hints"], mask)
    others, other_gradients = loss_and_gradients(trained, batch, batch["hints"][:, order], mask[:, order])
    close(losses, others)
    assert max(farthest(gradients, other_gradients).values()) < 1e-4
    # the mask goes with its hints
    unordered, _ = loss_and_gradients(trained, batch, batch["hints"][:, order], mask)
    assert not torch.allclose(losses, unordered, atol=1e-4)


def test_keys_and_values_of_a_hint_do_not_depend_on_the_other_hints(network, batch):
    tokens = 16
    cache = network.encode_hints(batch["hints"])
    other = network.encode_hints(torch.cat([batch["hints"][:, :1], 5 * batch["hints"][:, 1:]], dim=1))
    assert len(cache.keys) == len(cache.values) == 3
    for ours, theirs in zip(cache.keys + cache.values, other.keys + other.values, strict=True):
        assert ours.shape == (2, 4, 3 * tokens, 8)
        assert torch.equal(ours[:, :, :tokens], theirs[:, :, :tokens])
        assert not torch.equal(ours[:, :, tokens:], theirs[:, :, tokens:])


def test_keys_and_values_in_a_pass_do_not_depend_on_image_or_noise_level(network, batch, monkeypatch):
    """Watched where the blocks use them, so that no path from the image to the hints stays unseen."""
    seen = []
    for block in network.blocks:

        def watched(x, condition, k=None, v=None, bias=None, forward=block.forward):
            seen[-1] += [k.clone(), v.clone()]
            return forward(x, condition, k, v, bias)

        monkeypatch.setattr(block, "forward", watched)
    for scale, shift in ((1.0, 0.0), (-3.0, 0.8)):
        seen.append([])
        network(scale * batch["x"], batch["c_noise"] + shift, batch["hints"])
    assert len(seen[0]) == 6
    assert all(map(torch.equal, *seen))


def test_fresh_aligned_path_changes_nothing(batch):
    plain, aligned = network_with_hints(aligned=False), build_dit("custom", **SIZES, aligned=True)
    missing, unexpected = aligned.load_state_dict(plain.state_dict(), strict=False)
    assert {name.split(".")[0] for name in missing} == {"aligned_hint"}
    assert not unexpected
    assert torch.equal(aligned.eval()(**batch), plain(**batch))


def test_aligned_path_adds_the_mean_patch_of_the_present_hints(batch):
    """With attention's output silenced only the aligned path is left: it acts as if the image tokens were moved."""
    network = network_with_hints()
    for block in network.blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    projection = network.aligned_hint.embedder.proj
    patches = torch.stack([projection(hint).flatten(2).transpose(1, 2) for hint in batch["hints"].unbind(1)], dim=1)
    moved = torch.stack([(patches[0, 0] + patches[0, 2]) / 2, patches[1, 2]])
    handle = network.x_embedder.register_forward_hook(lambda _, inputs, output: output + moved)
    expected = network(batch["x"], batch["c_noise"])
    handle.remove()
    close(network(**batch, hint_mask=mask), expected)


def test_strength_1_is_none_given(network, batch):
    mask = mask_of(True, False, True)
    expected = network(**batch, hint_mask=mask)
    assert torch.equal(network(**batch, hint_mask=mask, hint_strength=torch.ones(2, 3)), expected)


def test_strength_towards_0_approaches_an_absent_hint(network, batch):
    absent = network(**batch, hint_mask=mask_of(True, False, True))
    distances = []
    for strength in (1.0, 1e-1, 1e-3, 1e-8):
        output = network(**batch, hint_strength=torch.tensor([[1.0, strength, 1.0]]).expand(2, 3))
        distances.append(float((output - absent).detach().abs().max()))
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-5
    exactly = network(**batch, hint_strength=torch.tensor([[1.0, 0.0, 1.0]]).expand(2, 3))
    close(exactly, absent)


def test_strength_of_the_only_hint_fades_it_out(network, batch):
    only, plain = batch["hints"][:, :1], network(batch["x"], batch["c_noise"])
    for strength, limit in ((1e-8, 1e-5), (0.0, 1e-5)):
        output = network(batch["x"], batch["c_noise"], only, hint_strength=torch.full((2, 1), strength))
        assert (output - plain).abs().max() < limit


def test_strength_multiplies_attention_odds(batch):
    """Strength 2 of one hint equals giving it twice, as far as attention goes."""
    network = network_with_hints(aligned=False)
    once = network(batch["x"], batch["c_noise"], batch["hints"][:, :1], hint_strength=torch.full((2, 1), 2.0))
    close(once, network(batch["x"], batch["c_noise"], batch["hints"][:, [0, 0]]))


def test_all_hints_masked_gives_finite_output_and_a_gradient_for_every_parameter(trained, batch):
    """DistributedDataParallel waits for a gradient of every parameter, in every batch."""
    output = trained(**batch, hint_mask=mask_of(False, False, False))
    output.square().mean().backward()
    assert torch.isfinite(output).all()
    for name, parameter in trained.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
