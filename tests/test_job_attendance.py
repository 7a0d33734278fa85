"""How a job is followed, with a stand-in for the job API of Ray's dashboard that tells what was asked of it."""

import asyncio
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from aiohttp import WSCloseCode, web
from ray.job_submission import JobSubmissionClient

from ray_pipeline.job_attendance import attend_job
from ray_pipeline.submission import Job

SILENT_SECONDS = 0.05


class Dashboard:
    """The API for one job. tail: what it does with a websocket that follows the log; asked: how often each path was."""

    def __init__(self, tail: Callable):
        self.tail, self.asked, self.log = tail, Counter(), ""
        self.record = {"type": "SUBMISSION", "entrypoint": "train", "status": "RUNNING"}
        self.loop, self.ready = asyncio.new_event_loop(), threading.Event()
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()
        assert self.ready.wait(30)

    def _serve(self) -> None:
        application = web.Application()
        application.add_routes(
            [
                web.get("/api/version", self._answer(lambda: {"version": "4", "ray_version": "2.50.0"})),
                web.get("/api/jobs/a", self._answer(lambda: self.record)),
                web.get("/api/jobs/a/logs", self._answer(lambda: {"logs": self.log})),
                web.get("/api/jobs/a/logs/tail", self._follow),
                web.post("/api/jobs/a/stop", self._answer(self._stop)),
                web.post("/api/jobs/", self._answer(lambda: {"job_id": "b", "submission_id": "b"})),
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
def follow(monkeypatch) -> Iterator[Callable]:
    """(tail, **words of `attend_job`) -> its exit status, what it wrote, what it said, and the Dashboard."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    started = []

    def run(tail: Callable, **words):
        dashboard = Dashboard(tail)
        started.append(dashboard)
        written, said = [], []
        job = Job(words=("train",), runtime_env={}, metadata={})
        client = JobSubmissionClient(dashboard.url)
        status = attend_job(
            client, job, "a", write=written.append, say=said.append, silent_seconds=SILENT_SECONDS,
            **({"ask": lambda: False} | words),
        )  # fmt: skip
        return status, "".join(written), said, dashboard

    yield run
    for dashboard in started:
        dashboard.stop()


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


def test_a_job_that_was_asked_to_stop_is_not_submitted_again_whatever_ends_it(follow):
    async def tail(dashboard, socket):
        await dashboard.say(socket, "line 0\n")
        if dashboard.asked["tail"] == 1:
            os.kill(os.getpid(), signal.SIGINT)
            await socket.receive()  # until the command goes

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background have it ignored
    try:
        status, _, said, dashboard = follow(tail, retries=3, ask=lambda: True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert status == 137, said
    assert dashboard.asked["POST /api/jobs/a/stop"] == 1
    assert dashboard.asked["POST /api/jobs/"] == 0
