"""A run's page while a command works on it, whatever it does."""

import re
import time
import warnings

from ray_pipeline.monitoring import live_report
from ray_pipeline.monitoring.live_report import LiveReport
from ray_pipeline.sweep_records import SweepRecord, TrialRecord, sweep_folder

TIMEOUT_SECONDS = 60


def wait_for(condition):
    until = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_the_page_is_there_before_anything_is_trained_and_shows_a_sweep_between_the_phases(make_run):
    run = make_run()
    page = run.folder / "report.html"
    with LiveReport(run.config):
        wait_for(page.exists)
        assert "Nothing is trained yet." in page.read_text()
        run.train("one", 4, finish=True)
        sweep_folder(run.folder).mkdir()
        trials = [TrialRecord(number=0, values={}), TrialRecord(number=1, values={}, status="finished")]
        SweepRecord(averages=["a"], trials=trials).save(sweep_folder(run.folder))
    assert "the sweep goes on, 1 of 2 trials so far have ended" in page.read_text()


def test_there_is_no_page_where_none_is_wanted(make_run):
    run = make_run(monitoring={"report": False})
    with LiveReport(run.config):
        run.train("one", 4)
    assert not (run.folder / "report.html").exists()


def test_a_page_that_cannot_be_written_is_told_once_and_ends_nothing(make_run):
    run = make_run()
    (run.folder / "report.html" / "in the way").mkdir(parents=True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with LiveReport(run.config):
            wait_for(lambda: told)
            run.train("one", 4)  # so that it is drawn once more at the end
    assert len([warning for warning in told if "report.html cannot be drawn" in str(warning.message)]) == 1


def test_a_page_that_could_not_be_written_for_a_while_is_drawn_though_nothing_is_new(make_run):
    run = make_run()
    run.train("one", 4)
    in_the_way = run.folder / "report.html" / "in the way"
    in_the_way.mkdir(parents=True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with LiveReport(run.config):
            wait_for(lambda: told)
            in_the_way.rmdir()
            in_the_way.parent.rmdir()
    assert "step 12 of 12" in (run.folder / "report.html").read_text()


def test_each_line_of_the_records_is_parsed_for_one_page_alone(make_run, monkeypatch, caplog):
    monkeypatch.setattr(live_report, "_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(live_report, "_PAUSE_FACTOR", 0)
    run = make_run()
    run.train("one", 4)
    page, lines = run.folder / "report.html", run.folder / "logs" / "metrics.jsonl"
    with lines.open("ab") as file:
        file.write(b"no JSON\n")
    with LiveReport(run.config):
        wait_for(page.exists)
        run.train("two", 1)
        wait_for(lambda: "two, step 3 of 6" in page.read_text())
    assert caplog.text.count("is damaged and was left out") == 1


def test_a_page_that_is_not_due_again_says_that_its_command_lives(make_run, monkeypatch):
    monkeypatch.setattr(live_report, "_ALIVE_SECONDS", 0.0)
    monkeypatch.setattr(live_report, "_PAUSE_FACTOR", 10**6)
    run = make_run()
    page = run.folder / "report.html"
    with LiveReport(run.config):
        wait_for(page.exists)
        first = page.read_text()
        run.train("one", 4)
        wait_for(lambda: page.read_text() != first)
        second = page.read_text()
    alive = re.compile('(?<=<meta name="alive" content=")[^"]+')
    assert alive.search(second)[0] > alive.search(first)[0]
    assert alive.sub("", second) == alive.sub("", first)
    assert "step 12 of 12" in page.read_text()
