"""Saving while training goes on: a copy in host memory, written by a thread in the order of the requests."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
from torch import Tensor

from ray_pipeline.checkpoints import CheckpointStore
from ray_pipeline.storage import StorageError

#: a storage that refuses is asked again after so many seconds, then twice as many, at most the last number
_FIRST_PAUSE, _LONGEST_PAUSE = 2.0, 120.0
#: what a copy may take of the memory that is free
_MEMORY_SHARE = 0.8
_CGROUP = Path("/sys/fs/cgroup")
_LEAST_PRIORITY = 19


@dataclass(frozen=True, eq=False)
class Save:
    """What is to be committed as `name`.

    obsolete: names that this one makes superfluous. replaceable: itself superfluous once a later one waits. overwrite:
    the same name may be there already, with equal contents. first: what must be in the storage before it.
    """

    store: CheckpointStore
    name: str
    groups: Mapping[str, Mapping[str, Tensor]]
    state: Mapping
    metadata: Mapping[str, str]
    obsolete: tuple[str, ...] = ()
    replaceable: bool = True
    overwrite: bool = False
    first: Callable[[], None] | None = None

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for tensors in self.groups.values() for t in tensors.values())

    def copied(self) -> Save:
        """The same with tensors of its own, on the host."""
        groups = {
            group: {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
            for group, tensors in self.groups.items()
        }
        return replace(self, groups=groups)

    def commit(self) -> Outcome:
        """Write it, then delete what is obsolete; what the storage refuses is in the outcome, anything else an
        exception."""
        started = time.perf_counter()
        try:
            if self.first is not None:
                self.first()
            if self.overwrite:
                self.store.delete(self.name)
            self.store.save(self.name, self.groups, self.state, self.metadata)
            if self.obsolete:  # whoever has begun since may stand on one of them
                self.store.check_attempt()
        except StorageError as error:
            return Outcome(self, time.perf_counter() - started, str(error))
        left = []
        for name in self.obsolete:
            try:
                self.store.delete(name)
            except StorageError as error:
                left.append(f"{name} is obsolete and could not be deleted: {error}")
        return Outcome(self, time.perf_counter() - started, left=tuple(left))


@dataclass(frozen=True)
class Outcome:
    """What became of a save after `seconds` of writing: committed, or refused with these words.

    dropped: it will not be tried again. left: what could not be deleted after it.
    """

    save: Save
    seconds: float
    error: str | None = None
    dropped: bool = False
    left: tuple[str, ...] = ()


class Saver:
    """A context manager; leaving it does not wait: what is not committed then never existed. Saves are written in the
    order of their requests, but a store that refuses does not hold up another one."""

    def __init__(self):
        self._changed = threading.Condition()
        self._waiting: deque[Save] = deque()
        self._outcomes: deque[Outcome] = deque()
        self._failure: BaseException | None = None
        self._refusing: set[str] = set()  # stores that did not take what they were given last
        self._writing: Save | None = None
        self._pause = _FIRST_PAUSE
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="saver")

    def __enter__(self) -> Saver:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def submit(self, save: Save) -> None:
        """Copy what is to be saved; its tensors may change as soon as this returns. While the storage refuses, a
        replaceable one takes the place of those that wait."""
        if save.replaceable:
            self._drop_refused()
        copy = save.copied()
        with self._changed:
            self._waiting.append(copy)
            self._changed.notify_all()

    def write(self, save: Save) -> None:
        """Save without a copy, while the caller stands still, and only if nothing waits; if the storage refuses, the
        caller may come again with a later one."""
        outcome = save.commit()
        with self._changed:
            self._outcomes.append(replace(outcome, dropped=outcome.error is not None))

    def outcomes(self) -> list[Outcome]:
        """What became of saves since this was asked last. Raises what is no refusal of the storage."""
        with self._changed:
            if self._failure is not None:
                raise self._failure
            told = list(self._outcomes)
            self._outcomes.clear()
            return told

    def drain(self, seconds: float) -> bool:
        """Wait until nothing waits, at most so long; a storage that refused is asked again at once."""
        with self._changed:
            self._refusing.clear()
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not self._waiting or self._failure is not None, seconds)

    def _drop_refused(self) -> None:
        with self._changed:
            for old in [save for save in self._waiting if save.replaceable and save is not self._writing]:
                if old.store.root in self._refusing:
                    self._waiting.remove(old)
                    self._outcomes.append(Outcome(old, 0.0, "a later one takes its place", dropped=True))
            self._changed.notify_all()

    def _run(self) -> None:
        if sys.platform == "linux":  # where a priority may be one thread's own: hashing gives way to training
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LEAST_PRIORITY)
        while save := self._next():
            try:
                outcome = save.commit()
            except BaseException as error:
                with self._changed:
                    self._failure, self._writing = error, None
                    self._changed.notify_all()
                return
            with self._changed:
                self._writing = None
                self._outcomes.append(outcome)
                if outcome.error is None:
                    self._waiting.remove(save)
                    self._pause = _FIRST_PAUSE
                else:
                    self._refusing.add(save.store.root)
                self._changed.notify_all()

    def _next(self) -> Save | None:
        """The save to write now; None once this is closed."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return None
                self._writing = self._ready()
                if self._writing is not None:
                    return self._writing
                if self._changed.wait_for(lambda: self._closed or not self._waiting or self._ready(), self._pause):
                    continue
                self._pause = min(2 * self._pause, _LONGEST_PAUSE)
                self._refusing.clear()

    def _ready(self) -> Save | None:
        """The first that waits for a store which has not refused."""
        return next((save for save in self._waiting if save.store.root not in self._refusing), None)


def fits_in_memory(save: Save) -> bool:
    """Whether there is room for a copy."""
    return save.bytes <= _MEMORY_SHARE * free_memory()


def free_memory() -> int:
    """Bytes that this process may still take, within its control group where it has one."""
    free = psutil.virtual_memory().available
    limit = _CGROUP / "memory.max"
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        cached = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())["inactive_file"]
        free = min(free, int(text) - int((_CGROUP / "memory.current").read_text()) + int(cached))
    return free
