"""Converts a run to the plain tree that the page's script draws.

In: a `RunData`. Out: lists and numbers, small enough to be embedded in the page.
"""

from __future__ import annotations

import math
from itertools import groupby
from typing import Any

from switchkd.controller.metrics import is_number
from switchkd.tools.report.read import RunData

MAX_POINTS = 800
"""Most points of a curve over steps: longer runs are averaged in bins."""


def payload(run: RunData) -> dict[str, Any]:
    """Return everything about one run that varies with the step or the token."""
    return {
        "name": run.name,
        "stages": stages(run),
        "steps": curves(run.steps),
        "evals": curves(run.evaluations),
        "shareByPosition": run.statistics.share_by_position(),
        "ruleByPosition": run.statistics.rule_by_position(),
        "blockLengths": run.statistics.block_lengths(),
        "numRollouts": run.num_rollouts,
        "rollouts": [rollout(row) for row in run.rollouts],
    }


def stages(run: RunData) -> list[dict[str, Any]]:
    """Return name and first step of each stage that has begun."""
    by_stage = groupby(run.steps, key=lambda row: str(row.get("stage")))
    return [{"name": name, "first": next(rows)["step"]} for name, rows in by_stage]


def curves(rows: list[dict[str, Any]]) -> dict[str, list[list[float]]]:
    """Return [step, value] points by key, for every key with a number."""
    keys = dict.fromkeys(key for row in rows for key in row if key not in ("step", "stage", "stage_end"))
    points = {key: [[row["step"], row[key]] for row in rows if is_number(row.get(key))] for key in keys}
    return {key: _thinned(values) for key, values in points.items() if values}


def rollout(row: dict[str, Any]) -> dict[str, Any]:
    """Return one completion for the viewer, by columns."""
    pieces = row.get("pieces")
    by_token = isinstance(pieces, list) and len(pieces) == row["num_tokens"]
    record = {
        "id": row.get("rollout_id"),
        "step": row["step"],
        "stage": row.get("stage"),
        "origin": row.get("origin"),
        "promptId": str(row.get("prompt_id", "")),
        "prompt": row["prompt"],
        "ends": row.get("finish_reason"),
        "num": row["num_tokens"],
        "share": row.get("teacher_frac"),
        "approximate": bool(row.get("approximate")),
        "pieces": pieces if by_token else [str(part.get("text", "")) for part in row["segments"]],
        "sources": [[part["source"], part["num_tokens"] if by_token else 1] for part in row["segments"]],
        "blocks": row["stats"].get("block_lengths", []) if by_token else [],
    }
    if by_token:
        record |= {
            "ids": row.get("token_ids"),
            "statistic": _short(row.get("statistic")),
            "threshold": _short(row.get("threshold")),
            "uncertainty": _short(row.get("uncertainty")),
            "versions": row.get("versions"),
            "candidates": row.get("candidates"),
        }
    return record


def _short(values: Any) -> list[float | None] | None:
    """Round to four digits; None where the list has no number."""
    if not isinstance(values, list) or not any(is_number(value) for value in values):
        return None
    return [float(f"{value:.4g}") if is_number(value) and math.isfinite(value) else None for value in values]


def _thinned(points: list[list[float]]) -> list[list[float]]:
    width = math.ceil(len(points) / MAX_POINTS)
    if width <= 1:
        return points
    bins = [points[i : i + width] for i in range(0, len(points), width)]
    return [[part[len(part) // 2][0], sum(value for _, value in part) / len(part)] for part in bins]
