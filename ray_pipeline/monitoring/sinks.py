"""Which sinks there are: TensorBoard, Weights & Biases, Ray's metrics, and what other installed packages offer by the
entry points `ray_pipeline.sinks`."""

from __future__ import annotations

from collections.abc import Callable

from ray_pipeline.errors import UserError
from ray_pipeline.monitoring.sink import Sink, SinkContext
from ray_pipeline.plugins import SINKS, load_plugin
from ray_pipeline.sections import MonitoringConfig


def chosen_sinks(monitoring: MonitoringConfig) -> tuple[str, ...]:
    """Names of those that a config asks for; UserError for one that no installed package offers, or that needs one."""
    wanted = {"tensorboard": monitoring.tensorboard, "ray": monitoring.ray_metrics}
    wanted["wandb"] = monitoring.wandb != "disabled"
    if wanted["wandb"]:
        from ray_pipeline.monitoring.wandb_log import check_installed

        check_installed()
    for name in monitoring.sinks:
        if name in _OWN:
            raise UserError(f"monitoring.sinks lists {name}, which has a key of its own; leave it out there")
        load_plugin(SINKS, name)
    return (*(name for name in wanted if wanted[name]), *monitoring.sinks)


def open_sink(name: str, context: SinkContext) -> Sink:
    """The sink of this name, ready for events."""
    return _OWN[name](context) if name in _OWN else load_plugin(SINKS, name)(context)


def _tensorboard(context: SinkContext) -> Sink:
    from ray_pipeline.monitoring.tensorboard import TensorBoard

    return TensorBoard(context)


def _ray(context: SinkContext) -> Sink:
    from ray_pipeline.monitoring.ray_metrics import RayMetrics

    return RayMetrics(context)


def _wandb(context: SinkContext) -> Sink:
    from ray_pipeline.monitoring.wandb_log import WandbLog

    return WandbLog(context)


#: each is imported when it is opened: torch, Ray and wandb take seconds
_OWN: dict[str, Callable[[SinkContext], Sink]] = {"tensorboard": _tensorboard, "ray": _ray, "wandb": _wandb}
