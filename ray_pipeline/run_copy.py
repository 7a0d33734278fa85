"""Where the files of a run lie on this machine: in output_dir itself or, where that is a URI, in a copy of them.

Object storage cannot append, and asking it costs. So each process that works on such a run has a working copy of its
files in a temporary folder, and keeps both alike. Checkpoints and stored averages are not in it: they go to the storage
directly, whole and hashed. What is appended to by attempt after attempt is stored in segments (metrics_file.py).
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from ray_pipeline.storage import FileStamp, Folder, StorageError, is_uri, shown

#: between two comparisons at least; and so many times as long as one takes
_PAUSE_SECONDS, _PAUSE_FACTOR = 5.0, 20
#: how often, and after which seconds, the last state of a process is offered to a storage that refuses
_LAST_TRIES, _LAST_PAUSE_SECONDS = 5, 3.0
#: folders that no copy has: checkpoints of the run and of trials, stored averages, what Ray keeps for itself
_APART = ("checkpoints", "ema_snapshots", "ray")
#: files that no other process writes
_OWN = "logs/samples/"
#: a file that changed so short a time before it was read may have changed again within the same second
_YOUNG_NS = 3 * 10**9

_copies: dict[str, WorkingCopy] = {}


def run_path(output_dir: str | Path, *names: str) -> Path:
    """Path of a run's file on this machine; for a URI, within `working_copy` or `reading_copy` of it or of a folder
    above."""
    text = str(output_dir)
    if not is_uri(text):
        return Path(text, *names)
    held = _holding(text)
    if held is None:
        raise RuntimeError(f"{text} has no copy on this machine: the caller must work within working_copy")
    return held[0].folder.joinpath(*held[1], *names)


def is_copy(folder: str | Path) -> bool:
    """Whether a folder on this machine is, or lies in, the copy of one in object storage."""
    return any(Path(folder).is_relative_to(copy.folder) for copy in _copies.values())


def location_of(folder: str | Path) -> str:
    """Where the files of a folder on this machine belong: the URI that it is a copy of, or the folder itself."""
    folder = Path(folder)
    for copy in _copies.values():
        if folder.is_relative_to(copy.folder):
            return copy.remote.child(*folder.relative_to(copy.folder).parts).location
    return str(folder)


@contextmanager
def working_copy(output_dir: str | Path, *, follow: bool = False, empty: bool = False) -> Iterator[None]:
    """Within, the run's files may be read and written by `run_path`, and reach the storage within seconds, at the end
    at the latest: StorageError when it does not take them. Nothing to do for a local path.

    follow: what other processes write comes here, too. empty: nothing of what is there already is wanted.
    """
    text = str(output_dir)
    if not is_uri(text) or _holding(text) is not None:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="ray_pipeline_run_") as folder:
        copy = WorkingCopy(Folder(text), Path(folder), follow)
        if not empty:
            copy.pull()
        _copies[copy.remote.location] = copy
        try:
            with copy.kept_alike():
                yield
        finally:
            del _copies[copy.remote.location]


@contextmanager
def reading_copy(output_dir: str | Path, *, averages: bool = False) -> Iterator[Path]:
    """Within, the run's files as they are now, for reading; averages: the stored ones, too. A local path is itself."""
    text = str(output_dir)
    if not is_uri(text) or _holding(text) is not None:
        refresh(text)
        yield run_path(text)
        return
    with tempfile.TemporaryDirectory(prefix="ray_pipeline_run_") as folder:
        apart = tuple(name for name in _APART if not (averages and name == "ema_snapshots"))
        copy = WorkingCopy(Folder(text), Path(folder), follow=True, apart=apart)
        copy.pull()
        _copies[copy.remote.location] = copy
        try:
            yield copy.folder
        finally:
            del _copies[copy.remote.location]


def share(output_dir: str | Path) -> None:
    """Have the storage hold what this process wrote so far of a run; nothing to do for a local path."""
    if held := _holding(str(output_dir)):
        held[0].push()


def guard(output_dir: str | Path, superseded: Callable[[], bool]) -> None:
    """From now on a copy gives the storage nothing once `superseded` says so: what came after it stands. Nothing to do
    for a local path, where a superseded process keeps files of its own."""
    if held := _holding(str(output_dir)):
        held[0].superseded = superseded


def refresh(output_dir: str | Path) -> None:
    """`share`, then see what other processes have written; nothing to do for a local path."""
    if held := _holding(str(output_dir)):
        held[0].push()
        held[0].pull()


def _holding(text: str) -> tuple[WorkingCopy, list[str]] | None:
    """The copy that a location lies in, and the folders from there down to it."""
    folder, below = (Folder(text), []) if is_uri(text) else (None, [])
    while folder is not None:
        if folder.location in _copies:
            return _copies[folder.location], below
        above = folder.parent
        if above.location == folder.location:
            break
        folder, below = above, [folder.name, *below]
    return None


class WorkingCopy:
    """Files below `remote` and their copies in `folder`. A file that changed on both sides is taken from here."""

    def __init__(self, remote: Folder, folder: Path, follow: bool, apart: tuple[str, ...] = _APART):
        self.remote, self.folder, self.follow, self._apart = remote, folder, follow, apart
        self._local = Folder(folder)
        #: of each file that was alike: here, and there; None where it has to be looked at again
        self._here: dict[str, FileStamp | None] = {}
        self._there: dict[str, FileStamp | None] = {}
        #: the clock of the storage is at least so far ahead of this process's monotonic one
        self._ahead_ns = -time.monotonic_ns()
        self.superseded: Callable[[], bool] = lambda: False
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._told: set[str] = set()

    @contextmanager
    def kept_alike(self) -> Iterator[None]:
        """Within, a thread does so; at the end what is left goes to the storage."""
        thread = threading.Thread(target=self._run, daemon=True, name="run-copy")
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()
            self._push_last()

    def push(self) -> None:
        """Give the storage what changed here."""
        with self._lock:
            now = self._listed()
            if now == self._here:
                return
            if self.superseded():  # what came after it stands, and the log of what it took itself is its own
                now = self._here | {name: stamp for name, stamp in now.items() if name.startswith(_OWN)}
            for name, stamp in now.items():
                if self._here.get(name) == stamp:
                    continue
                with suppress(FileNotFoundError):  # it was replaced or deleted meanwhile
                    self.remote.write(name, self._local.read(name))
                    self._here[name], self._there[name] = stamp, self.remote.stamp(name)
            gone = set(self._here) - set(now)
            self.remote.remove(sorted(gone))
            for name in gone:
                del self._here[name], self._there[name]

    def pull(self) -> None:
        """Take what changed in the storage."""
        with self._lock:
            there = {name: stamp for name, stamp in self.remote.tree().items() if self._is_ours(name)}
            newest, now = max((stamp.mtime_ns for stamp in there.values()), default=0), time.monotonic_ns()
            self._ahead_ns = max(self._ahead_ns, newest - now)
            settled = now + self._ahead_ns - _YOUNG_NS
            for name, stamp in there.items():
                here = self._local.stamp(name)
                if self._there.get(name) == stamp or here not in (None, self._here.get(name)):
                    continue
                with suppress(FileNotFoundError):
                    self._local.write(name, self.remote.read(name))
                    self._here[name] = self._local.stamp(name)
                    self._there[name] = stamp if stamp.mtime_ns < settled else None
            for name in set(self._there) - set(there):
                self._local.remove([name])
                del self._here[name], self._there[name]

    def _run(self) -> None:
        pause = _PAUSE_SECONDS
        while not self._ended.wait(pause):
            started = time.monotonic()
            try:
                self.push()
                if self.follow:
                    self.pull()
            except StorageError as error:
                self._tell(str(error))
            pause = max(_PAUSE_SECONDS, _PAUSE_FACTOR * (time.monotonic() - started))

    def _push_last(self) -> None:
        for tries_left in reversed(range(_LAST_TRIES)):
            try:
                self.push()
                return
            except StorageError as error:
                if not tries_left:
                    raise
                self._tell(str(error))
                time.sleep(_LAST_PAUSE_SECONDS)

    def _tell(self, words: str) -> None:
        if words not in self._told:
            self._told.add(words)
            warnings.warn(f"the records of the run are behind: {words}", stacklevel=2)

    def _listed(self) -> dict[str, FileStamp]:
        if not self.folder.is_dir():  # else all of the run would seem to have been deleted here
            raise StorageError(
                f"{self.folder}, the copy of {shown(self.remote.location)} on this machine, was deleted; let it lie "
                "until its process has ended"
            )
        found = {}
        for folder, _, files in os.walk(self.folder, onerror=self._unlisted):
            for name in (Path(folder, file).relative_to(self.folder).as_posix() for file in files):
                if self._is_ours(name) and (stamp := self._local.stamp(name)) is not None:
                    found[name] = stamp
        return found

    def _unlisted(self, error: OSError) -> None:
        """A folder that was deleted meanwhile holds nothing; of any other the files would seem to be deleted."""
        if not isinstance(error, FileNotFoundError):
            with self._local.reaching(os.path.relpath(error.filename, self.folder)):
                raise error

    def _is_ours(self, name: str) -> bool:
        parts = PurePosixPath(name).parts
        return not parts[-1].startswith(".") and not any(part in self._apart for part in parts[:-1])
