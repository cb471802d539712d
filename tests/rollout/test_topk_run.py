"""Runs with `teacher.output: top_logprobs`, and the configs that are refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from runs import config, save_models, steps
from test_rollout import RULES, params
from test_topk import write

from switchkd.config.errors import ConfigError
from switchkd.controller import preflight
from switchkd.data.rollout_io import load_rollouts, save_rollouts
from switchkd.train import train

torch.set_num_threads(1)
TOPK = {"path": "teacher", "output": "top_logprobs", "num_top_logprobs": 16}
SWITCH = {
    "name": "switch", "steps": 6, "mix": {"rollout": 0.5, "dataset": 0.5},
    "rule": {"type": "switch", "half_life": 6}, "loss": {"type": "forward_kl"},
}  # fmt: skip
ADASWITCH = {
    "name": "adaswitch", "steps": 2, "mix": {"rollout": 0.75, "dataset": 0.25},
    "rule": {"type": "adaswitch", "window": 2, "factor": 1.05, "warm_up": "available"}, "loss": {"type": "atkd"},
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return save_models(tmp_path_factory.mktemp("top_logprobs"))


def a_config(place: Path, monkeypatch, stages, **sections):  # type: ignore[no-untyped-def]
    monkeypatch.chdir(place)
    return config(place, stages, **{"teacher": TOPK, **sections})


def test_a_run_on_top_k_rows_learns(place: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """In a run with top-k rows the loss falls, each rollout is marked, and metrics hold tail masses and bytes."""
    evaluation = {"data": "./data.jsonl", "num_prompts": 4, "max_new_tokens": 8, "metrics": ["agreement", "kl"]}
    train(a_config(place, monkeypatch, [SWITCH, ADASWITCH], run={"dir": "one"}, eval=evaluation))
    rows = steps(place / "one")
    assert len(rows) == 8
    losses = [row["loss/kl"] for row in rows[:6]]
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    for row in rows:
        assert 0 < row["teacher/tail_mass"] < 1
        assert row["teacher/bytes_per_row"] == 8 * 16 + 8 and row["teacher/bytes_per_token"] > 0
    lines = [json.loads(line) for line in (place / "one" / "rollouts.jsonl").read_text().splitlines()]
    assert lines and all(line["approximate"] for line in lines)


def test_saved_top_k_rows_are_bit_equal(tmp_path: Path) -> None:
    """Top-k rows are bit-equal after saving and loading."""
    found = write(params(RULES["switch"]), range(5), k=6)
    save_rollouts(tmp_path / "some.safetensors", list(found.values()))
    for back in load_rollouts(tmp_path / "some.safetensors"):
        was = found[back.rollout_id]
        assert was.teacher_output is not None and back.teacher_output is not None
        assert (
            back.teacher_output.kind == "top_logprobs"
            and back.teacher_output.dtype == "int32"
            and back.stats == was.stats
        )
        assert (
            back.teacher_output.rows.values == was.teacher_output.rows.values
        ).all() and back.teacher_output.rows.values.dtype == was.teacher_output.rows.values.dtype


REFUSED = {
    "rank": ({"rule": {"type": "outside_top_k", "top_k": 17}}, {}, "the teacher's first 17 ids"),
    "reverse-kl": ({"loss": {"type": "reverse_kl"}}, {}, "loss.approximate=true"),
    "skewed": ({"loss": {"type": "skew_reverse_kl"}}, {}, "skew_reverse_kl"),
    "atkd-reverse": ({"loss": {"type": "atkd", "direction": "reverse"}}, {}, "direction reverse"),
    "zero": ({}, {"num_top_logprobs": 0}, "num_top_logprobs=0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unbounded_losses_and_rules_are_refused(place: Path, monkeypatch, name: str) -> None:  # type: ignore[no-untyped-def]
    """A rule or loss without a bound on top-k rows is refused in one line, and the named remedy is accepted."""
    stage, teacher, text = REFUSED[name]
    stages = [{"name": "one", "steps": 1, **stage}]
    with pytest.raises(ConfigError, match=text) as raised:
        preflight.check(a_config(place, monkeypatch, stages, teacher={**TOPK, **teacher}))
    assert "\n" not in str(raised.value)
    if "loss" in stage:
        stages[0]["loss"] = {**stage["loss"], "approximate": True}
        preflight.check(a_config(place, monkeypatch, stages))
    if "rule" in stage:
        preflight.check(a_config(place, monkeypatch, stages, teacher={**TOPK, "num_top_logprobs": 17}))
        preflight.check(a_config(place, monkeypatch, stages, teacher={"path": "teacher"}))
