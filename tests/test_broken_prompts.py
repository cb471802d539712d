"""A prompt that breaks its worker, or kills it, is set aside with the reason; the others are trained on as if it were
not there. What dies or fails for other reasons is tried again, and not for ever."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from runs import NUM_ROLLOUTS, STAGES, command, config, config_file, distance, lines, rollouts, steps

from switchkd.controller import dispatcher
from switchkd.controller.local import LocalWorkerHandle
from switchkd.controller.metrics import MetricsLog
from switchkd.controller.quarantine import CrashAttribution
from switchkd.rollout.generator import SwitchingGenerator
from switchkd.train import train
from switchkd.types import MAX_DEATHS, TeacherLost, Unreachable, WorkerLost


def break_rollouts(patch: pytest.MonkeyPatch, broken: set[int]) -> None:
    """Writing these fails, whenever and beside whomever it is tried."""
    start = SwitchingGenerator._start

    def started(job: Any, slot: int) -> Any:
        if job.task.rollout_id in broken:
            raise ValueError(f"cannot write {job.task.rollout_id}")
        return start(job, slot)

    patch.setattr(SwitchingGenerator, "_start", staticmethod(started))


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
    assert "failed (ValueError: cannot write 17); each is tried alone" in out
    assert "warning: rollout 17 is set aside: its prompt" in out
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
    """A worker that can write none of several rollouts has another fault than its prompts: its own error ends the run,
    and nothing is set aside."""
    config_file(place, STAGES, data={"path": "./data.jsonl", "max_prompt_tokens": 64, "max_quarantined_frac": 1.0})
    break_rollouts(monkeypatch, set(range(NUM_ROLLOUTS)))
    code, _, err = command(monkeypatch, capsys, "train", "config.yaml")
    assert code == 1 and "ValueError: cannot write" in err
    assert not (place / "run" / "quarantined.jsonl").exists()


def test_state_holds_what_was_set_aside(place, monkeypatch):
    """A checkpoint knows its set-aside rollouts, and how many earlier steps did without."""
    break_rollouts(monkeypatch, {13})
    train(config(place, STAGES, data={"path": "./data.jsonl", "max_prompt_tokens": 64, "max_quarantined_frac": 0.1}))
    told = json.loads((place / "run" / "checkpoints" / "step-00000010" / "state.json").read_text())["told"]["extra"]
    assert told == {"num_started": 40, "quarantined": [13], "num_passed": 1}


# --- deaths ----------------------------------------------------------------------------------------------------------

Fault = Callable[[list[int], int], Exception | None]
"""(rollouts of a call, how many calls there were before) -> what becomes of it; None: it is written."""


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
    return lambda ids, num: WorkerLost() if set(deadly).intersection(ids) else None


def rests(patch: pytest.MonkeyPatch) -> list[float]:
    """How long workers rest; nobody waits for it."""
    found: list[float] = []

    def rest(seconds: float) -> Future[None]:
        found.append(seconds)
        over: Future[None] = Future()
        over.set_result(None)
        return over

    patch.setattr(dispatcher, "_rest", rest)
    return found


SOME = {"path": "./data.jsonl", "max_prompt_tokens": 64, "max_reference_tokens": 32, "max_quarantined_frac": 0.1}


def test_a_prompt_kills(alone, place, monkeypatch, notes):
    """A call whose worker died twice is taken apart; whose worker then dies alone too, three times while the others are
    written, is set aside. Every other rollout is trained on once."""
    calls = calls_of(monkeypatch, kills(17))
    assert train(config(place, STAGES, data=SOME)).finished
    group = [16, 17, 18, 19]
    assert [ids for ids in calls if set(ids) & set(group)] == [group, group, [16], [17], [18], [19], [17], [17]]
    (row,) = lines(place / "run" / "quarantined.jsonl")
    assert (row["rollout_id"], row["step"]) == (17, 4)
    assert row["reason"] == "WorkerLost: its worker died 3 times while it was written alone"
    assert "rollout worker 0 died; its 4 rollouts are written again" in notes
    assert "rollout worker 0 died; its 4 rollouts are written again, each alone" in notes
    assert any(note.startswith("warning: rollout 17 is set aside: its prompt") for note in notes)
    ours, sound = rollouts(place / "run"), rollouts(alone)
    assert sorted(ours) == [i for i in range(NUM_ROLLOUTS) if i != 17]
    assert [i for i in ours if i < 20 and ours[i] != sound[i]] == []


def test_two_prompts_kill(place, monkeypatch):
    """Also where nothing is left to be written beside them: what was written since they first died speaks for it."""
    calls = calls_of(monkeypatch, kills(18, 19))
    assert train(config(place, STAGES, data=SOME)).finished
    assert [ids[0] for ids in calls if len(ids) == 1] == [16, 17, 18, 19, 18, 19, 18, 19]
    assert [row["rollout_id"] for row in lines(place / "run" / "quarantined.jsonl")] == [18, 19]


def test_calls_of_one_rollout(place, monkeypatch):
    """Where each rollout has a call of its own, those before it are the witnesses; without any it is not to blame."""
    stage = {"name": "single", "steps": 3, "batch_size": 1}
    with monkeypatch.context() as patch:
        calls = calls_of(patch, kills(1))
        assert train(config(place, [stage], data={**SOME, "max_quarantined_frac": 0.5})).finished
    assert calls == [[0], [1], [1], [1], [2]] and sorted(rollouts(place / "run")) == [0, 2]
    calls_of(monkeypatch, kills(0))
    with pytest.raises(RuntimeError, match="rollout 0 was given out 5 times in vain; rollout worker 0 died"):
        train(config(place, [stage], run={"dir": "first"}, data={**SOME, "max_quarantined_frac": 0.5}))
    assert not (place / "first" / "quarantined.jsonl").exists()


def test_workers_die_whatever_they_write(place, monkeypatch, capsys):
    """From some time on every worker dies: no prompt is blamed, and the run ends with one line."""
    config_file(place, STAGES, data={**SOME, "max_quarantined_frac": 1.0})
    calls = calls_of(monkeypatch, kills(*range(16, NUM_ROLLOUTS)))
    code, _, err = command(monkeypatch, capsys, "train", "config.yaml")
    assert code == 1 and "rollout 16 was given out 5 times in vain; rollout worker 0 died; see its log" in err
    assert max(map(max, calls)) == 19 and not (place / "run" / "quarantined.jsonl").exists()


def test_workers_die_by_chance(alone, place, monkeypatch):
    """Two deaths of every call, and two of each rollout alone, blame nobody: the run is the one that nothing befell."""
    num: dict[int, int] = {}

    def fault(ids: list[int], calls: int) -> Exception | None:
        num[ids[0]] = num.get(ids[0], 0) + 1
        return WorkerLost() if num[ids[0]] <= (4 if ids[0] % 8 == 0 else 0) else None

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
    said = err.strip().splitlines()[-1]
    assert (
        code == 1
        and "2 of the run's 40 rollouts could not be written, more than data.max_quarantined_frac=0.03" in said
    )
    assert "WorkerLost: its worker died 3 times while it was written alone" in said


def test_teachers_die_of_a_prompt(place, monkeypatch):
    """That they died so often in a row counts as so many deaths: the call is taken apart at once, and who is alone
    with it is set aside at once."""
    rested = rests(monkeypatch)
    calls = calls_of(monkeypatch, lambda ids, num: TeacherLost("3 in a row") if 18 in ids else None)
    assert train(config(place, STAGES, data=SOME)).finished
    assert [ids for ids in calls if 15 < ids[0] < 20] == [[16, 17, 18, 19], [16], [17], [18], [19]]
    (row,) = lines(place / "run" / "quarantined.jsonl")
    assert row["reason"] == "TeacherLost: teachers died 3 times while it was written alone" and len(rested) == 2


def test_whose_worker_died():
    """A rollout is to blame if others were written meanwhile, and not always the same one of several workers died."""
    first, last, other = ([SimpleNamespace(rollout_id=i)] for i in range(3))
    deaths = CrashAttribution()
    deaths.written(other, asked=True)
    for time in range(MAX_DEATHS):
        deaths.hear(first, WorkerLost, time % 2)
        deaths.hear(last, WorkerLost, 0)
    assert not deaths.blame(first, WorkerLost, 2), "both died, and nothing was written since"
    deaths.written(other, asked=False)
    assert deaths.blame(first, WorkerLost, 2)
    assert not deaths.blame(last, WorkerLost, 2) and deaths.blame(last, WorkerLost, 1)


def test_whose_teachers_died():
    """Workers share them: where several calls died, none is to blame until the others are written. What died with
    teachers does not count where a worker dies."""
    first, last = ([SimpleNamespace(rollout_id=i)] for i in range(2))
    deaths = CrashAttribution()
    for tasks in (first, last):
        deaths.hear(tasks, TeacherLost, 0)
        assert not deaths.split(tasks, TeacherLost)
    deaths.written([SimpleNamespace(rollout_id=2)], asked=True)
    assert not deaths.blame(first, TeacherLost, 1)
    deaths.written(last, asked=True)
    assert deaths.blame(first, TeacherLost, 1)
    deaths.hear(last, TeacherLost, 0)
    deaths.hear(last, WorkerLost, 0)
    assert not deaths.blame(last, WorkerLost, 1)


def test_somebody_does_not_answer(alone, place, monkeypatch, notes):
    """A worker whom somebody did not answer rests, each time twice as long; the call goes out as it was; when it went
    out in vain so often, the run ends with one line that says who. Nobody is set aside."""
    rested = rests(monkeypatch)
    away = Unreachable("RayError: no route")
    with monkeypatch.context() as patch:
        calls = calls_of(patch, lambda ids, num: away if num in (2, 3, 7) else None)
        assert train(config(place, STAGES)).finished
    assert calls[2] == calls[3] == calls[4] and len(calls) == 13 and rested == [1.0, 2.0, 1.0]
    assert "rollout worker 0 could not go on (RayError: no route); its 4 rollouts are written again" in notes
    assert rollouts(place / "run") == rollouts(alone)
    rested.clear()
    calls = calls_of(monkeypatch, lambda ids, num: away if 9 in ids else None)
    with pytest.raises(RuntimeError, match=r"rollouts 8 to 11 were given out 5 times in vain; .* \(RayError: no route"):
        train(config(place, STAGES, run={"dir": "second"}))
    assert calls[2:] == [[8, 9, 10, 11]] * dispatcher.MAX_TRIES and rested == [1.0, 2.0, 4.0, 8.0]
    assert not (place / "second" / "quarantined.jsonl").exists()
