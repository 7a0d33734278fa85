"""What other installed packages add, by entry points: hints, data sources and sinks of events.

The names come from the packages' metadata; their code is imported when it is used, in Ray's workers too, where nothing
that a driver registered would ever arrive.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points

from ray_pipeline.errors import UserError

#: functions tile -> image, see ray_pipeline.data.hints
HINTS = "ray_pipeline.hints"
#: functions root -> Collection, see ray_pipeline.data.sources.collection
SOURCES = "ray_pipeline.sources"
#: functions SinkContext -> sink, see ray_pipeline.monitoring.sinks
SINKS = "ray_pipeline.sinks"


def plugin_names(group: str) -> tuple[str, ...]:
    """Names that installed packages offer in `group`, sorted; no code of theirs runs."""
    return tuple(sorted({point.name for point in entry_points(group=group)}))


def load_plugin(group: str, name: str) -> Callable:
    """The function that a package offers under `name`; UserError when none or several do, or it cannot be imported."""
    point = _point(group, name)
    try:
        function = point.load()
    except Exception as error:  # whatever happens while somebody else's package is imported
        raise UserError(
            f"{group} {name!r} of package {_package(point)} cannot be loaded from {point.value} "
            f"({type(error).__name__}: {' '.join(str(error).split())}); repair or uninstall that package"
        ) from error
    if not callable(function):
        raise UserError(f"{group} {name!r}: {point.value} of package {_package(point)} is no function; correct it")
    return function


def plugin_version(group: str, name: str) -> str:
    """Package and version that `name` comes from."""
    return _package(_point(group, name))


def _point(group: str, name: str) -> EntryPoint:
    points = sorted(entry_points(group=group, name=name), key=lambda point: point.value)
    if not points:
        known = ", ".join(plugin_names(group)) or "none"
        raise UserError(f"no installed package offers {name!r} in the entry points {group}, found {known}; install it")
    if len({point.value for point in points}) > 1:
        packages = " and ".join(_package(point) for point in points)
        raise UserError(f"{group} {name!r} is offered by {packages}; uninstall one")
    return points[0]


def _package(point: EntryPoint) -> str:
    return "unknown" if point.dist is None else f"{point.dist.name} {point.dist.version}"
