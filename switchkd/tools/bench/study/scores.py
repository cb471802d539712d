"""Scores of one student on a study's test sets, whole and in parts.

In: completions. Out: a flat dict: `exact_match` of all rows, `exact_match/digits=3` of a part, and with several test
sets `dolly/rouge_l` of one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from switchkd.config.errors import ConfigError
from switchkd.config.schema import Config
from switchkd.controller.evaluation import stats
from switchkd.data.dataset import read_records
from switchkd.data.prompts import eval_data
from switchkd.tools.bench.study.spec import Group
from switchkd.types import EvalRow, Prompt


def scores_of(rows: Sequence[EvalRow], prompts: Sequence[Prompt], config: Config, group: Group) -> dict[str, float]:
    """Return means over the evaluation's seeds, of all rows and of each part."""
    metrics = config.eval.metrics
    scores = {name: stat.mean for name, stat in stats(rows, metrics, prompts).items()}
    parts = parts_of(prompts, config, group)
    for part in sorted(set(parts), key=_order):
        in_part = [row for row in rows if parts[row.index] == part]
        scores |= {f"{name}/{part}": stat.mean for name, stat in stats(in_part, metrics, prompts).items()}
    return scores


def over_test_sets(scores: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """Add each score's mean over the test sets that have it. A test set with the empty name has these keys itself."""
    if "" in names:
        return dict(scores)
    by_score: dict[str, list[float]] = {}
    for name, value in scores.items():
        test_set, _, score = name.partition("/")
        if test_set in names:
            by_score.setdefault(score, []).append(value)
    return {score: fmean(values) for score, values in by_score.items()} | dict(scores)


def parts_of(prompts: Sequence[Prompt], config: Config, group: Group) -> list[str]:
    """Return each prompt's part; empty without a grouping. Raises ConfigError for a row without the field."""
    if group.reference_tokens:
        edges = sorted(group.reference_tokens)
        names = [f"reference_tokens={low}.." for low in (0, *edges)]
        return [names[bisect_right(edges, len(prompt.reference_ids))] for prompt in prompts]
    if not group.field:
        return []
    values: dict[str, Any] = {}
    for record in read_records(eval_data(config)):
        if group.field not in record.fields:
            raise ConfigError(f"{record.where}: no field {group.field!r}; set group.field to one that the test set has")
        values[str(record.fields.get("id", record.where))] = record.fields[group.field]
    return [f"{group.field}={values[prompt.prompt_id]}" for prompt in prompts]


def _order(part: str) -> tuple[str, float, str]:
    """Return a sort key with numbers by size: digits=9 before digits=10."""
    name, _, value = part.partition("=")
    number = value.removesuffix("..")
    return (name, float(number), "") if number.replace(".", "", 1).isdigit() else (name, 0.0, value)
