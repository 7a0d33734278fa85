"""What a run was made with: for its report."""

from __future__ import annotations

import importlib.metadata
import platform

_PACKAGES = ("ray-pipeline", "torch", "ray", "diffusers", "numpy")


def environment() -> dict[str, str]:
    """Versions of Python, of the packages that decide over numbers, and of the system."""
    found = {"Python": platform.python_version()}
    for name in _PACKAGES:
        found[name] = importlib.metadata.version(name)
    return found | {"system": f"{platform.system()} {platform.release()} {platform.machine()}"}
