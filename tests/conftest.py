"""Rooms that many test files share: tiny models with data, a working directory of one's own, the run nothing befell."""

from __future__ import annotations

import os
import time
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # several test processes share the cores: before anything imports torch
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from runs import STAGES, config, linked, save_models

from switchkd.controller.metrics import MetricsLog


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def place(models, tmp_path, monkeypatch) -> Path:
    """A working directory of one's own with the models in it."""
    monkeypatch.chdir(tmp_path)
    return linked(models, tmp_path)


@pytest.fixture(scope="module")
def alone(models) -> Path:
    """STAGES without Ray and without accidents: what others are held against."""
    from switchkd.train import train

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(models)
        train(config(models, STAGES, name="alone.yaml", run={"dir": "alone"}))
    return models / "alone"


@pytest.fixture
def notes(monkeypatch) -> list[str]:
    """What the user is told."""
    told: list[str] = []
    info = MetricsLog.info
    monkeypatch.setattr(MetricsLog, "info", lambda self, text: (told.append(text), info(self, text)))
    return told


@pytest.fixture
def done_at(monkeypatch) -> list[tuple[int, float]]:
    """Which steps this process has done, and when: to tell, never to assert, how long a recovery took."""
    done: list[tuple[int, float]] = []
    log_step = MetricsLog.step
    monkeypatch.setattr(
        MetricsLog, "step", lambda self, step, row: (log_step(self, step, row), done.append((step, time.time())))
    )
    return done
