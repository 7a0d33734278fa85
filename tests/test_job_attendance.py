"""How a job is followed, with a stand-in for the job API of Ray's dashboard that tells what was asked of it."""

import asyncio
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from aiohttp import WSCloseCode, web
from ray.job_submission import JobSubmissionClient

from ray_pipeline.errors import UserError
from ray_pipeline.job_attendance import attend_job
from ray_pipeline.submission import Job, submit_job

SILENT_SECONDS = 0.05


class Dashboard:
    """The API, with a job that runs. tail: what it does with a websocket that follows the log; asked: how often each
    path was; jobs: records by id; refuses: to take one; lost: so many answers of /api/jobs to come get lost; locked:
    which requests of /api/jobs it takes for a stranger's."""

    def __init__(self, tail: Callable | None = None):
        self.tail, self.asked, self.log = tail, Counter(), ""
        self.lost, self.refuses, self.locked = 0, False, re.compile("(?!)")
        self.record = {"type": "SUBMISSION", "entrypoint": "train", "status": "RUNNING"}
        self.jobs = {"a": self.record}
        self.loop, self.ready = asyncio.new_event_loop(), threading.Event()
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()
        assert self.ready.wait(30)

    def _serve(self) -> None:
        application = web.Application(middlewares=[self._stand_between])
        application.add_routes(
            [
                web.get("/api/version", self._answer(lambda: {"version": "4", "ray_version": "2.50.0"})),
                web.get("/api/packages/gcs/{name}", self._answer(dict)),
                web.get("/api/jobs/{job_id}", self._tell),
                web.get("/api/jobs/a/logs", self._answer(lambda: {"logs": self.log})),
                web.get("/api/jobs/a/logs/tail", self._follow),
                web.post("/api/jobs/a/stop", self._answer(self._stop)),
                web.post("/api/jobs/", self._take),
            ]
        )
        runner = web.AppRunner(application, shutdown_timeout=0)
        self.loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self.loop.run_until_complete(site.start())
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self.ready.set()
        self.loop.run_forever()
        self.loop.run_until_complete(runner.cleanup())

    @web.middleware
    async def _stand_between(self, request: web.Request, handler: Callable) -> web.StreamResponse:
        if self.locked.match(request.path):
            self.asked["refused"] += 1
            return web.Response(status=403, text="wrong token")
        answer = await handler(request)
        if self.lost and request.path.startswith("/api/jobs/"):
            self.lost -= 1
            request.transport.close()
        return answer

    async def _tell(self, request: web.Request) -> web.Response:
        self.asked[f"{request.method} {request.path}"] += 1
        job_id = request.match_info["job_id"]
        if job_id not in self.jobs:
            return web.Response(status=404, text=f"Job {job_id} does not exist")
        return web.json_response(self.jobs[job_id])

    async def _take(self, request: web.Request) -> web.Response:
        self.asked[f"{request.method} {request.path}"] += 1
        job_id = (await request.json())["submission_id"]
        if self.refuses:
            return web.Response(status=400, text="no such runtime environment")
        if job_id in self.jobs:
            return web.Response(status=500, text=f"Job with submission_id {job_id} already exists.")
        self.jobs[job_id] = dict(self.record)
        return web.json_response({"job_id": job_id, "submission_id": job_id})

    def _answer(self, content: Callable[[], dict]) -> Callable:
        async def answer(request: web.Request) -> web.Response:
            self.asked[f"{request.method} {request.path}"] += 1
            return web.json_response(content())

        return answer

    async def _follow(self, request: web.Request) -> web.WebSocketResponse:
        self.asked["tail"] += 1
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await self.tail(self, socket)
        await socket.close(code=WSCloseCode.OK)
        return socket

    def _stop(self) -> dict:
        self.record |= {"status": "FAILED", "driver_exit_code": 137}  # its node went meanwhile
        return {"stopped": True}

    async def say(self, socket: web.WebSocketResponse, text: str) -> None:
        self.log += text
        await socket.send_str(text)

    async def until_asked(self, times: int) -> None:
        """Until the job was asked after so many times."""
        while self.asked["GET /api/jobs/a"] < times:
            await asyncio.sleep(0.01)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(30)


@pytest.fixture
def start(monkeypatch) -> Iterator[Callable]:
    """(tail) -> a Dashboard and a client of it."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    started = []

    def run(tail: Callable | None = None):
        started.append(Dashboard(tail))
        return started[-1], JobSubmissionClient(started[-1].url)

    yield run
    for dashboard in started:
        dashboard.stop()


@pytest.fixture
def follow(start) -> Callable:
    """(tail, **words of `attend_job`) -> its exit status, what it wrote, what it said, and the Dashboard."""

    def run(tail: Callable, **words):
        dashboard, client = start(tail)
        written, said = [], []
        status = attend_job(
            client, a_job("a"), write=written.append, say=said.append, silent_seconds=SILENT_SECONDS,
            **({"ask": lambda: False} | words),
        )  # fmt: skip
        return status, "".join(written), said, dashboard

    return run


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT interrupts, which in tests in the background is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def a_job(job_id: str) -> Job:
    return Job(words=("train",), runtime_env={}, metadata={}, package=b"", job_id=job_id)


def test_of_a_silent_job_the_record_is_asked_for_and_the_log_is_not_sent_again(follow):
    async def tail(dashboard, socket):
        for number in range(3 if dashboard.asked["tail"] == 1 else 0):
            await dashboard.say(socket, f"line {number}\n")
            await dashboard.until_asked(dashboard.asked["GET /api/jobs/a"] + 2)
        dashboard.record["status"] = "SUCCEEDED"

    status, written, said, dashboard = follow(tail)
    assert (status, written, said) == (0, "line 0\nline 1\nline 2\n", ["job a succeeded"])
    assert dashboard.asked["GET /api/jobs/a"] >= 6
    assert dashboard.asked["tail"] == 1
    assert dashboard.asked["GET /api/jobs/a/logs"] == 1  # at its end


def test_a_log_that_stays_silent_is_read_anew_and_each_word_written_once(follow):
    async def tail(dashboard, socket):
        if dashboard.asked["tail"] == 1:
            await dashboard.say(socket, "line 0\n")
            dashboard.log += "line 1\n"  # which is lost, as is the connection, without a word
            while dashboard.asked["tail"] == 1:
                await asyncio.sleep(0.01)
            return
        await socket.send_str(dashboard.log)
        await dashboard.say(socket, "line 2\n")
        dashboard.record["status"] = "SUCCEEDED"

    status, written, _, dashboard = follow(tail)
    assert (status, written) == (0, "line 0\nline 1\nline 2\n")
    assert dashboard.asked["GET /api/jobs/a/logs"] == 1


def test_a_job_that_ends_behind_a_lost_connection_is_heard_of(follow):
    async def tail(dashboard, socket):
        await dashboard.say(socket, "line 0\n")
        dashboard.log += "line 1\n"
        dashboard.record |= {"status": "FAILED", "driver_exit_code": 2}
        await socket.receive()  # until the command goes

    status, written, said, dashboard = follow(tail)
    assert (status, written, said) == (2, "line 0\nline 1\n", ["job a failed with exit status 2"])
    assert dashboard.asked["tail"] == 1


def test_a_token_that_changed_meanwhile_is_told_and_that_the_job_was_not_asked_to_stop(start, interruptible):
    async def tail(dashboard, socket):
        dashboard.locked = re.compile("/api/jobs/")
        os.kill(os.getpid(), signal.SIGINT)
        await socket.receive()  # until the command goes

    dashboard, client = start(tail)
    said = []
    with pytest.raises(UserError, match=r"^job a may go on without this command: .*RAY_AUTH_TOKEN"):
        attend_job(client, a_job("a"), write=print, say=said.append, ask=lambda: True)
    assert [line.partition(":")[0] for line in said] == ["job a could not be asked to stop"]
    assert "RAY_AUTH_TOKEN" in said[0]
    assert dashboard.asked["POST /api/jobs/a/stop"] == 0


def test_a_log_that_is_refused_hides_no_end_of_its_job(follow):
    async def tail(dashboard, socket):
        await dashboard.say(socket, "line 0\n")
        dashboard.record["status"] = "SUCCEEDED"
        dashboard.locked = re.compile("/api/jobs/a/logs$")

    status, written, said, dashboard = follow(tail)
    assert (status, written, said) == (0, "line 0\n", ["job a succeeded"])
    assert dashboard.asked["refused"] == 1


def test_a_job_that_was_asked_to_stop_is_not_submitted_again_whatever_ends_it(follow, interruptible):
    async def tail(dashboard, socket):
        await dashboard.say(socket, "line 0\n")
        if dashboard.asked["tail"] == 1:
            os.kill(os.getpid(), signal.SIGINT)
            await socket.receive()  # until the command goes

    status, _, said, dashboard = follow(tail, retries=3, ask=lambda: True)
    assert status == 137, said
    assert dashboard.asked["POST /api/jobs/a/stop"] == 1
    assert dashboard.asked["POST /api/jobs/"] == 0


def test_a_job_whose_answer_was_lost_is_not_started_twice(start):
    dashboard, client = start()
    dashboard.lost = 1  # the answer to the job
    submit_job(client, a_job("b"))
    assert dashboard.asked["POST /api/jobs/"] == 1
    dashboard.lost = 2  # and the one to the question after it
    with pytest.raises(UserError, match="whether the cluster took job c is not known"):
        submit_job(client, a_job("c"))
    submit_job(client, a_job("c"))
    assert sorted(dashboard.jobs) == ["a", "b", "c"]
    assert dashboard.asked["POST /api/jobs/"] == 3


def test_a_job_that_the_cluster_refuses_is_not_taken_for_one_whose_answer_was_lost(start):
    dashboard, client = start()
    dashboard.refuses = True
    with pytest.raises(UserError, match=r"the cluster did not take the job .*no such runtime environment"):
        submit_job(client, a_job("b"))
