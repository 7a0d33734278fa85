"""Weights that say what they are: safetensors whose metadata tells how to build, feed and read the network, so that
they load without the state of the training that made them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from ray_pipeline.diffusion.edm import EDM
from ray_pipeline.errors import UserError
from ray_pipeline.models.dit import DiT, build_dit
from ray_pipeline.storage import replace_file

METADATA_KEY = "ray_pipeline"
_REMEDY = "give a checkpoint folder of a run, or weights that `ray-pipeline` wrote"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LatentsHeader(_Record):
    """Statistics (C,) that the latents were normalised by, of `count` tiles of the store of that fingerprint."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    count: int
    fingerprint: str


class AutoencoderHeader(_Record):
    """The autoencoder of the latents: as vae.pretrained named it, and the sha256 of its class, config and weights."""

    pretrained: str
    sha256: str


class IntensityRange(_Record):
    """What -1 and 1 are in the source's units, for the tiles (role `tile`) or the partners of a hint (its name) of one
    data set, channel and dtype; `tiles`: how many have it."""

    dataset: str
    role: str
    channel: int
    dtype: str
    low: float
    high: float
    tiles: int


class WeightsHeader(_Record):
    """Metadata of weights.

    network: arguments of build_dit. edm: arguments of EDM. hints: parameters of each hint that the network was trained
    with. ema: name of the average that validation used, None where there was none.
    """

    version: Literal[1] = 1
    phase: str
    step: int
    network: dict[str, Any]
    edm: dict[str, Any]
    latents: LatentsHeader
    autoencoder: AutoencoderHeader
    intensity: tuple[IntensityRange, ...]
    hints: dict[str, dict[str, Any]]
    ema: str | None

    def metadata(self) -> dict[str, str]:
        """As the metadata of a safetensors file; `parse_header` reads it back."""
        return {METADATA_KEY: self.model_dump_json()}

    def build_network(self) -> DiT:
        """The network, with fresh weights."""
        return build_dit("custom", **self.network)

    def build_edm(self) -> EDM:
        """The diffusion process."""
        return EDM(**self.edm)


def parse_header(metadata: Mapping[str, str] | None, source: str) -> WeightsHeader:
    """The header in the metadata of the safetensors file `source`; UserError when there is none, or a damaged one."""
    text = (metadata or {}).get(METADATA_KEY)
    if text is None:
        raise UserError(f"{source} does not say what its weights are (no {METADATA_KEY} in its metadata); {_REMEDY}")
    try:
        return WeightsHeader.model_validate(json.loads(text))
    except (ValueError, ValidationError) as error:
        raise UserError(
            f"{source}: its metadata is damaged or of another version ({' '.join(str(error).split())[:200]}); {_REMEDY}"
        ) from None


def header_in(state: Mapping[str, Any], source: str) -> WeightsHeader:
    """The header in the state of the checkpoint `source`; UserError when there is none, or a damaged one."""
    return parse_header({METADATA_KEY: json.dumps(state["weights"])} if "weights" in state else None, source)


def save_weights(path: str | Path, tensors: Mapping[str, Tensor], header: WeightsHeader) -> None:
    """Write all weights of a network as one safetensors file, atomically."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    replace_file(path, safetensors.torch.save(contiguous, metadata=header.metadata()))


def load_weights_file(path: str | Path) -> tuple[WeightsHeader, dict[str, Tensor]]:
    """Header and tensors of one safetensors file; UserError when it is not one of ours."""
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            header = parse_header(file.metadata(), str(path))
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} is no safetensors file ({' '.join(str(error).split())[:200]}); {_REMEDY}") from None
