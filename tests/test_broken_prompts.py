"""A prompt that breaks its worker is set aside with the reason; the others are trained on as if it were not there."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import pytest
from runs import NUM_ROLLOUTS, STAGES, command, config, config_file, distance, lines, rollouts, steps

from switchkd.metrics import MetricsLog
from switchkd.rollout import RolloutWorker
from switchkd.run import train


def break_rollouts(patch: pytest.MonkeyPatch, broken: set[int]) -> None:
    """Writing these fails, whenever and beside whomever it is tried."""
    start = RolloutWorker._start

    def started(job: Any, slot: int) -> Any:
        if job.task.rollout_id in broken:
            raise ValueError(f"cannot write {job.task.rollout_id}")
        return start(job, slot)

    patch.setattr(RolloutWorker, "_start", staticmethod(started))


def test_two_prompts_break(place, monkeypatch, capsys):
    """They are named in set_aside.jsonl and counted in the metrics; every other rollout is written as ever and trained
    on once, in batches that are shorter by those; a stopped run does without them after --resume too."""
    train(config(place, STAGES, run={"dir": "sound"}))
    broken = {17, 30}
    may_break = {"path": "./data.jsonl", "max_prompt_tokens": 64, "max_reference_tokens": 32, "max_broken_frac": 0.1}
    config_file(place, STAGES, data=may_break)
    break_rollouts(monkeypatch, broken)
    log_step = MetricsLog.step

    def stop(self: MetricsLog, step: int, row: Any) -> None:
        log_step(self, step, row)
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "step", stop)
        code, out, err = command(patch, capsys, "train", "config.yaml")
    assert code == 143, err
    assert "failed (ValueError: cannot write 17); each is tried alone" in out
    assert "warning: rollout 17 is set aside: its prompt" in out
    code, out, err = command(monkeypatch, capsys, "train", "config.yaml", "--resume")
    assert code == 0, err
    run, sound = place / "run", place / "sound"
    told = lines(run / "set_aside.jsonl")
    assert [(row["rollout_id"], row["step"], row["reason"]) for row in told] == [
        (17, 4, "ValueError: cannot write 17"), (30, 7, "ValueError: cannot write 30"),
    ]  # fmt: skip
    prompts = {row["rollout_id"]: row["prompt_id"] for row in lines(sound / "rollouts.jsonl")}
    assert all(prompts[row["rollout_id"]] == row["prompt_id"] for row in told)
    ours = rollouts(run)
    assert sorted(ours) == sorted(set(range(NUM_ROLLOUTS)) - broken)
    before = {i: what for i, what in rollouts(sound).items() if i < 20 and i not in broken}
    assert {i: ours[i] for i in before} == before, "same weights, same rollouts"
    assert all(step == i // 4 for i, (_, _, step) in ours.items())
    counts = [row.get("rollout/num_set_aside", 0) for row in steps(run)]
    assert counts == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_a_batch_that_breaks_whole(place, monkeypatch):
    """Where each of a step's rollouts breaks in a call of its own, the step trains on nothing and the run goes on."""
    break_rollouts(monkeypatch, {1})
    stage = {"name": "single", "steps": 3, "batch_size": 1}
    assert train(config(place, [stage], data={"path": "./data.jsonl", "max_broken_frac": 0.5})).finished
    rows = [row for row in lines(place / "run" / "metrics.jsonl") if "weight_version" in row]
    assert [row["weight_version"] for row in rows] == [1, 2, 3] and sorted(rollouts(place / "run")) == [0, 2]
    students = [place / "run" / "checkpoints" / "step-00000003" / "student", place / "student"]
    assert distance(*students) > 0


def test_more_than_the_budget(place, monkeypatch, capsys):
    """Above data.max_broken_frac the run ends with exit code 1 and one line that says why; mended, --resume completes
    it, and the history no longer calls them broken."""
    config_file(place, STAGES, data={"path": "./data.jsonl", "max_prompt_tokens": 64, "max_broken_frac": 0.03})
    with monkeypatch.context() as patch:
        break_rollouts(patch, {17, 22})
        code, _, err = command(patch, capsys, "train", "config.yaml")
    said = err.strip().splitlines()[-1]
    assert code == 1 and "2 of the run's 40 rollouts could not be written" in said and "cannot write 22" in said
    assert "data.max_broken_frac=0.03" in said and "--resume" in said
    code, _, err = command(monkeypatch, capsys, "train", "config.yaml", "--resume")
    assert code == 0, err
    assert sorted(rollouts(place / "run")) == list(range(NUM_ROLLOUTS))
    assert lines(place / "run" / "set_aside.jsonl") == []
    assert [row["rollout_id"] for row in lines(place / "run" / "lost" / "set_aside.jsonl")] == [17, 22]


def test_an_error_of_the_run_itself(place, monkeypatch, capsys):
    """A worker that can write none of several rollouts has another fault than its prompts: its own error ends the run,
    and nothing is set aside."""
    config_file(place, STAGES, data={"path": "./data.jsonl", "max_prompt_tokens": 64, "max_broken_frac": 1.0})
    break_rollouts(monkeypatch, set(range(NUM_ROLLOUTS)))
    code, _, err = command(monkeypatch, capsys, "train", "config.yaml")
    assert code == 1 and "ValueError: cannot write" in err
    assert not (place / "run" / "set_aside.jsonl").exists()


def test_state_holds_what_was_set_aside(place, monkeypatch):
    """A checkpoint knows its set-aside rollouts, and how many earlier steps did without."""
    break_rollouts(monkeypatch, {13})
    train(config(place, STAGES, data={"path": "./data.jsonl", "max_prompt_tokens": 64, "max_broken_frac": 0.1}))
    told = json.loads((place / "run" / "checkpoints" / "step-00000010" / "state.json").read_text())["told"]["extra"]
    assert told == {"num_started": 40, "set_aside": [13], "num_short": 1}
