"""A run with steps that are not finite reports them, keeps the data that explains them, and can resume."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from runs import config, config_file, distance, lines, save_models, steps
from test_run import command

from switchkd.data.rollout_io import load_rollouts
from switchkd.train import train

SPOILED = """
import os
from switchkd.algo.losses import forward_kl

def loss(p_logits, q_logits, labels, mask, *, spoil=0.0):
    kl = forward_kl(p_logits, q_logits, labels, mask)
    trial = q_logits.shape[1] > 1000  # before the start
    return kl * float("nan") if spoil and not trial and "MENDED" not in os.environ else kl
"""
NUMBERS = {
    "weight_version", "loss/grad_norm", "loss/skipped", "rollout/len_mean", "rollout/eos_frac", "rollout/repeat_frac",
    "rollout/divergence_mean", "replay/staleness_max",
}  # fmt: skip


def stage(name: str, num: int, spoil: float = 0.0, **keys: float) -> dict:
    return {"name": name, "steps": num, "loss": {"type": "spoiled:loss", "params": {"spoil": spoil}}, **keys}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    save_models(tmp_path)
    (tmp_path / "spoiled.py").write_text(SPOILED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "spoiled", raising=False)
    return tmp_path


def test_two_bad_steps_are_skipped(place, capsys):
    """Steps with a loss that is not finite are reported and leave the weights unchanged, and the run finishes."""
    stages = [stage("good", 1), stage("bad", 2, spoil=1.0), stage("end", 1), stage("bad again", 2, spoil=1.0)]
    assert train(config(place, stages, train={"batch_size": 4, "checkpoint_every": 1})).finished
    said = capsys.readouterr().out.splitlines()
    wanted = [f"warning: step {i}: loss is not finite; step skipped ({k} of 3)" for i, k in ((1, 1), (2, 2), (4, 1))]
    assert [line for line in said if "not finite" in line][:3] == wanted
    rows = steps(place / "run")
    assert all(row.keys() >= NUMBERS for row in rows)
    assert [row["loss/skipped"] for row in rows] == [0, 1, 1, 0, 1, 1]
    assert [row["loss/total"] is None for row in rows] == [False, True, True, False, True, True]
    assert [row["weight_version"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(0 < row["rollout/len_mean"] <= 12 and 0 < row["rollout/divergence_mean"] < 1 for row in rows)
    student = {i: place / "run" / "checkpoints" / f"step-{i:08d}" / "student" for i in (5, 6)}
    assert distance(student[5], student[6]) == 0 and not list((place / "run").glob("bad-batch*"))


def test_three_bad_steps_end_the_run(place, monkeypatch, capsys):
    """The third bad step in a row ends the run with one line that names the file of its rollouts; --resume completes
    the run once the loss is repaired."""
    config_file(place, [stage("good", 2), stage("bad", 4, spoil=1.0)], train={"batch_size": 4, "checkpoint_every": 2})
    code, out, err = command(monkeypatch, capsys, "train", "config.yaml")
    assert code == 1 and "step 4: loss is not finite; step skipped (3 of 3)" in out
    last = err.strip().splitlines()[-1]
    assert last.startswith("switchkd: error: RuntimeError: step 4: loss is not finite, as in the 2 steps before")
    assert "bad-batch-4.safetensors" in last and "--resume" in last and "learner.lr" in last
    kept = load_rollouts(place / "run" / "bad-batch-4.safetensors")
    assert [one.rollout_id for one in kept] == [16, 17, 18, 19] and all(one.teacher_output is not None for one in kept)
    checkpoints = sorted(path.name for path in (place / "run" / "checkpoints").glob("step-*"))
    assert checkpoints == ["step-00000002", "step-00000004"]
    students = [place / "run" / "checkpoints" / name / "student" for name in checkpoints]
    assert distance(*students) == 0, "nothing was learned in between, and nothing lost"
    monkeypatch.setenv("MENDED", "1")
    code, out, err = command(monkeypatch, capsys, "train", "config.yaml", "--resume")
    assert code == 0, err
    assert [row["loss/skipped"] for row in steps(place / "run")] == [0, 0, 1, 1, 0, 0]
    assert len(lines(place / "run" / "rollouts.jsonl")) == 24


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_diverged_weights_end_the_run(place, monkeypatch, capsys, zero_stage):
    """A step that makes the weights useless ends the run with one line; the checkpoint before it stands, and its
    student goes on with a smaller learning rate."""
    stages = [stage("good", 2), stage("steep", 1, lr=1e30)]
    sections = {"learner": {"zero_stage": zero_stage, "grad_clip": 0}, "checkpoint": {"keep_last": 1}}
    config_file(place, stages, train={"batch_size": 4, "checkpoint_every": 1}, **sections)
    code, _, err = command(monkeypatch, capsys, "train", "config.yaml")
    last = err.strip().splitlines()[-1]
    assert code == 1 and last.startswith("switchkd: error: RuntimeError: step 2: the weights diverged"), err
    (kept,) = (place / "run" / "checkpoints").glob("step-*")
    assert kept.name == "step-00000002" and "checkpoint run/checkpoints/step-00000002 stands" in last
    assert "learner.lr" in last and "learner.grad_clip" in last
    assert not (place / "run" / "student").exists() and not (place / "run" / "summary.json").exists()
    assert [row["step"] for row in steps(place / "run")] == [0, 1, 2]
    (student,) = re.findall(r"student\.path=\S+(?=,)", last)
    anew = (student, "run.dir=anew", "train.stages.1.lr=1e-4")
    code, _, err = command(monkeypatch, capsys, "train", "config.yaml", *anew)
    assert code == 0, err
    assert 0 < distance(kept / "student", place / "anew" / "student") < 1


def test_diverged_weights_without_a_checkpoint_say_so(place, monkeypatch, capsys):
    """Without a checkpoint the line says how to start anew."""
    config_file(place, [stage("steep", 1, lr=1e30)])
    code, _, err = command(monkeypatch, capsys, "train", "config.yaml")
    assert code == 1 and "step 0: the weights diverged" in err and "there is no checkpoint" in err
    anew = ("run.overwrite=true", "train.stages.0.lr=1e-4")
    assert command(monkeypatch, capsys, "train", "config.yaml", *anew)[0] == 0
