"""Writes a run's numbers to metrics.jsonl, the console and, if configured, TensorBoard and W&B.

In: one row per optimizer step, with names such as `loss/...`, `rollout/...` or `time/...`, and evaluations with
`eval/...`. Out: a line each, flushed at once; on a terminal a live view, else a plain line per `log_every` steps.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeGuard

import yaml
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from switchkd.config.schema import MetricsConfig
from switchkd.controller.checkpoint import TrainState
from switchkd.controller.console import LiveView
from switchkd.controller.samples import show_samples
from switchkd.data.atomic_files import CONFIG, METRICS, ROLLOUTS, json_safe, write_text_atomic

StageScores = Sequence[tuple[str, Mapping[str, float]]]
"""The evaluation at the end of each stage; "start" names the one before the first step."""

WANDB_ID = "wandb_run_id"

COLUMNS = {
    "agreement": "eval/agreement",
    "agreement, own text": "eval/agreement_greedy",
    "KL": "eval/kl",
    "KL, own text": "eval/kl_greedy",
    "ROUGE-L": "eval/rouge_l",
    "exact match": "eval/exact_match",
    "validation loss": "eval/loss",
    "teacher share": "rollout/teacher_token_frac",
    "tokens/s": "rollout/tokens_per_s",
}
"""Titles and metrics of the final table. A metric without numbers is left out."""

CAPTION = (
    "agreement: share of positions with the teacher's most likely token; KL: from the teacher, nats a token; "
    "own text: on the student's greedy text, else on the references"
)

DENOMINATORS = {"rollout/teacher_token_frac": "rollout/shared_tokens", "rollout/tokens_per_s": "time/step_s"}
"""Metrics of steps that are ratios, with their denominators: a stage's number is a ratio of sums."""

RECENT = 8
"""Steps of the current stage from which the remaining time is extrapolated."""

SHORT = {"loss/total": "loss", "rollout/teacher_token_frac": "teacher", "rollout/tokens_per_s": "tokens/s"}
"""Metrics that a console line shows of a step, with their short names."""


class MetricsLog:
    """All sinks of a run: the console from the start, the others from `open` on."""

    def __init__(self, settings: MetricsConfig, console: Console | None = None) -> None:
        self.settings = settings
        self.console = console or Console()
        self._num_steps = 0
        self._stage = ""
        self._recent_s: deque[float] = deque(maxlen=RECENT)  # of steps of this stage
        self._run_dir: Path | None = None
        self._file: TextIO | None = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        self._live: LiveView | None = None
        self._sinks: list[Callable[[int, Mapping[str, float]], None]] = []

    def open(self, run_dir: Path, num_steps: int, state: TrainState) -> None:
        """Append to the run folder's files, which a resume has cut back to `state`."""
        self._run_dir, self._num_steps = run_dir, num_steps
        self._file = (run_dir / METRICS).open("a", encoding="utf-8")
        if self.settings.tensorboard:
            self._tensorboard = _tensorboard(run_dir, state.step)
        if self.settings.wandb:
            self._wandb = _wandb(run_dir, self.settings.wandb)
        if self.console.is_terminal:
            self._live = LiveView(self.console, num_steps, state.step)
            self._live.start()

    def now(self, **doing: str) -> None:
        """Show on a terminal what roles (`teacher`, `rollout`, `replay`, `learner`) do from now on."""
        if self._live is not None:
            self._live.now(**doing)

    def export(self, sink: Callable[[int, Mapping[str, float]], None]) -> None:
        """Add a sink, which gets the step and the numbers of each row."""
        self._sinks.append(sink)

    def step(self, step: int, row: Mapping[str, Any]) -> None:
        """Write the row of an optimizer step (0-based)."""
        written = self._write({"step": step, **row})
        if row["stage"] != self._stage:
            self._stage = row["stage"]
            self._recent_s.clear()
        self._recent_s.append(row["time/step_s"])
        line = _line(written)
        if self._live is not None:
            self._live.step(step + 1, written, line)
        elif (step + 1) % self.settings.log_every == 0 or step + 1 == self._num_steps:
            self.info(f"step {step + 1}/{self._num_steps}  {line}  {self._eta(step + 1)}")

    def evaluation(
        self, num_done: int, stage_end: str, scores: Mapping[str, float], sample: Mapping[str, str] | None = None
    ) -> None:
        """Write the scores after `num_done` steps. `stage_end` names the stage that ended ("start" before the first
        step), `sample` has the texts of one prompt. The row carries the last step done (-1 before the first), so that a
        checkpoint taken now keeps it."""
        more = {"stage_end": stage_end} if stage_end else {}
        self._write({"step": num_done - 1, **more, **scores, **({"sample": dict(sample)} if sample else {})})
        text = "  ".join(f"{k.removeprefix('eval/')} {v:.4g}" for k, v in scores.items() if not k.endswith("_std"))
        self.info(f"evaluation after {num_done} steps: {text}")

    def info(self, text: str) -> None:
        """Print a line on the console."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def summary(self, stage_scores: StageScores, student: str, finished: bool) -> None:
        """Print the final table, and the student's folder or how to resume."""
        self.stop_live()
        if self._run_dir:
            metrics = read_rows(self._run_dir / METRICS)
            if rows := stage_rows(stage_scores, metrics):
                self.console.print(summary_table(rows), Text(CAPTION, "dim"))
                show_samples(self.console, metrics, self._run_dir / ROLLOUTS)
        if not finished:
            self.info(f"stopped before the end; --resume goes on with {self._run_dir}")
            return
        self.info(f"student: {student}")
        self.info(f"curves, and every rollout token by token: switchkd report {self._run_dir}")

    def close(self) -> None:
        """Close the files. `open` may follow: a run that goes back to its checkpoint cuts them in between."""
        self.stop_live()
        if self._file:
            self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()

    def stop_live(self) -> None:
        """End the live view, which leaves the terminal as it was."""
        if self._live:
            self._live.stop()
            self._live = None

    def _write(self, values: dict[str, Any]) -> dict[str, Any]:
        """Write a row to all sinks; return it in plain values."""
        assert self._file is not None, "open() comes first"
        row = json_safe(values)
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        numbers = {key: float(value) for key, value in row.items() if key != "step" and is_number(value)}
        if self._tensorboard:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key, value, max(row["step"], 0))
            self._tensorboard.flush()
        if self._wandb:
            self._wandb.log({"step": row["step"], **numbers})
        for sink in self._sinks:
            sink(row["step"], numbers)
        return row

    def _eta(self, num_done: int) -> str:
        left = int(sum(self._recent_s) / len(self._recent_s) * (self._num_steps - num_done))
        return f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"


def read_rows(metrics_file: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl: of steps, also those before a resume, and of evaluations."""
    with metrics_file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def stage_rows(stage_scores: StageScores, metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for the start and one per stage: its scores, and the ratios in DENOMINATORS over its steps."""
    scores, steps = dict(stage_scores), [row for row in metrics if "stage" in row]
    rows = []
    for name in dict.fromkeys([*scores, *(row["stage"] for row in steps)]):
        stage = [row for row in steps if row["stage"] == name]
        ratios = {key: ratio(stage, key) for key in DENOMINATORS if any(is_number(row.get(key)) for row in stage)}
        rows.append({"name": name, **ratios, **scores.get(name, {})})
    return rows


def ratio(steps: Sequence[Mapping[str, Any]], key: str) -> float:
    """A metric of DENOMINATORS over several steps: the sum of the numerators by the sum of the denominators."""
    pairs = [(row.get(key) or 0.0, row.get(DENOMINATORS[key]) or 0.0) for row in steps]
    return sum(share * whole for share, whole in pairs) / sum(whole for _, whole in pairs)


def summary_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Table of `rows`, one a column: each has a `name`, metrics of COLUMNS and, with several seeds, their `..._std`."""
    table = Table(title="before and after each stage", box=SIMPLE)
    table.add_column("after", no_wrap=True)
    for row in rows:
        table.add_column(str(row["name"]), justify="right", overflow="fold")
    for title, key in COLUMNS.items():
        if any(is_number(row.get(key)) for row in rows):
            table.add_row(title, *(_cell(row, key) for row in rows))
    return table


def _cell(row: Mapping[str, Any], key: str) -> str:
    if not is_number(value := row.get(key)):
        return "-"
    std = row.get(f"{key}_std")
    return figure(value) + (f" ± {std:.2g}" if std else "")


def _line(row: Mapping[str, Any]) -> str:
    """The stage and the numbers of SHORT."""
    parts = [str(row.get("stage", ""))]
    for key, name in SHORT.items():
        if is_number(value := row.get(key)):
            parts.append(f"{name} {value:.1%}" if key.endswith("_frac") else f"{name} {figure(value)}")
    return "  ".join(part for part in parts if part)


def figure(value: float) -> str:
    """Four significant figures, or all digits before the decimal point."""
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _tensorboard(run_dir: Path, first_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # seconds to import

    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)


def _wandb(run_dir: Path, project: str) -> Any:
    """Start or continue a W&B run. The x axis is the run's step: W&B's own cannot go back to a checkpoint."""
    import wandb

    known, config = run_dir / WANDB_ID, run_dir / CONFIG
    run = wandb.init(
        project=project,
        id=known.read_text().strip() if known.exists() else None,
        resume="allow",
        dir=str(run_dir),
        config=yaml.safe_load(config.read_text(encoding="utf-8")) if config.exists() else {},
    )
    write_text_atomic(known, f"{run.id}\n")
    run.define_metric("*", step_metric="step")
    return run
