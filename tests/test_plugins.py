"""What other packages offer is found by its entry points and loaded when it is used; what cannot be used is named."""

import subprocess
import sys

import pytest

from ray_pipeline.data.hint_registry import hint_function, known_hints
from ray_pipeline.data.sources.kinds import known_kinds, source_of
from ray_pipeline.errors import UserError
from ray_pipeline.plugins import HINTS, SOURCES, load_plugin, plugin_names, plugin_version


@pytest.fixture
def install(tmp_path, monkeypatch):
    """(package, entry points by group, code) puts a package on the path, by the metadata that pip would write."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def put(package: str, points: dict[str, dict[str, str]], code: str = "", version: str = "1.2") -> None:
        (tmp_path / f"{package}.py").write_text(code)
        info = tmp_path / f"{package}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in some.items()) for group, some in points.items()]
        (info / "entry_points.txt").write_text("\n".join(lines))

    yield put
    hint_function.cache_clear()
    for name in [name for name in sys.modules if name.startswith("offered_")]:
        del sys.modules[name]


def test_names_are_told_without_running_code_of_the_package(install):
    install(
        "offered_broken", {HINTS: {"waves": "offered_broken:waves"}, SOURCES: {"mine": "offered_broken:mine"}}, "1/0"
    )
    assert plugin_names(HINTS) == ("waves",)
    assert known_hints() == ("super_resolution", "denoising", "canny", "depth", "waves")
    assert known_kinds() == ("sr-caco2", "fmd", "folder", "mine")
    assert plugin_version(HINTS, "waves") == "offered_broken 1.2"


def test_a_function_is_loaded_when_it_is_used(install):
    install("offered_good", {HINTS: {"flat": "offered_good:flat"}}, "def flat(tile): return 0 * tile.pixels")
    assert load_plugin(HINTS, "flat").__name__ == "flat"
    assert hint_function("flat") is load_plugin(HINTS, "flat")


@pytest.mark.parametrize(
    ("code", "target", "said"),
    [
        (
            "import nowhere_to_be_found",
            "offered_bad:flat",
            "ModuleNotFoundError: No module named 'nowhere_to_be_found'",
        ),
        ("1 / 0", "offered_bad:flat", "ZeroDivisionError: division by zero"),
        ("other = 3", "offered_bad:flat", "AttributeError: module 'offered_bad' has no attribute 'flat'"),
        ("", "offered_gone:flat", "ModuleNotFoundError: No module named 'offered_gone'"),
    ],
)
def test_code_that_does_not_load_is_told_with_its_package(install, code, target, said):
    install("offered_bad", {HINTS: {"flat": target}}, code)
    with pytest.raises(UserError) as error:
        load_plugin(HINTS, "flat")
    assert str(error.value) == (
        f"ray_pipeline.hints 'flat' of package offered_bad 1.2 cannot be loaded from {target} ({said}); repair or "
        "uninstall that package"
    )


def test_what_is_no_function_is_refused(install):
    install("offered_number", {HINTS: {"flat": "offered_number:flat"}}, "flat = 3")
    with pytest.raises(UserError, match=r"offered_number:flat of package offered_number 1\.2 is no function; corr"):
        load_plugin(HINTS, "flat")


def test_a_name_that_nobody_offers_is_told_with_those_that_are_offered(install):
    install("offered_good", {HINTS: {"flat": "offered_good:flat", "steep": "offered_good:steep"}})
    with pytest.raises(
        UserError, match=r"offers 'flet' in the entry points ray_pipeline\.hints, found flat, steep; ins"
    ):
        load_plugin(HINTS, "flet")


def test_a_name_that_two_packages_offer_is_refused(install):
    for package in ("offered_one", "offered_two"):
        install(package, {HINTS: {"flat": f"{package}:flat"}}, "def flat(tile): return tile.pixels")
    with pytest.raises(UserError, match=r"'flat' is offered by offered_one 1\.2 and offered_two 1\.2; uninstall one"):
        load_plugin(HINTS, "flat")
    assert plugin_names(HINTS) == ("flat",)


def test_no_package_takes_the_name_of_a_hint_or_source_of_ours(install):
    points = {HINTS: {"canny": "offered_same:canny"}, SOURCES: {"fmd": "offered_same:fmd"}}
    install("offered_same", points, "def canny(tile): return tile.pixels\ndef fmd(root): return None")
    hint_function.cache_clear()
    for find, name in ((hint_function, "canny"), (source_of, "fmd")):
        with pytest.raises(
            UserError, match=rf"'{name}' of package offered_same 1\.2 has the name of a .* of ray-pipeli"
        ):
            find(name)


PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "stripes-for-ray-pipeline"
version = "0.3"

[tool.setuptools]
py-modules = ["stripes"]

[project.entry-points."ray_pipeline.hints"]
stripes = "stripes:stripes"

[project.entry-points."ray_pipeline.sources"]
plates = "stripes:list_plates"
"""

MODULE = """
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from ray_pipeline.data.hints import Tile
from ray_pipeline.data.sources.collection import Collection, SourceImage


def stripes(tile: Tile, *, period: Annotated[int, Field(ge=2)] = 8) -> np.ndarray:
    lines = np.arange(tile.pixels.shape[0]) % period < period // 2
    return np.where(lines[:, None], tile.pixels, -1)


def list_plates(root: Path) -> Collection:
    names = sorted(path.relative_to(root).as_posix() for path in root.glob("*/*.png"))
    return Collection(root, [SourceImage(name, "plates", group=name.split("/")[0]) for name in names])
"""

# what a user types, one after the other: a Ray of its own each
COMMANDS = """
import sys
from ray_pipeline.cli import main

root, source, settings = sys.argv[1], sys.argv[2], sys.argv[3:]
words = [word for setting in settings for word in ("--set", setting)]
code = main(["prepare", "plates", source, "--out", root, "--tile-size", "64", "--val-fraction", "0.3"])
sys.exit(code or main(["encode", "--config", "job.yaml", *words]))
"""

JOB = """
data: {tile_size: 64, shard_rows: 5, hints: {stripes: {period: 6}}}
model: {architecture: DiT-S/8, latent_size: 8}
phases: [{name: one, epochs: 1, condition_types: [stripes, canny]}]
ray: {address: local}
"""


def test_an_installed_package_adds_a_source_and_a_hint_to_every_command(tmp_path, tiny_data, tiny_autoencoder):
    """Ray's workers find them too, though no code of this test runs there."""
    import numpy as np
    import torch
    from diffusers import AutoencoderTiny

    from ray_pipeline.data.latents import LatentStore
    from ray_pipeline.data.tile_table import TileTable
    from ray_pipeline.data.tiles import read_tile

    package, place = tmp_path / "package", tmp_path / "site"
    package.mkdir()
    (package / "pyproject.toml").write_text(PROJECT)
    (package / "stripes.py").write_text(MODULE)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--no-index", "--target", str(place), str(package)], check=True)
    images = sorted((tiny_data / "foundation/simulated/images").glob("*.png"))[:8]
    for number, image in enumerate(images):
        plate = tmp_path / "plates" / f"plate{number // 2}"
        plate.mkdir(parents=True, exist_ok=True)
        (plate / image.name).write_bytes(image.read_bytes())
    (tmp_path / "job.yaml").write_text(JOB)
    settings = [f"data.root={tmp_path / 'data'}", f"vae.pretrained={tiny_autoencoder}", "vae.actors=1"]
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, str(tmp_path / "data"), str(tmp_path / "plates"), *settings],
        cwd=tmp_path,
        env={**_environment(), "PYTHONPATH": str(place)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "latents   " in done.stdout

    store = LatentStore.open(tmp_path / "data" / "latents")
    rows = TileTable(store.folder, "tiles.arrow").rows(range(len(store)))
    assert store.hint_names == ("canny", "stripes")
    assert {row.id.split("/")[0] for row in rows} == {"plates"}
    expected = []
    for row in rows:
        tile = read_tile(tmp_path / "data" / row.path)
        tile[np.arange(64) % 6 >= 3] = -1
        expected.append(tile)
    network = AutoencoderTiny.from_pretrained(tiny_autoencoder)
    with torch.no_grad():
        latents = network.encode(torch.from_numpy(np.stack(expected))[:, None]).latents.numpy()
    np.testing.assert_allclose(store.gather(range(len(store)))["hint.stripes"], latents, rtol=2**-10, atol=1e-6)


def _environment() -> dict[str, str]:
    """Without what a Ray that runs here has set."""
    import os

    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_") and name != "PYTHONPATH"}
    return kept | {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
