"""A hundred steps during which processes die at random lose nothing and hold no more memory at the end."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from runs import command

from switchkd.tools.bench import soak


def test_the_schedule_is_the_seeds():
    """Every role dies before one dies again, within the run, and the same seed gives the same faults."""
    first, same = (soak.schedule(200, 10, random.Random(3)) for _ in range(2))
    assert first == same and 12 <= len(first) <= 28
    assert {fault.role for fault in first[:4]} == set(soak.ROLES) and max(fault.step for fault in first) < 199


def test_the_accounts(tmp_path):
    """Lost and doubled rollouts are counted."""
    path = tmp_path / "rollouts.jsonl"
    path.write_text("".join(json.dumps({"rollout_id": i}) + "\n" for i in (0, 1, 1, 3)))
    assert soak.account(path, 5) == (2, 1)


def test_the_queue(tmp_path):
    """Of steps, not of evaluations."""
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 0, "replay/waiting": 8.0}, {"step": 1, "eval/kl": 1.0}, {"step": 1, "replay/waiting": 0}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert soak.queue(path) == [8, 0]


def test_the_slope():
    """MB per 100 steps, without what came before it settled."""
    samples = [(step, 50.0 if step < 20 else 80 + 0.02 * step) for step in range(0, 101, 5)]
    assert soak.slope(samples) == pytest.approx(2)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_hundred_steps(tmp_path, monkeypatch, capsys):
    """`bench soak`: nothing lost, nothing twice (the command fails otherwise), each role died at least once, and
    neither the object store nor any process that lived long grows by more than a run of its size could explain. The
    replay never held more than it may."""
    code, out, err = command(monkeypatch, capsys, "bench", "soak", "--json", tmp_path / "soak.json")
    print(out)
    assert code == 0, err
    told = json.loads((tmp_path / "soak.json").read_text())
    assert all(re.search(rf"[1-9] of role {role}", told["remarks"][0]) for role in soak.ROLES), told["remarks"][0]
    rows = {row["longest-lived process"]: row for row in told["rows"]}
    assert rows.keys() == {"driver", "object store", *soak.ROLES}
    grown = {name: row["last, MB"] - row["first, MB"] for name, row in rows.items()}
    assert all(more < 60 for more in grown.values()), grown
    assert "800 rollouts: none lost, none twice" in told["remarks"][1]
    said = told["remarks"][2]
    found = re.search(r"at most (\d+) waited .* full after (\d+) steps and empty after ([1-9])", said)
    assert found and int(found[1]) <= soak.MOST_WAITING, said
    assert not Path("run").exists()
