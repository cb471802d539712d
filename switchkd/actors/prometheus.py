"""Exports a run's numbers to Prometheus through Ray: every node's metrics port has them as `ray_switchkd_...`.

In: the rows that go to metrics.jsonl. Out: gauges with the tag `run`, such as `switchkd_rollout_teacher_token_frac`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ray.util.metrics import Gauge


class Exporter:
    """A sink of `MetricsLog`. `run` distinguishes runs on one cluster."""

    def __init__(self, run: str) -> None:
        self.run = run
        self._gauges: dict[str, Gauge] = {}

    def __call__(self, step: int, numbers: Mapping[str, float]) -> None:
        for key, value in {"step": step, **numbers}.items():
            name = "switchkd_" + re.sub(r"[^a-zA-Z0-9_]", "_", key)
            if name not in self._gauges:
                self._gauges[name] = Gauge(name, description=f"switchkd: {key}", tag_keys=("run",))
            self._gauges[name].set(value, tags={"run": self.run})
