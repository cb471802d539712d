"""Runs a study cell by cell: teacher and warm-ups once, then each cell as an ordinary run and an evaluation.

In: a Study and a folder. Out, in the folder:

    study.json                the study
    task/                     data and untrained models, where the study makes them
    teacher/, warm-up-seed1/  runs before the cells
    cells/NAME-seed1.json     one file per finished cell, written atomically
    runs/NAME-seed1/          the cell's run, without its checkpoints; NAME-seed1.log is its output

After any interruption the same command continues: finished cells are read, the others run. A run with a checkpoint is
resumed, one without restarts. A failed cell does not stop the others; a failed warm-up only those of its seed.
"""

from __future__ import annotations

import json
import shutil
import signal
import time
import traceback
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from types import FrameType
from typing import Any

from switchkd.config.errors import ConfigError, with_type
from switchkd.config.schema import Config
from switchkd.controller.metrics import ratio, read_rows
from switchkd.controller.run_lock import RunLock
from switchkd.data.atomic_files import METRICS, write_json_atomic
from switchkd.tools.bench.study.scores import over_test_sets, scores_of
from switchkd.tools.bench.study.spec import GROWS, TEACHER, WARM_UP, Cell, Overrides, Study, configured, flat, merged
from switchkd.tools.offline import evaluate_rows

WITHOUT_TEACHER: Overrides = {"learner": {"loss": {"type": "cross_entropy"}}, "train": {"mix": {"dataset": 1.0}}}


class Stopped(Exception):
    """SIGTERM was received; the text names the first cell without a result."""


class Failed(Exception):
    """Some cells have failed; the text names them and their logs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """A study in its folder. The study file's relative paths start at `home`."""

    study: Study
    home: Path
    out: Path
    signals: list[int] = field(default_factory=list)  # SIGTERMs received

    def run(self, chosen: Sequence[Cell]) -> None:
        """Run the chosen cells that have no result. Raises ConfigError, Stopped, and at the end Failed."""
        lock = RunLock(self.out)
        previous = signal.signal(signal.SIGTERM, self._on_signal)
        try:
            missing = [cell for cell in chosen if self.read(cell) is None]
            num_done = len(chosen) - len(missing)
            print(f"{self.study.name}: {len(chosen)} cells, {num_done} of them are there", flush=True)
            self._write_task()
            if self.study.teacher is not None and self.read(Cell(TEACHER, 0)) is None:
                self._run_cell(Cell(TEACHER, 0))
            self._run_cells(self._with_warm_ups(missing))
        finally:
            signal.signal(signal.SIGTERM, previous)
            lock.release()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signals.append(number)

    def _with_warm_ups(self, missing: Sequence[Cell]) -> list[Cell]:
        """Insert each seed's missing warm-up before its first cell."""
        queue: list[Cell] = []
        for cell in missing:
            warm_up = Cell(WARM_UP, cell.seed)
            if self.study.warm_up is not None and warm_up not in queue and self.read(warm_up) is None:
                queue.append(warm_up)
            queue.append(cell)
        return queue

    def _run_cells(self, queue: Sequence[Cell]) -> None:
        seconds: list[float] = []
        failed: dict[Cell, str] = {}
        for i, cell in enumerate(queue):
            if Cell(WARM_UP, cell.seed) in failed:
                continue
            if self.signals:  # a signal after its last step does not stop a run
                raise Stopped("; ".join([cell.name, *failed.values()]))
            started = time.monotonic()
            try:  # a cell that diverges must not end the study
                self._run_cell(cell)
            except (ConfigError, Stopped):
                raise
            except Exception as error:
                failed[cell] = self._log_failure(cell, error)
                print(f"{i + 1}/{len(queue)} {failed[cell]}", flush=True)
                continue
            seconds.append(time.monotonic() - started)
            left = timedelta(seconds=int(fmean(seconds) * (len(queue) - i - 1)))
            print(f"{i + 1}/{len(queue)}, {left} left", flush=True)
        if failed:
            raise Failed("; ".join(failed.values()))

    def _log_failure(self, cell: Cell, error: Exception) -> str:
        log = self._log(cell)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            traceback.print_exception(error, file=file)
        return f"{cell.name} ({with_type(error)}; {log})"

    def _run_dir(self, cell: Cell) -> Path:
        if cell.method == TEACHER:
            return self.out / TEACHER
        return (self.out if cell.method == WARM_UP else self.out / "runs") / cell.name

    def _log(self, cell: Cell) -> Path:
        return self._run_dir(cell).with_name(f"{self._run_dir(cell).name}.log")

    def _write_task(self) -> None:
        task = self.study.task
        if task is None or (self.out / "task").is_dir():
            return
        from switchkd.tools.bench.study.arithmetic_task import write_task

        write_task(self.out / "task", **task.model_dump(exclude={"type"}))

    # --- one run -----------------------------------------------------------------------------------------------------

    def _run_cell(self, cell: Cell) -> None:
        """Train, evaluate, write the result. Raises Stopped, and ConfigError for a teacher below `teacher_at_least`."""
        result = self._train(cell)
        scores, rank_by, least = result["scores"], self.study.rank_by, self.study.teacher_at_least
        if cell.method == TEACHER and scores[rank_by] < least:
            raise ConfigError(
                f"the teacher has {rank_by} {scores[rank_by]:.4g}, below teacher_at_least={least:g}; train it longer "
                "(teacher.train.num_steps) into another --out"
            )
        self.cells.mkdir(exist_ok=True)
        write_json_atomic(self.cells / f"{cell.name}.json", result)
        main = " ".join(f"{name} {scores[name]:.4g}" for name in (rank_by, "kl_greedy", "length") if name in scores)
        print(f"{cell.name}  {main}  {result['seconds']['train']:.0f} s", flush=True)

    def _train(self, cell: Cell) -> dict[str, Any]:
        """Run or resume the training, and evaluate its student."""
        from switchkd.train import train

        changes = {TEACHER: self.study.teacher, WARM_UP: self.study.warm_up, **self.study.methods}
        overrides, run_dir = changes[cell.method] or {}, self._run_dir(cell)
        config = self._train_config(cell, overrides)
        resume = (run_dir / "checkpoints" / "LATEST").exists()
        if not resume:
            shutil.rmtree(run_dir, ignore_errors=True)
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        with self._log(cell).open("w") as log, redirect_stdout(log), redirect_stderr(log):
            summary = train(config, resume=resume)
            signal.signal(signal.SIGTERM, self._on_signal)  # Ray installs its own handler
            if summary.told_to_stop:
                self.signals.append(signal.SIGTERM)
            if not summary.finished:
                raise Stopped(cell.name)
            trained = time.monotonic()
            scores = self._evaluate(cell, summary.student)
        ended = time.monotonic()
        shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
        return {
            "method": cell.method,
            "seed": cell.seed,
            "overrides": overrides,
            "scores": scores,
            "rollouts": rollout_numbers(run_dir / METRICS),
            # `elapsed_s` counts from the run's first start, `started` from its last resume
            "seconds": {"train": max(trained - started, summary.elapsed_s), "evaluation": ended - trained},
            "resumed": resume,
        }

    def _train_config(self, cell: Cell, overrides: Overrides) -> Config:
        """Return a cell's config for training. Its evaluations (`eval.every`) use the task's validation set only."""
        paths = {"eval": ""}
        if merged(self.study.base.get("eval", {}), overrides.get("eval", {})).get("every"):
            paths = {"eval": str(self.out / "task" / "valid.jsonl")} if self.study.task else {}
        if cell.method not in (TEACHER, WARM_UP) and self.study.warm_up is not None:
            paths["student"] = str(self._run_dir(Cell(WARM_UP, cell.seed)) / "student")
        elif self.study.task is not None:
            role = "teacher" if cell.method == TEACHER else "student"
            paths["student"] = str(self.out / "task" / f"{role}-init")
        return self._config({**overrides, "seed": cell.seed}, self._run_dir(cell), **paths)

    def _evaluate(self, cell: Cell, student: str) -> dict[str, float]:
        """Score a student on every test set, compared with the teacher except for the teacher itself."""
        scores: dict[str, float] = {}
        for name, changes in self.study.test_sets.items():
            if cell.method == TEACHER:
                changes = merged(changes, {**WITHOUT_TEACHER, "eval": {"metrics": [self.study.rank_by]}})
            config = self._config(changes, self.out / "evaluation", student=student)
            rows, prompts = evaluate_rows(config)
            of_set = scores_of(rows, prompts, config, self.study.group)
            scores |= {f"{name}/{key}" if name else key: value for key, value in of_set.items()}
        return over_test_sets(scores, list(self.study.test_sets))

    def _config(self, overrides: Overrides, run_dir: Path, **paths: str) -> Config:
        if self.study.task is not None:
            task = self.out / "task"
            paths = {"data": str(task / "train.jsonl"), "eval": str(task / "test.jsonl"), **paths}
        if self.study.teacher is not None:
            paths = {"teacher": str(self.out / TEACHER / "student"), **paths}
        return configured(self.study, overrides, run_dir, self.home, **paths)

    # --- cells on the disk -------------------------------------------------------------------------------------------

    @property
    def cells(self) -> Path:
        return self.out / "cells"

    def read(self, cell: Cell) -> dict[str, Any] | None:
        return read_cell(self.study, self.cells, cell)


def read_cell(study: Study, folder: Path, cell: Cell) -> dict[str, Any] | None:
    """Return a cell's result, or None. Raises ConfigError where the method of that name had other changes."""
    path = folder / f"{cell.name}.json"
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    overrides = study.methods.get(cell.method)
    if overrides is not None and result["overrides"] != json.loads(json.dumps(overrides)):
        raise ConfigError(
            f"methods.{cell.method} is not what {path} was made with ({' '.join(flat(result['overrides']))}); give "
            "the changed method another name, or remove its cells"
        )
    return result


def claim(study: Study, out: Path) -> None:
    """Write the study into its folder. Raises ConfigError where the folder belongs to another study."""
    path = out / "study.json"
    if not path.exists():
        if out.is_file() or (out.is_dir() and any(out.iterdir())):
            raise ConfigError(f"--out {out} exists and holds no study; choose a new folder")
        out.mkdir(parents=True, exist_ok=True)
        write_json_atomic(path, {"digest": study.digest, **study.model_dump(mode="json")})
        return
    other = json.loads(path.read_text(encoding="utf-8"))
    if other["digest"] != study.digest:
        now = study.model_dump(mode="json")
        changed = [key for key in now if key not in GROWS and other.get(key) != now[key]]
        raise ConfigError(
            f"--out {out} belongs to another study ({other['name']}; {', '.join(changed)} differ); only methods and "
            "seeds may be added to one that has begun: choose a new folder"
        )


def rollout_numbers(metrics: Path) -> dict[str, float]:
    """Return the number of generated tokens of the whole run and of its steps. `teacher_token_frac` is the teacher's
    share of the completions that both models generated; absent where there are none."""
    steps = [row for row in read_rows(metrics) if "loss/total" in row]
    numbers = {"tokens": sum(row["rollout/tokens"] for row in steps), "steps": len(steps)}
    if any("rollout/shared_tokens" in row for row in steps):
        numbers["teacher_token_frac"] = ratio(steps, "rollout/teacher_token_frac")
    return numbers
