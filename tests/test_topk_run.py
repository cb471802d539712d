"""Whole runs with `teacher.output: top_logprobs`, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from pools import Still, Thunks, fetch
from runs import config, rollouts, save_models, steps
from tiny import NUM_TOKENS, tiny_model

from switchkd.config.errors import ConfigError
from switchkd.controller import preflight
from switchkd.data.rollout_io import load_rollouts, save_rollouts
from switchkd.engines.hf.teacher import HFTeacher
from switchkd.train import train
from switchkd.types import Blocks, Positions, Sessions

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


def test_a_run_learns_and_says_what_it_cost(place: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """SWITCH and AdaSwitch, forward KL and ATKD: the loss falls, the rollouts of the first steps are those of
    `teacher.output: hidden_states`, and shares, tails and bytes stand in the metrics; evaluation reads exact rows."""
    evaluation = {"data": "./data.jsonl", "num_prompts": 4, "max_new_tokens": 8}
    made = a_config(place, monkeypatch, [SWITCH, ADASWITCH], run={"dir": "one"}, eval=evaluation)
    train(made)
    rows = steps(place / "one")
    assert len(rows) == 8
    losses = [row["loss/kl"] for row in rows[:6]]
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    for row in rows:
        assert 0 <= row["teacher/undecided_frac"] <= 1 and 0 < row["teacher/tail_mass"] < 1
        assert row["teacher/bytes_per_row"] > 0 and row["teacher/bytes_per_token"] > 0
    train(a_config(place, monkeypatch, [SWITCH, ADASWITCH], run={"dir": "two"}, teacher={"path": "teacher"}))
    ours, theirs = rollouts(place / "one"), rollouts(place / "two")
    first = [i for i, (_, _, step) in theirs.items() if step == 0]
    assert first and all(ours[i] == theirs[i] for i in first), "before the first update the students are equal"
    assert all("teacher/undecided_frac" not in row for row in steps(place / "two"))


def test_resume(place: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """A run that stopped at a checkpoint goes on to what an unbroken one is."""
    train(a_config(place, monkeypatch, [SWITCH], run={"dir": "whole"}))
    short = a_config(place, monkeypatch, [SWITCH], run={"dir": "broken"})
    calls = {"n": 0}
    from switchkd.learner.rank import LearnerRank

    step = LearnerRank.step

    def breaks(self, plan, lr):  # type: ignore[no-untyped-def]
        calls["n"] += 1
        if calls["n"] == 5:
            raise RuntimeError("power cut")
        return step(self, plan, lr)

    monkeypatch.setattr(LearnerRank, "step", breaks)
    with pytest.raises(RuntimeError, match="power cut"):
        train(short)
    monkeypatch.setattr(LearnerRank, "step", step)
    train(short, resume=True)
    assert rollouts(place / "broken") == rollouts(place / "whole")
    for ours, theirs in zip(steps(place / "broken"), steps(place / "whole"), strict=True):
        assert ours["loss/total"] == pytest.approx(theirs["loss/total"], rel=1e-4)


def test_rollouts_keep_their_rows_on_disk(tmp_path: Path) -> None:
    """Saved and loaded, compressed rows are bit for bit what they were."""
    from test_topk import RULES, params, write

    found, _ = write(params(RULES["switch"]), range(5), k=6)
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
            back.teacher_output.values == was.teacher_output.values
        ).all() and back.teacher_output.values.dtype == was.teacher_output.values.dtype


REFUSED = {
    "reverse-statistic": ({"rule": {"type": "adaswitch", "divergence": "reverse_kl"}}, {}, "decide=coarse"),
    "own-rule": ({"rule": {"type": "own_rules:steady"}}, {}, "own_rules:steady"),
    "reverse-kl": ({"loss": {"type": "reverse_kl"}}, {}, "loss.approximate=true"),
    "skewed": ({"loss": {"type": "skew_reverse_kl"}}, {}, "skew_reverse_kl"),
    "atkd-reverse": ({"loss": {"type": "atkd", "direction": "reverse"}}, {}, "direction reverse"),
    "zero": ({}, {"num_top_logprobs": 0}, "num_top_logprobs=0"),
    "word": ({}, {"decide": "maybe"}, "decide='maybe'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(place: Path, monkeypatch, name: str) -> None:  # type: ignore[no-untyped-def]
    """What cannot be certified or bounded is refused before anything starts; the remedy named there is taken."""
    stage, teacher, said = REFUSED[name]
    (place / "own_rules.py").write_text(
        "from switchkd.algo.switching import Rule, jsd_threshold\n"
        "import dataclasses\n"
        "def steady():\n    return dataclasses.replace(jsd_threshold(schedule='constant'), interval=None)\n"
    )
    stages = [{"name": "one", "steps": 1, **stage}]
    with pytest.raises(ConfigError, match=said.replace("[", r"\[")) as raised:
        preflight.check(a_config(place, monkeypatch, stages, teacher={**TOPK, **teacher}))
    assert "\n" not in str(raised.value)
    if "loss" in stage:
        stages[0]["loss"] = {**stage["loss"], "approximate": True}
        preflight.check(a_config(place, monkeypatch, stages))
    if "rule" in stage:
        preflight.check(a_config(place, monkeypatch, stages, teacher={**TOPK, "decide": "coarse"}))
        preflight.check(a_config(place, monkeypatch, stages, teacher={"path": "teacher"}))


def test_router_passes_questions_on(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Questions go to the sessions' replicas and come back in order; a lost session is opened again with all its
    tokens, and answers the same."""
    from switchkd.actors import teacher_router

    monkeypatch.setattr(teacher_router.ray, "get", fetch)
    replicas = [
        HFTeacher(
            tiny_model("llama"), vocab_size=NUM_TOKENS, max_sessions=2, max_len=64, output="top_logprobs", top_k=4
        )
        for _ in range(2)
    ]
    router = teacher_router.TeacherRouter(Still({i: Thunks(replica) for i, replica in enumerate(replicas)}))
    ids = np.random.default_rng(0).integers(5, NUM_TOKENS, (3, 12)).astype(np.int32)
    names = np.array([5, 6, 7])
    for i in range(3):
        one = np.array([8], np.int32)
        router.open(Sessions(session_ids=names[i : i + 1], token_ids=ids[i, :8], lengths=one))
    lens = np.full(3, 8, np.int32)
    router.score(
        Blocks(session_ids=names, base_lens=lens, first_rows=lens - 1, token_ids=ids[:, 8:].ravel(), lengths=lens - 4)
    )
    question = Positions(
        session_ids=names[[2, 0, 1]], positions=np.array([11, 9, 3, 8], np.int32), lengths=np.array([1, 2, 1], np.int32)
    )
    first = router.exact(question)
    assert first.kind == "hidden_states" and first.lengths.tolist() == [1, 2, 1]
    for replica in replicas:
        replica.close(names)
    again = router.exact(question)
    np.testing.assert_allclose(again.values, first.values, atol=1e-5)
    clean = tiny_model("llama").model(torch.from_numpy(ids[[2, 0, 1]].astype(np.int64))).last_hidden_state
    wanted = torch.stack([clean[0, 11], clean[1, 9], clean[1, 3], clean[2, 8]])
    np.testing.assert_allclose(first.values, wanted.numpy(), atol=1e-5)
