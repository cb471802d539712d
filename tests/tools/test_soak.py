"""`bench soak`: a run of a hundred steps with random process deaths loses no rollout and does not grow in memory."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from runs import command

from switchkd.tools.bench import soak


def test_the_schedule_depends_on_the_seed():
    """Faults hit each role before one is hit twice, lie within the run, and are the same for the same seed."""
    first, same = (soak.schedule(200, 10, random.Random(3)) for _ in range(2))
    assert first == same and 12 <= len(first) <= 28
    assert {fault.role for fault in first[:4]} == set(soak.ROLES) and max(fault.step for fault in first) < 199


def test_lost_and_doubled_rollouts_are_counted(tmp_path):
    """`account` counts lost and doubled rollouts."""
    path = tmp_path / "rollouts.jsonl"
    path.write_text("".join(json.dumps({"rollout_id": i}) + "\n" for i in (0, 1, 1, 3)))
    assert soak.account(path, 5) == (2, 1)


def test_the_queue_is_read_from_steps(tmp_path):
    """`queue` reads the rows of steps, not those of evaluations."""
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 0, "replay/waiting": 8.0}, {"step": 1, "eval/kl": 1.0}, {"step": 1, "replay/waiting": 0}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert soak.queue(path) == [8, 0]


def test_the_slope_leaves_out_the_start():
    """`slope` gives MB per 100 steps, without the first part of the run."""
    samples = [(step, 50.0 if step < 20 else 80 + 0.02 * step) for step in range(0, 101, 5)]
    assert soak.slope(samples) == pytest.approx(2)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_soak_of_a_hundred_steps_passes(tmp_path, monkeypatch, capsys):
    """No rollout is lost or doubled, each role dies at least once, memory grows by less than 60 MB, and the replay
    keeps its limit."""
    code, out, err = command(monkeypatch, capsys, "bench", "soak", "--json", tmp_path / "soak.json")
    print(out)
    assert code == 0, err
    table = json.loads((tmp_path / "soak.json").read_text())
    assert all(re.search(rf"[1-9] of role {role}", table["remarks"][0]) for role in soak.ROLES), table["remarks"][0]
    rows = {row["longest-lived process"]: row for row in table["rows"]}
    assert rows.keys() == {"driver", "object store", *soak.ROLES}
    grown = {name: row["last, MB"] - row["first, MB"] for name, row in rows.items()}
    assert all(more < 60 for more in grown.values()), grown
    assert "800 rollouts: none lost, none twice" in table["remarks"][1]
    said = table["remarks"][2]
    found = re.search(r"at most (\d+) waited .* full after (\d+) steps and empty after ([1-9])", said)
    assert found and int(found[1]) <= soak.MOST_WAITING, said
    assert not Path("run").exists()
