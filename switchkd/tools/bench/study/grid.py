"""A study is run cell by cell: teacher and warmed-up students once, then each cell as an ordinary run, then its exam.

In: a Study and a folder. Out, in the folder:

    study.json                whose folder it is
    task/                     data and untrained models, where the study makes them
    teacher/, warm-up-seed1/  runs that come before
    cells/NAME-seed1.json     one file per finished cell, written beside and renamed
    runs/NAME-seed1/          the cell's run, without its checkpoints; NAME-seed1.log is what it said

Killed anywhere, the same command goes on: finished cells are read, the others run. A run with a checkpoint is resumed,
one without begins anew. A cell that fails does not keep the others from running, a warm-up only those of its seed.
"""

from __future__ import annotations

import json
import shutil
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from switchkd.config.errors import ConfigError, with_type
from switchkd.config.schema import Config
from switchkd.controller.run_lock import RunLock
from switchkd.data.atomic_files import write_json_atomic
from switchkd.tools.bench.study.scores import over_exams
from switchkd.tools.bench.study.spec import TEACHER, WARM_UP, Cell, Overrides, Study, cells, configured, flat

Say = Callable[[str], None]


class Stopped(Exception):
    """The grid was told to stop (SIGTERM); its text names the first cell that is not there."""


class Failed(Exception):
    """Some cells have no result; its text names them and their logs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """A study in its folder. `home` is where the study file's relative paths start."""

    study: Study
    home: Path
    out: Path
    say: Say
    heard: list[int] = field(default_factory=list)  # signals that ask to stop

    def run(self, methods: Sequence[str] = (), wanted: Sequence[str] = ()) -> None:
        """All chosen cells that are not there yet. Raises ConfigError, Stopped, and at the end Failed."""
        chosen = cells(self.study, methods, wanted)
        claim(self.study, self.out)
        lock = RunLock(self.out)
        try:
            with self._listening():
                self._run(chosen)
        finally:
            lock.release()

    @contextmanager
    def _listening(self) -> Iterator[None]:
        previous = signal.signal(signal.SIGTERM, self._hear)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.heard.append(number)

    def _run(self, chosen: Sequence[Cell]) -> None:
        missing = [cell for cell in chosen if self.read(cell) is None]
        self.say(f"{self.study.name}: {len(chosen)} cells, {len(chosen) - len(missing)} of them are there")
        self._write_task()
        self._teacher()
        took: list[float] = []
        failed: dict[Cell, str] = {}
        for i, cell in enumerate(missing):
            started = time.monotonic()
            at_work = start = Cell(WARM_UP, cell.seed)
            if start in failed:
                continue
            try:  # a night's work is not to end with one method, or one seed, that diverges
                if self._warm_up_run and self.read(start) is None:
                    self._warm_up(start)
                    started = time.monotonic()
                if self.heard:  # behind its last step a run ends as it would have
                    raise Stopped("; ".join([cell.name, *failed.values()]))
                at_work = cell
                told = self._cell(cell)
            except (ConfigError, Stopped):
                raise
            except Exception as error:
                failed[at_work] = self._failed(at_work, error)
                self.say(f"{i + 1}/{len(missing)} {failed[at_work]}")
                continue
            took.append(time.monotonic() - started)
            left = statistics.fmean(took) * (len(missing) - i - 1)
            scored = " ".join(f"{name} {told['scores'][name]:.4g}" for name in self._headline(told["scores"]))
            self.say(f"{i + 1}/{len(missing)} {cell.name}  {scored}  {took[-1]:.0f} s  {_clock(left)} left")
        if failed:
            raise Failed("; ".join(failed.values()))

    def _failed(self, cell: Cell, error: Exception) -> str:
        log = (self.out if cell.method == WARM_UP else self.out / "runs") / f"{cell.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            traceback.print_exception(error, file=file)
        return f"{cell.name} ({with_type(error)}; {log})"

    def _headline(self, scores: dict[str, float]) -> list[str]:
        return [name for name in (self.study.rank_by, "kl_greedy", "length") if name in scores]

    # ── what comes before ──────────────────────────────────────────────────────────────────────────────────────────

    def _write_task(self) -> None:
        task = self.study.task
        if task is None or (self.out / "task").is_dir():
            return
        from switchkd.tools.bench.study import arithmetic_task

        arithmetic_task.write_task(
            self.out / "task", digits=task.digits, num_train=task.num_train, num_test=task.num_test,
            num_valid=task.num_valid, seed=task.seed, teacher=task.teacher.model_dump(),
            student=task.student.model_dump(),
        )  # fmt: skip

    def _teacher(self) -> None:
        cell = Cell(TEACHER, 0)
        if self.study.teacher is None or self.read(cell) is not None:
            return
        paths = {"student": str(self.out / "task" / "teacher-init")} if self.study.task else {}
        told = self._trained(cell, self.study.teacher, self.out / TEACHER, paths)
        score = told["scores"][self.study.rank_by]
        if score < self.study.teacher_at_least:
            raise ConfigError(
                f"the teacher has {self.study.rank_by} {score:.4g}, below teacher_at_least="
                f"{self.study.teacher_at_least:g}; train it longer (teacher.train.num_steps) into another --out"
            )
        self._keep(cell, told)
        self.say(f"teacher  {self.study.rank_by} {score:.4g}  {told['seconds']['train']:.0f} s")

    @property
    def _warm_up_run(self) -> bool:
        return self.study.warm_up is not None

    def _warm_up(self, cell: Cell) -> None:
        paths = {"student": str(self.out / "task" / "student-init")} if self.study.task else {}
        overrides = self.study.warm_up or {}
        told = self._trained(cell, overrides, self.out / cell.name, paths)
        self._keep(cell, told)
        scored = " ".join(f"{name} {told['scores'][name]:.4g}" for name in self._headline(told["scores"]))
        self.say(f"{cell.name}  {scored}  {told['seconds']['train']:.0f} s")

    # ── one run ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _cell(self, cell: Cell) -> dict[str, Any]:
        start = str(self.out / f"{WARM_UP}-seed{cell.seed}" / "student") if self._warm_up_run else ""
        if not start and self.study.task:
            start = str(self.out / "task" / "student-init")
        overrides = self.study.methods[cell.method]
        told = self._trained(cell, overrides, self.out / "runs" / cell.name, {"student": start} if start else {})
        self._keep(cell, told)
        return told

    def _trained(self, cell: Cell, overrides: Overrides, run_dir: Path, paths: dict[str, str]) -> dict[str, Any]:
        """The run, and what its student is worth."""
        from switchkd.train import train

        config = self._training({**overrides, "seed": cell.seed}, run_dir, paths)
        resume = (run_dir / "checkpoints" / "LATEST").exists()
        if not resume:
            shutil.rmtree(run_dir, ignore_errors=True)
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        with run_dir.with_name(f"{run_dir.name}.log").open("w") as log, redirect_stdout(log), redirect_stderr(log):
            summary = train(config, resume=resume)
            signal.signal(signal.SIGTERM, self._hear)  # Ray has a handler of its own
            if summary.told_to_stop:
                self.heard.append(signal.SIGTERM)
            if not summary.finished:
                raise Stopped(cell.name)
            trained = time.monotonic()
            scores: dict[str, float] = {}
            for exam, changes in self.study.exams.items():
                scores |= self._exam(exam, changes, cell, {**paths, "student": summary.student})
            scores = over_exams(scores, list(self.study.exams))
        ended = time.monotonic()
        shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
        return {
            "method": cell.method,
            "seed": cell.seed,
            "overrides": overrides,
            "scores": scores,
            "rollouts": rollout_numbers(run_dir / "metrics.jsonl"),
            # A resumed run's own clock counts from its first start, this process's only from the last one.
            "seconds": {"train": max(trained - started, summary.elapsed_s), "exam": ended - trained},
            "resumed": resume,
        }

    def _training(self, overrides: Overrides, run_dir: Path, paths: dict[str, str]) -> Config:
        """Nothing is evaluated on the way, unless the method lives on it; then never on the exam of a task."""
        if not {**self.study.base.get("eval", {}), **overrides.get("eval", {})}.get("every"):
            return self._config(overrides, run_dir, {**paths, "eval": ""})
        valid = {"eval": str(self.out / "task" / "valid.jsonl")} if self.study.task else {}
        return self._config(overrides, run_dir, {**paths, **valid})

    def _exam(self, name: str, changes: Overrides, cell: Cell, paths: dict[str, str]) -> dict[str, float]:
        """Beside the teacher, but for the teacher itself. Every student of the study takes the same."""
        from switchkd.tools.bench.study.scores import scores_of
        from switchkd.tools.offline import evaluate_rows

        if cell.method == TEACHER:
            changes = {
                **changes,
                **_WITHOUT_TEACHER,
                "eval": {**changes.get("eval", {}), "metrics": [self.study.rank_by]},
            }
        config = self._config(changes, self.out / "exam", paths)
        rows, prompts = evaluate_rows(config)
        found = scores_of(rows, prompts, config, self.study.group)
        return {f"{name}/{key}" if name else key: value for key, value in found.items()}

    def _config(self, overrides: Overrides, run_dir: Path, paths: dict[str, str]) -> Config:
        if self.study.task is not None:
            task = self.out / "task"
            paths = {"data": str(task / "train.jsonl"), "eval": str(task / "test.jsonl"), **paths}
        if self.study.teacher is not None:
            paths = {"teacher": str(self.out / TEACHER / "student"), **paths}
        return configured(self.study, overrides, run_dir, self.home, **paths)

    # ── cells on the disk ──────────────────────────────────────────────────────────────────────────────────────────

    def _path(self, cell: Cell) -> Path:
        return self.out / "cells" / f"{cell.name}.json"

    def _keep(self, cell: Cell, told: dict[str, Any]) -> None:
        self._path(cell).parent.mkdir(exist_ok=True)
        write_json_atomic(self._path(cell), told)

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """None while the cell is to be run. ConfigError where it was run with another method of that name."""
        path = self._path(cell)
        if not path.exists():
            return None
        told = json.loads(path.read_text(encoding="utf-8"))
        own = self.study.methods.get(cell.method)
        if own is not None and told["overrides"] != json.loads(json.dumps(own)):
            raise ConfigError(
                f"methods.{cell.method} is not what {path} was made with ({' '.join(flat(told['overrides']))}); give "
                "the changed method another name, or remove its cells"
            )
        return told


_WITHOUT_TEACHER: Overrides = {"learner": {"loss": {"type": "cross_entropy"}}, "train": {"mix": {"dataset": 1.0}}}


def claim(study: Study, out: Path) -> None:
    """The folder is this study's, from now on. ConfigError where it is another's."""
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
        changed = [key for key in now if key not in ("methods", "seeds", "main") and other.get(key) != now[key]]
        raise ConfigError(
            f"--out {out} belongs to another study ({other['name']}; {', '.join(changed)} differ); only methods and "
            "seeds may be added to one that has begun: choose a new folder"
        )


def rollout_numbers(metrics: Path) -> dict[str, float]:
    """Who wrote what, over the whole run: tokens of both models (those of the data set do not count), and the teacher's
    share of them."""
    with metrics.open(encoding="utf-8") as lines:
        steps = [row for row in map(json.loads, lines) if "loss/total" in row]
    student = sum(row["rollout/student_tokens"] for row in steps)
    teacher = sum(row["rollout/teacher_tokens"] for row in steps)
    return {"tokens": student + teacher, "teacher_frac": teacher / max(student + teacher, 1), "steps": len(steps)}


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
