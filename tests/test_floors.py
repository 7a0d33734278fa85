"""The house keeps its shape: imports run downwards, sources are ASCII, nothing unpickles."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "ray_pipeline"
FLOORS = {
    "cli": 4, "cli_data": 4, "cli_inference": 4, "cli_prepare": 4, "cli_words": 4, "__main__": 5,
    "pipeline": 3, "encoding": 3, "sweeping": 3, "inference": 3, "estimate": 3, "status": 3, "check": 3,
    "check_cluster": 3,
    "training": 2,
    "data": 1,
    "models": 0, "diffusion": 0, "monitoring": 0, "checkpoints": 0, "config": 0, "config_kinds": 0, "config_changes": 0,
    "attempts": 0, "tensor_files": 0, "retention": 0, "run_state": 0, "resume": 0, "sections": 0, "phase_sections": 0,
    "run_copy": 0, "sweep_sections": 0, "sweep_space": 0, "sweep_records": 0,
    "cli_submit": 4, "submission": 3, "job_attendance": 3, "job_paths": 0,
    "runtime_env": 0, "passwords": 0, "node_probe": 0,
    "storage": 0, "json_lines": 0, "plugins": 0, "ray_session": 0, "errors": 0, "__init__": 0,
}  # fmt: skip
SOURCES = sorted(PACKAGE.rglob("*.py"))


def module(path: Path) -> str:
    return ".".join(("ray_pipeline", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Modules of ours that a file imports, wherever in the file."""
    known = {module(source) for source in SOURCES}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ray_pipeline"):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & known) or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("ray_pipeline")}
    return found


def floor(name: str) -> int:
    parts = name.split(".")
    return FLOORS[parts[1] if len(parts) > 1 else "__init__"]


@pytest.mark.parametrize("path", SOURCES, ids=module)
def test_imports_run_downwards(path):
    upwards = [other for other in imports(path) if floor(other) > floor(module(path))]
    assert not upwards, f"{module(path)} imports {upwards} from a higher floor"


def test_no_module_imports_itself_by_way_of_others():
    graph = {module(path): imports(path) for path in SOURCES}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        for other in graph.get(name, ()):
            visit(other, (*trail, name))

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", SOURCES, ids=module)
def test_sources_are_ascii_and_free_of_pickle(path):
    text = path.read_text()
    assert text.isascii()
    tree = ast.parse(text)
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert not names & {"pickle", "dill", "cloudpickle", "joblib"}
    assert "torch.load(" not in text.replace("safetensors.torch.load(", "")
