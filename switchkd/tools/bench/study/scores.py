"""Scores of one student on a study's test set, whole and in parts.

In: what it wrote, text by text. Out: a flat dict, `exact_match` for all and `exact_match/digits=3` for a part; with
several test sets `dolly/rouge_l` for one of them.
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
    """Means over the exam's seeds, of all rows and of each part's."""
    metrics = config.eval.metrics
    found = {name: stat.mean for name, stat in stats(rows, metrics, prompts).items()}
    parts = parts_of(prompts, config, group)
    for part in sorted(set(parts), key=_order):
        own = [row for row in rows if parts[row.index] == part]
        found |= {f"{name}/{part}": stat.mean for name, stat in stats(own, metrics, prompts).items()}
    return found


def over_exams(scores: Mapping[str, float], exams: Sequence[str]) -> dict[str, float]:
    """Also without an exam's name in front: the means over all exams that have the score. Where one has no name, its
    scores stand there already."""
    if "" in exams:
        return dict(scores)
    several: dict[str, list[float]] = {}
    for exam in exams:
        for name, score in scores.items():
            if name.startswith(f"{exam}/"):
                several.setdefault(name.removeprefix(f"{exam}/"), []).append(score)
    return {name: fmean(values) for name, values in several.items()} | dict(scores)


def parts_of(prompts: Sequence[Prompt], config: Config, group: Group) -> list[str]:
    """The part of each prompt; empty without a grouping. ConfigError for a row without the field."""
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
    """Numbers by size: digits=9 before digits=10."""
    name, _, value = part.partition("=")
    number = value.removesuffix("..")
    return (name, float(number), "") if number.replace(".", "", 1).isdigit() else (name, 0.0, value)
