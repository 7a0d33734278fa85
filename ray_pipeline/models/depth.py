"""Depth estimation by a Hugging Face model, for the hint `depth`; transformers is the extra `depth`."""

from __future__ import annotations

import hashlib
import threading
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import torch

from ray_pipeline.errors import UserError


class DepthModel:
    """A frozen monocular depth model with its image processor."""

    def __init__(self, network: torch.nn.Module, processor, name: str):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network = network.eval().requires_grad_(False).to(self.device)
        self.processor, self.name = processor, name

    @torch.no_grad()
    def estimate(self, unit: np.ndarray) -> np.ndarray:
        """Grey image (H, W) in [0, 1] -> its relative depth or inverse depth (H, W) float32 from 0 to 1, as the model
        gives it; 0.5 where it sees no relief."""
        rgb = np.repeat(np.rint(255 * unit).astype(np.uint8)[..., None], 3, axis=2)
        inputs = self.processor(images=rgb, return_tensors="pt").to(self.device)
        found = self.network(**inputs).predicted_depth[0].float().cpu().numpy()
        depth = cv2.resize(found, unit.shape[::-1], interpolation=cv2.INTER_LINEAR)
        low, high = float(depth.min()), float(depth.max())
        return (depth - low) / (high - low) if low < high else np.full(unit.shape, 0.5, np.float32)

    def fingerprint(self) -> str:
        """sha256 of class, processor and weights."""
        digest = hashlib.sha256(f"{type(self.network).__name__} {self.processor.to_json_string()}".encode())
        for name, tensor in sorted(self.network.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


#: transformers builds a network under hooks that hold for the whole process, and two threads make the hints
_LOADING = threading.Lock()


def load_depth_model(name: str) -> DepthModel:
    """A model of a local folder or a hub id, loaded once a process.

    UserError: transformers is not installed, or there is no depth-estimation model of that name with safetensors
    weights.
    """
    with _LOADING:
        return _load(name)


@cache
def _load(name: str) -> DepthModel:
    try:
        from transformers import AutoImageProcessor, AutoModelForDepthEstimation, logging
    except ImportError as error:
        raise UserError(
            f"data.hints.depth.model={name} needs transformers; install it with pip install 'ray-pipeline[depth]'"
        ) from error
    if name.startswith(("/", ".", "~")) and not Path(name).expanduser().is_dir():
        raise UserError(f"data.hints.depth.model={name}: no such folder; correct the path or give a hub id")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        processor = AutoImageProcessor.from_pretrained(name)
        network = AutoModelForDepthEstimation.from_pretrained(name, use_safetensors=True)
    except Exception as error:  # the hub client, safetensors and transformers each have errors of their own
        raise UserError(
            f"data.hints.depth.model={name} does not load as a depth-estimation model "
            f"({' '.join(str(error).split())[:300]}); give a folder or hub id of one, with safetensors weights"
        ) from error
    return DepthModel(network, processor, name)
