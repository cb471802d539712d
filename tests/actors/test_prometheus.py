"""A run's metrics on Ray's metrics port, and the dashboard that queries them."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from pathlib import Path

import pytest
from runs import SWITCH, WARM_UP, config, lines, save_prompts

from switchkd.train import train

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

BOARD = Path(__file__).parents[2] / "cluster" / "grafana" / "switchkd.json"
STAGES = [{**WARM_UP, "steps": 1}, {**SWITCH, "steps": 2}]


@pytest.fixture(scope="module")
def port(cluster) -> int:
    """The metrics port of the driver's node."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    return next(node["MetricsExportPort"] for node in ray.nodes() if node["NodeID"] == here)


@pytest.fixture(scope="module")
def run(port, tmp_path_factory) -> Path:
    place = save_prompts(tmp_path_factory.mktemp("shown"))
    evaluation = {"data": "./data.jsonl", "num_prompts": 4, "max_new_tokens": 8}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        train(config(place, STAGES, fake=True, run={"dir": "shown", "mode": "ray"}, eval=evaluation))
    return place / "shown"


def exported(port: int) -> dict[str, float]:
    """The run's gauges as Prometheus reads them, by name."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found = re.findall(r'^(ray_switchkd_\w+)\{[^}]*run="shown"[^}]*\} (\S+)$', text, flags=re.MULTILINE)
    return {name: float(value) for name, value in found}


@pytest.fixture(scope="module")
def seen(port, run) -> dict[str, float]:
    """The gauges once the last row, the final evaluation's, has arrived; the last step's arrives before it."""
    final = [row for row in lines(run / "metrics.jsonl") if "stage_end" in row][-1]["eval/kl"]
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        found = exported(port)
        if found.get("ray_switchkd_eval_kl") == pytest.approx(final):
            return found
        time.sleep(1)
    raise AssertionError(f"the metrics port shows {sorted(exported(port))}")


def test_the_port_exports_the_last_step(seen, run):
    """The metrics port exports the numbers of the last step under the run's name."""
    last = [row for row in lines(run / "metrics.jsonl") if "stage" in row][-1]
    for key in ("loss/total", "rollout/teacher_token_frac", "weight_version", "replay/staleness_max", "time/learn_s"):
        assert seen["ray_switchkd_" + key.replace("/", "_")] == pytest.approx(last[key]), key


def test_the_dashboard_queries_exported_gauges(seen):
    """Each panel has a query, and all queries name exported gauges of the selected run."""
    board = json.loads(BOARD.read_text())
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    names = {name for query in queries for name in re.findall(r"ray_switchkd_\w+", query)}
    assert len(panels) > 12 and all(panel["targets"] for panel in panels)
    assert names <= seen.keys(), names - seen.keys()
    variables = {one["name"] for one in board["templating"]["list"]}
    assert {"run", "source"} <= variables and all("$run" in query for query in queries)
