"""The columns of rollouts.jsonl, for `datasets.load_dataset("json", ..., features=rollout_features())`.

Without it `datasets` guesses from the file's first 10 MB, where a long warm-up on a data set has only nulls.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from switchkd.types import RolloutStats

_NUMBERS = {"int": "int64", "float": "float64"}


def rollout_features() -> Any:
    """`datasets.Features` of the lines that `rollout_io.rollout_to_row` makes."""
    from datasets import Features, List, Value  # seconds to import

    integer, number, text, flag = (Value(kind) for kind in ("int64", "float64", "string", "bool"))
    side = {"ids": List(List(integer)), "texts": List(List(text)), "logprobs": List(List(number))}
    stats = {one.name: Value(_NUMBERS[kind]) if (kind := str(one.type)) in _NUMBERS else List(integer)
             for one in fields(RolloutStats)}  # fmt: skip
    return Features(
        {
            "step": integer, "rollout_id": integer, "batch": integer, "stage": integer, "prompt_id": text,
            "finish_reason": text, "approximate": flag, "teacher": text, "origin": text, "prompt": text,
            "completion": text, "segments": List({"source": text, "num_tokens": integer, "text": text}),
            "num_tokens": integer, "teacher_frac": number, "token_ids": List(integer), "pieces": List(text),
            "statistic": List(number), "threshold": List(number), "uncertainty": List(number),
            "versions": List(List(integer)), "candidates": {"teacher": side, "student": side}, "stats": stats,
        }
    )  # fmt: skip
