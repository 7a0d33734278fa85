"""A hint's keyword-only parameters are its keys in the YAML, checked like every other key."""

from __future__ import annotations

import inspect
from dataclasses import replace

import numpy as np
import pytest
import yaml

from ray_pipeline.config import load_config
from ray_pipeline.data import hint_registry
from ray_pipeline.data.encode_job import encode_job
from ray_pipeline.data.hint_registry import hint_fingerprint, hint_parameters, known_hints, make_hint, resolve_hints
from ray_pipeline.data.hints import HINTS, Tile
from ray_pipeline.data.listing import list_tiles
from ray_pipeline.data.tile_reader import Request, TileReader
from ray_pipeline.errors import UserError
from ray_pipeline.sections import CONDITION_TYPES


def refusal(given: dict, wanted=()) -> str:
    with pytest.raises(UserError) as error:
        resolve_hints(given, wanted)
    return str(error.value)


def test_the_keys_of_a_hint_are_the_keyword_arguments_of_its_function_with_their_defaults():
    assert known_hints()[: len(HINTS)] == tuple(HINTS) == CONDITION_TYPES
    resolved = resolve_hints({}, CONDITION_TYPES)
    for name, function in HINTS.items():
        _, *arguments = inspect.signature(function).parameters.values()
        assert {a.kind for a in arguments} == {inspect.Parameter.KEYWORD_ONLY}
        plain = {a.name: list(a.default) if isinstance(a.default, tuple) else a.default for a in arguments}
        assert resolved[name] == plain


def test_what_is_given_takes_the_place_of_defaults_and_only_wanted_hints_come_back():
    given = {"canny": {"sigma": 3}, "denoising": {"a": [0.01, 0.02], "bits": [12]}}
    resolved = resolve_hints(given, ["denoising"])
    assert list(resolved) == ["denoising"]
    assert resolved["denoising"] == {
        "simulated_share": 0.0, "a": [0.01, 0.02], "b": [0.0, 0.01], "averages": [1], "bits": [12],
    }  # fmt: skip
    assert yaml.safe_load(yaml.safe_dump(resolved)) == resolved  # plain values: they travel to actors


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"cany": {}}, "unknown key data.hints.cany; the nearest known key is data.hints.canny"),
        (
            {"canny": {"sigm": 1}},
            "unknown key data.hints.canny.sigm; the nearest known key is data.hints.canny.sigma",
        ),
        (
            {"super_resolution": {"scale": [4]}},
            "unknown key data.hints.super_resolution.scale; the nearest known key is data.hints.super_resolution.scale",
        ),
        ({"canny": {"sigma": "wide"}}, "data.hints.canny.sigma: input should be a valid number"),
        ({"canny": {"sigma": -1}}, "data.hints.canny.sigma: input should be greater than or equal to 0, found -1"),
        ({"canny": {"percentile": 100}}, "data.hints.canny.percentile: input should be less than 100, found 100"),
        ({"canny": {"sigma": True}}, "data.hints.canny.sigma: expected another value than true"),
        ({"denoising": {"a": [0.2, 0.1]}}, "data.hints.denoising.a: expected two numbers from 0 up, the smaller one"),
        ({"denoising": {"a": [-0.2, 0.1]}}, "data.hints.denoising.a: expected two numbers from 0 up"),
        ({"denoising": {"a": 0.1}}, "data.hints.denoising.a: expected a list, found 0.1"),
        ({"denoising": {"a": [0.1]}}, "data.hints.denoising.a.1 is missing"),
        ({"denoising": {"b": [0.0, float("nan")]}}, "data.hints.denoising.b.1: input should be a finite number"),
        ({"denoising": {"bits": []}}, "data.hints.denoising.bits: expected at least one entry"),
        ({"denoising": {"bits": [17]}}, "data.hints.denoising.bits.0: input should be less than or equal to 16"),
        ({"denoising": {"averages": [0]}}, "data.hints.denoising.averages.0: input should be greater than 0"),
        ({"denoising": {"simulated_share": 1.5}}, "data.hints.denoising.simulated_share: input should be less than"),
        ({"super_resolution": {"scales": [3]}}, "data.hints.super_resolution.scales.0: input should be 2, 4 or 8"),
        ({"depth": {"model": 7}}, "data.hints.depth.model: input should be a valid string, found 7"),
    ],
)
def test_wrong_keys_and_values_are_refused_with_their_path(given, said):
    assert refusal(given).startswith(said)  # also of a hint that no phase uses


def test_every_wrong_key_of_a_hint_is_told_at_once():
    message = refusal({"canny": {"sgma": 1, "floor": 0}})
    assert "unknown key data.hints.canny.sgma" in message
    assert "data.hints.canny.floor: input should be greater than 0" in message


def test_a_hint_that_is_wanted_and_not_known_is_told_with_the_known_ones():
    assert refusal({}, ["cany"]) == (
        "unknown hint 'cany', expected some of super_resolution, denoising, canny, depth; the nearest is 'canny'"
    )


def test_parameters_set_in_the_yaml_or_on_the_command_line_reach_the_job(tmp_path):
    tree = {"phases": [{"name": "one", "epochs": 1, "condition_types": ["canny", "depth"]}]}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(tree | {"data": {"hints": {"canny": {"floor": 9}}}}))
    config = load_config(tmp_path / "job.yaml", ["data.hints.canny.sigma=2.5", "data.hints.denoising.bits=[8]"])
    settings = encode_job(config).hint_settings
    assert settings["canny"] == {"sigma": 2.5, "percentile": 90.0, "floor": 9.0, "low_ratio": 0.4}
    assert list(settings) == ["canny", "depth"]
    with pytest.raises(UserError, match=r"unknown key data\.hints\.canny\.sigmaa"):
        encode_job(load_config(tmp_path / "job.yaml", ["data.hints.canny.sigmaa=2.5"]))


@pytest.fixture
def offered(monkeypatch):
    """Takes a function for the hint "mine", as one that comes with the package."""
    monkeypatch.setattr(hint_registry, "HINTS", {**HINTS})

    def put(function) -> None:
        hint_registry.HINTS["mine"] = function
        hint_registry.hint_function.cache_clear()
        hint_parameters.cache_clear()

    yield put
    hint_registry.hint_function.cache_clear()
    hint_parameters.cache_clear()


def test_a_parameter_without_a_default_must_be_given(offered):
    def mine(tile: Tile, *, width: int) -> np.ndarray:
        return tile.pixels * width

    offered(mine)
    assert refusal({}, ["mine"]) == "data.hints.mine.width is missing and has no default"
    assert resolve_hints({"mine": {"width": 3}}, ["mine"]) == {"mine": {"width": 3}}


def test_a_hint_without_parameters_takes_no_key(offered):
    offered(lambda tile: tile.pixels)
    assert resolve_hints({}, ["mine"]) == {"mine": {}}
    assert refusal({"mine": {"width": 1}}) == "unknown key data.hints.mine.width; data.hints.mine has no keys"


def without_a_tile() -> np.ndarray:
    return np.zeros(2)


def of_keywords_alone(*, tile: Tile) -> np.ndarray:
    return tile.pixels


def with_a_second_positional(tile: Tile, width: int = 3) -> np.ndarray:
    return tile.pixels


def without_annotation(tile: Tile, *, width=3) -> np.ndarray:
    return tile.pixels


def with_the_rest(tile: Tile, **rest: int) -> np.ndarray:
    return tile.pixels


def with_an_annotation_that_is_not_there(tile: Tile, *, width: Elsewhere = 3) -> np.ndarray:  # noqa: F821
    return tile.pixels


def with_an_annotation_that_no_yaml_can_give(tile: Tile, *, other: np.random.Generator = None) -> np.ndarray:
    return tile.pixels


@pytest.mark.parametrize(
    "function",
    [
        without_a_tile,
        of_keywords_alone,
        with_a_second_positional,
        without_annotation,
        with_the_rest,
        with_an_annotation_that_is_not_there,
        with_an_annotation_that_no_yaml_can_give,
    ],
)
def test_a_function_that_is_no_hint_is_refused_by_its_name(offered, function):
    offered(function)
    message = refusal({}, ["mine"])
    assert message.startswith("hint 'mine': ")
    assert function.__name__ in message
    assert "correct" in message


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (np.zeros((3, 4)), r"has shape \(3, 4\)"),
        (np.full((8, 8), 1.5), r"has shape \(8, 8\) and values from 1\.5 to 1\.5, expected \(8, 8\) within -1 to 1"),
        (np.full((8, 8), np.nan), r"has shape \(8, 8\) and values from nan to nan"),
    ],
)
def test_a_hint_that_returns_another_image_than_it_must_is_named(offered, made, said):
    offered(lambda tile: made)
    with pytest.raises(UserError, match=rf"hint mine of set/a {said}.*correct its function"):
        make_hint("mine", np.zeros((8, 8), np.float32), None, "set/a", 0, {"mine": {}})


def test_whatever_decides_a_hint_s_pixels_is_in_its_fingerprint():
    settings = resolve_hints({}, CONDITION_TYPES)
    other = resolve_hints({"canny": {"sigma": 1.5}}, CONDITION_TYPES)
    for name in CONDITION_TYPES:
        same = hint_fingerprint(name, settings[name]) == hint_fingerprint(name, other[name])
        assert same == (name != "canny")


def test_a_hint_cannot_change_the_tile_that_it_is_given(offered, job_for, tiny_data):
    def mine(tile: Tile) -> np.ndarray:
        tile.pixels[:] = -1
        return tile.pixels

    offered(mine)
    job = replace(job_for(tiny_data), hints=("mine",), hint_settings={"mine": {}})
    row = list_tiles(job).rows["train"][0]
    with pytest.raises(ValueError, match="read-only"):
        TileReader(job).images(Request(row, (0, 3), ("latent", "hint.mine")))
