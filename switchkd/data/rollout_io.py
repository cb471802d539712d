"""Writes and reads rollouts without pickle, and formats a rollout as a line of rollouts.jsonl.

In: Rollouts. Out: one safetensors file: each field of all rollouts is one flat tensor, teacher outputs are grouped by
width and dtype, and values that are not arrays are JSON in the tensor `records` (a file's header is limited, a tensor
is not). Every array is restored bit for bit, NaN included.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from itertools import accumulate, groupby, pairwise
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from switchkd.data.atomic_files import append_whole, json_safe, write_atomic
from switchkd.types import CompletionSource, Ragged, Rollout, RolloutStats, TeacherOutput, TokenSource, TopLogprobs

FORMAT = {"format": "switchkd-rollouts", "version": "1"}

TOKEN_FIELDS = {
    "token_ids": np.int32,
    "sources": np.uint8,
    "weight_versions": np.int32,
    "statistic": np.float32,
    "threshold": np.float32,
    "uncertainty": np.float32,
}
"""Arrays with one value per token of the completion."""

CANDIDATE_FIELDS = {
    "teacher_ids": np.int32,
    "teacher_logprobs": np.float32,
    "student_ids": np.int32,
    "student_logprobs": np.float32,
}
"""Arrays [T, K] of rollouts with `top_logprobs`; one K in a file."""

PLAIN_FIELDS = ("rollout_id", "batch", "stage", "prompt_id", "finish_reason", "approximate", "teacher")

BatchDecode = Callable[[Sequence[Sequence[int]]], list[str]]
"""The texts of several sequences of token ids, such as a tokenizer's `batch_decode`."""


def save_rollouts(path: Path, rollouts: Sequence[Rollout]) -> None:
    """Write the file, completely or not at all."""
    _save(path, rollouts, {})


def read_column(path: Path, name: str) -> np.ndarray:
    """Read one of TOKEN_FIELDS of all rollouts of a file, flat, and nothing else."""
    with safe_open(path, framework="numpy") as file:
        return file.get_tensor(name)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read the values of all rollouts of a file that are not arrays, and nothing else."""
    return json.loads(read_column(path, "records").tobytes())["rollouts"]


def load_rollouts(path: Path, rollout_ids: Collection[int] | None = None) -> list[Rollout]:
    """Read all rollouts of a file, or those with these ids and nothing else, in the order of the file."""
    return _load(path, rollout_ids)[0]


def save_replay_state(path: Path, state: dict[str, Any]) -> None:
    """Write the result of `Replay.state_dict` into one file."""
    _save(path, state["rollouts"], {key: value for key, value in state.items() if key != "rollouts"})


def load_replay_state(path: Path) -> dict[str, Any]:
    rollouts, rest = _load(path)
    return {"rollouts": rollouts, **rest}


def rollout_to_row(
    rollout: Rollout, prompt_text: str, decode: Callable[[Sequence[int]], str], step: int | None = None
) -> dict[str, Any]:
    """Format a rollout as a line of rollouts.jsonl: strict JSON, NaN is null.

    `step` is the optimizer step that trained on it (by default its own batch). `pieces` are the tokens' texts, joined
    the completion; `segments` the runs of tokens with one source; `versions` runs `[weight_version, num_tokens]`;
    `candidates` each model's most likely tokens (null without `rollout.save_top_logprobs`).
    """
    runs = _runs(rollout.sources)
    ends = np.cumsum([0, *(num for _, num in runs)]).tolist()
    pieces = texts_between(rollout.token_ids.tolist(), range(1, rollout.num_tokens + 1), decode)
    texts = ["".join(pieces[start:end]) for start, end in pairwise(ends)]
    row = {
        "step": rollout.batch if step is None else step,
        **{name: getattr(rollout, name) for name in PLAIN_FIELDS},
        "origin": CompletionSource(rollout.completion_source).name.lower(),
        "prompt": prompt_text,
        "prompt_token_ids": rollout.prompt_ids.tolist(),
        "completion": decode(rollout.token_ids.tolist()),
        "segments": [
            {"source": TokenSource(source).name.lower(), "num_tokens": num, "text": text}
            for (source, num), text in zip(runs, texts, strict=True)
        ],
        "num_tokens": rollout.num_tokens,
        "teacher_frac": sum(num for source, num in runs if source == TokenSource.TEACHER) / max(rollout.num_tokens, 1),
        "token_ids": rollout.token_ids.tolist(),
        "pieces": pieces,
        "statistic": _rounded(rollout.statistic),
        "threshold": _rounded(rollout.threshold),
        "uncertainty": _rounded(rollout.uncertainty),
        "versions": [list(run) for run in _runs(rollout.weight_versions)],
        "candidates": None if rollout.top_logprobs is None else _candidates_row(rollout.top_logprobs, decode),
        "stats": json_safe(asdict(rollout.stats)),
    }
    # trap: `json_safe` of every token's values takes longer than their texts
    return {**row, **json_safe({name: row[name] for name in PLAIN_FIELDS})}


def rollout_lines(rollouts: Sequence[Rollout], decode: BatchDecode, step: int | None = None) -> str:
    """The lines of a rollouts.jsonl, which `switchkd rollout --out` writes too: one per rollout."""
    text_of = _decoded(rollouts, decode)
    rows = [rollout_to_row(rollout, text_of(rollout.prompt_ids.tolist()), text_of, step) for rollout in rollouts]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def append_rows(path: Path, rollouts: Sequence[Rollout], decode: BatchDecode, step: int | None = None) -> None:
    """Append a line per rollout to a rollouts.jsonl. Raises OSError, and then appends none."""
    append_whole(path, rollout_lines(rollouts, decode, step))


def _decoded(rollouts: Sequence[Rollout], decode: BatchDecode) -> Callable[[Sequence[int]], str]:
    """Return a decoder that knows the texts of almost all sequences that the rollouts' rows ask for: decoding them one
    by one takes longer than everything else."""
    sequences = list(dict.fromkeys(sequence for rollout in rollouts for sequence in _sequences(rollout)))
    texts = dict(zip(sequences, decode(sequences), strict=True)) if sequences else {}

    def text_of(token_ids: Sequence[int]) -> str:
        text = texts.get(key := tuple(token_ids))
        return decode([key])[0] if text is None else text

    return text_of


def _sequences(rollout: Rollout) -> Iterator[tuple[int, ...]]:
    """The sequences that `rollout_to_row` decodes where no character spans two tokens."""
    token_ids = rollout.token_ids.tolist()
    yield tuple(rollout.prompt_ids.tolist())
    yield tuple(token_ids)
    yield ()
    yield from ((token,) for token in token_ids)
    yield from pairwise(token_ids)
    if (top := rollout.top_logprobs) is not None:
        candidates = np.unique(np.concatenate([top.teacher_ids, top.student_ids]))
        yield from ((token,) for token in candidates[candidates >= 0].tolist())


def _candidates_row(top: TopLogprobs, decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    """By model: lists [T][up to K] of ids, texts and logprobs; an empty list where a position has no row."""
    sides = {"teacher": (top.teacher_ids, top.teacher_logprobs), "student": (top.student_ids, top.student_logprobs)}
    names = {i: decode([i]) for ids, _ in sides.values() for i in np.unique(ids[ids >= 0]).tolist()}
    return {
        side: {
            "ids": [row[row >= 0].tolist() for row in ids],
            "texts": [[names[i] for i in row if i >= 0] for row in ids.tolist()],
            "logprobs": [_rounded(row[kept >= 0], 4) for kept, row in zip(ids, logprobs, strict=True)],
        }
        for side, (ids, logprobs) in sides.items()
    }


def texts_between(token_ids: Sequence[int], ends: Iterable[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """The text of each run of tokens that ends before ends[i]; joined they are the text of all tokens.

    Runs cannot be decoded one by one: a character may span two of them, and some tokenizers drop the space before the
    first token. So a run's text is what it adds to the run before; an incomplete character is part of the next run.
    """
    texts: list[str] = []
    start = read = 0
    for end in ends:
        before, text = decode(token_ids[start:read]), decode(token_ids[start:end])
        if text.endswith("\ufffd") and end < len(token_ids):
            texts.append("")
            continue
        texts.append(text[len(before) :])
        start, read = read, end
    return texts


def _save(path: Path, rollouts: Sequence[Rollout], rest: dict[str, Any]) -> None:
    records = json.dumps({"rollouts": [_record(rollout) for rollout in rollouts], "rest": rest})
    tensors = {
        "records": np.frombuffer(records.encode(), np.uint8),
        "prompt_ids": _flat([rollout.prompt_ids for rollout in rollouts], np.int32),
        **{name: _flat([getattr(r, name) for r in rollouts], dtype) for name, dtype in TOKEN_FIELDS.items()},
    }
    tops = [rollout.top_logprobs for rollout in rollouts if rollout.top_logprobs is not None]
    for name, dtype in CANDIDATE_FIELDS.items() if tops else ():
        tensors[f"candidates.{name}"] = np.concatenate([getattr(top, name).astype(dtype, copy=False) for top in tops])
    groups: dict[str, list[TeacherOutput]] = {}
    for rollout in rollouts:
        if rollout.teacher_output is not None:
            groups.setdefault(_group(rollout.teacher_output), []).append(rollout.teacher_output)
    for name, outputs in groups.items():
        tensors[f"values.{name}"] = np.concatenate([output.rows.values for output in outputs])
        tensors[f"lengths.{name}"] = np.concatenate([output.rows.lengths for output in outputs])
    write_atomic(path, lambda beside: save_file(tensors, beside, metadata=FORMAT))


Read = Callable[[str, Mapping[int, int]], dict[int, np.ndarray]]
"""Reads the parts of a flat tensor by record: the name of the tensor, and the length of each record's part."""


def _load(path: Path, rollout_ids: Collection[int] | None = None) -> tuple[list[Rollout], dict[str, Any]]:
    with safe_open(path, framework="numpy") as file:
        if "records" not in file.keys():  # noqa: SIM118 (not a dict)
            raise ValueError(f"{path} holds no rollouts of this program (no tensor `records`)")
        content = json.loads(file.get_tensor("records").tobytes())
        all_records = dict(enumerate(content["rollouts"]))
        records = {i: one for i, one in all_records.items() if rollout_ids is None or one["rollout_id"] in rollout_ids}
        read = partial(_read_parts, file, records)
        prompts = read("prompt_ids", {i: record["prompt_length"] for i, record in all_records.items()})
        lengths = {i: record["length"] for i, record in all_records.items()}
        columns: dict[str, dict[int, Any]] = {name: read(name, lengths) for name in TOKEN_FIELDS}
        teacher_outputs = _read_teacher_outputs(read, all_records)
        tops = _read_candidates(read, all_records)
    rollouts = [
        Rollout(
            **{name: record[name] for name in PLAIN_FIELDS},
            completion_source=CompletionSource(record["origin"]),
            prompt_ids=prompts[i],
            **{name: column[i] for name, column in columns.items()},
            teacher_output=teacher_outputs.get(i),
            stats=RolloutStats(**record["stats"]),
            top_logprobs=tops.get(i),
        )
        for i, record in records.items()
    ]
    return rollouts, content["rest"]


def _read_parts(file: Any, chosen: Collection[int], name: str, lengths: Mapping[int, int]) -> dict[int, np.ndarray]:
    """Read the parts of the chosen records as copies: one rollout must not keep all others in memory."""
    column = file.get_slice(name)
    if not column.get_shape()[0]:  # a slice of an empty tensor is an error
        column = file.get_tensor(name)
    ends = accumulate(lengths.values())
    return {
        i: column[end - num : end].copy() for (i, num), end in zip(lengths.items(), ends, strict=True) if i in chosen
    }


def _read_candidates(read: Read, records: Mapping[int, dict[str, Any]]) -> dict[int, TopLogprobs]:
    lengths = {i: record["length"] for i, record in records.items() if record.get("candidates")}
    columns = {name: read(f"candidates.{name}", lengths) for name in (CANDIDATE_FIELDS if lengths else ())}
    chosen = columns["teacher_ids"] if lengths else ()
    return {i: TopLogprobs(**{name: column[i] for name, column in columns.items()}) for i in chosen}


def _record(rollout: Rollout) -> dict[str, Any]:
    stored: dict[str, Any] | None = None
    if (output := rollout.teacher_output) is not None:
        sizes = {"num_rows": len(output.rows.values), "num_lengths": len(output.rows.lengths)}
        stored = {"group": _group(output), "kind": output.kind, "dtype": output.dtype, **sizes}
    return {
        **{name: getattr(rollout, name) for name in PLAIN_FIELDS},
        "origin": int(rollout.completion_source),
        "stats": json_safe(asdict(rollout.stats)),
        "prompt_length": len(rollout.prompt_ids),
        "length": rollout.num_tokens,
        "candidates": rollout.top_logprobs is not None,
        "teacher_output": stored,
    }


def _group(teacher_output: TeacherOutput) -> str:
    """Name of the tensor that the output's rows fit into, such as `uint16x576`."""
    values = teacher_output.rows.values
    return f"{values.dtype.name}x{'x'.join(map(str, values.shape[1:]))}"


def _read_teacher_outputs(read: Read, records: Mapping[int, dict[str, Any]]) -> dict[int, TeacherOutput]:
    present = {i: record["teacher_output"] for i, record in records.items() if record["teacher_output"]}
    outputs: dict[int, TeacherOutput] = {}
    for group in sorted({one["group"] for one in present.values()}):
        members = {i: one for i, one in present.items() if one["group"] == group}
        values = read(f"values.{group}", {i: one["num_rows"] for i, one in members.items()})
        lengths = read(f"lengths.{group}", {i: one["num_lengths"] for i, one in members.items()})
        for i, rows in values.items():
            one = members[i]
            outputs[i] = TeacherOutput(kind=one["kind"], dtype=one["dtype"], rows=Ragged(rows, lengths[i]))
    return outputs


def _flat(arrays: list[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *(array.astype(dtype, copy=False) for array in arrays)])


def _runs(values: np.ndarray) -> list[tuple[int, int]]:
    """Run-length pairs (value, count)."""
    return [(int(value), sum(1 for _ in run)) for value, run in groupby(values.tolist())]


def _rounded(values: np.ndarray, digits: int = 6) -> list[float | None]:
    """Round to six digits, the precision of float32; NaN and infinity become None."""
    return [float(f"{value:.{digits}g}") if isfinite(value) else None for value in values.tolist()]


def rollout_features() -> Any:
    """Return the `datasets.Features` of the lines of `rollout_to_row`."""
    from datasets import Features, List, Value  # seconds to import

    integer, number, text, flag = (Value(kind) for kind in ("int64", "float64", "string", "bool"))
    side = {"ids": List(List(integer)), "texts": List(List(text)), "logprobs": List(List(number))}
    kinds = {"int": integer, "float": number}
    stats = {one.name: kinds.get(str(one.type), List(integer)) for one in fields(RolloutStats)}
    return Features(
        {
            "step": integer, "rollout_id": integer, "batch": integer, "stage": integer, "prompt_id": text,
            "finish_reason": text, "approximate": flag, "teacher": text, "origin": text, "prompt": text,
            "prompt_token_ids": List(integer), "completion": text,
            "segments": List({"source": text, "num_tokens": integer, "text": text}),
            "num_tokens": integer, "teacher_frac": number, "token_ids": List(integer), "pieces": List(text),
            "statistic": List(number), "threshold": List(number), "uncertainty": List(number),
            "versions": List(List(integer)), "candidates": {"teacher": side, "student": side}, "stats": stats,
        }
    )  # fmt: skip
