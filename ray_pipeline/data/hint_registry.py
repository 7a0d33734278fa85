"""Which hints there are, with which parameters: those of this package and those that others add."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ValidationError, create_model

from ray_pipeline.config import describe_problem
from ray_pipeline.data.hints import HINTS, Tile, hint_generator
from ray_pipeline.errors import UserError
from ray_pipeline.plugins import HINTS as GROUP
from ray_pipeline.plugins import load_plugin, plugin_names, plugin_version
from ray_pipeline.sections import Section


class BrokenHint(UserError):
    """A hint's own function is wrong, not the tile that it was given."""


def known_hints() -> tuple[str, ...]:
    """Names of all hints, this package's own first."""
    return (*HINTS, *(name for name in plugin_names(GROUP) if name not in HINTS))


@cache
def hint_function(name: str) -> Callable[..., np.ndarray]:
    """The function of a hint; UserError for an unknown one, or one whose package does not load."""
    if name in HINTS:
        if name in plugin_names(GROUP):
            raise UserError(
                f"{GROUP} {name!r} of package {plugin_version(GROUP, name)} has the name of a hint of ray-pipeline; "
                "rename it there, or uninstall that package"
            )
        return HINTS[name]
    return load_plugin(GROUP, name)


@cache
def hint_parameters(name: str) -> type[BaseModel]:
    """The keys of data.hints.<name>: keyword-only arguments of the hint's function, with annotations and defaults."""
    function = hint_function(name)
    try:
        tile, *keywords = inspect.signature(function, eval_str=True).parameters.values()
        fields = {a.name: (a.annotation, ... if a.default is a.empty else a.default) for a in keywords}
        model = create_model(name, __base__=Section, **fields)
    except Exception as error:  # whatever evaluating another package's annotations raises
        raise UserError(
            f"hint {name!r}: the arguments of {_origin(name, function)} cannot be understood "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); correct them"
        ) from error
    wrong = [a for a in keywords if a.kind is not a.KEYWORD_ONLY or a.annotation is a.empty]
    if wrong or tile.kind not in (tile.POSITIONAL_ONLY, tile.POSITIONAL_OR_KEYWORD):
        raise UserError(
            f"hint {name!r}: expected a function of a tile and of keyword-only arguments with "
            f"annotations, found {function.__name__}{inspect.signature(function)}; correct it"
        )
    return model


def _origin(name: str, function: Callable) -> str:
    package = "ray-pipeline" if name in HINTS else plugin_version(GROUP, name)
    return f"{getattr(function, '__name__', 'its function')} of {package}"


def resolve_hints(given: Mapping[str, Mapping[str, Any]], wanted: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Every parameter of the `wanted` hints as plain values, from `given` (data.hints) and the defaults.

    A local folder as `model` becomes absolute, since workers change directory. UserError for unknown hints and keys,
    and for wrong values, with their paths.
    """
    for name in (*given, *wanted):
        if name not in known_hints():
            nearest = difflib.get_close_matches(name, known_hints(), n=1, cutoff=0.0)[0]
            if name in given:
                raise UserError(f"unknown key data.hints.{name}; the nearest known key is data.hints.{nearest}")
            known = ", ".join(known_hints())
            raise UserError(f"unknown hint {name!r}, expected some of {known}; the nearest is {nearest!r}")
    resolved = {name: _resolve(name, given.get(name, {})) for name in dict.fromkeys((*wanted, *given))}
    return {name: resolved[name] for name in wanted}


def make_hint(
    name: str,
    pixels: np.ndarray,
    partner: np.ndarray | None,
    sample_id: str,
    variant: int,
    settings: Mapping[str, Mapping[str, Any]],
    psf_fwhm_px: float = 0.0,
) -> np.ndarray:
    """One hint of one tile, (H, W) float32 in [-1, 1]; equal arguments give equal pixels.

    pixels, partner: in this variant already. settings: of `resolve_hints`. UserError for a partner that does not fit,
    and for what a hint of another package must not return.
    """
    tile = Tile(pixels, partner, hint_generator(name, sample_id, variant), psf_fwhm_px)
    try:
        hint = np.ascontiguousarray(hint_function(name)(tile, **settings[name]), dtype=np.float32)
    except Exception as error:
        if name in HINTS or isinstance(error, UserError):
            raise
        raise BrokenHint(
            f"hint {name} of package {plugin_version(GROUP, name)} fails at {sample_id} ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}); correct its function"
        ) from error
    if hint.shape != pixels.shape or not (np.abs(hint) <= 1).all():
        found = f"values from {hint.min():g} to {hint.max():g}" if hint.size else "no values"
        raise BrokenHint(
            f"hint {name} of {sample_id} has shape {hint.shape} and {found}, expected {pixels.shape} within -1 to 1; "
            "correct its function"
        )
    return hint


def hint_fingerprint(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a hint's pixels beside the tile: its parameters, a model's weights, another package's version."""
    decisive = dict(settings)
    if name == "depth" and settings["model"] is not None:
        from ray_pipeline.models.depth import load_depth_model

        decisive["model"] = load_depth_model(settings["model"]).fingerprint()
    if name not in HINTS:
        decisive["package"] = plugin_version(GROUP, name)
    return decisive


def _resolve(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    parameters = hint_parameters(name)
    try:
        values = parameters.model_validate(given).model_dump(mode="json")
    except ValidationError as error:
        problems = [describe_problem(p, parameters, f"data.hints.{name}") for p in error.errors()]
        raise UserError("; ".join(problems)) from None
    folder = values.get("model")
    if name == "depth" and folder is not None and Path(folder).expanduser().is_dir():
        values["model"] = str(Path(folder).expanduser().absolute())
    return values
