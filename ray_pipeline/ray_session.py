"""Start Ray, or join the one that runs."""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import ray

from ray_pipeline.errors import UserError
from ray_pipeline.sections import RayConfig


@contextmanager
def ray_session(settings: RayConfig, *, more_cpus: float = 0.0, verbose: bool = False) -> Iterator[None]:
    """Ray for the length of the block: the one that runs already, a cluster, or a local one that ends with it.

    A local one has so many more logical CPUs than its training workers and the machine's cores: workers that fill the
    machine would leave none for the data stream. Within, SIGTERM ends the process as an exception would: Ray is shut
    down, and the exit code is 143.
    """
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.CRITICAL)
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not verbose:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    address = settings.address
    if address == "auto":
        address = "auto" if os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_ID") else "local"
    if address != "local" or settings.dashboard:  # for the dashboard's page of Train alone
        os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")
    options = {"log_to_driver": verbose, "logging_level": logging.INFO if verbose else logging.ERROR}
    try:
        with nullcontext() if verbose else _silent_stderr():
            _start_ray(settings, more_cpus, address, options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"ray.address={settings.address}: Ray does not start or answer ({' '.join(str(error).split())[:300]}); "
            "check the address, or use ray.address=local"
        ) from error
    try:
        with _exit_on_sigterm():
            yield
    finally:
        ray.shutdown()


def _start_ray(settings: RayConfig, more_cpus: float, address: str, options: dict) -> None:
    if address != "local":
        ray.init(address=address, **options)
        return
    workers = math.ceil(settings.max_workers * settings.cpus_per_worker)
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, workers) + math.ceil(more_cpus),
        include_dashboard=settings.dashboard,
        dashboard_host="127.0.0.1",
        **options,
    )


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Ray sets a handler of its own, which exits with 15."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Nothing reaches file descriptor 2 within: Ray's core announces there that it was told to be quiet."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
