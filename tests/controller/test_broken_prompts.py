"""A prompt that raises in its worker or kills it is quarantined with the reason; other rollouts are unaffected. Other
failures are retried up to a limit."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
from runs import NUM_ROLLOUTS, STAGES, SWITCH, command, config, config_file, distance, lines, rollouts, steps

from switchkd.controller import dispatcher
from switchkd.controller.local import LocalWorkerHandle
from switchkd.controller.metrics import MetricsLog
from switchkd.controller.quarantine import MAX_FAILURES, MAX_STRIKES, Strikes
from switchkd.rollout.state import RolloutSlots
from switchkd.train import train
from switchkd.types import TeacherLost, Unreachable, WorkerLost


def break_rollouts(patch: pytest.MonkeyPatch, broken: set[int]) -> None:
    """Make the start of these rollouts raise, alone or in a batch."""
    add = RolloutSlots.add

    def added(self: RolloutSlots, task: Any, params: Any, cache_slot: int) -> int:
        if task.rollout_id in broken:
            raise ValueError(f"cannot write {task.rollout_id}")
        return add(self, task, params, cache_slot)

    patch.setattr(RolloutSlots, "add", added)


def test_two_broken_prompts_are_quarantined(place, monkeypatch, capsys):
    """Broken prompts are in quarantined.jsonl and the metrics; all others train once, also after a resume."""
    train(config(place, STAGES, run={"dir": "sound"}))
    broken = {17, 30}
    may_break = {
        "path": "./data.jsonl",
        "max_prompt_tokens": 64,
        "max_reference_tokens": 32,
        "max_quarantined_frac": 0.1,
    }
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
    assert "failed (ValueError: cannot write 17); its 4 rollouts are written again, each alone" in out
    assert "warning: rollout 17 is quarantined: its prompt" in out
    code, out, err = command(monkeypatch, capsys, "train", "config.yaml", "--resume")
    assert code == 0, err
    run, sound = place / "run", place / "sound"
    stored = lines(run / "quarantined.jsonl")
    assert [(row["rollout_id"], row["step"], row["reason"]) for row in stored] == [
        (17, 4, "ValueError: cannot write 17"), (30, 7, "ValueError: cannot write 30"),
    ]  # fmt: skip
    prompts = {row["rollout_id"]: row["prompt_id"] for row in lines(sound / "rollouts.jsonl")}
    assert all(prompts[row["rollout_id"]] == row["prompt_id"] for row in stored)
    ours = rollouts(run)
    assert sorted(ours) == sorted(set(range(NUM_ROLLOUTS)) - broken)
    before = {i: what for i, what in rollouts(sound).items() if i < 20 and i not in broken}
    assert {i: ours[i] for i in before} == before, "same weights, same rollouts"
    assert all(step == i // 4 for i, (_, _, step) in ours.items())
    counts = [row.get("rollout/num_quarantined", 0) for row in steps(run)]
    assert counts == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_a_step_without_rollouts_trains_on_nothing(place, monkeypatch):
    """A step whose only rollout is quarantined trains on nothing, and the run finishes."""
    break_rollouts(monkeypatch, {1})
    stage = {"name": "single", "steps": 3, "batch_size": 1}
    assert train(config(place, [stage], data={"path": "./data.jsonl", "max_quarantined_frac": 0.5})).finished
    rows = [row for row in lines(place / "run" / "metrics.jsonl") if "weight_version" in row]
    assert [row["weight_version"] for row in rows] == [1, 2, 3] and sorted(rollouts(place / "run")) == [0, 2]
    students = [place / "run" / "checkpoints" / "step-00000003" / "student", place / "student"]
    assert distance(*students) > 0


def test_more_quarantined_than_allowed_ends_the_run(place, monkeypatch, capsys):
    """Above data.max_quarantined_frac the run ends with one line; --resume after a repair completes it."""
    config_file(place, STAGES, data={"path": "./data.jsonl", "max_prompt_tokens": 64, "max_quarantined_frac": 0.03})
    with monkeypatch.context() as patch:
        break_rollouts(patch, {17, 22})
        code, _, err = command(patch, capsys, "train", "config.yaml")
    said = err.strip().splitlines()[-1]
    assert code == 1 and "2 of the run's 40 rollouts could not be written" in said and "cannot write 22" in said
    assert "data.max_quarantined_frac=0.03" in said and "--resume" in said
    code, _, err = command(monkeypatch, capsys, "train", "config.yaml", "--resume")
    assert code == 0, err
    assert sorted(rollouts(place / "run")) == list(range(NUM_ROLLOUTS))
    assert lines(place / "run" / "quarantined.jsonl") == []
    assert [row["rollout_id"] for row in lines(place / "run" / "lost" / "quarantined.jsonl")] == [17, 22]


def test_an_error_of_all_rollouts_quarantines_nothing(place, monkeypatch, capsys):
    """If no rollout can be written, the last error ends the run and nothing is quarantined."""
    config_file(
        place,
        [{**SWITCH, "mix": {"rollout": 1}}],
        data={"path": "./data.jsonl", "max_prompt_tokens": 64, "max_quarantined_frac": 1.0},
    )
    break_rollouts(monkeypatch, set(range(NUM_ROLLOUTS)))
    code, _, err = command(monkeypatch, capsys, "train", "config.yaml")
    assert code == 1 and "5 failures in a row and no rollout finished in between" in err
    assert "rollout worker 0 failed (ValueError: cannot write 3) at rollout 3" in err
    assert not (place / "run" / "quarantined.jsonl").exists()


def test_a_checkpoint_holds_the_quarantined_rollouts(place, monkeypatch):
    """A checkpoint holds its quarantined rollouts and how many of them earlier steps left out."""
    break_rollouts(monkeypatch, {14})
    train(config(place, STAGES, data={"path": "./data.jsonl", "max_prompt_tokens": 64, "max_quarantined_frac": 0.1}))
    stored = json.loads((place / "run" / "checkpoints" / "step-00000010" / "state.json").read_text())["extra"]
    del stored["history"]
    assert stored == {"num_started": 40, "quarantined": [14], "num_passed": 1}


# --- deaths and outages ----------------------------------------------------------------------------------------------

Fault = Callable[[list[int], int], Exception | None]
"""(rollouts of a call, number of earlier calls) -> the error of the call, or None."""


def calls_of(patch: pytest.MonkeyPatch, fault: Fault) -> list[list[int]]:
    """Record every call of a worker; a call for which `fault` gives an error fails with it."""
    generate, calls = LocalWorkerHandle.generate, list[list[int]]()

    def generated(worker: LocalWorkerHandle, tasks: Any, weights: Any) -> Future[Any]:
        ids = [task.rollout_id for task in tasks]
        error = fault(ids, len(calls))
        calls.append(ids)
        return generate(worker, tasks, weights) if error is None else failed(error)

    patch.setattr(LocalWorkerHandle, "generate", generated)
    return calls


def failed(error: Exception) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_exception(error)
    return future


def kills(*deadly: int) -> Fault:
    return lambda ids, num: WorkerLost("exit code 1") if set(deadly).intersection(ids) else None


def pauses(patch: pytest.MonkeyPatch) -> list[float]:
    """Record the length of each pause of a worker, without waiting."""
    lengths: list[float] = []

    def pause(seconds: float) -> Future[None]:
        lengths.append(seconds)
        over: Future[None] = Future()
        over.set_result(None)
        return over

    patch.setattr(dispatcher, "_pause", pause)
    return lengths


SOME = {"path": "./data.jsonl", "max_prompt_tokens": 64, "max_reference_tokens": 32, "max_quarantined_frac": 0.1}
NOTHING = r"5 failures in a row and no rollout finished in between; the last: "


def test_a_prompt_that_kills_its_worker_is_quarantined(alone, place, monkeypatch, notes):
    """A rollout whose worker dies is retried alone and quarantined at the third death; all others train once."""
    calls = calls_of(monkeypatch, kills(17))
    assert train(config(place, STAGES, data=SOME)).finished
    group = [16, 17, 18, 19]
    assert [ids for ids in calls if set(ids) & set(group)] == [group, [16], [17], [18], [19], [17]]
    (row,) = lines(place / "run" / "quarantined.jsonl")
    assert (row["rollout_id"], row["step"], row["reason"]) == (17, 4, "WorkerLost: exit code 1")
    assert "rollout worker 0 died; its 4 rollouts are written again, each alone" in notes
    assert "rollout worker 0 died; its rollout is written again" in notes
    assert any(note.startswith("warning: rollout 17 is quarantined: its prompt") for note in notes)
    ours, sound = rollouts(place / "run"), rollouts(alone)
    assert sorted(ours) == [i for i in range(NUM_ROLLOUTS) if i != 17]
    assert [i for i in ours if i < 20 and ours[i] != sound[i]] == []


def test_a_finished_rollout_is_the_control_of_two_deadly_ones(place, monkeypatch):
    """If nothing else is left to write, a finished rollout is written again as a control and its copy dropped."""
    calls = calls_of(monkeypatch, kills(18, 19))
    assert train(config(place, STAGES, data=SOME)).finished
    assert [ids[0] for ids in calls if len(ids) == 1] == [16, 17, 18, 19, 17, 18, 19]
    assert [row["rollout_id"] for row in lines(place / "run" / "quarantined.jsonl")] == [18, 19]
    assert sorted(rollouts(place / "run")) == [i for i in range(NUM_ROLLOUTS) if i not in (18, 19)]


def test_earlier_calls_are_the_control_of_single_rollouts(place, monkeypatch):
    """In calls of one rollout, the earlier calls are the control; without an earlier one nothing is quarantined."""
    stage = {"name": "single", "steps": 3, "batch_size": 1}
    with monkeypatch.context() as patch:
        calls = calls_of(patch, kills(1))
        assert train(config(place, [stage], data={**SOME, "max_quarantined_frac": 0.5})).finished
    assert calls == [[0], [1], [0], [1], [0], [1], [2]] and sorted(rollouts(place / "run")) == [0, 2]
    calls_of(monkeypatch, kills(0))
    with pytest.raises(RuntimeError, match=NOTHING + "rollout worker 0 died at rollout 0;"):
        train(config(place, [stage], run={"dir": "first"}, data={**SOME, "max_quarantined_frac": 0.5}))
    assert not (place / "first" / "quarantined.jsonl").exists()


def test_deaths_at_every_rollout_quarantine_nothing(alone, place, monkeypatch, capsys):
    """If every worker dies from some point on, nothing is quarantined, and the saved run can be resumed."""
    config_file(place, STAGES, data={**SOME, "max_quarantined_frac": 1.0})
    with monkeypatch.context() as patch:
        calls = calls_of(patch, kills(*range(16, NUM_ROLLOUTS)))
        code, out, err = command(patch, capsys, "train", "config.yaml")
    last = err.strip().splitlines()[-1]
    assert code == 1 and "saved checkpoint 4" in out
    assert "5 failures in a row" in last and "rollout worker 0 died at rollout 19; see its log" in last
    assert max(map(max, calls)) == 19 and not (place / "run" / "quarantined.jsonl").exists()
    code, _, err = command(monkeypatch, capsys, "train", "config.yaml", "--resume")
    assert code == 0 and rollouts(place / "run") == rollouts(alone), err


def test_an_outage_after_a_death_quarantines_nothing(place, monkeypatch):
    """A rollout whose worker died once is not quarantined if nothing else can be written afterwards."""

    def fault(ids: list[int], num: int) -> Exception | None:
        return WorkerLost() if ids == [16, 17, 18, 19] or num > 7 else None

    calls = calls_of(monkeypatch, fault)
    with pytest.raises(RuntimeError, match=NOTHING + "rollout worker 0 died at rollout 18;"):
        train(config(place, STAGES, data=SOME))
    assert [ids[0] for ids in calls[5:]] == [16, 17, 18, 19, 18, 18, 18, 18]
    assert not (place / "run" / "quarantined.jsonl").exists()


def test_random_deaths_change_no_rollout(alone, place, monkeypatch):
    """Two deaths at a rollout quarantine nothing, and the run equals the one without deaths."""
    num: dict[int, int] = {}

    def fault(ids: list[int], calls: int) -> Exception | None:
        num[ids[0]] = num.get(ids[0], 0) + 1
        return WorkerLost() if num[ids[0]] <= (2 if ids[0] % 8 == 0 else 0) else None

    calls_of(monkeypatch, fault)
    assert train(config(place, STAGES)).finished
    assert rollouts(place / "run") == rollouts(alone) and not (place / "run" / "quarantined.jsonl").exists()
    # hidden states' last bits depend on how many are written together
    assert distance(place / "run" / "student", alone / "student") < 1e-5


def test_deaths_count_against_the_quarantine_limit(place, monkeypatch, capsys):
    """Deaths count against data.max_quarantined_frac."""
    config_file(place, STAGES, data={**SOME, "max_quarantined_frac": 0.03})
    calls_of(monkeypatch, kills(17, 22))
    code, _, err = command(monkeypatch, capsys, "train", "config.yaml")
    last = err.strip().splitlines()[-1]
    assert code == 1 and "2 of the run's 40 rollouts could not be written" in last
    assert "more than data.max_quarantined_frac=0.03" in last and "WorkerLost: exit code 1" in last


def test_a_prompt_that_kills_its_teacher_alone_is_quarantined(place, monkeypatch):
    """A teacher's death is a strike only in a call of one rollout, and a pause precedes each retry."""
    lengths = pauses(monkeypatch)
    calls = calls_of(monkeypatch, lambda ids, num: TeacherLost("teacher 0 died") if 18 in ids else None)
    assert train(config(place, STAGES, data=SOME)).finished
    assert [ids for ids in calls if 15 < ids[0] < 20] == [
        [16, 17, 18, 19], [16], [17], [18], [19], [18], [19], [18],
    ]  # fmt: skip
    (row,) = lines(place / "run" / "quarantined.jsonl")
    assert row["reason"] == "TeacherLost: teacher 0 died" and lengths == [1.0] * 4


def test_unreachable_processes_are_retried_after_pauses(alone, place, monkeypatch, notes):
    """An unreachable process makes the worker pause, doubling each time, and repeat the same call; five failures in a
    row end the run, and nothing is quarantined."""
    lengths = pauses(monkeypatch)
    away = Unreachable("RayError: no route")
    with monkeypatch.context() as patch:
        calls = calls_of(patch, lambda ids, num: away if num in (2, 3, 7) else None)
        assert train(config(place, STAGES)).finished
    assert calls[2] == calls[3] == calls[4] and len(calls) == 13 and lengths == [1.0, 2.0, 1.0]
    assert "rollout worker 0 could not go on (RayError: no route); its 4 rollouts are written again" in notes
    assert rollouts(place / "run") == rollouts(alone)
    lengths.clear()
    calls = calls_of(monkeypatch, lambda ids, num: away if 9 in ids else None)
    with pytest.raises(RuntimeError, match=NOTHING + r"rollout worker 0 .* \(RayError: no route\) at rollouts 8 to 11"):
        train(config(place, STAGES, run={"dir": "second"}))
    assert calls[2:] == [[8, 9, 10, 11]] * MAX_FAILURES and lengths == [1.0, 2.0, 4.0, 8.0, 16.0]
    assert not (place / "second" / "quarantined.jsonl").exists()


def test_weights_that_are_lost_are_published_again(alone, place, monkeypatch, notes):
    """Weights that no worker can fetch any more, because the rank that published them died, are published again."""
    pauses(monkeypatch)
    generate, lost = LocalWorkerHandle.generate, []

    def generated(worker: LocalWorkerHandle, tasks: Any, weights: Any) -> Future[Any]:
        if weights is not None and weights.version >= 4 and not lost:
            lost.append(weights)
        if any(weights is each for each in lost):
            return failed(Unreachable("OwnerDiedError: the owner died"))
        return generate(worker, tasks, weights)

    monkeypatch.setattr(LocalWorkerHandle, "generate", generated)
    assert train(config(place, STAGES)).finished
    assert len(lost) == 1 and sum("OwnerDiedError" in note for note in notes) == 1
    assert rollouts(place / "run") == rollouts(alone)


def test_strikes_need_a_finished_rollout_in_between():
    """A failure is a strike only if another rollout finished since the task's last one; finishing clears strikes."""
    strikes = Strikes()

    def fail(*rollout_ids: int, strike: bool = True) -> bool:
        return strikes.fail(strikes.round, rollout_ids, strike=strike)

    assert not any(fail(0) for _ in range(MAX_STRIKES))
    for _ in range(MAX_STRIKES - 1):
        strikes.finish([7])
        assert not fail(0, 1)
    assert not fail(0)
    strikes.finish([1])
    assert not fail(1) and not fail(0, strike=False)
    strikes.finish([8])
    assert fail(0)


def test_concurrent_failures_count_once():
    """Calls that were in flight together fail once; a finished rollout resets the count."""
    strikes = Strikes()
    for num in (1, 2):
        for rollout_id, call_round in enumerate([strikes.round] * 8):
            strikes.fail(call_round, [rollout_id], strike=True)
        assert strikes.num_failures == num
    late = strikes.round
    strikes.finish([1])
    strikes.fail(late, [2], strike=True)
    assert strikes.num_failures == 1
