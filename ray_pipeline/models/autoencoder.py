"""Autoencoders in diffusers format behind one small interface: grey tiles in, latents out, and back."""

from __future__ import annotations

import hashlib
import json
import logging
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from ray_pipeline.errors import UserError
from ray_pipeline.models.architectures import DOWNSCALE as DOWNSCALE

_CLASSES = ("AutoencoderTiny", "AutoencoderKL")


class Autoencoder:
    """A frozen diffusers autoencoder that takes one grey channel, repeated to the channels it was made for.

    Latents are the network's own, unscaled; whoever trains on them normalises by their measured mean and std.
    """

    def __init__(self, network: torch.nn.Module, name: str, posterior: str = "mode"):
        self.network = network.eval().requires_grad_(False)
        self.name, self.samples = name, posterior == "sample"

    @property
    def latent_channels(self) -> int:
        return self.network.config.latent_channels

    @torch.no_grad()
    def encode(self, tiles: Tensor) -> Tensor:
        """tiles (B, H, W) in [-1, 1] -> latents (B, C, H/8, W/8), float32. KL autoencoders give their mode."""
        return self.posterior(tiles)[0]

    @torch.no_grad()
    def posterior(self, tiles: Tensor) -> tuple[Tensor, Tensor | None]:
        """tiles (B, H, W) in [-1, 1] -> mean and std of the latents (B, C, H/8, W/8), float32; the std is None unless
        it was loaded for sampling. Kingma and Welling 2014."""
        reference = next(self.network.parameters())
        images = (
            tiles[:, None].to(reference.device, reference.dtype).expand(-1, self.network.config.in_channels, -1, -1)
        )
        encoded = self.network.encode(images.contiguous(memory_format=torch.channels_last))
        if hasattr(encoded, "latents"):
            return encoded.latents.float().contiguous(), None
        std = encoded.latent_dist.std.float().contiguous() if self.samples else None
        return encoded.latent_dist.mode().float().contiguous(), std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, C, h, w) -> tiles (B, 8h, 8w) in [-1, 1], float32, the mean of the output channels."""
        reference = next(self.network.parameters())
        images = self.network.decode(latents.to(reference.device, reference.dtype)).sample
        return images.float().mean(dim=1).clamp(-1, 1)

    def fingerprint(self) -> str:
        """sha256 of class, config and weights: two autoencoders with equal fingerprints give equal latents."""
        digest = hashlib.sha256(type(self.network).__name__.encode())
        config = {k: v for k, v in self.network.config.items() if not k.startswith("_")}
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.network.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def load_autoencoder(
    pretrained: str,
    *,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    latent_channels: int | None = None,
    posterior: str = "mode",
) -> Autoencoder:
    """Load `embedded`, a folder in diffusers format, or a hub id; posterior: mode or sample.

    Raises UserError when the folder is not one, its weights are missing or do not fit its config, or its latents
    have another size than 1/8 of the tile or another channel count than `latent_channels`.
    """
    network = _load_network(pretrained)
    downscale = 2 ** (len(network.config.block_out_channels) - 1)
    if downscale != DOWNSCALE:
        raise UserError(
            f"vae.pretrained={pretrained} makes tiles {downscale} times smaller, expected {DOWNSCALE}; "
            "choose an autoencoder with four levels"
        )
    if latent_channels is not None and network.config.latent_channels != latent_channels:
        raise UserError(
            f"vae.pretrained={pretrained} has {network.config.latent_channels} latent channels, but "
            f"model.latent_channels is {latent_channels}; set model.latent_channels={network.config.latent_channels} "
            "or choose another autoencoder"
        )
    if posterior == "sample" and type(network).__name__ != "AutoencoderKL":
        raise UserError(
            f"vae.posterior=sample, but vae.pretrained={pretrained} is an {type(network).__name__}, whose latents have "
            "no spread to sample from; use vae.posterior=mode or an AutoencoderKL"
        )
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return Autoencoder(network.to(device=device, dtype=dtype, memory_format=torch.channels_last), pretrained, posterior)


def embedded_folder() -> Path:
    """Folder of the autoencoder that comes with the package."""
    return Path(str(resources.files("ray_pipeline.models") / "embedded_autoencoder"))


def _load_network(pretrained: str) -> torch.nn.Module:
    if pretrained == "embedded":
        return _load_folder(embedded_folder(), pretrained)
    folder = Path(pretrained).expanduser()
    if folder.is_dir():
        return _load_folder(folder, pretrained)
    if folder.exists():
        raise UserError(f"vae.pretrained={pretrained} is a file; give the folder that holds config.json and weights")
    if folder.is_absolute() or pretrained.startswith((".", "~")) or pretrained.count("/") != 1:
        raise UserError(
            f"vae.pretrained={pretrained} does not exist; give a folder in diffusers format, a hub id such as "
            "stabilityai/sd-vae-ft-mse, or 'embedded'"
        )
    return _load_hub(pretrained)


def _load_folder(folder: Path, named: str) -> torch.nn.Module:
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise UserError(
            f"vae.pretrained={named}: {config_file} is missing; expected a folder in diffusers format with "
            "config.json and diffusion_pytorch_model.safetensors"
        )
    try:
        name = json.loads(config_file.read_text(encoding="utf-8")).get("_class_name")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError):
        raise UserError(f"vae.pretrained={named}: {config_file} is not a JSON object; take a fresh copy") from None
    if name not in _CLASSES:
        raise UserError(
            f"vae.pretrained={named}: {config_file} names class {name!r}, expected one of {', '.join(_CLASSES)}; "
            "point to the autoencoder's own folder"
        )
    if not list(folder.glob("diffusion_pytorch_model*.safetensors")):
        raise UserError(f"vae.pretrained={named}: no diffusion_pytorch_model.safetensors in {folder}; take a full copy")
    return _from_pretrained(name, str(folder), named)


def _load_hub(hub_id: str) -> torch.nn.Module:
    from huggingface_hub import hf_hub_download

    for subfolder in (None, "vae"):
        try:
            config_file = hf_hub_download(hub_id, "config.json", subfolder=subfolder)
        except Exception as error:  # the hub client has a dozen kinds of "not there" and "not reachable"
            reason = type(error).__name__
            continue
        name = json.loads(Path(config_file).read_text(encoding="utf-8")).get("_class_name")
        if name in _CLASSES:
            return _from_pretrained(name, hub_id, hub_id, **({"subfolder": subfolder} if subfolder else {}))
        reason = f"its config.json names class {name!r}"
    raise UserError(
        f"vae.pretrained={hub_id} is no folder here, and the hub gave no autoencoder of that id ({reason}); "
        "check the spelling and the network, or give a local folder"
    )


def _from_pretrained(class_name: str, source: str, named: str, **kwargs) -> torch.nn.Module:
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        network, info = getattr(diffusers, class_name).from_pretrained(
            source,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            ignore_mismatched_sizes=True,  # reported below, together with missing and unexpected keys
            output_loading_info=True,
            **kwargs,
        )
    except Exception as error:  # safetensors and OS errors, each with its own class
        raise UserError(
            f"vae.pretrained={named} does not load as {class_name}: {' '.join(str(error).split())[:300]}; "
            "take a fresh copy of the folder"
        ) from error
    mismatched = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
    wrong = mismatched or info["missing_keys"] or info["unexpected_keys"]
    if wrong:
        raise UserError(
            f"vae.pretrained={named}: the weights do not fit config.json (first key: {sorted(map(str, wrong))[0]}); "
            "take config and weights from the same release"
        )
    return network
