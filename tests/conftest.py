"""Shared fixtures: tiny models with prompts, a working directory, a run without faults, one Ray cluster."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # several test processes share the cores: before anything imports torch
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # as `switchkd`: before anything imports transformers

import pytest
from runs import PROTECTED, STAGES, config, linked, save_models, save_prompts

from switchkd.controller.metrics import MetricsLog


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        if mark := item.get_closest_marker("bad_input"):
            item.user_properties.append(("bad_input", mark.args[0]))


def pytest_terminal_summary(terminalreporter, config) -> None:
    """Print a table of `bad_input` tests, if they are what was asked for: kind, cases, right."""
    if config.getoption("markexpr") != "bad_input":
        return
    kinds: dict[str, list[bool]] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for kind in (value for name, value in report.user_properties if name == "bad_input"):
                kinds.setdefault(kind, []).append(outcome == "passed")
    terminalreporter.write_line(f"{'kind':<58}{'cases':>6}{'right':>6}")
    every = [right for cases in kinds.values() for right in cases]
    for kind, right in [*sorted(kinds.items()), ("all", every)]:
        terminalreporter.write_line(f"{kind:<58}{len(right):>6}{sum(right):>6}")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def place(models, tmp_path, monkeypatch) -> Path:
    """The working directory of a test, with the models in it."""
    monkeypatch.chdir(tmp_path)
    return linked(models, tmp_path)


@pytest.fixture(scope="module")
def alone(models) -> Path:
    """The folder of a run of STAGES without Ray and without faults: the reference of other runs."""
    from switchkd.train import train

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(models)
        train(config(models, STAGES, name="alone.yaml", run={"dir": "alone"}))
    return models / "alone"


@pytest.fixture
def fake_place(tmp_path, monkeypatch) -> Path:
    """The working directory of a test, with prompts and without models."""
    monkeypatch.chdir(tmp_path)
    return save_prompts(tmp_path)


@pytest.fixture(scope="session")
def fake_alone(tmp_path_factory) -> Path:
    """The folder of a run of STAGES with fake models, without Ray and without faults: the reference of other runs."""
    from switchkd.train import train

    place = save_prompts(tmp_path_factory.mktemp("fake"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        train(config(place, STAGES, name="alone.yaml", fake=True, run={"dir": "alone"}))
    return place / "alone"


TEACH, WRITE = {"pool": "teach"}, {"pool": "write"}


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """One Ray for all tests, four nodes of this machine: a head with 3 CPUs, two `TEACH` and one `WRITE` with 2 each.
    `cluster.folder` holds its logs."""
    os.environ.update(PROTECTED)
    # a node counts as dead after 3 s, not 15; actors are not niced: the test that waits for them is not either
    settings = {"health_check_period_ms": 1000, "health_check_failure_threshold": 3, "worker_niceness": 0}
    os.environ.update({f"RAY_{name}": str(value) for name, value in settings.items()})
    import ray
    from ray.cluster_utils import Cluster

    from switchkd.actors.ray_futures import shut_down

    folder = tempfile.mkdtemp(prefix="skd-", dir="/tmp")  # a socket's path must be short
    os.makedirs("/tmp/ray", exist_ok=True)  # the cluster's address is written there
    small = {"object_store_memory": 100_000_000}
    head = {"num_cpus": 3, "include_dashboard": False, "temp_dir": folder, **small}
    made = Cluster(initialize_head=True, head_node_args={**head, "_system_config": {"metrics_report_interval_ms": 500}})
    for labels in (TEACH, TEACH, WRITE):
        made.add_node(num_cpus=2, labels=labels, **small)
    ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
    made.folder = folder
    yield made
    shut_down()
    made.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def notes(monkeypatch) -> list[str]:
    """The lines that runs print."""
    lines: list[str] = []
    info = MetricsLog.info
    monkeypatch.setattr(MetricsLog, "info", lambda self, text: (lines.append(text), info(self, text)))
    return lines


@pytest.fixture
def done_at(monkeypatch) -> list[tuple[int, float]]:
    """The steps that this process has done, with their times. Recovery times are printed, never asserted."""
    done: list[tuple[int, float]] = []
    log_step = MetricsLog.step
    monkeypatch.setattr(
        MetricsLog, "step", lambda self, step, row: (log_step(self, step, row), done.append((step, time.time())))
    )
    return done
