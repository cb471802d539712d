"""Real engines on Ray: rollouts, losses and students equal those of one process for any number of processes, also if
some are killed. Tests with fake models: test_pools.py, test_faults.py, test_jobs.py."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from faults import FaultInjector, actors, report_at_once, same_losses, same_rollouts, wait_until
from runs import STAGES, SWITCH, config, config_file, distance, lines, linked, rollouts, steps
from test_broken_prompts import break_rollouts
from test_security import LOOPBACK

from switchkd.controller.summary import Summary
from switchkd.train import train

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

EVAL = {"data": "./data.jsonl", "num_prompts": 6, "max_new_tokens": 12}
ON_RAY = {"dir": "run", "mode": "ray"}


@pytest.fixture(scope="module")
def alone(models) -> tuple[Path, Summary]:
    """A run without Ray, the reference of the others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(models)
        summary = train(config(models, STAGES, name="alone.yaml", run={"dir": "alone"}, eval=EVAL))
    return models / "alone", summary


def test_one_worker_and_one_teacher_that_die_change_no_rollout(cluster, alone, place, monkeypatch, notes):
    """A run with one worker and one teacher equals the run without Ray although the worker is killed in a batch and in
    an evaluation, and the teacher during a call about a block; each death is printed."""
    report_at_once(monkeypatch)
    injector = FaultInjector(monkeypatch, {4: "RolloutActor", 5: "TeacherActor"}, at_evaluation=3)
    summary = train(config(place, STAGES, run=ON_RAY, eval=EVAL))
    assert sorted(injector.victims) == ["RolloutActor", "RolloutActor", "TeacherActor"]
    assert summary.finished and "waits for a teacher" in injector.in_flight[0]
    wait_until(lambda: not actors(), "the run left actors behind")
    assert [note for note in notes if " died" in note] == [
        "a rollout worker died; the evaluation begins again",
        "rollout worker 0 died; its 4 rollouts are written again, each alone",
        "teacher replica 0 died and is started again",
    ]
    assert "teacher replica 0 works" in notes
    same_rollouts(place / "run", alone[0])
    assert steps(place / "run")[0]["loss/total"] == steps(alone[0])[0]["loss/total"]
    same_losses(place / "run", alone[0], 1e-5)
    assert distance(place / "run" / "student", alone[0] / "student") < 1e-4
    for (name, ours), (same, theirs) in zip(summary.stage_scores, alone[1].stage_scores, strict=True):
        assert name == same and ours == pytest.approx(theirs, abs=1e-4)


def test_two_of_each_equal_one_process_although_one_of_each_dies(cluster, place, monkeypatch, notes):
    """Two teachers (one of two replicas), two workers and two ranks give the rollouts, losses and weights of one
    process, although a replica, a worker and a rank are killed."""
    rows = [json.loads(line) for line in (place / "data.jsonl").read_text().splitlines()]
    named = [{**row, "source": ("near", "far")[i % 2]} for i, row in enumerate(rows)]
    (place / "named.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))
    data = {"path": "./named.jsonl", "max_prompt_tokens": 64, "max_reference_tokens": 32, "teacher_field": "source"}
    teachers = {"near": {"path": "teacher"}, "far": {"path": "student"}}
    train(config(place, STAGES, run={"dir": "one"}, teachers=teachers, data=data))
    injector = FaultInjector(monkeypatch, {4: "TeacherActor", 6: "RolloutActor", 8: "LearnerActor"})
    two = {
        "rollout": {"num_workers": 2, "batch_size": 4, "max_new_tokens": 12},
        "teachers": {**teachers, "near": {"path": "teacher", "replicas": 2}},
        "learner": {"lr": 1e-3, "num_ranks": 2},
        "cluster": {"address": "auto"},
    }
    summary = train(config(place, STAGES, run=ON_RAY, data=data, **two))
    assert injector.victims == ["TeacherActor", "RolloutActor", "LearnerActor"] and summary.finished
    assert [note for note in notes if re.match(r"rollout worker \d died; its 2 rollouts are written again", note)]
    assert "a learner rank died; going back to the last checkpoint (restart 1 of 8)" in notes
    same_rollouts(place / "run", place / "one")
    same_losses(place / "run", place / "one", 1e-5)
    assert distance(place / "run" / "student", place / "one" / "student") < 1e-4


DEADLY = """
import os
import numpy as np
from switchkd.algo import switching

KILLS, BREAKS, BREAKS_THE_TEACHER = 6, 9, 13


def rule():
    if "RAY_JOB_ID" in os.environ:
        arm()
    return switching.jsd_threshold(half_life=6)


def arm():
    from switchkd.actors.teacher_router import SESSION_BITS, TeacherRouter
    from switchkd.rollout.state import RolloutSlots

    add, place = RolloutSlots.add, TeacherRouter._open_somewhere

    def added(self, task, params, cache_slot):
        if task.rollout_id == KILLS:
            os._exit(1)
        if task.rollout_id == BREAKS:
            raise ValueError("no rule for this prompt")
        return add(self, task, params, cache_slot)

    def placed(self, sessions):
        empty = np.zeros(0, np.int32)
        return place(self, {i: empty if i == BREAKS_THE_TEACHER else ids for i, ids in sessions.items()})

    RolloutSlots.add = added
    TeacherRouter._open_somewhere = placed
"""
"""A user's rule: it ends its process at one prompt, raises at the next, and at the last sends a session without tokens,
at which the teacher raises."""


LOOK = """
import json, os, sys
from pathlib import Path
from switchkd import cli
from switchkd.controller.metrics import MetricsLog

sys.path.insert(0, {tests!r})
log_step = MetricsLog.step

def look(self, step, row):
    from runs import descendants
    from test_security import listening

    pids = set(descendants(os.getpid())) | {{os.getpid()}}
    seen = {{"listens": listening(pids), "num": len(pids), "mode": os.environ["RAY_AUTH_MODE"],
            "token": os.environ["RAY_AUTH_TOKEN"]}}
    Path("seen.json").write_text(json.dumps(seen))
    log_step(self, step, row)

MetricsLog.step = look
sys.argv = ["switchkd", "train", "config.yaml"]
cli.main()
"""
"""Script: a run that records the sockets on which its processes listen, and its cluster's token."""
BREAKING = {"path": "./data.jsonl", "max_prompt_tokens": 64, "max_reference_tokens": 32, "max_quarantined_frac": 0.2}
STAGE = {**SWITCH, "steps": 4, "mix": {"rollout": 1}}


@pytest.fixture(scope="module")
def private_run(models, tmp_path_factory) -> tuple[Path, str]:
    """A run on a private cluster with the rule DEADLY: its folder, and what it printed."""
    place = linked(models, tmp_path_factory.mktemp("private"))
    (place / "deadly.py").write_text(DEADLY)
    (place / "home").mkdir()
    config_file(place, [{**STAGE, "rule": {"type": "deadly:rule"}}], run=ON_RAY, data=BREAKING)
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", LOOK.format(tests=str(Path(__file__).parents[1]))]
    env |= {"HOME": str(place / "home")}
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return place, done.stdout


def test_prompts_that_raise_or_kill_are_quarantined(private_run, place, monkeypatch):
    """Prompts that end their worker or at which the rule or the teacher raises are quarantined with the reason; the
    other rollouts equal those of a run without Ray."""
    with monkeypatch.context() as patch:
        break_rollouts(patch, {6, 9, 13})
        train(config(place, [STAGE], run={"dir": "sound"}, data=BREAKING))
    folder, printed = private_run
    reasons = {row["rollout_id"]: row["reason"] for row in lines(folder / "run" / "quarantined.jsonl")}
    assert reasons[6].startswith("WorkerLost")
    assert reasons[9] == "ValueError: no rule for this prompt"
    assert "ValueError: session 13 has 0 tokens" in reasons[13] and len(reasons) == 3
    assert printed.count("rollout worker 0 died; its 4 rollouts are written again, each alone") == 1
    assert re.search("warning: rollout 6 is quarantined: its prompt .* fails", printed)
    assert rollouts(folder / "run") == rollouts(place / "sound") and len(rollouts(folder / "run")) == 13
    assert distance(folder / "run" / "student", place / "sound" / "student") < 1e-4


def test_a_private_cluster_listens_on_loopback_with_a_token(private_run):
    """A private cluster listens on loopback only and needs a token, which is in no file."""
    folder, _ = private_run
    seen = json.loads((folder / "seen.json").read_text())
    assert seen["num"] > 6 and seen["listens"] and seen["listens"].keys() <= LOOPBACK, seen["listens"]
    assert seen["mode"] == "token" and len(seen["token"]) == 64
    home = folder / "home"
    files = [path for path in (*home.rglob("*"), *(folder / "run").rglob("*")) if path.is_file()]
    assert len(files) > 5 and [path for path in files if seen["token"].encode() in path.read_bytes()] == []
    assert not (home / ".ray").exists()


OWN_RULE = """
import os
from switchkd.algo import switching


def guarded():
    '''Fails in a process that was not given the token.'''
    in_actor = "RAY_JOB_ID" in os.environ
    assert not in_actor or os.environ.get("HF_TOKEN", "").startswith("hf_"), "no token here"
    return switching.jsd_threshold(half_life=6)
"""


def test_staleness_is_bounded_and_actors_get_a_secret(cluster, place, monkeypatch):
    """With max_staleness 1 and weights loaded mid-rollout no token is older than one version. Actors get HF_TOKEN from
    the driver, and no file of the run or of Ray's logs holds it."""
    token = "hf_" + "abcDEF0123456789" * 2
    assert "HF_TOKEN" not in os.environ
    (place / "my_rule.py").write_text(OWN_RULE)
    monkeypatch.setattr(sys, "path", sys.path[:])
    writers = {"num_workers": 2, "batch_size": 4, "max_new_tokens": 12, "on_new_weights": "reprefill"}
    stage = {**SWITCH, "steps": 6, "mix": {"rollout": 1}, "rule": {"type": "my_rule:guarded"}}
    with pytest.raises(RuntimeError, match="an actor could not start: AssertionError: no token here"):
        train(config(place, [stage], run={**ON_RAY, "dir": "without"}))
    wait_until(lambda: not actors(), "the failed run left actors behind")
    monkeypatch.setenv("HF_TOKEN", token)
    assert train(config(place, [stage], run=ON_RAY, rollout=writers, replay={"max_staleness": 1})).finished
    ages = [row["replay/staleness_max"] for row in steps(place / "run")]
    assert max(ages) == 1 and sorted(rollouts(place / "run")) == list(range(24))
    files = [path for folder in (place / "run", Path(cluster.folder)) for path in folder.rglob("*") if path.is_file()]
    assert any("logs" in path.parts for path in files) and len(files) > 20
    assert [path for path in files if token.encode() in path.read_bytes()] == []
