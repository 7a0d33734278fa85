"""Sizes of the networks that config and data need to know; no torch in here, so that they are read quickly."""

#: pixels that a latent covers along each axis
DOWNSCALE = 8

_SIZES = {"XL": (28, 1152, 16), "L": (24, 1024, 16), "B": (12, 768, 12), "S": (12, 384, 6)}

#: name -> depth, hidden_size, num_heads, patch_size (Peebles & Xie 2023, Table 1)
ARCHITECTURES: dict[str, dict[str, int]] = {
    f"DiT-{size}/{patch}": {"depth": depth, "hidden_size": hidden, "num_heads": heads, "patch_size": patch}
    for size, (depth, hidden, heads) in _SIZES.items()
    for patch in (2, 4, 8)
}

#: layers of the hint branch that may have a low-rank part (models/lora.py)
LORA_TARGETS = ("x_embedder", "adaLN_modulation", "qkv", "proj", "fc1", "fc2")
