"""What a run was made with: for its report."""

from __future__ import annotations

import importlib.metadata
import platform

import ray_pipeline

_PACKAGES = ("torch", "ray", "diffusers", "numpy")


def environment() -> dict[str, str]:
    """Versions of Python, of the packages that decide over numbers, and of the system."""
    # a job may bring our sources without installing them
    found = {"Python": platform.python_version(), "ray-pipeline": ray_pipeline.__version__}
    for name in _PACKAGES:
        found[name] = importlib.metadata.version(name)
    return found | {"system": f"{platform.system()} {platform.release()} {platform.machine()}"}
