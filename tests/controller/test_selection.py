"""`train.select_by` and `train.early_stop` choose a student of the last stage, before and after a resume."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from runs import SWITCH, WARM_UP, command, config, distance, lines

from switchkd.config.schema import TrainConfig
from switchkd.controller.checkpoint import TrainState
from switchkd.controller.evaluation import stops_early, update_best
from switchkd.controller.model_card import exported_step
from switchkd.controller.summary import Summary
from switchkd.engines.models.origin import CARD, front_matter
from switchkd.train import train

EVAL = {"data": "./data.jsonl", "num_prompts": 6, "max_new_tokens": 12}
TWO_STAGES = [{**WARM_UP, "steps": 3}, {**SWITCH, "steps": 5}]


def test_each_stage_starts_without_a_best():
    """The first evaluation of a stage is its best, whatever the stages before scored; lower is better for kl and loss,
    higher for the others."""
    stages = [{"name": name, "steps": 2} for name in ("a", "b")] + [{"name": "never", "steps": 0}]
    for metric, kl in (("kl", 1), ("rouge_l", -1)):
        settings = TrainConfig(stages=stages, select_by=metric, early_stop=1)
        state = update_best(TrainState(), {f"eval/{metric}": 0.5 * kl}, settings)
        assert state.best is None, "the student before the first step is not selected"
        found = []
        for step, score in enumerate((1.0, 2.0, 4.0, 3.0, 5.0), start=1):
            state = update_best(replace(state, step=min(step, 4)), {f"eval/{metric}": score * kl}, settings)
            found.append((state.best, state.best_step, state.best_stage, state.stopped_early))
        assert found == [(kl, 1, "a", False)] * 2 + [
            (4 * kl, 3, "b", False), (3 * kl, 4, "b", False), (3 * kl, 4, "b", True),
        ]  # fmt: skip
        assert stops_early(state, settings) and not stops_early(replace(state, best_stage="a"), settings)


def test_select_by_keeps_the_best_student_of_the_last_stage(place):
    """student/ is the best student of the last stage, also where one of the warm-up scores better; student-last/ is the
    last one."""
    ruin = {"name": "ruin", "steps": 3, "mix": {"dataset": 1}, "lr": 5.0, "scheduler": "constant"}
    learner = {"lr": 1e-3, "scheduler": "constant"}
    evaluated = {**EVAL, "every": 1, "metrics": ["kl"]}
    summary = train(config(place, [{**WARM_UP, "steps": 2}, ruin], learner=learner, eval=evaluated,
                           train={"batch_size": 4, "checkpoint_every": 1, "select_by": "kl"},
                           checkpoint={"keep_last": 9}))  # fmt: skip
    run = place / "run"
    scores = [row["eval/kl"] for row in lines(run / "metrics.jsonl") if "eval/kl" in row][1:]
    best = min((3, 4, 5), key=lambda step: scores[step - 1])
    assert min(scores) == scores[1] < scores[best - 1], "the warm-up's last student scores best"
    assert (summary.best, summary.best_step, summary.best_stage) == (scores[best - 1], best, "ruin")
    at = {step: run / "checkpoints" / f"step-{step:08d}" / "student" for step in (2, best, 5)}
    assert distance(run / "student", at[best]) == 0 and distance(run / "student-last", at[5]) == 0
    assert distance(at[2], at[best]) > 0.01


def selected(
    place: Path, monkeypatch: pytest.MonkeyPatch, kl: list[float], resume: bool = False, **section: Any
) -> Summary:
    """A fake run of TWO_STAGES whose evaluations give these KLs; it dies at the evaluation after them."""
    values = iter(kl)
    monkeypatch.setattr("switchkd.train.aggregate", lambda *args: {"eval/kl": next(values)})
    section = {"batch_size": 4, "checkpoint_every": 1, "select_by": "kl", "early_stop": 2} | section
    evaluated = {**EVAL, "metrics": ["kl"], "every": section.pop("every", 1)}
    wanted = config(place, TWO_STAGES, fake=True, eval=evaluated, train=section, checkpoint={"keep_last": 9})
    return train(wanted, resume=resume)


def student_at(step: int) -> Path:
    return Path("run/checkpoints") / f"step-{step:08d}" / "student"


def test_early_stop_ends_the_last_stage_only(fake_place, monkeypatch):
    """Early stopping lets the warm-up run to its end, ends the last stage after so many evaluations without a better
    one, and a resume keeps the run stopped unless early_stop is taken away."""
    kl = [9.0, 0.1, 0.2, 0.3, 5.0, 4.0, 6.0, 7.0]  # of the start and of steps 1, 2, ...
    summary = selected(fake_place, monkeypatch, kl)
    assert summary.finished and summary.stopped_early and summary.steps == 7
    assert (summary.best, summary.best_step, summary.best_stage) == (4.0, 5, "switch")
    stored = json.loads(Path("run/summary.json").read_text())
    assert (stored["best"], stored["best_step"], stored["best_stage"]) == (4.0, 5, "switch")
    assert distance(Path("run/student"), student_at(5)) == 0 and distance(Path("run/student-last"), student_at(7)) == 0
    assert selected(fake_place, monkeypatch, [], resume=True).steps == 7, "it stays stopped"
    summary = selected(fake_place, monkeypatch, [3.0], resume=True, early_stop=None)
    assert (summary.steps, summary.stopped_early, summary.best_step) == (8, False, 8)


def test_cards_name_the_stage_and_step_of_their_students(fake_place, monkeypatch, capsys):
    """The cards of student/, of student-last/ and of an exported checkpoint name their own stage and step, and have no
    scores of later students."""
    selected(fake_place, monkeypatch, [9.0, 0.1, 0.2, 0.3, 5.0, 4.0, 6.0, 7.0, 8.0], early_stop=None)
    code, _, err = command(monkeypatch, capsys, "export", "run", "--step", 2, "--out", "second")
    assert code == 0, err
    expected = {
        "run/student": ("5 of 8, stage switch", 5, "switch", ["start | 9", "warm-up | 0.3", "switch | 4"]),
        "run/student-last": ("8 of 8, stage switch", 8, "switch", ["start | 9", "warm-up | 0.3", "switch | 8"]),
        "second": ("2 of 8, stage warm-up", 2, "warm-up", ["start | 9", "warm-up | -"]),
    }
    for folder, (made, step, stage, rows) in expected.items():
        text = Path(folder, CARD).read_text()
        assert f"**Steps**: {made}, seed 0" in text
        assert (exported_step(Path(folder)), front_matter(Path(folder))["switchkd"]["stage"]) == (step, stage)
        table = [line.removeprefix("| ") for line in text.splitlines() if line.startswith("| ")][1:]
        assert [" | ".join(line.split(" | ")[:2]).removesuffix(" |") for line in table if "---" not in line] == rows


def test_a_resume_counts_evaluations_of_the_last_stage_only(fake_place, monkeypatch):
    """A resume in the warm-up does not stop the run because of the warm-up's evaluations."""
    with pytest.raises(StopIteration):
        selected(fake_place, monkeypatch, [9.0, 0.1, 0.2, 0.3])  # dies in the last stage, before its first evaluation
    summary = selected(fake_place, monkeypatch, [5.0, 4.0, 3.0, 2.0, 1.0], resume=True)
    assert (summary.steps, summary.best, summary.best_step, summary.best_stage) == (8, 1.0, 8, "switch")


def test_a_resume_forgets_a_best_student_that_was_replaced(fake_place, monkeypatch):
    """Where the steps behind the checkpoint had replaced student/ by a better one, a resume selects anew: student/ is
    the student of `best_step`."""
    with pytest.raises(StopIteration):
        selected(fake_place, monkeypatch, [9.0, 0.1, 5.0, 4.0], every=2, checkpoint_every=5)
    # the checkpoint of step 5 has 4.0 of step 4; let student/ be of step 6
    with pytest.raises(StopIteration):
        selected(fake_place, monkeypatch, [3.0], resume=True, every=2, checkpoint_every=5)
    summary = selected(fake_place, monkeypatch, [4.5], resume=True, every=0, early_stop=None)
    assert (summary.best, summary.best_step) == (4.5, 8)
    assert distance(Path("run/student"), student_at(8)) == 0
