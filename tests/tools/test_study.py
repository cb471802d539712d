"""`bench quality`: its task, its study files and its grid of cells that resumes."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import command

from switchkd.config.errors import ConfigError
from switchkd.controller.text_metrics import exact_match, final_number
from switchkd.tools.bench.study import arithmetic_task, grid
from switchkd.tools.bench.study.arithmetic_task import Problem
from switchkd.tools.bench.study.scores import over_test_sets
from switchkd.tools.bench.study.spec import Cell, cells, configured, merged, read_study

STUDIES = Path(__file__).parents[2] / "configs" / "study"
SIZE = {"layers": 1, "hidden": 16, "heads": 2}
STUDY: dict[str, Any] = {
    "name": "tiny",
    "task": {"type": "arithmetic", "digits": [2, 3], "num_train": 40, "num_test": 8, "teacher": SIZE, "student": SIZE},
    "seeds": [1, 2],
    "group": {"field": "digits"},
    "base": {
        "run": {"mode": "inprocess"},
        "data": {"max_prompt_tokens": 12, "max_reference_tokens": 40},
        "rollout": {"batch_size": 4, "max_new_tokens": 8, "max_draft_tokens": 4, "drafter": "student", "save": False},
        "train": {"num_steps": 2, "batch_size": 4, "checkpoint_every": 0},
        "learner": {"lr": 1e-3},
        "eval": {"metrics": ["exact_match", "kl"], "num_prompts": 8, "temperature": 0, "max_new_tokens": 8},
        "resources": {role: {"threads": 1} for role in ("teacher", "rollout", "learner")},
    },
    "teacher": {"learner": {"loss": {"type": "cross_entropy"}}, "train": {"mix": {"dataset": 1.0}}},
    "warm_up": {"learner": {"loss": {"type": "cross_entropy"}}, "train": {"mix": {"dataset": 1.0}}},
    "main": ["switch"],
    "methods": {
        "supervised-kd": {"train": {"mix": {"dataset": 1.0}}},
        "switch": {"rollout": {"rule": {"type": "switch"}}},
    },
}


def solution_tokens(digits: int) -> int:
    """Most tokens of a solution: 8 per column, commas between them, `####`, the answer, the end."""
    return 8 * digits + (digits - 1) + 1 + (digits + 1) + 1


def study_file(place: Path, **changes: Any) -> Path:
    path = place / "study.yaml"
    path.write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False))
    return path


# --- the task --------------------------------------------------------------------------------------------------------


def test_a_solution_equals_a_hand_calculation():
    """The solutions of 385 + 947 and 20 + 51 are those of a hand calculation, from the right column with carries."""
    problem = Problem(385, 947)
    assert problem.prompt == "385+947="
    assert problem.solution == "5+7+0=12,8+4+1=13,3+9+1=13####1332"
    assert Problem(20, 51).solution == "0+1+0=01,2+5+0=07####71"


def test_every_solution_is_right():
    """Each column of a solution has the right sum and carry, and the results form the answer."""
    for problem in arithmetic_task.draw([2, 3, 4, 8], 200, seed=3):
        steps, answer = problem.solution.split("####")
        carry, result = 0, ""
        for step in steps.split(","):
            summands, total = step.split("=")
            a, b, handed = map(int, summands.split("+"))
            assert handed == carry and a + b + handed == int(total)
            carry, result = divmod(int(total), 10)[0], str(int(total) % 10) + result
        whole = (str(carry) if carry else "") + result
        assert whole == answer == str(sum(map(int, problem.prompt.rstrip("=").split("+"))))
        assert exact_match(problem.solution, problem.answer) and not exact_match(problem.solution + "0", problem.answer)


def test_the_answer_follows_the_mark():
    assert final_number("5+7+0=12####1332") == "1332"
    assert final_number("5+7+0=12####") is None


def test_train_and_test_share_no_problem():
    """No two problems are equal, also with swapped summands, and draws are repeatable with equal shares of lengths."""
    test = arithmetic_task.draw([2, 3], 400, seed=0)
    train = arithmetic_task.draw([2, 3], 2000, seed=1, apart_from=test)
    pairs = [frozenset((p.first, p.second)) for p in (*test, *train)]
    assert len(set(pairs)) == len(pairs) == 2400
    assert [sum(p.digits == n for p in train) for n in (2, 3)] == [1000, 1000]
    assert (
        train
        == arithmetic_task.draw([2, 3], 2000, seed=1, apart_from=test)
        != arithmetic_task.draw([2, 3], 2000, seed=2)
    )


def test_too_many_problems_are_refused():
    with pytest.raises(ConfigError, match="30 problems of 1 digits"):
        arithmetic_task.draw([1], 30, seed=0)


def test_the_tokenizer_decodes_what_it_encodes():
    """`####` is one token and any other character is one, and no character becomes a special token."""
    tokenizer = arithmetic_task.tokenizer()
    text = Problem(385, 947).prompt + Problem(385, 947).solution
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and len(ids) == len(text) - 3
    assert not {tokenizer.pad_token_id, tokenizer.eos_token_id} & set(ids)
    longest = max(len(tokenizer(p.solution)["input_ids"]) for p in arithmetic_task.draw([8], 300, seed=0))
    assert longest + 1 <= solution_tokens(8)


# --- the study file --------------------------------------------------------------------------------------------------


def test_the_arithmetic_study_is_valid():
    """The shipped arithmetic study is valid, and its rollouts have room for each solution."""
    study = read_study(STUDIES / "arithmetic.yaml")
    assert study.task is not None
    assert study.base["rollout"]["max_new_tokens"] >= solution_tokens(max(study.task.digits))
    names = [cell.name for cell in cells(study)]
    assert len(set(names)) == len(study.methods) * len(study.seeds)
    assert {cell.seed for cell in cells(study)[: len(study.methods)]} == {study.seeds[0]}
    on_policy = {"on-policy", "on-policy-cold"}
    assert {one for one, other in study.compare if other in on_policy} == study.methods.keys() - {"on-policy"}


@pytest.mark.parametrize("name", ["dolly", "dolly_small"])
def test_the_dolly_studies_are_valid(name):
    """Each method's config of the Dolly studies is valid, and the test sets have their names."""
    study = read_study(STUDIES / f"{name}.yaml")
    assert set(study.test_sets) == {"dolly", "self_inst", "s_ni", "vicuna"} and set(study.main) <= study.methods.keys()
    assert len(cells(study)) == 3 * len(study.methods)


def test_a_warmed_up_student_is_not_pruned_again(tmp_path):
    """A study prunes its student for the warm-up only; cells and evaluations use the given folder."""
    student = {"prune": {"num_layers": 1}, "prepack": "off"}
    study = read_study(study_file(tmp_path, base={**STUDY["base"], "student": student}))
    assert configured(study, {}, tmp_path, tmp_path).student.prune is not None
    given = configured(study, {}, tmp_path, tmp_path, student="warm-up/student").student
    assert (given.path, given.prune, given.prepack) == ("warm-up/student", None, "off")


def test_scores_are_averaged_over_test_sets():
    """Scores have the test set's name and a mean; a part that one set lacks is the mean of the others."""
    scores = {"a/rouge_l": 10.0, "b/rouge_l": 20.0, "a/rouge_l/short": 4.0}
    assert over_test_sets(scores, ["a", "b"]) == {**scores, "rouge_l": 15.0, "rouge_l/short": 4.0}
    named = {"rouge_l": 1.0, "b/rouge_l": 3.0}
    assert over_test_sets(named, ["", "b"]) == named


def test_the_order_of_cells_is_balanced(tmp_path):
    study = read_study(study_file(tmp_path, methods={**STUDY["methods"], "other": {}}))
    assert [cell.name for cell in cells(study)] == [
        "switch-seed1", "switch-seed2", "supervised-kd-seed1", "other-seed1", "supervised-kd-seed2", "other-seed2",
    ]  # fmt: skip


def test_groups_of_keys_are_merged():
    base = {"a": {"b": 1, "c": {"d": 2}}, "e": [1]}
    assert merged(base, {"a": {"c": {"f": 3}}, "e": [2]}) == {"a": {"b": 1, "c": {"d": 2, "f": 3}}, "e": [2]}
    assert base == {"a": {"b": 1, "c": {"d": 2}}, "e": [1]}


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"sedes": [1]}, [], "sedes: unknown key (value [1]); did you mean 'seeds'?"),
        ({"task": {**STUDY["task"], "digit": [2]}}, [], "task.digit: unknown key (value [2]); did you mean 'digits'?"),
        ({"main": ["swich"]}, [], "main: 'swich' is not known; did you mean 'switch'?"),
        (
            {"main": [], "methods": {"x": {"rollout": {"rule": {"type": "swich"}}}}},
            [],
            "methods.x: rollout.rule.type='swich'",
        ),
        ({"main": [], "methods": {"x": {"rollout": {"rule": {"type": "switch", "prob": 1}}}}}, [], "methods.x: rule"),
        ({"rank_by": "rouge_l"}, [], "test_sets.: rank_by=rouge_l is not scored; eval.metrics has exact_match, kl"),
        ({"methods": {"warm-up": {}}}, [], "the name 'warm-up' is taken"),
        ({"compare": [["switch", "swich"]]}, [], "compare: 'swich' is not known; did you mean 'switch'?"),
        ({}, ["--methods", "swich"], "--methods: 'swich' is not known; did you mean 'switch'?"),
        ({}, ["--cells", "switch-seed9"], "--cells: 'switch-seed9' is not known"),
        ({}, ["--only-table"], "holds no study yet"),
    ],
)
def test_bad_input_is_one_line(changes, options, message, tmp_path, monkeypatch, capsys):
    """Bad input is one line with exit code 2, before anything is trained."""
    monkeypatch.setattr(grid.Grid, "_write_task", lambda self: pytest.fail("it was started"))
    file = study_file(tmp_path, **changes)
    code, _, err = command(
        monkeypatch, capsys, "bench", "quality", "--study", file, "--out", tmp_path / "out", *options
    )
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


def test_the_folder_of_another_study_is_refused(tmp_path, monkeypatch, capsys):
    """The folder of another study is refused and unchanged; more methods, seeds and pairs are the same study."""
    study = read_study(study_file(tmp_path))
    grid.claim(study, tmp_path / "out")
    more = {"seeds": [1, 2, 3], "methods": {"switch": {}, "skd": {}}, "compare": [["switch", "skd"]]}
    grid.claim(read_study(study_file(tmp_path, **more)), tmp_path / "out")
    before = (tmp_path / "out" / "study.json").read_bytes()
    file = study_file(tmp_path, base=merged(STUDY["base"], {"train": {"num_steps": 9}}))
    code, _, err = command(monkeypatch, capsys, "bench", "quality", "--study", file, "--out", tmp_path / "out")
    assert code == 2 and "belongs to another study (tiny; base differ)" in err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    code, _, err = command(monkeypatch, capsys, "bench", "quality", "--study", file, "--out", tmp_path / "mine")
    assert code == 2 and "holds no study" in err
    assert (tmp_path / "out" / "study.json").read_bytes() == before


# --- the grid --------------------------------------------------------------------------------------------------------


class Trains:
    """Records the calls of `train.train`; call number `stop_at` ends as after SIGTERM."""

    def __init__(self, monkeypatch: Any, stop_at: int = 0) -> None:
        from switchkd import train

        self.real, self.seen, self.stop_at = train.train, [], stop_at
        monkeypatch.setattr(train, "train", self)

    def __call__(self, config: Any, *, resume: bool = False) -> Any:
        self.seen.append(Path(config.run.dir).name)
        if len(self.seen) == self.stop_at:
            from switchkd.train import Trainer

            step = Trainer._one_step

            def stopped(trainer: Any) -> None:
                step(trainer)
                trainer.recovery.started -= 1000  # seconds that a resumed run must count
                signal.raise_signal(signal.SIGTERM)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Trainer, "_one_step", stopped)
                return self.real(config, resume=resume)
        return self.real(config, resume=resume)


def test_a_stopped_grid_resumes(tmp_path, monkeypatch, capsys):
    """A stopped grid resumes the interrupted cell and runs the rest; finished cells are unchanged and not run again.
    The cells, copied beside the study file, give the same table without --out."""
    args = ("bench", "quality", "--study", study_file(tmp_path), "--out", tmp_path / "out")
    first = Trains(monkeypatch, stop_at=6)  # teacher, warm-up 1, cell, warm-up 2, cell, cell
    code, printed, _ = command(monkeypatch, capsys, *args)
    assert code == 1 and "stopped at supervised-kd-seed1; the same command goes on" in printed
    order = ["teacher", "warm-up-seed1", "switch-seed1", "warm-up-seed2", "switch-seed2", "supervised-kd-seed1"]
    assert first.seen == order
    made = {path.name: path.read_bytes() for path in (tmp_path / "out" / "cells").iterdir()}
    assert set(made) == {f"{name}.json" for name in ("teacher-seed0", *order[1:5])}

    second = Trains(monkeypatch)
    code, printed, _ = command(monkeypatch, capsys, *args)
    assert code == 0 and second.seen == ["supervised-kd-seed1", "supervised-kd-seed2"]
    assert all((tmp_path / "out" / "cells" / name).read_bytes() == data for name, data in made.items())
    cell = json.loads((tmp_path / "out" / "cells" / "supervised-kd-seed1.json").read_text())
    assert cell["resumed"] and 1000 < cell["seconds"]["train"] < 1200
    assert cell["rollouts"] == {"tokens": 0, "steps": 2}
    assert {"exact_match", "exact_match/digits=2", "exact_match/digits=3", "kl", "kl_greedy"} <= set(cell["scores"])
    of_switch = json.loads((tmp_path / "out" / "cells" / "switch-seed1.json").read_text())["rollouts"]
    assert of_switch["tokens"] > 0 and 0 <= of_switch["teacher_token_frac"] <= 1
    assert "| supervised-kd | 2 |" in printed and (tmp_path / "out" / "plot.png").read_bytes()[1:4] == b"PNG"
    assert len(json.loads((tmp_path / "out" / "table.json").read_text())["ranked"]) == 2

    third = Trains(monkeypatch)
    assert command(monkeypatch, capsys, *args)[0] == 0 and not third.seen

    only_table = ("bench", "quality", "--study", tmp_path / "study.yaml", "--only-table")
    code, _, err = command(monkeypatch, capsys, *only_table)
    assert code == 2 and f"there are no cells in {tmp_path / 'cells' / 'study'}; name the folder" in err
    shutil.copytree(tmp_path / "out" / "cells", tmp_path / "cells" / "study")
    assert command(monkeypatch, capsys, *only_table)[0] == 0 and not third.seen
    assert (tmp_path / "study.md").read_text() == (tmp_path / "out" / "table.md").read_text()
    assert (tmp_path / "study.png").read_bytes()[1:4] == b"PNG"


def test_several_test_sets_have_columns(tmp_path, monkeypatch, capsys):
    """With several test sets a cell has scores by set and their mean, and the table a column for each set."""
    file = study_file(tmp_path, test_sets={"a": {}, "b": {"eval": {"num_prompts": 4}}})
    out = tmp_path / "out"
    options = ("--study", file, "--out", out, "--cells", "supervised-kd-seed1")
    code, printed, err = command(monkeypatch, capsys, "bench", "quality", *options)
    assert code == 0, err
    scores = json.loads((out / "cells" / "supervised-kd-seed1.json").read_text())["scores"]
    assert scores["kl"] == (scores["a/kl"] + scores["b/kl"]) / 2 and scores["a/kl"] != scores["b/kl"]
    assert "| method | digits=2 | digits=3 | a | b |" in printed


def test_a_failed_cell_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    """A failed cell is reported with its log, the other cells run, and the same command tries it again."""
    args = ("bench", "quality", "--study", study_file(tmp_path), "--out", tmp_path / "out")
    with monkeypatch.context() as patch:
        run_cell = grid.Grid._run_cell

        def breaks(one: Any, cell: Cell) -> None:
            if cell == Cell("switch", 1):
                raise ValueError("the loss is nan")
            run_cell(one, cell)

        patch.setattr(grid.Grid, "_run_cell", breaks)
        code, printed, _ = command(monkeypatch, capsys, *args)
    log = tmp_path / "out" / "runs" / "switch-seed1.log"
    assert code == 1 and f"without a result: switch-seed1 (ValueError: the loss is nan; {log})" in printed
    assert "Traceback" in log.read_text() and "| supervised-kd | 2 |" in (tmp_path / "out" / "table.md").read_text()
    names = {path.stem for path in (tmp_path / "out" / "cells").iterdir()}
    assert {"switch-seed2", "supervised-kd-seed1", "supervised-kd-seed2"} <= names and "switch-seed1" not in names

    (tmp_path / "out" / "cells" / "supervised-kd-seed2.json").unlink()
    evaluate = grid.Grid._evaluate
    monkeypatch.setattr(grid.Grid, "_evaluate", lambda *args: (signal.raise_signal(signal.SIGTERM), evaluate(*args))[1])
    code, printed, _ = command(monkeypatch, capsys, *args)
    assert code == 1 and "stopped at supervised-kd-seed2;" in printed
    assert (tmp_path / "out" / "cells" / "switch-seed1.json").exists()


def test_a_failed_warm_up_stops_its_seed_only(tmp_path, monkeypatch, capsys):
    """A failed warm-up stops the cells of its seed only, and is reported once."""
    run_cell = grid.Grid._run_cell

    def breaks(one: Any, cell: Cell) -> None:
        if cell == Cell("warm-up", 1):
            raise ValueError("the loss is nan")
        run_cell(one, cell)

    monkeypatch.setattr(grid.Grid, "_run_cell", breaks)
    args = ("bench", "quality", "--study", study_file(tmp_path), "--out", tmp_path / "out")
    code, printed, _ = command(monkeypatch, capsys, *args)
    log = tmp_path / "out" / "warm-up-seed1.log"
    assert code == 1 and printed.count("the loss is nan") == 2  # at the failure and at the end
    assert f"without a result: warm-up-seed1 (ValueError: the loss is nan; {log})" in printed and log.is_file()
    made = {path.stem for path in (tmp_path / "out" / "cells").iterdir()}
    assert {"switch-seed2", "supervised-kd-seed2"} <= made and not any(name.endswith("seed1") for name in made)


def test_a_grid_of_failed_cells_gives_the_reason(tmp_path, monkeypatch, capsys):
    """If all cells fail, the command gives the reason."""
    run_cell = grid.Grid._run_cell
    monkeypatch.setattr(
        grid.Grid, "_run_cell", lambda one, cell: 1 / 0 if cell.method == "switch" else run_cell(one, cell)
    )
    args = ("bench", "quality", "--study", study_file(tmp_path), "--out", tmp_path / "out")
    code, printed, _ = command(monkeypatch, capsys, *args, "--cells", "switch-seed1")
    assert code == 1 and "without a result: switch-seed1 (ZeroDivisionError:" in printed


def test_sigterm_after_a_last_step_ends_the_grid(tmp_path, monkeypatch, capsys):
    """SIGTERM after a run's last step ends the grid; the finished cell is kept."""
    from switchkd.controller.recovery import Recovery

    save = Recovery.export
    monkeypatch.setattr(Recovery, "export", lambda *args: (signal.raise_signal(signal.SIGTERM), save(*args))[1])
    args = ("bench", "quality", "--study", study_file(tmp_path), "--out", tmp_path / "out")
    code, printed, _ = command(monkeypatch, capsys, *args, "--cells", "switch-seed1")
    assert code == 1 and "stopped at warm-up-seed1;" in printed
    assert {path.stem for path in (tmp_path / "out" / "cells").iterdir()} == {"teacher-seed0"}


def test_a_changed_method_is_refused(tmp_path):
    """Results of a method whose config has changed are refused."""
    one = grid.Grid(study=read_study(study_file(tmp_path)), home=tmp_path, out=tmp_path / "out")
    grid.claim(one.study, one.out)
    (one.out / "cells").mkdir()
    result = {"overrides": {"rollout": {"rule": {"type": "skd"}}}}
    (one.out / "cells" / "switch-seed1.json").write_text(json.dumps(result))
    with pytest.raises(ConfigError, match=r"methods.switch is not what .* was made with \(rollout.rule.type=skd\)"):
        one.read(Cell("switch", 1))
