"""The diffusion transformer: sizes and names of the reference, equal numbers to diffusers', exact zero at the start."""

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from scipy import stats as distributions

from ray_pipeline.models.dit import ARCHITECTURES, build_dit, sincos_positions
from ray_pipeline.models.noise_embedding import NoiseEmbedder

TINY = {"latent_size": 8, "depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 2}


def tiny_dit(seed=0, **overrides):
    """A small network whose every trained parameter is non-zero (a fresh one returns 0 whatever is wrong inside)."""
    torch.manual_seed(seed)
    network = build_dit("custom", **{**TINY, **overrides})
    for parameter in network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return network


def inputs(batch=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, 8, 8, generator=generator)
    return x, torch.rand(batch, generator=generator) * 2.6 - 1.5


def counts(architecture):
    """(trainable, all) parameters without allocating them."""
    with torch.device("meta"):
        parameters = list(build_dit(architecture).parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def test_xl_8_has_674_2_million_trainable_parameters():
    trainable, everything = counts("DiT-XL/8")
    assert trainable / 1e6 == pytest.approx(674.2, abs=0.05)
    assert everything - trainable == 64 * 1152  # the frozen positions


@pytest.mark.parametrize(
    ("size", "depth", "hidden", "heads"),
    [("XL", 28, 1152, 16), ("L", 24, 1024, 16), ("B", 12, 768, 12), ("S", 12, 384, 6)],
)
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_architectures_have_the_paper_s_sizes(size, depth, hidden, heads, patch):
    name = f"DiT-{size}/{patch}"
    expected = {"depth": depth, "hidden_size": hidden, "num_heads": heads, "patch_size": patch}
    assert ARCHITECTURES[name] == expected
    patch_values = 4 * patch**2
    block = 12 * hidden**2 + 9 * hidden + 6 * (hidden**2 + hidden)
    ends = (patch_values + 1) * hidden + (hidden + 1) * patch_values + 2 * (hidden**2 + hidden)
    noise = 257 * hidden + hidden**2 + hidden
    assert counts(name)[0] == depth * block + ends + noise


def test_unknown_architecture_is_refused_by_name():
    with pytest.raises(ValueError, match=r"unknown architecture 'DiT-M/8'.*DiT-XL/8"):
        build_dit("DiT-M/8")


def test_fresh_network_returns_exactly_zero():
    for aligned in (False, True):
        network = build_dit("custom", **TINY, aligned=aligned)
        x, c_noise = inputs()
        hints = torch.randn(3, 2, 4, 8, 8) if aligned else None
        assert (network(x, c_noise, hints) == 0).all()


def test_fresh_linear_weights_are_xavier_and_the_noise_mlp_is_narrow():
    torch.manual_seed(0)
    network = build_dit("custom", **{**TINY, "hidden_size": 128})
    weight = network.blocks[0].mlp.fc1.weight
    limit = (6 / (128 + 512)) ** 0.5
    assert weight.abs().max() <= limit
    assert weight.detach().std() == pytest.approx(limit / 3**0.5, rel=0.03)
    assert network.t_embedder.mlp[0].weight.detach().std() == pytest.approx(0.02, rel=0.03)
    patch = network.x_embedder.proj.weight
    assert patch.detach().std() == pytest.approx(
        (2 / (16 + 128)) ** 0.5, rel=0.05
    )  # fans of the flattened patch, not of a conv


def diffusers_twin(network, heads=4):
    """diffusers' DiT with the weights of `network`, reference noise embedding, and a class that adds nothing."""
    depth, hidden = len(network.blocks), network.pos_embed.shape[-1]
    twin = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=hidden // heads,
        in_channels=4,
        out_channels=4,
        num_layers=depth,
        norm_num_groups=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1,
        norm_elementwise_affine=False,
    )
    ours = network.state_dict()
    theirs = {
        "pos_embed.proj": "x_embedder.proj",
        "proj_out_1": "final_layer.adaLN_modulation.1",
        "proj_out_2": "final_layer.linear",
    }
    state = {f"{a}.{kind}": ours[f"{b}.{kind}"] for a, b in theirs.items() for kind in ("weight", "bias")}
    for index in range(depth):
        a, b = f"transformer_blocks.{index}", f"blocks.{index}"
        state[f"{a}.norm1.emb.class_embedder.embedding_table.weight"] = torch.zeros(2, hidden)
        for kind in ("weight", "bias"):
            for number, part in enumerate(("to_q", "to_k", "to_v")):
                state[f"{a}.attn1.{part}.{kind}"] = ours[f"{b}.attn.qkv.{kind}"].chunk(3)[number]
            state[f"{a}.attn1.to_out.0.{kind}"] = ours[f"{b}.attn.proj.{kind}"]
            state[f"{a}.ff.net.0.proj.{kind}"] = ours[f"{b}.mlp.fc1.{kind}"]
            state[f"{a}.ff.net.2.{kind}"] = ours[f"{b}.mlp.fc2.{kind}"]
            state[f"{a}.norm1.linear.{kind}"] = ours[f"{b}.adaLN_modulation.1.{kind}"]
            state[f"{a}.norm1.emb.timestep_embedder.linear_1.{kind}"] = ours[f"t_embedder.mlp.0.{kind}"]
            state[f"{a}.norm1.emb.timestep_embedder.linear_2.{kind}"] = ours[f"t_embedder.mlp.2.{kind}"]
    missing, unexpected = twin.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"pos_embed.pos_embed"}
    for block in twin.transformer_blocks:
        # diffusers divides the frequencies by 127, the reference DiT by 128
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return twin.eval()


def test_equals_diffusers_dit_with_the_same_weights():
    network = tiny_dit(noise_embedding="reference").eval()
    twin = diffusers_twin(network)
    x, c_noise = inputs()
    with torch.no_grad():
        for timestep in (c_noise, torch.tensor([0.0, 500.0, 999.0])):
            expected = twin(x, timestep=timestep, class_labels=torch.zeros(3, dtype=torch.long)).sample
            assert expected.abs().max() > 0.1
            torch.testing.assert_close(network(x, timestep), expected, atol=1e-5, rtol=1e-5)


def test_reference_weights_load_leaving_only_the_class_embedder_aside():
    network = tiny_dit()
    layers = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2"]
    for block in range(2):
        layers += [f"blocks.{block}.{layer}" for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
        layers += [f"blocks.{block}.adaLN_modulation.1"]
    layers += ["final_layer.linear", "final_layer.adaLN_modulation.1"]
    names = ["pos_embed", *(f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias"))]
    ours = network.state_dict()
    assert set(ours) == set(names)
    reference = {name: torch.full_like(ours[name], 0.25) for name in names}
    reference["y_embedder.embedding_table.weight"] = torch.zeros(1001, 32)
    missing, unexpected = network.load_state_dict(reference, strict=False)
    assert (list(missing), list(unexpected)) == ([], ["y_embedder.embedding_table.weight"])
    assert (network.blocks[1].mlp.fc2.weight == 0.25).all()


def test_positions_are_sines_and_cosines_of_column_then_row():
    hidden, grid = 16, 5
    positions = sincos_positions(hidden, grid)
    assert positions.shape == (grid * grid, hidden)
    for row in range(grid):
        for column in range(grid):
            expected = []
            for coordinate in (column, row):
                angles = [coordinate / 10000 ** (4 * i / hidden) for i in range(hidden // 4)]
                expected += [np.sin(a) for a in angles] + [np.cos(a) for a in angles]
            np.testing.assert_allclose(positions[row * grid + column], expected, atol=1e-12)


def test_positions_are_frozen():
    network = tiny_dit()
    assert not network.pos_embed.requires_grad
    np.testing.assert_allclose(network.pos_embed[0].numpy(), sincos_positions(32, 4), atol=1e-7)


def test_dropout_acts_in_training_and_not_in_evaluation():
    network = tiny_dit(dropout=0.5)
    x, c_noise = inputs()
    assert not torch.equal(network(x, c_noise), network(x, c_noise))
    network.eval()
    assert torch.equal(network(x, c_noise), network(x, c_noise))
    without = tiny_dit(dropout=0.0).eval()
    assert torch.equal(network(x, c_noise), without(x, c_noise))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_gives_equal_gradients(dropout):
    gradients = []
    for checkpointing in (False, True):
        network = tiny_dit(dropout=dropout, aligned=True, activation_checkpointing=checkpointing)
        x, c_noise = inputs()
        torch.manual_seed(7)
        network(x, c_noise, torch.ones(3, 2, 4, 8, 8)).square().mean().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.requires_grad})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_scaled_and_fourier_embeddings_vary_in_more_dimensions_than_the_reference():
    c_noise = torch.linspace(-1.55, 1.10, 2000)
    varying = {}
    for kind in ("reference", "scaled", "fourier"):
        embedder = NoiseEmbedder(8, kind)
        seen = []
        embedder.mlp[0].register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        embedder(c_noise)
        varying[kind] = int((seen[0].std(dim=0) > 0.1).sum())
    assert varying["reference"] == pytest.approx(37, abs=3)
    assert varying["scaled"] > 200
    assert varying["fourier"] > 200


def test_fourier_features_are_cosines_of_frequencies_that_are_saved_with_the_weights():
    """sqrt(2) cos(2 pi (f c + phi)), f standard normal, phi uniform, the same in every network (EDM2)."""
    network = tiny_dit(seed=0, noise_embedding="fourier")
    features, state = network.t_embedder.fourier, tiny_dit(seed=5, noise_embedding="fourier").state_dict()
    frequencies, phases = (state[f"t_embedder.fourier.{name}"].double().numpy() for name in ("frequencies", "phases"))
    assert distributions.kstest(frequencies, "norm").pvalue > 1e-3
    assert distributions.kstest(phases, "uniform").pvalue > 1e-3
    c_noise = torch.tensor([-1.5, 0.0, 0.7])
    expected = np.sqrt(2) * np.cos(2 * np.pi * (np.outer(c_noise.double().numpy(), frequencies) + phases))
    np.testing.assert_allclose(features(c_noise).numpy(), expected, atol=1e-5)


def test_qk_norm_divides_each_head_by_its_root_mean_square():
    """Attention of normalised queries and keys, by hand in float64."""
    network = tiny_dit(qk_norm=True)
    attention = network.blocks[0].attn
    x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(3))
    q, k, v = (part.double().numpy().reshape(2, 16, 4, 8) for part in attention.qkv(x).detach().chunk(3, dim=-1))
    scales = [attention.q_norm.weight, attention.k_norm.weight]
    q, k = (
        part / np.sqrt((part**2).mean(axis=-1, keepdims=True) + 1e-6) * scale.detach().double().numpy()
        for part, scale in zip((q, k), scales, strict=True)
    )
    scores = np.exp(np.einsum("bihd,bjhd->bhij", q, k) / np.sqrt(8))
    attended = np.einsum("bhij,bjhd->bihd", scores / scores.sum(axis=-1, keepdims=True), v).reshape(2, 16, 32)
    expected = attended @ attention.proj.weight.detach().double().numpy().T + attention.proj.bias.detach().numpy()
    np.testing.assert_allclose(attention.attend(*attention.heads(x)).detach().numpy(), expected, atol=1e-5)


def test_qk_norm_bounds_the_scores_of_huge_activations():
    attention = tiny_dit(qk_norm=True).blocks[0].attn
    torch.nn.init.ones_(attention.q_norm.weight)
    torch.nn.init.ones_(attention.k_norm.weight)
    q, k, _ = attention.heads(1e4 * torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(3)))
    assert float((q @ k.transpose(-1, -2)).detach().abs().max()) <= 8 * 1.001


def test_every_sample_of_a_batch_is_computed_alone():
    network = tiny_dit().eval()
    x, c_noise = inputs()
    together = network(x, c_noise)
    for index in range(3):
        alone = network(x[index : index + 1], c_noise[index : index + 1])
        torch.testing.assert_close(together[index : index + 1], alone, atol=1e-5, rtol=1e-5)


def test_bf16_autocast_stays_close_to_fp32():
    network = tiny_dit(aligned=True).eval()
    x, c_noise = inputs()
    hints = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[True, False], [True, True], [False, False]])
    exact = network(x, c_noise, hints, mask)
    with torch.autocast("cpu", torch.bfloat16):
        rough = network(x, c_noise, hints, mask)
    assert ((rough.float() - exact).norm() / exact.norm()) < 0.03
