"""Gauges as Prometheus gets them from a Ray that runs, and the rules and panels that ask for them."""

import json
import math
import re
import time
import urllib.request
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from ray_pipeline.monitoring.event_log import EventLog
from ray_pipeline.monitoring.events import CheckpointEvent, FaultEvent, PhaseEvent, StepEvent, ValidationEvent
from ray_pipeline.monitoring.ray_metrics import COUNTERS, OTHER_GAUGES, STEP_GAUGES

PHASE = "phase1_unconditional"
MONITORING = Path(__file__).resolve().parents[2] / "cluster" / "monitoring"
#: names as they appear at /metrics; counters end in _total
NAMES = {f"ray_pipeline_{name}" for name in (*STEP_GAUGES, *OTHER_GAUGES)} | {
    f"ray_pipeline_{name}_total" for name in COUNTERS
}

#: seconds after which Ray no longer shows a gauge that was set once: it reports every 10 s, and skips one report
FORGOTTEN_AFTER = 35


def scrape(run: str) -> dict[str, float]:
    """Our series of one run, from the node's real endpoint."""
    import ray

    port = ray.nodes()[0]["MetricsExportPort"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {
        sample.name: sample.value
        for family in families
        for sample in family.samples
        if sample.labels.get("run") == run and sample.labels["phase"] == PHASE
    }


def test_the_metrics_endpoint_of_a_node_shows_a_run_while_it_trains(ray_cluster, tmp_path):
    run_dir = tmp_path / "metrics_run"
    with EventLog(run_dir, PHASE, ("ray",)) as log:
        log.emit(PhaseEvent(PHASE, "started", 0, "started at step 0 of 20 on 1 worker(s)", 20))
        log.emit(StepEvent(PHASE, 1, 8, 1, 0.9, 1e-4, 0.5, 10.0, 0.01))
        time.sleep(0.6)
        step = StepEvent(
            PHASE, 7, 56, 2, 0.75, 2e-4, 0.25, 12.5, 0.125, 3, 0.64, 0.4, 0.1, 0.05, 0.01, 0.02, 0.375, 2e9
        )
        log.emit(step)
        log.emit(ValidationEvent(PHASE, 7, 56, 2, 0.5, 0.01, {}, "ema_decay_0.999"))
        log.emit(ValidationEvent(PHASE, 7, 56, 2, 0.4, 0.01, {}, "ema_decay_0.5"))
        log.emit(ValidationEvent(PHASE, 8, 64, 2, math.nan, 0.01, {}, "ema_decay_0.999"))
        log.emit(CheckpointEvent(PHASE, 7, 2, "step_7", "safety", 0.25, 1.5))
        log.emit(FaultEvent(PHASE, 7, "save", "the disk is full"))
        told, found = time.monotonic(), {}
        while time.monotonic() < told + 60 and found.keys() != NAMES:
            time.sleep(0.5)
            found = scrape("metrics_run")
        assert found.keys() == NAMES
        time.sleep(max(0.0, told + FORGOTTEN_AFTER - time.monotonic()))
        assert scrape("metrics_run") == found  # the next step may take longer than that
    for name, (field, _) in STEP_GAUGES.items():
        assert found[f"ray_pipeline_{name}"] == pytest.approx(getattr(step, field))
    assert found["ray_pipeline_val_loss"] == 0.5
    assert found["ray_pipeline_status"] == 0
    assert found["ray_pipeline_total_steps"] == 20
    assert 13 / 6 * 0.6 <= found["ray_pipeline_seconds_left"] < 13 / 6 * 6
    assert found["ray_pipeline_checkpoint_seconds"] == 0.25
    assert found["ray_pipeline_skipped_steps_total"] == 3
    assert found["ray_pipeline_faults_total"] == 1


def test_a_worker_that_is_killed_at_once_after_its_phase_still_tells_that_it_finished(ray_cluster, tmp_path):
    import ray

    @ray.remote(num_cpus=0)
    class Worker:
        def train(self, run_dir: str) -> None:
            with EventLog(run_dir, PHASE, ("ray",)) as log:
                log.emit(PhaseEvent(PHASE, "started", 0, "started", 20))
                log.emit(PhaseEvent(PHASE, "finished", 20, "finished"))

    worker = Worker.remote()
    ray.get(worker.train.remote(str(tmp_path / "finished_run")))
    ray.kill(worker)  # as Train ends its workers; Ray collects the values every 10 s
    until, found = time.monotonic() + 60, {}
    while time.monotonic() < until and not found:
        time.sleep(0.5)
        found = scrape("finished_run")
    assert found == {"ray_pipeline_status": 2, "ray_pipeline_total_steps": 20}


def test_a_resume_adds_no_line_to_a_panel():
    """Ray labels each series with its worker, and a resume has another one."""
    board = json.loads((MONITORING / "grafana_dashboard.json").read_text())
    for panel in board["panels"]:
        for target in panel["targets"]:
            series = len(re.findall(r"ray_pipeline_\w+", target["expr"]))
            assert len(re.findall(r"(?:sum|max) by \(run, phase\) \(", target["expr"])) == series


def test_the_dashboard_asks_for_series_that_there_are():
    board = json.loads((MONITORING / "grafana_dashboard.json").read_text())
    asked = {
        name
        for panel in board["panels"]
        for target in panel.get("targets", ())
        for name in re.findall(r"ray_pipeline_\w+", target["expr"])
    }
    assert asked == NAMES
    identifiers = [panel["id"] for panel in board["panels"]]
    assert len(set(identifiers)) == len(identifiers)


def test_prometheus_finds_the_nodes_by_the_file_that_ray_keeps():
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    (found,) = job["file_sd_configs"]
    assert found["files"] == ["/tmp/ray/prom_metrics_service_discovery.json"]
    rules = yaml.safe_load((MONITORING / "alerts.yml").read_text())
    asked = {
        name
        for group in rules["groups"]
        for rule in group["rules"]
        for name in re.findall(r"ray_pipeline_\w+", rule["expr"])
    }
    assert asked <= NAMES
    assert config["rule_files"] == ["alerts.yml"]
