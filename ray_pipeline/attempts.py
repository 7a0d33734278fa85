"""Attempts: every start of a phase takes a number, so that a start before it that still lives can do no harm.

<store>/attempts/attempt_000007.json. A later number supersedes: its holder begins from what is committed then, and
nothing that another one commits afterwards counts.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ray_pipeline.errors import UserError
from ray_pipeline.monitoring.phase_state import utc_now
from ray_pipeline.storage import Folder

FOLDER = "attempts"
#: small files that are read at once
READERS = 16
_NAME = re.compile(r"attempt_(\d{6,})\.json")


class Superseded(UserError):
    """Another attempt at the run has begun."""

    superseded = True


class AttemptRecord(BaseModel):
    """One start of a phase on `world_size` workers.

    start_step: steps that were done before it, None until that is known; valid_until: commits of later steps of this
    attempt do not count, None when all do; skipped: steps (from 1) whose update was left out.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    attempt: int
    phase: str
    world_size: int
    began: str
    host: str
    pid: int
    token: str
    start_step: int | None = None
    valid_until: int | None = None
    skipped: tuple[int, ...] = ()


class Attempt:
    """This process's hold on the run."""

    def __init__(self, folder: Folder, record: AttemptRecord):
        self._folder, self.record = folder, record

    @property
    def number(self) -> int:
        return self.record.attempt

    def check(self) -> None:
        """Superseded when another attempt has begun."""
        newest = _numbers(self._folder)[-1:]
        if newest == [self.number] and _read(self._folder, self.number).token == self.record.token:
            return
        later = _read(self._folder, newest[0]) if newest else None
        by = f"attempt {later.attempt} on {later.host} (process {later.pid}, {later.began})" if later else "nobody"
        raise Superseded(
            f"attempt {self.number} of this run in {self._folder.parent} was superseded by {by}; "
            "it ends here and has changed nothing since"
        )

    def update(self, **changes: Any) -> None:
        """Change the record; Superseded when it is no longer the newest."""
        self.check()
        self.record = self.record.model_copy(update=changes)
        self._folder.write(_name(self.number), self.record.model_dump_json(indent=1).encode())


def begin_attempt(store: Folder, phase: str, world_size: int) -> Attempt:
    """Take the next number."""
    folder = store.child(FOLDER)
    folder.create()
    number = max(_numbers(folder), default=0) + 1
    record = AttemptRecord(
        attempt=number,
        phase=phase,
        world_size=world_size,
        began=utc_now(),
        host=socket.gethostname(),
        pid=os.getpid(),
        token=secrets.token_hex(8),
    )
    folder.write(_name(number), record.model_dump_json(indent=1).encode())
    return Attempt(folder, record)


def read_attempts(store: Folder) -> list[AttemptRecord]:
    """All attempts at the run whose checkpoints lie in `store`, by number."""
    folder = store.child(FOLDER)
    with ThreadPoolExecutor(READERS) as pool:  # a request to object storage is mostly waiting
        return list(pool.map(lambda number: _read(folder, number), _numbers(folder)))


def counts(state: Mapping[str, Any], attempts: Sequence[AttemptRecord]) -> bool:
    """Whether a commit of this state still counts: every later attempt at its phase began behind it."""
    phase, step, number = state.get("phase"), state.get("step"), state.get("attempt")
    if step is None or number is None:
        return True
    for attempt in attempts:
        bound = attempt.valid_until if attempt.attempt == number else attempt.start_step
        if attempt.phase == phase and attempt.attempt >= number and bound is not None and step > bound:
            return False
    return True


def _name(number: int) -> str:
    return f"attempt_{number:06d}.json"


def _numbers(folder: Folder) -> list[int]:
    return sorted(int(match[1]) for match in map(_NAME.fullmatch, folder.names()) if match)


def _read(folder: Folder, number: int) -> AttemptRecord:
    data = folder.read(_name(number))
    try:
        return AttemptRecord.model_validate(json.loads(data))
    except (ValueError, ValidationError) as error:
        raise UserError(
            f"{folder.where(_name(number))} is damaged ({' '.join(str(error).split())[:100]}), expected the record of "
            "an attempt; delete it if no training of this run is going on, then resume"
        ) from None
