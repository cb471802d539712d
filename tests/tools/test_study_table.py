"""The table and plot of `bench quality`, against hand calculations."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from runs import command

from switchkd.tools.bench.study import grid, plot
from switchkd.tools.bench.study.spec import Study
from switchkd.tools.bench.study.table import Mean, Paired, QualityTable, holm

STUDIES = Path(__file__).parents[2] / "configs" / "study"


def cell(method: str, seed: int, score: float, **parts: float) -> dict[str, Any]:
    return {
        "method": method, "seed": seed, "overrides": {},
        "scores": {"exact_match": score, **{f"exact_match/{name}": value for name, value in parts.items()}},
        "rollouts": {"teacher_token_frac": 0.25, "tokens": 100.0}, "seconds": {"train": 2.0},
    }  # fmt: skip


def quality(cells: list[dict[str, Any]], before: list[dict[str, Any]], **keys: Any) -> QualityTable:
    """The table of a study with two seeds."""
    methods = {cell["method"]: {} for cell in cells}
    study = Study(name="t", seeds=(1, 2), base={}, methods=methods, **keys)
    return QualityTable.from_cells(study, cells, before)


def test_the_interval_equals_a_hand_calculation():
    """The interval of 1, 2, 3 is 2 ± 4.302653 / sqrt(3), with s = 1 and t(0.975, 2) = 4.302653."""
    mean = Mean.from_values([1.0, 2.0, 3.0])
    assert mean.mean == 2 and mean.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert Mean.from_values([5.0]) == Mean(5.0, None, 1)


def test_the_paired_test_equals_a_hand_calculation():
    """Differences 1, 2, 3 give t = 2 / (1 / sqrt(3)) and p = 1 - t / sqrt(2 + t^2) at 2 degrees of freedom. Unpaired
    seeds do not count."""
    pair = Paired.from_scores("a", {1: 2.0, 2: 4.0, 3: 6.0, 4: 9.0}, "b", {1: 1.0, 2: 2.0, 3: 3.0, 5: 0.0})
    t = 2 * math.sqrt(3)
    assert pair.difference.num == 3 and pair.t == pytest.approx(t)
    assert pair.p == pytest.approx(1 - t / math.sqrt(2 + t * t))
    same = Paired.from_scores("a", {1: 1.0, 2: 2.0}, "b", {1: 1.0, 2: 2.0})
    assert same.p is None and same.difference.mean == 0


def test_holm_equals_a_hand_calculation():
    """Holm's correction gives 0.01 x 3, 0.03 x 2, and for 0.04 the value before, which is larger."""
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_methods_with_all_seeds_are_ranked():
    """Methods with all seeds are ranked by score; one with fewer stands below them, marked, however high its score."""
    made = [cell("low", s, 10.0 + s, **{"digits=2": 30.0}) for s in (1, 2)]
    made += [cell("high", s, 50.0 + 2 * s, **{"digits=2": 70.0}) for s in (1, 2)] + [cell("lucky", 1, 90.0)]
    before = [cell("teacher", 0, 99.0, **{"digits=2": 100.0}), cell("warm-up", 1, 9.0), cell("warm-up", 2, 10.0)]
    del before[0]["rollouts"]["teacher_token_frac"]
    table = quality(made, before)
    assert [row.method for row in table.ranked] == ["high", "low"]
    assert [row.method for row in table.unranked] == ["lucky"]
    assert table.ranked[0].scores["exact_match"].mean == 53 and table.parts == ["digits=2"]
    text = table.markdown()
    assert text.index("| high | 2 |") < text.index("| low | 2 |") < text.index("| lucky * | 1 |")
    assert "`*`: fewer than the study's 2 seeds, so not ranked." in text and "Pairs" not in text
    assert "| low | 2 | 11.5 ± 6.4 | 2.00 ± 0.00 | 25.0% | 100 | 2 |" in text
    assert "| teacher | 1 | 99.0 | - | - | 100 | 2 |" in text
    assert "| low | 30.0 ± 0.0 |" in text and "| teacher | 100.0 |" in text and "| lucky * | - |" in text


def test_only_the_pairs_of_the_study_are_tested():
    """The study's pairs are tested in its order, over shared seeds, and Holm's correction counts these alone."""
    scores = {"a": (1.0, 2.0), "b": (3.0, 5.0), "c": (8.0, 7.0), "d": (9.0,)}
    made = [cell(method, s, score) for method, values in scores.items() for s, score in enumerate(values, 1)]
    table = quality(made, [], compare=(("b", "a"), ("c", "a"), ("d", "a")))
    first, second, third = table.compared
    assert [(pair.method, pair.other, pair.difference.num) for pair in table.compared] == [
        ("b", "a", 2), ("c", "a", 2), ("d", "a", 1)
    ]  # fmt: skip
    assert (first.p, second.p) == pytest.approx((0.1257, 0.1051), abs=1e-4) and third.p is third.p_holm is None
    assert (first.p_holm, second.p_holm) == pytest.approx((2 * second.p, 2 * second.p))
    assert "| c - a | 2 | 6.00 ± 12.71 | 0.105 | 0.210 |" in table.markdown()


def test_the_teachers_share_is_over_shared_completions(tmp_path):
    """The teacher's share is over the tokens of completions that both models generated, and absent without any."""
    steps = [
        {"loss/total": 1, "rollout/tokens": 70, "rollout/teacher_token_frac": 0.5, "rollout/shared_tokens": 10},
        {"loss/total": 1, "rollout/tokens": 30, "rollout/teacher_token_frac": 0.1, "rollout/shared_tokens": 30},
        {"loss/total": 1, "rollout/tokens": 50},
        {"eval/kl": 1},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in steps))
    assert grid.rollout_numbers(path) == pytest.approx({"tokens": 150, "steps": 3, "teacher_token_frac": 8 / 40})
    path.write_text(json.dumps(steps[2]) + "\n")
    assert grid.rollout_numbers(path) == {"tokens": 50, "steps": 1}


@pytest.mark.parametrize("folder", sorted((STUDIES / "cells").glob("*")), ids=lambda folder: folder.name)
def test_a_shipped_table_is_that_of_its_cells(folder, tmp_path, monkeypatch, capsys):
    """A shipped table is what its shipped cells give; the cells are small."""
    file = shutil.copy(STUDIES / f"{folder.name}.yaml", tmp_path)
    shutil.copytree(folder, tmp_path / "cells" / folder.name)
    assert command(monkeypatch, capsys, "bench", "quality", "--study", file, "--only-table")[0] == 0
    assert (tmp_path / f"{folder.name}.md").read_text() == (STUDIES / f"{folder.name}.md").read_text()
    assert sum(path.stat().st_size for path in folder.iterdir()) < 200_000


@pytest.mark.parametrize("with_starts", [True, False])
def test_the_plot_shows_gains_or_scores(with_starts):
    """The plot shows gains over each seed's start with a zero line, or scores without starts, the best on top."""
    figure = pytest.importorskip("matplotlib.figure").Figure()
    made = [cell("low", s, 40.0 + s) for s in (1, 2)] + [cell("high", s, 50.0 + 2 * s) for s in (1, 2)]
    before = [cell("warm-up", 1, 38.0), cell("warm-up", 2, 39.0)] if with_starts else []
    axes = figure.subplots()
    plot._ranking(axes, quality(made, before))
    assert [label.get_text() for label in axes.get_yticklabels()] == ["low (2)", "high (2)"]
    low, high = ([3.0, 3.0], [14.0, 15.0]) if with_starts else ([41.0, 42.0], [52.0, 54.0])
    marks = {mark: [list(line.get_xdata()) for line in axes.lines if line.get_marker() == mark] for mark in "o|"}
    assert marks["o"] == [[sum(low) / 2, sum(high) / 2]]
    strokes = [seeds for seeds in marks["|"] if seeds in (low, high)]  # the error bars' caps are such marks, too
    assert strokes == [low, high]
    left, right = axes.get_xlim()
    assert (left < 0) == with_starts and right > max(high)
    assert ("gain" in axes.get_xlabel()) == with_starts
