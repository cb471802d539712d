"""Renders runs as one HTML file that loads nothing from the network.

In: `RunData`s. Out: the page's text. A run's content is text in it: the template escapes, the script only sets text,
data is JSON without `<`, and the page's policy allows no script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from switchkd import __version__
from switchkd.controller.metrics import COLUMNS, figure, is_number, stage_rows
from switchkd.controller.resume import flatten_keys
from switchkd.data.atomic_files import json_safe
from switchkd.tools.report.payload import payload
from switchkd.tools.report.read import RunData

SCRIPTS = ("chart.js", "charts.js", "viewer.js", "main.js")
SHOWN = {"teacher": "teacher.path", "student": "student.path", "data": "data.path", "seed": "seed", "folder": "run.dir"}
"""Config keys in the head of the page."""


def render(runs: Sequence[RunData]) -> str:
    script = "\n".join(_part(name) for name in SCRIPTS)
    style = _part("report.css")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(_part("report.html.j2")).render(
        title=" and ".join(run.name for run in runs),
        version=__version__,
        # the browser runs this script, applies this style and fetches nothing
        policy=(
            f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; img-src data:; "
            "base-uri 'none'; form-action 'none'"
        ),
        style=Markup(style),
        script=Markup(script),
        data=Markup(embedded({"runs": [payload(run) for run in runs]})),
        runs=[_head(run) for run in runs],
        table=_table(runs),
        differences=_differences(runs),
    )
    return page.encode("utf-8", errors="replace").decode()  # half a surrogate pair cannot be encoded


def embedded(tree: Any) -> str:
    """Return JSON for a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(json_safe(tree), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _part(name: str) -> str:
    return (files("switchkd.tools.report") / "page" / name).read_text(encoding="utf-8")


def _head(run: RunData) -> dict[str, Any]:
    keys = dict(flatten_keys(run.config))
    stages = [stage for stage in run.section("train").get("stages") or [] if isinstance(stage, dict)]
    return {
        "name": run.name,
        "folder": str(run.path),
        "facts": {title: str(keys[key]) for title, key in SHOWN.items() if keys.get(key) not in (None, "")},
        "methods": [_method(stage) for stage in stages],
        "missing": run.missing,
        "config": run.config_text,
        "state": _state(run, sum(stage.get("steps") or 0 for stage in stages)),
    }


def _method(stage: dict[str, Any]) -> str:
    """`switch: 2000 steps, rollout 0.5 + dataset 0.5, rule jsd_threshold, loss skew_reverse_kl`."""
    mix = {key: share for key, share in (stage.get("mix") or {}).items() if is_number(share) and share > 0}
    parts = [f"{stage.get('steps')} steps", " + ".join(f"{key} {share:g}" for key, share in mix.items())]
    for key in ("rule", "loss"):
        kind = (stage.get(key) or {}).get("type")
        if kind and not (key == "rule" and "rollout" not in mix):
            parts.append(f"{key} {kind}")
    return f"{stage.get('name')}: " + ", ".join(part for part in parts if part)


def _state(run: RunData, planned: int) -> str:
    done = run.steps[-1]["step"] + 1 if run.steps else 0
    if not run.summary.get("finished"):
        return f"{done}{f' of {planned}' if planned else ''} steps so far"
    seconds = run.summary.get("elapsed_s")
    return f"finished: {done} steps" + (f" in {seconds / 60:.1f} min" if isinstance(seconds, int | float) else "")


def _table(runs: Sequence[RunData]) -> dict[str, Any]:
    """Return the scores before and after each stage, all runs in one table."""
    rows = [(run.name, row) for run in runs for row in stage_rows(run.stage_scores, run.steps)]
    shown = {title: key for title, key in COLUMNS.items() if any(is_number(row.get(key)) for _, row in rows)}
    cells = [
        [name, row["name"], *(figure(row[key]) if is_number(row.get(key)) else "–" for key in shown.values())]
        for name, row in rows
    ]
    return {"titles": list(shown), "rows": cells if shown else []}


def _differences(runs: Sequence[RunData]) -> list[list[str]]:
    """Return the keys in which the runs' configs differ, with each run's value."""
    trees = [dict(flatten_keys(run.config)) for run in runs]
    rows = []
    for key in dict.fromkeys(key for tree in trees for key in tree if key != "run.dir"):
        values = [json.dumps(json_safe(tree.get(key)), ensure_ascii=False, default=str) for tree in trees]
        if len(set(values)) > 1:
            rows.append([key, *values])
    return rows if all(trees) else []
