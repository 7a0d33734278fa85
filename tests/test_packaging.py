"""What the package imports is what it declares."""

import ast
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "ray_pipeline"


def third_party() -> dict[str, set[str]]:
    """Top-level modules of others, with the files that import them."""
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            for name in names:
                top = name.split(".")[0]
                if top != "ray_pipeline" and top not in sys.stdlib_module_names:
                    found.setdefault(top, set()).add(path.name)
    return found


def declared() -> set[str]:
    """Distributions that an installation brings, or an extra that users ask for; those for development aside."""
    requirements = importlib.metadata.requires("ray-pipeline")
    kept = [text for text in requirements if not re.search(r"extra == ['\"](dev|bench)['\"]", text)]
    return {re.match(r"[\w.-]+", text)[0].lower().replace("_", "-") for text in kept}


@pytest.mark.parametrize(("name", "files"), sorted(third_party().items()))
def test_every_import_is_a_declared_requirement(name, files):
    owners = importlib.metadata.packages_distributions()[name]
    assert {owner.lower().replace("_", "-") for owner in owners} & declared(), f"{sorted(files)} import {name}"
