"""A submitted job until its end: its log as it comes, Ctrl-C, and another try when what ended it may pass."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from ray_pipeline.errors import TRY_AGAIN, UserError
from ray_pipeline.submission import Job, job_record, next_commands, on_one_line, refusal, submit_job

#: how long a cluster that does not answer is asked again, and how often, in seconds
_PATIENCE_SECONDS, _ASK_SECONDS = 600.0, 5.0
#: after so many seconds without a word of the log the job is asked after; after so many such silences in a row the log
#: is read anew, which brings all of it again
_SILENT_SECONDS, _MOST_SILENCES = 60.0, 10
#: pauses before a job is submitted again, each twice the one before, in seconds
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 5.0, 300.0
#: failures without an exit status by which the driver, or its node, was lost
_LOST = {
    f"JOB_SUPERVISOR_ACTOR_{end}"
    for end in ("DIED", "START_FAILURE", "START_TIMEOUT", "UNKNOWN_FAILURE", "UNSCHEDULABLE")
}

Write = Callable[[str], None]


@dataclass(frozen=True)
class Ended:
    """How a job ended. exit_status: the driver's, 128 + the number of the signal that ended it; of a job that was
    stopped Ray tells none, and it is SIGTERM's. may_pass: it is worth another try, since the driver died without being
    asked to, or said so by its status."""

    words: str
    exit_status: int
    may_pass: bool


def attend_job(
    client: JobSubmissionClient,
    job: Job,
    *,
    retries: int = 0,
    write: Write,
    say: Write,
    ask: Callable[[], bool],
    silent_seconds: float = _SILENT_SECONDS,
) -> int:
    """Follow a submitted job to its end; returns its exit status, 130 when Ctrl-C left it running.

    retries: how often a job whose end may pass is submitted again; write: gets its log as it comes; say: gets a line of
    ours; ask: after Ctrl-C, whether to stop the job too; silent_seconds: how long a silent log is believed.
    """
    first, pause = job.job_id, _FIRST_PAUSE_SECONDS
    for retry in range(1, retries + 2):
        ended = _follow_or_leave(_Log(client, job.job_id, write, say, silent_seconds), ask)
        if ended is None:
            return 128 + signal.SIGINT
        say(f"job {job.job_id} {ended.words}")
        if not ended.may_pass or retry > retries:
            break
        say(f"this may pass: submitted again in {pause:g} s, retry {retry} of {retries}")
        try:
            time.sleep(pause)
        except KeyboardInterrupt:
            say("not submitted again")
            return 128 + signal.SIGINT
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        job = job.again(retry, first)
        _submit_when_it_answers(client, job, say)
        say(f"job {job.job_id} goes on with the run of job {first}")
    return ended.exit_status


def ask_to_stop() -> bool:
    """Ask on the terminal whether to stop the job too; no without a terminal, at its end, and at another Ctrl-C."""
    if not sys.stdin.isatty():
        return False
    print("\nstop the job too? [y/N] ", end="", file=sys.stderr, flush=True)
    try:
        return sys.stdin.readline().strip().lower() in ("y", "yes")
    except KeyboardInterrupt:
        return False


def how_it_ended(details: JobDetails | None) -> Ended:
    """What a job's record says of its end; None: the cluster has no record any more."""
    if details is None:
        return Ended("is not known to the cluster any more", 1, may_pass=True)
    if details.status == JobStatus.SUCCEEDED:
        return Ended("succeeded", 0, may_pass=False)
    if details.status == JobStatus.STOPPED:
        return Ended("was stopped", 128 + signal.SIGTERM, may_pass=False)
    code = details.driver_exit_code
    if code is None:
        return Ended(f"failed ({on_one_line(details.message)})", 1, may_pass=details.error_type in _LOST)
    status = 128 - code if code < 0 else code
    number = status - 128  # a shell that Ray runs ends so when its command was killed
    if not 0 < number < signal.NSIG:
        return Ended(f"failed with exit status {status}", status, may_pass=status == TRY_AGAIN)
    # a `ray job stop` makes it STOPPED: a SIGTERM of others came with its node, such as a pod that is drained
    return Ended(f"was ended by {signal.Signals(number).name}", status, may_pass=number != signal.SIGINT)


def _follow_or_leave(log: _Log, ask: Callable[[], bool]) -> Ended | None:
    """How a job ended, None when Ctrl-C left it."""
    client, job_id, say, stopping = log.client, log.job_id, log.say, False
    while True:
        try:
            ended = log.follow()
            return replace(ended, may_pass=ended.may_pass and not stopping)
        except KeyboardInterrupt:
            if stopping or not ask():
                say(f"job {job_id} {'is being stopped' if stopping else 'goes on'} without this command")
                for line in next_commands(client, job_id):
                    say(line)
                return None
        try:
            client.stop_job(job_id)
        except AuthenticationError as error:
            say(f"job {job_id} could not be asked to stop: {refusal(error)}")
        except (OSError, RuntimeError) as error:
            say(f"job {job_id} could not be asked to stop ({on_one_line(error)})")
        else:
            stopping = True
            say(f"stopping job {job_id}: its workers are asked to commit; Ctrl-C again does not wait for it")


class _Log:
    """The log of a job, each character written once, whatever breaks in between."""

    def __init__(self, client: JobSubmissionClient, job_id: str, write: Write, say: Write, silent_seconds: float):
        self.client, self.job_id, self.write, self.say = client, job_id, write, say
        self.silent_seconds = silent_seconds
        self.shown, self.line_ended = 0, True

    def follow(self) -> Ended:
        """Write the log as it comes until the job has ended."""
        # what it means, the record tells
        broken = suppress(OSError, RuntimeError, AuthenticationError, aiohttp.ClientError, TimeoutError)
        while True:
            with broken, asyncio.Runner() as runner:
                if self._stream(runner):
                    continue
            details = self._record()
            with broken:  # where no stream gets through, the log comes so
                self._write_new(0, self.client.get_job_logs(self.job_id))
            if details is None or details.status.is_terminal():
                if not self.line_ended:
                    self.write("\n")
                return how_it_ended(details)
            time.sleep(_ASK_SECONDS)

    def _stream(self, runner: asyncio.Runner) -> bool:
        """Write the log as it comes until the job has ended, or, which is True, it was silent for so long that the
        connection may have been lost without a word. RuntimeError or ClientError when the connection breaks."""
        stream, place = self.client.tail_job_logs(self.job_id), 0

        async def read() -> str | None:
            return await anext(stream, None)

        while True:
            coming = runner.get_loop().create_task(read())
            for _ in range(_MOST_SILENCES):
                runner.run(asyncio.wait({coming}, timeout=self.silent_seconds))
                if coming.done():
                    break
                details = self._record()
                if details is None or details.status.is_terminal():
                    return False
            else:
                return True
            if (text := coming.result()) is None:
                return False
            self._write_new(place, text)
            place += len(text)

    def _write_new(self, place: int, text: str) -> None:
        """Write what was not shown of a text that begins at character `place`."""
        new = text[max(0, self.shown - place) :]
        if new:
            self.shown, self.line_ended = place + len(text), new.endswith("\n")
            self.write(new)

    def _record(self) -> JobDetails | None:
        """What the cluster says of the job; None when it does not know it: its head was replaced."""
        deadline, minutes, said = time.monotonic() + _PATIENCE_SECONDS, _PATIENCE_SECONDS / 60, False
        while True:
            try:
                return job_record(self.client, self.job_id)
            except AuthenticationError as error:
                raise UserError(f"job {self.job_id} may go on without this command: {refusal(error)}") from error
            except (OSError, RuntimeError, ValueError) as error:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"the cluster has not answered for {minutes:g} minutes ({on_one_line(error)}); job "
                        f"{self.job_id} may go on without this command"
                    ) from error
            if not said:
                self.say(f"the cluster does not answer; asking again for {minutes:g} minutes")
            said = True
            time.sleep(_ASK_SECONDS)


def _submit_when_it_answers(client: JobSubmissionClient, job: Job, say: Write) -> None:
    """Submit a job to a cluster that may have lost a node, or its head, a moment ago."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return submit_job(client, job)
        except UserError as error:
            if time.monotonic() > deadline or isinstance(error.__cause__, AuthenticationError):
                raise
            say(f"{error}; trying again")
            time.sleep(_ASK_SECONDS)
