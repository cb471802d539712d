"""Rollouts on disk keep every bit, and each row is strict JSON."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from switchkd.data.replay import Replay
from switchkd.data.rollout_io import (
    load_replay_state,
    load_rollouts,
    rollout_to_row,
    save_replay_state,
    save_rollouts,
    texts_between,
)
from switchkd.types import CompletionSource, Ragged, Rollout, RolloutStats, TeacherOutput, TokenSource


def rollout(
    rollout_id: int = 0, sources=(0, 0, 1, 0, 2), *, teacher_output: TeacherOutput | None = None, **more
) -> Rollout:
    num = len(sources)
    values = {
        "rollout_id": rollout_id,
        "batch": rollout_id // 4,
        "stage": 1,
        "prompt_id": f"é-{rollout_id}",
        "completion_source": CompletionSource.ROLLOUT,
        "prompt_ids": np.arange(rollout_id + 1, dtype=np.int32),
        "token_ids": np.arange(100, 100 + num, dtype=np.int32),
        "sources": np.array(sources, np.uint8),
        "weight_versions": np.arange(num, dtype=np.int32) // 3,
        "statistic": np.array([np.nan, np.inf, 1 / 3, 0, 1e-9][:num], np.float32),
        "threshold": np.linspace(1, 0, num, dtype=np.float32),
        "uncertainty": np.full(num, np.nan, np.float32),
        "teacher_output": teacher_output,
        "finish_reason": "eos",
        "stats": RolloutStats(num_drafted=7, time_s=0.5),
    }
    return Rollout(**{**values, **more})


def teacher_output(num: int, width: int, dtype: str, kind: str = "hidden_states") -> TeacherOutput:
    rng = np.random.default_rng(num)
    held = {"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32}[dtype]
    values = rng.integers(0, 60_000, (num, width)).astype(held)
    return TeacherOutput(kind=kind, dtype=dtype, rows=Ragged(values, np.array([num], np.int32)))


def some_rollouts() -> list[Rollout]:
    return [
        rollout(0, teacher_output=teacher_output(5, 8, "bfloat16")),
        rollout(1),
        rollout(
            2,
            (),
            teacher_output=teacher_output(0, 8, "bfloat16"),
            finish_reason="length",
            approximate=True,
            teacher="math",
        ),
        rollout(
            3,
            (2, 2),
            teacher_output=teacher_output(2, 16, "float32", "logits"),
            completion_source=CompletionSource.DATASET,
        ),
        rollout(4, (1,), teacher_output=teacher_output(1, 8, "bfloat16")),
    ]


def assert_same(a: object, b: object) -> None:
    for name in type(a).__dataclass_fields__:
        x, y = getattr(a, name), getattr(b, name)
        assert type(x) is type(y), name
        if isinstance(x, np.ndarray):
            assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()), name
        elif isinstance(x, TeacherOutput | Ragged):
            assert_same(x, y)
        else:
            assert x == y, name


def test_loaded_rollouts_are_bit_equal(tmp_path):
    """Saved and loaded rollouts are bit-equal: NaN, no tokens, no teacher output, several widths and dtypes."""
    path = tmp_path / "rollouts.safetensors"
    save_rollouts(path, some_rollouts())
    back = load_rollouts(path)
    assert len(back) == 5
    for a, b in zip(some_rollouts(), back, strict=True):
        assert_same(a, b)


def test_loaded_arrays_share_no_memory(tmp_path):
    """A loaded rollout's arrays share no memory with the file's other rollouts."""
    save_rollouts(tmp_path / "r", some_rollouts())
    for one in load_rollouts(tmp_path / "r"):
        assert one.token_ids.base is None and (
            one.teacher_output is None or one.teacher_output.rows.values.base is None
        )


def test_an_empty_list_can_be_saved(tmp_path):
    """An empty list of rollouts can be saved and loaded."""
    save_rollouts(tmp_path / "none", [])
    assert load_rollouts(tmp_path / "none") == []


def test_replay_state_is_restored_from_a_file(tmp_path):
    """A replay restored from a file equals the saved one."""
    replay = Replay(capacity=100)
    replay.put([rollout(i) for i in range(12)])
    replay.commit(0, [entry.rollout_id for entry in replay.take(0, 4, 0, 1)])
    save_replay_state(tmp_path / "replay", replay.state_dict())
    other = Replay(capacity=100)
    other.load_state_dict(load_replay_state(tmp_path / "replay"))
    assert other.stats() == replay.stats() | {"mean_staleness": pytest.approx(np.nan, nan_ok=True)} | {
        "max_staleness": pytest.approx(np.nan, nan_ok=True)
    }
    assert other.rewind(0, 12) and other.stats()["num_waiting"] == 12


def test_a_crash_while_saving_leaves_the_old_file(tmp_path, monkeypatch):
    """A file is replaced as a whole, so a crash keeps the old one."""
    path = tmp_path / "rollouts"
    save_rollouts(path, some_rollouts()[:1])
    monkeypatch.setattr(os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_rollouts(path, some_rollouts())
    assert len(load_rollouts(path)) == 1


def test_another_file_is_refused(tmp_path):
    """A safetensors file without rollouts is refused."""
    save_file({"weight": np.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="holds no rollouts"):
        load_rollouts(tmp_path / "model.safetensors")


def test_a_row_is_strict_json_with_segments_by_writer():
    """A row has texts, segments by writer, versions and statistics as strict JSON: NaN and infinity are null."""
    row = rollout_to_row(rollout(6), "Hi", lambda ids: "".join(f"<{i}>" for i in ids), step=3)
    row = json.loads(json.dumps(row, allow_nan=False))
    assert (row["step"], row["rollout_id"], row["stage"], row["origin"]) == (3, 6, 1, "rollout")
    assert (row["prompt"], row["completion"]) == ("Hi", "<100><101><102><103><104>")
    assert [(one["source"], one["num_tokens"], one["text"]) for one in row["segments"]] == [
        ("student", 2, "<100><101>"),
        ("teacher", 1, "<102>"),
        ("student", 1, "<103>"),
        ("data", 1, "<104>"),
    ]
    assert row["token_ids"] == [100, 101, 102, 103, 104]
    assert row["statistic"] == [None, None, 0.333333, 0.0, 1e-9]
    assert row["versions"] == [[0, 3], [1, 2]]
    assert row["teacher_frac"] == 0.2
    assert row["stats"]["num_drafted"] == 7


def test_an_empty_completion_has_a_row():
    """A rollout without tokens has a row; without a step, its batch is the step."""
    row = rollout_to_row(rollout(9, ()), "", lambda ids: "")
    assert (row["step"], row["segments"], row["completion"]) == (2, [], "")


def test_texts_of_segments_join_to_the_whole_text():
    """The texts of consecutive segments join to the whole text, also inside a multi-byte character or after a leading
    space."""
    encoded = " naïve 日本 ok".encode()

    def decode(ids) -> str:
        text = bytes(ids).decode(errors="replace")
        return text.removeprefix(" ")

    for cut in range(1, len(encoded)):
        texts = texts_between(list(encoded), [cut, len(encoded)], decode)
        assert "".join(texts) == decode(encoded)
        assert "\ufffd" not in "".join(texts)
    every = texts_between(list(encoded), range(1, len(encoded) + 1), decode)
    assert "".join(every) == decode(encoded)


def test_sources_have_names():
    """Each TokenSource has its own name in a row."""
    row = rollout_to_row(rollout(0, tuple(TokenSource)), "", lambda ids: "x" * len(ids))
    assert [one["source"] for one in row["segments"]] == ["student", "teacher", "data"]
