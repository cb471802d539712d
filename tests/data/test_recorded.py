"""Records that a run saves beside its tokens, and runs that train on them without teacher and workers."""

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
from switchkd.controller.resume import cut_shards
from switchkd.data.atomic_files import TEACHER_OUTPUT
from switchkd.data.rollout_io import load_rollouts, save_rollouts
from switchkd.rollout.top_logprobs import TopTokens, top_logprobs
from switchkd.train import train
from switchkd.types import TokenSource

RECORDS = {"save_teacher_output": True, "save_top_logprobs": 3}


@pytest.fixture(scope="module")
def online(models) -> Path:
    """STAGES with all records saved."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(models)
        train(config(models, STAGES, name="online.yaml", run={"dir": "online"}, rollout=RECORDS))
    return models / "online"


@pytest.fixture
def here(models, monkeypatch) -> Path:
    monkeypatch.chdir(models)
    return models


# --- what is saved ---------------------------------------------------------------------------------------------------


def test_pieces_join_to_the_completion(online):
    """The texts of a rollout's tokens join to its completion, and so do the texts of its segments."""
    for row in lines(online / "rollouts.jsonl"):
        assert len(row["pieces"]) == row["num_tokens"] and "".join(row["pieces"]) == row["completion"]
        assert "".join(part["text"] for part in row["segments"]) == row["completion"]


def test_a_character_is_the_piece_of_its_last_token():
    """A character of several tokens is the text of its last token."""
    from switchkd.data.rollout_io import texts_between

    def decode(ids):
        return bytes(ids).decode("utf-8", errors="replace")

    ids = list("né🙂!".encode())
    pieces = texts_between(ids, range(1, len(ids) + 1), decode)
    assert pieces == ["n", "", "é", "", "", "", "🙂", "!"]


def test_block_lengths_add_up_to_the_tokens(online):
    """The block lengths of a rollout add up to its tokens, one block per round."""
    rows = [row for row in lines(online / "rollouts.jsonl") if row["origin"] == "rollout" and row["stage"] == 1]
    assert rows
    for row in rows:
        assert sum(row["stats"]["block_lengths"]) == row["num_tokens"]
        assert len(row["stats"]["block_lengths"]) == row["stats"]["num_rounds"]


def test_a_step_has_its_waiting_times(online):
    """Each step has its waiting times, queue and block lengths, within their bounds."""
    for row in steps(online):
        assert row["replay/waiting"] == 0 and row["replay/bytes"] > 0 and row["rollout/in_flight"] == 0
        assert 0 <= row["time/wait_teacher_s"] <= row["time/rollout_s"]
        assert row["time/rollout_idle_s"] > 0 and row["time/wait_replay_s"] >= 0
        assert (row["stage"] == "warm-up") == ("rollout/emitted_per_round" not in row)
        assert 1 <= row.get("rollout/emitted_per_round", 1) <= 4
        assert (row["stage"] == "warm-up") == ("rollout/acceptance_rate" not in row)
        assert 0 < row.get("rollout/acceptance_rate", 1) <= 1


def test_top_logprobs_equal_a_clean_forward(online, models):
    """Top log-probs equal those of one clean forward pass; the student has them only at the tokens that it read."""
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


def test_top_logprobs_change_no_token(online, here):
    """A run without top log-probs has the same tokens and weights."""
    train(config(here, STAGES, name="plain.yaml", run={"dir": "plain"}))
    plain, rich = (lines(run / "rollouts.jsonl") for run in (here / "plain", online))
    assert [row["token_ids"] for row in plain] == [row["token_ids"] for row in rich]
    assert all(row["candidates"] is None for row in plain) and not (here / "plain" / TEACHER_OUTPUT).exists()
    assert distance(here / "plain" / "student", online / "student") == 0


@pytest.mark.parametrize("stage", [{"rule": {"type": "student"}}, {"rule": {"type": "random", "prob": 0.4}}])
def test_top_logprobs_are_saved_under_rules_without_rows(here, tmp_path, stage):
    """Under a rule that reads no rows both models' top log-probs are saved for each token."""
    only = [{"name": "only", "steps": 1, **stage}]
    train(config(here, only, name="rows.yaml", run={"dir": str(tmp_path / "run")}, rollout=RECORDS))
    for rollout in _recorded(tmp_path / "run"):
        assert (rollout.top_logprobs.student_ids >= 0).all() and (rollout.top_logprobs.teacher_ids >= 0).all()


def test_top_logprobs_of_top_k_rows_are_the_first_ids(here, tmp_path):
    """With `teacher.output: top_logprobs` the teacher's saved ids are the first of its k."""
    only = [{"name": "only", "steps": 1, "rule": {"type": "switch"}}]
    teacher = {"path": "teacher", "output": "top_logprobs", "num_top_logprobs": 8}
    train(config(here, only, name="k.yaml", run={"dir": str(tmp_path / "run")}, rollout=RECORDS, teacher=teacher))
    for rollout in _recorded(tmp_path / "run"):
        assert (rollout.top_logprobs.teacher_ids == rollout.teacher_output.rows.values[:, :3]).all()


def test_saved_top_logprobs_are_bit_equal(online, tmp_path):
    """Top log-probs and stats are bit-equal after saving and loading."""
    rollouts = _recorded(online)
    save_rollouts(tmp_path / "r.safetensors", rollouts)
    for a, b in zip(rollouts, load_rollouts(tmp_path / "r.safetensors"), strict=True):
        assert a.stats == b.stats
        for name in ("teacher_ids", "teacher_logprobs", "student_ids", "student_logprobs"):
            assert getattr(a.top_logprobs, name).tobytes() == getattr(b.top_logprobs, name).tobytes()


def test_missing_top_logprobs_are_filled():
    """A row with fewer ids than requested is filled with id -1 and NaN."""
    top = TopTokens.of(torch.tensor([[0.0, 1.0]]), 3)
    assert top.ids.tolist() == [[1, 0, -1]] and np.isnan(top.logprobs[0, 2])
    assert top_logprobs([top], [], 1, 3).student_ids.tolist() == [[-1, -1, -1]]


def test_datasets_loads_rollouts(online):
    """`datasets` loads rollouts.jsonl."""
    from datasets import load_dataset

    rows = load_dataset("json", data_files=str(online / "rollouts.jsonl"), cache_dir=str(online / "hf"))["train"]
    assert len(rows) == NUM_ROLLOUTS
    assert [row["completion"] for row in rows] == [row["completion"] for row in lines(online / "rollouts.jsonl")]
    assert {"pieces", "segments", "statistic", "candidates", "step"} <= set(rows.column_names)


@pytest.mark.parametrize("top_logprobs", [0, 3])
def test_datasets_loads_rollouts_after_a_long_warm_up(online, tmp_path, top_logprobs):
    """`rollout_features` gives the column types if the first rows hold only nulls."""
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


# --- training from rollouts ------------------------------------------------------------------------------------------


def test_training_from_rollouts_equals_the_run(online, here, tmp_path, monkeypatch, capsys):
    """Training from recorded rollouts without teacher and workers gives the same weights, bit for bit."""
    (here / "teacher").rename(here / "teacher-away")
    try:
        file = config_file(here, STAGES, name="offline.yaml", run={"dir": str(tmp_path / "run")})
        code, _, err = command(monkeypatch, capsys, "train", file, "--from-rollouts", online)
    finally:
        (here / "teacher-away").rename(here / "teacher")
    assert code == 0, err
    assert distance(tmp_path / "run" / "student", online / "student") == 0
    again, first = steps(tmp_path / "run"), steps(online)
    assert [row["loss/total"] for row in again] == [row["loss/total"] for row in first]
    assert [row["token_ids"] for row in lines(tmp_path / "run" / "rollouts.jsonl")] == [
        row["token_ids"] for row in lines(online / "rollouts.jsonl")
    ]
    assert all(row["teacher/calls"] == 0 == row["rollout/tokens"] for row in again)
    evaluated = ("eval", tmp_path / "run", "--data", here / "data.jsonl", "--json", "eval.num_prompts=2")
    code, out, err = command(monkeypatch, capsys, *evaluated)
    assert code == 0 and json.loads(out)["num_prompts"] == 2 and "agreement" in out, err
    code, _, err = command(monkeypatch, capsys, "rollout", tmp_path / "run" / "config.yaml", "--num", 1)
    assert code == 0, err


def test_a_resume_moves_later_records_to_lost(online, tmp_path):
    """Records of steps that a resume cuts move to lost/."""
    shutil.copytree(online / TEACHER_OUTPUT, tmp_path / TEACHER_OUTPUT)
    cut_shards(tmp_path, 7, keep=True)
    assert [int(path.stem[-2:]) for path in sorted((tmp_path / TEACHER_OUTPUT).glob("step-*"))] == list(range(7))
    assert (
        len(list((tmp_path / "lost" / TEACHER_OUTPUT).iterdir())) == 3
        and (tmp_path / TEACHER_OUTPUT / "heads.safetensors").exists()
    )


def test_a_resume_deletes_records_without_save_teacher_output(online, tmp_path):
    """Without `save_teacher_output` a resume leaves no record, also of steps before the checkpoint: the run may have
    ended before it deleted them."""
    shutil.copytree(online / TEACHER_OUTPUT, tmp_path / TEACHER_OUTPUT)
    cut_shards(tmp_path, 7, keep=False)
    assert not list((tmp_path / TEACHER_OUTPUT).glob("step-*"))


def test_recorded_rollouts_serve_other_losses_and_longer_runs(online, here, tmp_path):
    """Recorded rollouts serve another loss and batch size, and start again when they run out."""
    only = [{"name": "only", "steps": 7, "batch_size": 8, "loss": {"type": "reverse_kl"}}]
    offline = {"recorded": str(online), "repeat_recorded": True}
    train(config(here, only, name="again.yaml", run={"dir": str(tmp_path / "run")}, rollout=offline))
    ids = [row["token_ids"] for row in lines(tmp_path / "run" / "rollouts.jsonl")]
    assert len(ids) == 56 and ids[:16] == ids[40:]


def test_a_run_from_rollouts_resumes(online, here, tmp_path, monkeypatch, capsys):
    """A run from recorded rollouts that was stopped resumes and completes all steps."""
    for num, more in ((2, []), (3, ["--resume"])):
        stages = [WARM_UP, STAGES[1], {**ADASWITCH, "steps": num}]
        file = config_file(here, stages, name="half.yaml", run={"dir": str(tmp_path / "run")})
        code, _, err = command(monkeypatch, capsys, "train", file, "--from-rollouts", online, *more)
        assert code == 0, err
    assert len(steps(tmp_path / "run")) == 10


def test_rollouts_without_teacher_output_are_refused(here, tmp_path, monkeypatch, capsys):
    """Rollouts without teacher output are refused with exit code 2 and the missing key, before anything starts."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "rollouts.jsonl").write_text("")
    file = config_file(here, STAGES, name="refused.yaml", run={"dir": str(tmp_path / "run")})
    code, _, err = command(monkeypatch, capsys, "train", file, "--from-rollouts", tmp_path / "old")
    assert code == 2 and "rollout.save_teacher_output=true" in err and not (tmp_path / "run").exists()
    code, _, err = command(monkeypatch, capsys, "train", file, "--from-rollouts", tmp_path / "nowhere")
    assert code == 2 and "there is no such folder" in err


def test_selection_and_damaged_shards_are_refused(online, here, tmp_path):
    """Selection by an evaluation and damaged shards are refused."""
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
def test_training_from_rollouts_on_ray_equals_the_run(cluster, online, here, tmp_path):
    """On Ray, training from recorded rollouts gives the same weights."""
    offline = {"recorded": str(online)}
    train(config(here, STAGES, name="ray.yaml", run={"dir": str(tmp_path / "run"), "mode": "ray"}, rollout=offline))
    assert distance(tmp_path / "run" / "student", online / "student") == 0
