"""A prompt that raises in its worker or kills it is quarantined with the reason; the others are trained on as if it
were not there. What fails for other reasons is tried again, and not for ever."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
from runs import NUM_ROLLOUTS, STAGES, command, config, config_file, distance, lines, rollouts, steps

from switchkd.controller import dispatcher
from switchkd.controller.local import LocalWorkerHandle
from switchkd.controller.metrics import MetricsLog
from switchkd.controller.quarantine import MAX_FAILURES, MAX_STRIKES, Strikes
from switchkd.rollout.state import RolloutState
from switchkd.train import train
from switchkd.types import TeacherLost, Unreachable, WorkerLost


def break_rollouts(patch: pytest.MonkeyPatch, broken: set[int]) -> None:
    """Writing these fails, whenever and beside whomever it is tried."""
    start = RolloutState.start

    def started(task: Any, params: Any, slot: int) -> RolloutState:
        if task.rollout_id in broken:
            raise ValueError(f"cannot write {task.rollout_id}")
        return start(task, params, slot)

    patch.setattr(RolloutState, "start", staticmethod(started))


def test_two_prompts_break(place, monkeypatch, capsys):
    """They are named in quarantined.jsonl and counted in the metrics; every other rollout is written as ever and
    trained on once, in batches that are shorter by those; a stopped run does without them after --resume too."""
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
    told = lines(run / "quarantined.jsonl")
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
    counts = [row.get("rollout/num_quarantined", 0) for row in steps(run)]
    assert counts == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_a_batch_that_breaks_whole(place, monkeypatch):
    """Where each of a step's rollouts breaks in a call of its own, the step trains on nothing and the run goes on."""
    break_rollouts(monkeypatch, {1})
    stage = {"name": "single", "steps": 3, "batch_size": 1}
    assert train(config(place, [stage], data={"path": "./data.jsonl", "max_quarantined_frac": 0.5})).finished
    rows = [row for row in lines(place / "run" / "metrics.jsonl") if "weight_version" in row]
    assert [row["weight_version"] for row in rows] == [1, 2, 3] and sorted(rollouts(place / "run")) == [0, 2]
    students = [place / "run" / "checkpoints" / "step-00000003" / "student", place / "student"]
    assert distance(*students) > 0


def test_more_than_the_budget(place, monkeypatch, capsys):
    """Above data.max_quarantined_frac the run ends with exit code 1 and one line that says why; mended, --resume
    completes it, and the history no longer calls them broken."""
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


def test_an_error_of_the_run_itself(place, monkeypatch, capsys):
    """Where no rollout can be written the fault is not a prompt's: the last error ends the run, nothing is
    quarantined."""
    config_file(place, STAGES, data={"path": "./data.jsonl", "max_prompt_tokens": 64, "max_quarantined_frac": 1.0})
    break_rollouts(monkeypatch, set(range(NUM_ROLLOUTS)))
    code, _, err = command(monkeypatch, capsys, "train", "config.yaml")
    assert code == 1 and "5 failures in a row and no rollout finished in between" in err
    assert "rollout worker 0 failed (ValueError: cannot write 15) at rollout 15" in err
    assert not (place / "run" / "quarantined.jsonl").exists()


def test_state_holds_what_was_quarantined(place, monkeypatch):
    """A checkpoint knows its quarantined rollouts, and how many earlier steps did without."""
    break_rollouts(monkeypatch, {13})
    train(config(place, STAGES, data={"path": "./data.jsonl", "max_prompt_tokens": 64, "max_quarantined_frac": 0.1}))
    told = json.loads((place / "run" / "checkpoints" / "step-00000010" / "state.json").read_text())["extra"]
    assert told == {"num_started": 40, "quarantined": [13], "num_passed": 1}


# --- deaths and outages ----------------------------------------------------------------------------------------------

Fault = Callable[[list[int], int], Exception | None]
"""(rollouts of a call, how many calls there were before) -> how it fails; None: it is written."""


def calls_of(patch: pytest.MonkeyPatch, fault: Fault) -> list[list[int]]:
    """Every call that is made from now on, some of which end as `fault` says."""
    generate, calls = LocalWorkerHandle.generate, list[list[int]]()

    def generated(worker: LocalWorkerHandle, tasks: Any, weights: Any) -> Future[Any]:
        ids = [task.rollout_id for task in tasks]
        error = fault(ids, len(calls))
        calls.append(ids)
        if error is None:
            return generate(worker, tasks, weights)
        failed: Future[Any] = Future()
        failed.set_exception(error)
        return failed

    patch.setattr(LocalWorkerHandle, "generate", generated)
    return calls


def kills(*deadly: int) -> Fault:
    return lambda ids, num: WorkerLost("exit code 1") if set(deadly).intersection(ids) else None


def pauses(patch: pytest.MonkeyPatch) -> list[float]:
    """How long workers would pause; they do not."""
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


def test_a_prompt_kills(alone, place, monkeypatch, notes):
    """After a worker's death each rollout of its call is written alone; the one whose worker dies alone too, while
    others finish, is quarantined at the third death. Every other rollout is trained on once."""
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


def test_two_prompts_kill(place, monkeypatch):
    """Where nothing else is left to be written, a rollout that finished is written again as a control and dropped."""
    calls = calls_of(monkeypatch, kills(18, 19))
    assert train(config(place, STAGES, data=SOME)).finished
    assert [ids[0] for ids in calls if len(ids) == 1] == [16, 17, 18, 19, 17, 18, 19]
    assert [row["rollout_id"] for row in lines(place / "run" / "quarantined.jsonl")] == [18, 19]
    assert sorted(rollouts(place / "run")) == [i for i in range(NUM_ROLLOUTS) if i not in (18, 19)]


def test_calls_of_one_rollout(place, monkeypatch):
    """Where each rollout has a call of its own, those before it are the control; without any it is not quarantined."""
    stage = {"name": "single", "steps": 3, "batch_size": 1}
    with monkeypatch.context() as patch:
        calls = calls_of(patch, kills(1))
        assert train(config(place, [stage], data={**SOME, "max_quarantined_frac": 0.5})).finished
    assert calls == [[0], [1], [0], [1], [0], [1], [2]] and sorted(rollouts(place / "run")) == [0, 2]
    calls_of(monkeypatch, kills(0))
    with pytest.raises(RuntimeError, match=NOTHING + "rollout worker 0 died at rollout 0;"):
        train(config(place, [stage], run={"dir": "first"}, data={**SOME, "max_quarantined_frac": 0.5}))
    assert not (place / "first" / "quarantined.jsonl").exists()


def test_workers_die_whatever_they_write(alone, place, monkeypatch, capsys):
    """From some time on every worker dies: nothing is quarantined, the state is saved and the run ends with one line;
    --resume completes it."""
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


def test_an_outage_after_a_death(place, monkeypatch):
    """A rollout that died by chance is not quarantined when, from then on, nothing else can be written either."""

    def fault(ids: list[int], num: int) -> Exception | None:
        return WorkerLost() if ids == [16, 17, 18, 19] or num > 7 else None

    calls = calls_of(monkeypatch, fault)
    with pytest.raises(RuntimeError, match=NOTHING + "rollout worker 0 died at rollout 18;"):
        train(config(place, STAGES, data=SOME))
    assert [ids[0] for ids in calls[5:]] == [16, 17, 18, 19, 18, 18, 18, 18]
    assert not (place / "run" / "quarantined.jsonl").exists()


def test_workers_die_by_chance(alone, place, monkeypatch):
    """A death of a call, and one of a rollout alone, quarantine nothing: the run is the one without deaths."""
    num: dict[int, int] = {}

    def fault(ids: list[int], calls: int) -> Exception | None:
        num[ids[0]] = num.get(ids[0], 0) + 1
        return WorkerLost() if num[ids[0]] <= (2 if ids[0] % 8 == 0 else 0) else None

    calls_of(monkeypatch, fault)
    assert train(config(place, STAGES)).finished
    assert rollouts(place / "run") == rollouts(alone) and not (place / "run" / "quarantined.jsonl").exists()
    # hidden states' last bits depend on how many are written together
    assert distance(place / "run" / "student", alone / "student") < 1e-5


def test_deaths_beyond_the_budget(place, monkeypatch, capsys):
    """They count against data.max_quarantined_frac as any other."""
    config_file(place, STAGES, data={**SOME, "max_quarantined_frac": 0.03})
    calls_of(monkeypatch, kills(17, 22))
    code, _, err = command(monkeypatch, capsys, "train", "config.yaml")
    last = err.strip().splitlines()[-1]
    assert code == 1 and "2 of the run's 40 rollouts could not be written" in last
    assert "more than data.max_quarantined_frac=0.03" in last and "WorkerLost: exit code 1" in last


def test_a_prompt_kills_its_teacher(place, monkeypatch):
    """In a call of several the death is no strike, but each rollout goes out alone, after a pause; alone it is one."""
    lengths = pauses(monkeypatch)
    calls = calls_of(monkeypatch, lambda ids, num: TeacherLost("teacher 0 died") if 18 in ids else None)
    assert train(config(place, STAGES, data=SOME)).finished
    assert [ids for ids in calls if 15 < ids[0] < 20] == [
        [16, 17, 18, 19], [16], [17], [18], [19], [18], [19], [18],
    ]  # fmt: skip
    (row,) = lines(place / "run" / "quarantined.jsonl")
    assert row["reason"] == "TeacherLost: teacher 0 died" and lengths == [1.0] * 4


def test_something_does_not_answer(alone, place, monkeypatch, notes):
    """A worker that could not reach something pauses, each time twice as long; the call goes out as it was; after five
    failures in a row the run ends with one line that says what failed. Nothing is quarantined."""
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


def test_strikes_need_evidence():
    """A failure counts against a task if another rollout has finished since its last one; finishing clears them."""
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


def test_failures_in_a_row():
    """Calls that were out together fail once; a rollout that finishes begins the count anew."""
    strikes = Strikes()
    for num in (1, 2):
        for rollout_id, call_round in enumerate([strikes.round] * 8):
            strikes.fail(call_round, [rollout_id], strike=True)
        assert strikes.num_failures == num
    late = strikes.round
    strikes.finish([1])
    strikes.fail(late, [2], strike=True)
    assert strikes.num_failures == 1
