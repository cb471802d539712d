"""The end of a run shows texts: a held-out prompt at each stage's end, and a rollout in its writers' colours."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console
from runs import STAGES, config, lines

from switchkd.controller.samples import last_shared, show_samples
from switchkd.train import train

EVAL = {"data": "./data.jsonl", "num_prompts": 3, "max_new_tokens": 8, "temperature": 0}


def shown(run_dir: Path, **settings) -> str:
    console = Console(file=io.StringIO(), width=80, **settings)
    show_samples(console, lines(run_dir / "metrics.jsonl"), run_dir / "rollouts.jsonl")
    return console.file.getvalue()


def test_a_run_shows_its_answers_and_a_rollout(place):
    """The question, the student's answer at the start and after each stage, the teacher's and the reference are shown
    as evaluated; the rollout is one that both models wrote, its teacher tokens marked."""
    train(config(place, STAGES, eval=EVAL))
    ends = [row for row in lines(place / "run" / "metrics.jsonl") if "sample" in row]
    assert [row["stage_end"] for row in ends] == ["start", *(stage["name"] for stage in STAGES)]
    assert all(row["sample"]["prompt"] == "say 0 in the house" for row in ends)
    assert [("teacher" in row["sample"]) for row in ends] == [True, False, False, False]
    text = " ".join(shown(place / "run").split())
    for row in ends:
        answer = " ".join(row["sample"]["student"].split())
        assert f"{row['stage_end']}: {answer or '(no text)'}" in text
    assert f"teacher: {' '.join(ends[0]['sample']['teacher'].split())}" in text and "the answer is 0 there" in text
    rollout = last_shared(place / "run" / "rollouts.jsonl")
    assert rollout is not None and rollout["origin"] == "rollout"
    marked = [part["text"].strip() for part in rollout["segments"] if part["source"] == "teacher"]
    assert marked and all(f"⟦{part}" in text or f"⟦ {part}" in text for part in marked)
    coloured = shown(place / "run", color_system="truecolor", force_terminal=True)
    assert "⟦" not in coloured and "\x1b[1;35m" in coloured and "\x1b[32m" in coloured


def test_the_teachers_text_is_its_greedy_completion(place):
    """The teacher's shown text is what it writes alone, greedily."""
    train(config(place, STAGES[:1], eval=EVAL))
    (start, *_) = [row for row in lines(place / "run" / "metrics.jsonl") if "sample" in row]
    stage = {**STAGES[0], "mix": {"teacher": 1}, "steps": 7, "max_new_tokens": 8}
    alone = {"run": {"dir": "alone"}, "data": {"path": "./data.jsonl", "shuffle": False}}
    train(config(place, [stage], teacher={"path": "teacher", "temperature": 0}, **alone))
    (row,) = [row for row in lines(place / "alone" / "rollouts.jsonl") if "say 0 in" in row["prompt"]]
    assert row["completion"] == start["sample"]["teacher"]


def test_a_large_file_is_read_from_its_end(tmp_path):
    """The last rollout of both writers is found in the last megabyte, whatever stands before it."""
    path = tmp_path / "rollouts.jsonl"
    both = {"segments": [{"source": "student", "text": "a"}, {"source": "teacher", "text": "b"}], "id": 0}
    alone = {"segments": [{"source": "student", "text": "x" * 1000}], "id": 1}
    assert last_shared(path) is None
    path.write_text("".join(json.dumps(row) + "\n" for row in [both] + [alone] * 1500))
    assert last_shared(path) is None, "too far from the end"
    with path.open("a") as file:
        file.write(json.dumps({**both, "id": 2}) + "\n" + json.dumps(alone) + "\n")
    assert last_shared(path)["id"] == 2
