"""What a run records beside its tokens, and another run that trains on it without teacher and workers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import ADASWITCH, NUM_ROLLOUTS, STAGES, WARM_UP, command, config, config_file, distance, lines, steps
from tiny import tiny_tokenizer

from switchkd.config.errors import ConfigError
from switchkd.controller.resume import truncate_history
from switchkd.data.atomic_files import TEACHER_OUTPUT
from switchkd.data.rollout_io import load_rollouts, save_rollouts
from switchkd.rollout.top_logprobs import TopTokens, top_logprobs
from switchkd.train import train
from switchkd.types import TokenSource

RECORDS = {"save_teacher_output": True, "save_top_logprobs": 3}


@pytest.fixture(scope="module")
def online(models) -> Path:
    """STAGES, with everything recorded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(models)
        train(config(models, STAGES, name="online.yaml", run={"dir": "online"}, rollout=RECORDS))
    return models / "online"


@pytest.fixture
def here(models, monkeypatch) -> Path:
    monkeypatch.chdir(models)
    return models


# --- what is recorded ------------------------------------------------------------------------------------------------


def test_pieces_are_the_completion(online):
    """Every token has its text; joined they are the completion, and a segment's are the segment."""
    for row in lines(online / "rollouts.jsonl"):
        assert len(row["pieces"]) == row["num_tokens"] and "".join(row["pieces"]) == row["completion"]
        assert "".join(part["text"] for part in row["segments"]) == row["completion"]


def test_pieces_of_half_characters():
    """A character of several tokens stands whole under its last one."""
    from switchkd.data.rollout_io import texts_between

    def decode(ids):
        return bytes(ids).decode("utf-8", errors="replace")

    ids = list("né🙂!".encode())
    pieces = texts_between(ids, range(1, len(ids) + 1), decode)
    assert pieces == ["n", "", "é", "", "", "", "🙂", "!"]


def test_blocks_add_up(online):
    """The blocks of a rollout settle all its tokens, unless one model finished it alone."""
    rows = [row for row in lines(online / "rollouts.jsonl") if row["origin"] == "rollout" and row["stage"] == 1]
    assert rows
    for row in rows:
        assert sum(row["stats"]["block_lengths"]) == row["num_tokens"]
        assert len(row["stats"]["block_lengths"]) == row["stats"]["num_rounds"]


def test_a_step_says_who_waited(online):
    """Waiting times, queue and block lengths stand in every step that has them, and are what they can be."""
    for row in steps(online):
        assert row["replay/waiting"] == 0 and row["replay/bytes"] > 0 and row["rollout/in_flight"] == 0
        assert 0 <= row["time/wait_teacher_s"] <= row["time/rollout_s"]
        assert row["time/rollout_idle_s"] > 0 and row["time/wait_replay_s"] >= 0
        assert (row["stage"] == "warm-up") == ("rollout/emitted_per_round" not in row)
        assert 1 <= row.get("rollout/emitted_per_round", 1) <= 4
        assert (row["stage"] == "warm-up") == ("rollout/acceptance_rate" not in row)
        assert 0 < row.get("rollout/acceptance_rate", 1) <= 1


def test_candidates_are_the_models_own(online, models):
    """The teacher's candidates are those of one clean pass over the rollout, the student's likewise where it read."""
    from transformers import AutoModelForCausalLM

    teacher = AutoModelForCausalLM.from_pretrained(models / "teacher").eval()
    vocab = len(tiny_tokenizer())
    rows = {row["rollout_id"]: row for row in lines(online / "rollouts.jsonl")}
    for rollout in _recorded(online):
        ids = torch.from_numpy(np.concatenate([rollout.prompt_ids, rollout.token_ids]).astype(np.int64))
        with torch.no_grad():
            logits = teacher(ids[None]).logits[0, len(rollout.prompt_ids) - 1 : -1, :vocab]
        found = logits.log_softmax(-1).topk(3)
        seen, row = rollout.top_logprobs, rows[rollout.rollout_id]["candidates"]
        assert (seen.teacher_ids == found.indices.numpy()).all()
        np.testing.assert_allclose(seen.teacher_logprobs, found.values.numpy(), atol=1e-4)
        read = (seen.student_ids >= 0).all(axis=1)
        assert (
            not read[rollout.sources == TokenSource.DATA].any() and read[rollout.sources == TokenSource.STUDENT].all()
        )
        assert [len(ids) for ids in row["student"]["ids"]] == [3 if one else 0 for one in read]
        assert row["teacher"]["ids"] == seen.teacher_ids.tolist()
        assert row["teacher"]["texts"][0] == [tiny_tokenizer().decode([i]) for i in seen.teacher_ids[0].tolist()]


def test_candidates_change_no_token(online, here):
    """A run without them writes the same tokens and ends with the same weights."""
    train(config(here, STAGES, name="plain.yaml", run={"dir": "plain"}))
    plain, rich = (lines(run / "rollouts.jsonl") for run in (here / "plain", online))
    assert [row["token_ids"] for row in plain] == [row["token_ids"] for row in rich]
    assert all(row["candidates"] is None for row in plain) and not (here / "plain" / TEACHER_OUTPUT).exists()
    assert distance(here / "plain" / "student", online / "student") == 0


@pytest.mark.parametrize("stage", [{"rule": {"type": "student"}}, {"rule": {"type": "random", "prob": 0.4}}])
def test_candidates_under_rules_that_read_no_rows(here, tmp_path, stage):
    """Where a rule needs no distributions they are made for the candidates: both models', for every token."""
    only = [{"name": "only", "steps": 1, **stage}]
    train(config(here, only, name="rows.yaml", run={"dir": str(tmp_path / "run")}, rollout=RECORDS))
    for rollout in _recorded(tmp_path / "run"):
        assert (rollout.top_logprobs.student_ids >= 0).all() and (rollout.top_logprobs.teacher_ids >= 0).all()


def test_candidates_of_compressed_rows(here, tmp_path):
    """With `teacher.output: top_logprobs` the teacher's candidates are the first of its k."""
    only = [{"name": "only", "steps": 1, "rule": {"type": "switch"}}]
    teacher = {"path": "teacher", "output": "top_logprobs", "num_top_logprobs": 8}
    train(config(here, only, name="k.yaml", run={"dir": str(tmp_path / "run")}, rollout=RECORDS, teacher=teacher))
    for rollout in _recorded(tmp_path / "run"):
        assert (rollout.top_logprobs.teacher_ids == rollout.teacher_output.rows.values[:, :3]).all()


def test_candidates_survive_the_disk(online, tmp_path):
    """Saved and loaded they are the same bits, also beside rollouts without any."""
    rollouts = _recorded(online)
    save_rollouts(tmp_path / "r.safetensors", rollouts)
    for a, b in zip(rollouts, load_rollouts(tmp_path / "r.safetensors"), strict=True):
        assert a.stats == b.stats
        for name in ("teacher_ids", "teacher_logprobs", "student_ids", "student_logprobs"):
            assert getattr(a.top_logprobs, name).tobytes() == getattr(b.top_logprobs, name).tobytes()


def test_more_candidates_than_ids():
    """A row has no more candidates than ids; the rest says that there is none."""
    top = TopTokens.of(torch.tensor([[0.0, 1.0]]), 3)
    assert top.ids.tolist() == [[1, 0, -1]] and np.isnan(top.logprobs[0, 2])
    assert top_logprobs([top], [], 1, 3).student_ids.tolist() == [[-1, -1, -1]]


def test_datasets_reads_rollouts(online):
    """rollouts.jsonl is a data set for `datasets`."""
    from datasets import load_dataset

    rows = load_dataset("json", data_files=str(online / "rollouts.jsonl"), cache_dir=str(online / "hf"))["train"]
    assert len(rows) == NUM_ROLLOUTS
    assert [row["completion"] for row in rows] == [row["completion"] for row in lines(online / "rollouts.jsonl")]
    assert {"pieces", "segments", "statistic", "candidates", "step"} <= set(rows.column_names)


@pytest.mark.parametrize("top_logprobs", [0, 3])
def test_datasets_reads_rollouts_after_a_long_warm_up(online, tmp_path, top_logprobs):
    """Where the first lines that are looked at hold only nulls, `rollout_features` says what the columns are."""
    from datasets import load_dataset

    from switchkd.data.rollout_io import rollout_features

    rows = lines(online / "rollouts.jsonl")
    if not top_logprobs:
        rows = [{**row, "candidates": None} for row in rows]
    file = tmp_path / "rollouts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"data_files": str(file), "cache_dir": str(tmp_path / "hf"), "chunksize": 4000}
    read = load_dataset("json", features=rollout_features(), **given)["train"]
    assert read[-1]["statistic"] == pytest.approx(rows[-1]["statistic"]) and read.column_names == list(rows[0])
    assert read[-1]["versions"] == rows[-1]["versions"] and read[0]["stats"] == rows[0]["stats"]


def _recorded(run: Path):
    return [rollout for path in sorted((run / TEACHER_OUTPUT).glob("step-*")) for rollout in load_rollouts(path)]


# --- trained on again ------------------------------------------------------------------------------------------------


def test_training_from_rollouts_equals_the_run(online, here, tmp_path, monkeypatch, capsys):
    """Without teacher and workers (their folder is gone) the same batches give the same weights, bit for bit."""
    (here / "teacher").rename(here / "teacher-away")
    try:
        file = config_file(here, STAGES, name="offline.yaml", run={"dir": str(tmp_path / "run")})
        code, _, told = command(monkeypatch, capsys, "train", file, "--from-rollouts", online)
    finally:
        (here / "teacher-away").rename(here / "teacher")
    assert code == 0, told
    assert distance(tmp_path / "run" / "student", online / "student") == 0
    again, first = steps(tmp_path / "run"), steps(online)
    assert [row["loss/total"] for row in again] == [row["loss/total"] for row in first]
    assert [row["token_ids"] for row in lines(tmp_path / "run" / "rollouts.jsonl")] == [
        row["token_ids"] for row in lines(online / "rollouts.jsonl")
    ]
    assert all(row["teacher/calls"] == 0 == row["rollout/tokens"] for row in again)
    evaluated = ("eval", tmp_path / "run", "--data", here / "data.jsonl", "--json", "eval.num_prompts=2")
    code, out, told = command(monkeypatch, capsys, *evaluated)
    assert code == 0 and json.loads(out)["num_prompts"] == 2 and "agreement" in out, told
    code, _, told = command(monkeypatch, capsys, "rollout", tmp_path / "run" / "config.yaml", "--num", 1)
    assert code == 0, told


def test_a_resume_takes_recorded_steps_back(online, tmp_path):
    """What was recorded of steps that a resume cuts away goes to lost/, so that no step is trained on twice."""
    shutil.copytree(online / TEACHER_OUTPUT, tmp_path / TEACHER_OUTPUT)
    assert truncate_history(tmp_path, 7) == {TEACHER_OUTPUT: 3}
    assert [int(path.stem[-2:]) for path in sorted((tmp_path / TEACHER_OUTPUT).glob("step-*"))] == list(range(7))
    assert (
        len(list((tmp_path / "lost" / TEACHER_OUTPUT).iterdir())) == 3
        and (tmp_path / TEACHER_OUTPUT / "heads.safetensors").exists()
    )


def test_other_losses_and_longer_runs(online, here, tmp_path):
    """The recorded rollouts serve another loss, other batches, and again from the first on when they run out."""
    only = [{"name": "only", "steps": 7, "batch_size": 8, "loss": {"type": "reverse_kl"}}]
    offline = {"recorded": str(online)}
    train(config(here, only, name="again.yaml", run={"dir": str(tmp_path / "run")}, rollout=offline))
    ids = [row["token_ids"] for row in lines(tmp_path / "run" / "rollouts.jsonl")]
    assert len(ids) == 56 and ids[:16] == ids[40:]


def test_from_rollouts_resumes(online, here, tmp_path, monkeypatch, capsys):
    """Stopped in the middle and resumed, it ends where it would have ended."""
    for num, more in ((2, []), (3, ["--resume"])):
        stages = [WARM_UP, STAGES[1], {**ADASWITCH, "steps": num}]
        file = config_file(here, stages, name="half.yaml", run={"dir": str(tmp_path / "run")})
        code, _, told = command(monkeypatch, capsys, "train", file, "--from-rollouts", online, *more)
        assert code == 0, told
    assert len(steps(tmp_path / "run")) == 10


def test_a_run_without_signal_is_refused(here, tmp_path, monkeypatch, capsys):
    """Exit 2, the key that was missing, and nothing started."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "rollouts.jsonl").write_text("")
    file = config_file(here, STAGES, name="refused.yaml", run={"dir": str(tmp_path / "run")})
    code, _, told = command(monkeypatch, capsys, "train", file, "--from-rollouts", tmp_path / "old")
    assert code == 2 and "rollout.save_teacher_output=true" in told and not (tmp_path / "run").exists()
    code, _, told = command(monkeypatch, capsys, "train", file, "--from-rollouts", tmp_path / "nowhere")
    assert code == 2 and "there is no such folder" in told


def test_what_recorded_rollouts_cannot_do(online, here, tmp_path):
    """Selecting by an evaluation, another tokenizer, and damaged shards are refused in one line."""
    offline = {"recorded": str(online)}
    by = {"select_by": "kl", "stages": STAGES}
    chosen = config(
        here, STAGES, name="by.yaml", run={"dir": str(tmp_path / "run")}, rollout=offline, train=by,
        eval={"data": "./data.jsonl"},
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"train.select_by=kl .*switchkd eval"):
        train(chosen)
    (tmp_path / "bad" / TEACHER_OUTPUT).mkdir(parents=True)
    (tmp_path / "bad" / TEACHER_OUTPUT / "step-00000000.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(ConfigError, match="cannot be read"):
        train(config(here, STAGES, name="bad.yaml", run={"dir": "x"}, rollout={"recorded": str(tmp_path / "bad")}))


@pytest.mark.ray
def test_from_rollouts_on_ray(cluster, online, here, tmp_path):
    """On Ray only the learner and the replay start, and the weights are the same."""
    offline = {"recorded": str(online)}
    train(config(here, STAGES, name="ray.yaml", run={"dir": str(tmp_path / "run"), "mode": "ray"}, rollout=offline))
    assert distance(tmp_path / "run" / "student", online / "student") == 0
