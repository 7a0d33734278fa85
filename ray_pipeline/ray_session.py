"""Start Ray, or join the one that runs."""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import ray

from ray_pipeline.errors import UserError
from ray_pipeline.runtime_env import make_runtime_env
from ray_pipeline.sections import RayConfig

_CONNECT_SECONDS = 10


@contextmanager
def ray_session(settings: RayConfig, *, more_cpus: float = 0.0, verbose: bool = False) -> Iterator[None]:
    """Ray for the length of the block: the one that runs already, a cluster, or a local one that ends with it.

    A local one has so many more logical CPUs than its training workers and the machine's cores: workers that fill the
    machine would leave none for the data stream. Within, SIGTERM ends the process as an exception would: Ray is shut
    down, and the exit code is 143.
    """
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.CRITICAL)
    runtime_env = make_runtime_env(settings.runtime_env)
    if ray.is_initialized():
        if runtime_env:
            raise UserError(
                "ray.runtime_env comes too late for the Ray that this process has joined; give it to its ray.init"
            )
        with limited_data(settings):
            yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not verbose:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    address = session_address(settings)
    if address == "local":  # else Ray warns on stdout when four times as many workers as cores are there, as they are
        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(max(8, os.cpu_count() or 1)))
    if address != "local" or settings.dashboard:  # the dashboard tells of Train's runs then, at /api/train/v2/runs/v1
        os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")
    options = {"log_to_driver": verbose, "logging_level": logging.INFO if verbose else logging.ERROR}
    options |= {"runtime_env": runtime_env}
    _check_listens(address)
    try:
        with nullcontext() if verbose else _silent_stderr():
            _start_ray(settings, more_cpus, address, options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        if "Failed to merge the Job's runtime env" in str(error):  # Ray's words show the values of all variables
            raise UserError(
                "ray.runtime_env and the runtime environment of this Ray job differ in a field or variable; leave it "
                "out of one of them"
            ) from None
        remedy = "check the address, or use ray.address=local"
        if address == "local" and settings.object_store_gib is not None:
            remedy = f"ray.object_store_gib={settings.object_store_gib:g} may be more than there is memory for"
        raise UserError(
            f"ray.address={settings.address}: Ray does not start or answer ({' '.join(str(error).split())[:300]}); "
            f"{remedy}"
        ) from error
    try:
        with _exit_on_sigterm(), limited_data(settings):
            yield
    finally:
        ray.shutdown()


def session_address(settings: RayConfig) -> str:
    """What `ray_session` joins or starts: "local", "auto" for the cluster that the environment tells of, or an
    address."""
    if settings.address != "auto":
        return settings.address
    return "auto" if os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_ID") else "local"


@contextmanager
def limited_data(settings: RayConfig) -> Iterator[None]:
    """Within, an execution of Ray Data that this process starts, or a worker of a training that it starts, holds at
    most ray.object_store_gib in the object store; one task is always under way."""
    if settings.object_store_gib is None:
        yield
        return
    from ray.data import DataContext

    options = DataContext.get_current().execution_options
    before = options.resource_limits
    options.resource_limits = before.copy(object_store_memory=store_bytes(settings))
    try:
        yield
    finally:
        options.resource_limits = before


def store_bytes(settings: RayConfig) -> int | None:
    """ray.object_store_gib in bytes."""
    return None if settings.object_store_gib is None else int(settings.object_store_gib * 2**30)


def _check_listens(address: str) -> None:
    """UserError where nothing takes connections at HOST:PORT: Ray would try for minutes; and for a dashboard's URL."""
    if re.match("https?://", address):
        raise UserError(
            f"ray.address={address} is a dashboard's URL, but a driver runs on a node of the cluster; use "
            "`ray-pipeline submit`, or `ray job submit` with this command"
        )
    found = re.fullmatch(r"([\w.-]+):(\d+)", address)
    if found is None:
        return
    try:
        socket.create_connection((found[1], int(found[2])), _CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"ray.address={address}: nothing answers there ({error}); give HOST:PORT of a Ray's head node, by default "
            "port 6379, or use ray.address=local"
        ) from None


def _start_ray(settings: RayConfig, more_cpus: float, address: str, options: dict) -> None:
    if address != "local":
        ray.init(address=address, **options)
        return
    workers = math.ceil(settings.max_workers * settings.cpus_per_worker)
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, workers) + math.ceil(more_cpus),
        object_store_memory=store_bytes(settings),
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
