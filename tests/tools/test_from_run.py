"""`switchkd plan --from-run`: the advice from a run's own timings."""

from __future__ import annotations

import json

import pytest
from runs import command, config_file, save_prompts

STAGE = {"name": "switch", "steps": 4, "rule": {"type": "random", "prob": 0.5}}


@pytest.mark.parametrize(
    ("costs", "limited_by", "advice"),
    [
        (
            {"teacher_s": 0.03},
            "teacher",
            "one more teacher: teacher.replicas=2 and one more worker: rollout.num_workers=2",
        ),
        ({"student_s": 0.01}, "rollout", "one more rollout worker: rollout.num_workers=2"),
        ({"learner_s": 0.5}, "learner", "one more learner rank: learner.num_ranks=2"),
    ],
)
def test_advice_names_the_slow_role(costs, limited_by, advice, tmp_path, monkeypatch, capsys):
    """The advice for a run in which one fake engine sleeps is one more process of that engine."""
    monkeypatch.chdir(tmp_path)
    save_prompts(tmp_path)
    assert command(monkeypatch, capsys, "train", config_file(tmp_path, [STAGE], fake=costs))[0] == 0
    code, out, err = command(monkeypatch, capsys, "plan", "--from-run", "run", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["limited_by"] == limited_by
    assert advice in report["advice"]
    assert report["num_steps"] == 3
    assert report["advice"] in command(monkeypatch, capsys, "plan", "--from-run", "run")[1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "give either CONFIG or --from-run RUN"),
        (["config.yaml", "--from-run", "run"], "give either CONFIG or --from-run RUN"),
        (["--from-run", "nowhere"], "--from-run nowhere: there is no config.yaml"),
    ],
)
def test_bad_input_is_one_line(args, message, tmp_path, monkeypatch, capsys):
    """A folder that is no run, and a call without or with both inputs, end with exit code 2 and one line."""
    monkeypatch.chdir(tmp_path)
    code, _, err = command(monkeypatch, capsys, "plan", *args)
    assert code == 2 and message in err and err.count("\n") == 1
