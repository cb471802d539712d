"""Runs tiny models for many steps while their processes are killed at random, and checks rollouts and memory.

In: a number of steps, a seed, how often a process is killed. Out: a table of every process's memory and its slope;
faults and seconds to recover; how full the replay was. Raises RuntimeError for a rollout that is lost or in the history
twice, and for a replay above its capacity.

The run uses a private Ray cluster, two workers that may be one version ahead, a replay of one batch (full whenever the
learner is slower, empty whenever the workers are), and a checkpoint every 10 steps.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from switchkd.tools.bench.process_stats import descendants, kilobytes
from switchkd.tools.bench.study.arithmetic_task import write_task
from switchkd.tools.bench.table import Options, Spread, Table

BATCH = 8
CHECKPOINT_EVERY = 10
MOST_WAITING = BATCH * (1 + CHECKPOINT_EVERY)
"""The replay's capacity, and the rollouts trained since a checkpoint: a run that resumes from it gets them again."""
ROLES = {
    "rollout worker": "RolloutActor",
    "teacher": "TeacherActor",
    "learner rank": "LearnerActor",
    "replay": "ReplayActor",
}


@dataclass(slots=True)
class Fault:
    step: int  # the last one before the process was killed
    role: str
    recover_s: float = 0.0  # until a later step was done


@dataclass(slots=True)
class FaultInjector:
    """Kills a run's processes on schedule, and samples their memory."""

    run_dir: Path
    due: list[Fault]
    rng: random.Random
    last_sampled: int
    faults: list[Fault] = field(default_factory=list)
    samples: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # process: (steps trained, MB)
    stopped: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        """Follow the run until `stopped` is set; runs in a thread."""
        num_trained, last, killed_at = 0, -1, 0.0
        while not self.stopped.wait(0.1):
            step = last_step(self.run_dir / "metrics.jsonl")
            if step is None or step == last:
                continue
            last, num_trained = step, num_trained + 1
            if killed_at and step > self.faults[-1].step:
                self.faults[-1].recover_s, killed_at = time.monotonic() - killed_at, 0.0
            if num_trained % 5 == 0 and step < self.last_sampled:
                self._sample(num_trained)
            if self.due and not killed_at and step >= self.due[0].step and self._kill(self.due[0], step):
                self.due.pop(0)
                killed_at = time.monotonic()

    def _kill(self, fault: Fault, step: int) -> bool:
        pids = [pid for pid, role in actor_processes().items() if role == fault.role]
        if not pids:
            return False
        fault.step = step
        with suppress(ProcessLookupError):
            os.kill(self.rng.choice(sorted(pids)), signal.SIGKILL)
        self.faults.append(fault)
        return True

    def _sample(self, num_trained: int) -> None:
        from switchkd.tools.bench.ray_cluster import object_store_mb

        processes = {f"{role} {pid}": pid for pid, role in actor_processes().items()} | {"driver": os.getpid()}
        for name, pid in processes.items():
            self.samples.setdefault(name, []).append((num_trained, kilobytes(pid, "RssAnon") / 2**10))
        with suppress(Exception):  # at the end the cluster shuts down
            self.samples.setdefault("object store", []).append((num_trained, object_store_mb()))


def run(options: Options, *, steps: int, seed: int, every: int) -> Table:
    """Run for `steps` steps, with a fault every `every` steps on average."""
    from switchkd.actors import process_setup

    process_setup.for_private_cluster()
    from switchkd.train import train

    with tempfile.TemporaryDirectory(prefix="switchkd-soak-") as parent:
        run_dir = Path(parent) / "run"
        config = soak_config(Path(parent), steps, seed)
        rng = random.Random(seed)
        # no sample in the last steps: Ray ends a process that calls a cluster which has shut down
        injector = FaultInjector(run_dir, schedule(steps, every, rng), rng, last_sampled=steps - 10)
        thread = threading.Thread(target=injector.watch, name="fault injector", daemon=True)
        thread.start()
        started = time.monotonic()
        try:
            train(config)
        finally:
            injector.stopped.set()
            thread.join()
        elapsed = time.monotonic() - started
        num_lost, num_double = account(run_dir / "rollouts.jsonl", steps * BATCH)
        waiting = queue(run_dir / "metrics.jsonl")
    if max(waiting) > MOST_WAITING:
        raise RuntimeError(f"{max(waiting)} rollouts waited in a replay where {MOST_WAITING} may at most")
    if num_lost or num_double:
        counts = f"{num_lost} were lost and {num_double} are in the history twice"
        raise RuntimeError(f"of {steps * BATCH} rollouts {counts}")
    return Table(
        title=f"Soak of {steps} steps",
        rows=_rows(injector.samples),
        notes=options.notes(steps=steps, seed=seed, batch=BATCH, elapsed_s=round(elapsed, 1)),
        remarks=_remarks(steps, elapsed, injector.faults, waiting),
    )


def schedule(steps: int, every: int, rng: random.Random) -> list[Fault]:
    """Draw the step and the role of each fault: every role once before any is killed again."""
    faults, step = [], every // 2
    while step < steps - 1:
        for role in rng.sample(list(ROLES), len(ROLES)):
            faults.append(Fault(step, role))
            step += rng.randint(max(every // 2, 1), every + every // 2)
    return [fault for fault in faults if fault.step < steps - 1]


def account(path: Path, num: int) -> tuple[int, int]:
    """Count the rollouts missing in the history, and the lines that repeat one."""
    with path.open(encoding="utf-8") as lines:
        ids = [json.loads(line)["rollout_id"] for line in lines]
    return len(set(range(num)) - set(ids)), len(ids) - len(set(ids))


def queue(path: Path) -> list[int]:
    """Return the number of rollouts that wait in the replay at each step's end."""
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [int(row["replay/waiting"]) for row in rows if "replay/waiting" in row]


def last_step(path: Path) -> int | None:
    """Read the last step of a file that is being written; None without one."""
    with suppress(OSError, ValueError, KeyError, IndexError), path.open("rb") as file:
        file.seek(max(path.stat().st_size - 4096, 0))
        return int(json.loads(file.read().rpartition(b"\n")[0].rpartition(b"\n")[2])["step"])
    return None


def actor_processes() -> dict[int, str]:
    """Map the process ids of this run's actors to their roles. Ray names the processes `ray::RolloutActor`."""
    roles = {}
    for pid in descendants():
        with suppress(OSError):
            name = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
            role = next((role for role, actor in ROLES.items() if re.match(f"ray::{actor}", name)), None)
            if role:
                roles[pid] = role
    return roles


def slope(samples: Sequence[tuple[int, float]]) -> float:
    """Fit a least-squares line, and return MB per 100 steps; NaN for fewer than three samples."""
    points = samples[len(samples) // 4 :]  # in the first quarter buffers and caches fill
    if len(points) < 3:
        return float("nan")
    return 100 * statistics.linear_regression(*zip(*points, strict=True)).slope


def _rows(samples: Mapping[str, list[tuple[int, float]]]) -> list[dict[str, Any]]:
    """Return one row for each role: its process with the most samples."""
    longest: dict[str, list[tuple[int, float]]] = {}
    for process, measured in samples.items():
        role = process.rstrip("0123456789").strip()
        longest[role] = max(measured, longest.get(role, []), key=len)
    return [
        {
            "longest-lived process": role,
            "samples": len(measured),
            "first, MB": round(measured[0][1], 1),
            "last, MB": round(measured[-1][1], 1),
            "slope, MB per 100 steps": round(slope(measured), 2),
        }
        for role, measured in longest.items()
    ]


def _remarks(steps: int, elapsed: float, faults: Sequence[Fault], waiting: Sequence[int]) -> tuple[str, ...]:
    killed = ", ".join(_killed(role, [fault for fault in faults if fault.role == role]) for role in ROLES)
    return (
        f"{len(faults)} processes were killed: {killed}; in brackets seconds until a step beyond it was done.",
        f"{steps * BATCH} rollouts: none lost, none twice in the history. {elapsed:.0f} s in all.",
        f"The replay holds {BATCH} rollouts, and after a run has gone back also all since its checkpoint: "
        f"at most {max(waiting)} waited after a step; it was full after {sum(num >= BATCH for num in waiting)} "
        f"steps and empty after {waiting.count(0)}.",
    )


def _killed(role: str, faults: Sequence[Fault]) -> str:
    seconds = [fault.recover_s for fault in faults if fault.recover_s]
    return f"{len(faults)} of role {role}{f' ({Spread.from_values(seconds)})' if seconds else ''}"


def soak_config(folder: Path, steps: int, seed: int) -> Any:
    """Write models and data of a run in `folder`, and return its config."""
    from switchkd.config.loader import parse

    task = folder / "task"
    teacher, student = ({"layers": layers, "hidden": 32, "heads": 4} for layers in (2, 1))
    write_task(task, digits=(2,), num_train=64, num_test=1, num_valid=1, seed=seed, teacher=teacher, student=student)
    return parse(
        {
            "seed": seed,
            "run": {"dir": str(folder / "run"), "watchdog_s": 120},
            "teacher": {"path": str(task / "teacher-init"), "replicas": 2},
            "student": {"path": str(task / "student-init")},
            "data": {"path": str(task / "train.jsonl"), "max_prompt_tokens": 16, "max_reference_tokens": 32},
            "rollout": {
                "rule": {"type": "random", "prob": 0.3},
                "num_workers": 2,
                "batch_size": 4,
                "max_new_tokens": 12,
                "drafter": "student",
                "max_draft_tokens": 4,
            },
            "replay": {"max_staleness": 1, "capacity": BATCH},
            "learner": {"lr": 1e-3, "scheduler": "constant"},
            "train": {
                "num_steps": steps,
                "batch_size": BATCH,
                "checkpoint_every": CHECKPOINT_EVERY,
                "mix": {"rollout": 0.75, "dataset": 0.25},
            },
            "metrics": {"log_every": max(steps // 10, 1)},
            "resources": {role: {"threads": 1} for role in ("teacher", "rollout", "learner")},
            "cluster": {"object_store_gb": 0.2},
        }
    )
