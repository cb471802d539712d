"""A long run of tiny models while its processes are killed at random: is anything lost, and does memory stay flat?

In: a number of steps, a seed, how often something dies. Out: a table of every process's memory and its slope; faults,
seconds to recover; how full the replay was. Raises RuntimeError when a rollout was lost or stands twice in the history,
or more of them waited than may.

It is the real program on a private Ray cluster, with two workers that may be one version ahead, a replay that holds one
batch (so that it is full whenever the learner is slower, and empty whenever the workers are), and a checkpoint every 10
steps.
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
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from switchkd.tools.bench.process_stats import descendants, kilobytes
from switchkd.tools.bench.table import Spread, Table, surroundings

BATCH = 8
CHECKPOINT_EVERY = 10
MOST_WAITING = BATCH * (1 + CHECKPOINT_EVERY)
"""The replay's own room, and what was trained since the checkpoint to which a run goes back: it is given again."""
ROLES = {"rollout worker": "RolloutActor", "teacher": "TeacherActor", "learner rank": "LearnerActor",
         "replay": "ReplayActor"}  # fmt: skip
CALM = 10
"""Steps at the end of which no sample is taken."""
SETTLE = 0.25
"""The first part of a process's samples is left out of its slope: buffers and caches fill."""


@dataclass(slots=True)
class Fault:
    step: int  # after which it struck
    role: str
    recover_s: float = 0.0  # until a step beyond it was done


@dataclass(slots=True)
class FaultInjector:
    """Looks at a run from outside: kills on schedule, and takes samples of memory."""

    run_dir: Path
    due: list[Fault]
    rng: random.Random
    last_sampled: int
    """Step from which no sample is taken: Ray ends a process that asks a cluster which has gone."""
    faults: list[Fault] = field(default_factory=list)
    samples: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # process: (steps trained, MB)
    _stop: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        """Until `stop`: a thread's work."""
        trained, seen, struck = 0, -1, 0.0
        while not self._stop.wait(0.1):
            step = last_step(self.run_dir / "metrics.jsonl")
            if step is None or step == seen:
                continue
            seen, trained = step, trained + 1
            if self.faults and struck and step > self.faults[-1].step:
                self.faults[-1].recover_s, struck = time.monotonic() - struck, 0.0
            if trained % 5 == 0 and step < self.last_sampled:
                self._sample(trained)
            if self.due and not struck and step >= self.due[0].step and self._strike(self.due[0], step):
                self.due.pop(0)
                struck = time.monotonic()

    def stop(self) -> None:
        self._stop.set()

    def _strike(self, fault: Fault, step: int) -> bool:
        pids = [pid for pid, role in actor_processes().items() if role == fault.role]
        if not pids:
            return False
        fault.step = step
        with suppress(ProcessLookupError):
            os.kill(self.rng.choice(sorted(pids)), signal.SIGKILL)
        self.faults.append(fault)
        return True

    def _sample(self, trained: int) -> None:
        from switchkd.tools.bench.ray_cluster import object_store_mb

        processes = {f"{role} {pid}": pid for pid, role in actor_processes().items()} | {"driver": os.getpid()}
        for name, pid in processes.items():
            self.samples.setdefault(name, []).append((trained, kilobytes(pid, "RssAnon") / 2**10))
        with suppress(Exception):  # at the end the cluster goes
            now = object_store_mb()
            self.samples.setdefault("object store", []).append((trained, now))


def run(*, steps: int, seed: int, every: int, keep: Path | None = None) -> Table:
    """`every`: steps between faults, on average. `keep`: a folder for the run, else it is removed again."""
    from switchkd.actors import process_setup

    process_setup.for_private_cluster()
    from switchkd.train import train

    with tempfile.TemporaryDirectory(prefix="switchkd-soak-") as place:
        folder = keep or Path(place)
        config = config_of(folder, steps, seed)
        rng = random.Random(seed)
        havoc = FaultInjector(folder / "run", schedule(steps, every, rng), rng, last_sampled=steps - CALM)
        thread = threading.Thread(target=havoc.watch, name="havoc", daemon=True)
        thread.start()
        started = time.monotonic()
        try:
            train(config)
        finally:
            havoc.stop()
            thread.join()
        elapsed = time.monotonic() - started
        lost, twice = account(folder / "run" / "rollouts.jsonl", steps * BATCH)
        waiting = queue(folder / "run" / "metrics.jsonl")
    if max(waiting) > MOST_WAITING:
        raise RuntimeError(f"{max(waiting)} rollouts waited in a replay where {MOST_WAITING} may at most")
    if lost or twice:
        raise RuntimeError(f"of {steps * BATCH} rollouts {lost} were lost and {twice} stand twice in the history")
    return _table(steps, seed, elapsed, havoc, waiting)


def schedule(steps: int, every: int, rng: random.Random) -> list[Fault]:
    """Which role dies after which step: every role in turn, in an order and at distances from the seed."""
    found, step = [], every // 2
    while step < steps - 1:
        for role in rng.sample(list(ROLES), len(ROLES)):
            found.append(Fault(step, role))
            step += rng.randint(max(every // 2, 1), every + every // 2)
    return [fault for fault in found if fault.step < steps - 1]


def account(path: Path, num: int) -> tuple[int, int]:
    """Rollouts that the history lacks, and those that stand in it more than once."""
    with path.open(encoding="utf-8") as lines:
        ids = [json.loads(line)["rollout_id"] for line in lines]
    return len(set(range(num)) - set(ids)), len(ids) - len(set(ids))


def queue(path: Path) -> list[int]:
    """Rollouts that waited in the replay when a step was over, by step."""
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [int(row["replay/waiting"]) for row in rows if "replay/waiting" in row]


def last_step(path: Path) -> int | None:
    """Of a file that is being written."""
    with suppress(OSError, ValueError, KeyError, IndexError), path.open("rb") as file:
        file.seek(max(path.stat().st_size - 4096, 0))
        return int(json.loads(file.read().rpartition(b"\n")[0].rpartition(b"\n")[2])["step"])
    return None


def actor_processes() -> dict[int, str]:
    """Process ids of this run's actors, and their roles. Ray names them `ray::RolloutActor`."""
    found = {}
    for pid in descendants():
        with suppress(OSError):
            name = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
            role = next((role for role, actor in ROLES.items() if re.match(f"ray::{actor}", name)), None)
            if role:
                found[pid] = role
    return found


def slope(samples: Iterable[tuple[int, float]]) -> float:
    """MB per 100 steps: the least-squares line through what follows the settling; NaN for fewer than three."""
    points = list(samples)
    points = points[int(len(points) * SETTLE) :]
    if len(points) < 3:
        return float("nan")
    return 100 * statistics.linear_regression(*zip(*points, strict=True)).slope


def _table(steps: int, seed: int, elapsed: float, havoc: FaultInjector, waiting: Sequence[int]) -> Table:
    longest: dict[str, tuple[str, list[tuple[int, float]]]] = {}
    for name, samples in havoc.samples.items():
        role = name.rstrip("0123456789").strip()
        if role not in longest or len(samples) > len(longest[role][1]):
            longest[role] = (name, samples)
    rows: list[Mapping[str, Any]] = [
        {
            "longest-lived process": role,
            "samples": len(samples),
            "first, MB": round(samples[0][1], 1),
            "last, MB": round(samples[-1][1], 1),
            "slope, MB per 100 steps": round(slope(samples), 2),
        }
        for role, (_, samples) in longest.items()
    ]
    told = ", ".join(_of_role(role, [fault for fault in havoc.faults if fault.role == role]) for role in ROLES)
    return Table(
        title=f"Soak of {steps} steps", columns=tuple(rows[0]), rows=tuple(rows),
        notes=surroundings("cpu", "float32", steps=steps, seed=seed, batch=BATCH, elapsed_s=round(elapsed, 1)),
        remarks=(
            f"{len(havoc.faults)} processes were killed: {told}; in brackets seconds until a step beyond it was done.",
            f"{steps * BATCH} rollouts: none lost, none twice in the history. {elapsed:.0f} s in all.",
            f"The replay has room for {BATCH} rollouts, where a run goes back also for all since its checkpoint: "
            f"at most {max(waiting)} waited after a step; it was full after {sum(num >= BATCH for num in waiting)} "
            f"steps and empty after {waiting.count(0)}.",
        ),
    )  # fmt: skip


def _of_role(role: str, faults: Sequence[Fault]) -> str:
    recovered = [fault.recover_s for fault in faults if fault.recover_s]
    return f"{len(faults)} of role {role}{f' ({Spread.of(recovered)})' if recovered else ''}"


# --- a tiny run ------------------------------------------------------------------------------------------------------


def config_of(folder: Path, steps: int, seed: int) -> Any:
    """Models, data and config of a run in `folder`."""
    from switchkd.config.loader import parse

    words = [f"w{i}" for i in range(90)]
    for name, layers, number in (("teacher", 2, 1), ("student", 1, 2)):
        _save_model(folder / name, words, layers, seed * 10 + number)
    rng = random.Random(seed)
    rows = [{"prompt": " ".join(rng.choices(words, k=6)), "reference": " ".join(rng.choices(words, k=8))}
            for _ in range(64)]  # fmt: skip
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return parse(
        {
            "seed": seed,
            "run": {"dir": str(folder / "run"), "watchdog_s": 120},
            "teacher": {"path": str(folder / "teacher"), "replicas": 2},
            "student": {"path": str(folder / "student")},
            "data": {"path": str(folder / "data.jsonl"), "max_prompt_tokens": 16, "max_reference_tokens": 16},
            "rollout": {"rule": {"type": "random", "prob": 0.3}, "num_workers": 2, "batch_size": 4,
                        "max_new_tokens": 12, "drafter": "student", "max_draft_tokens": 4},
            "replay": {"max_staleness": 1, "capacity": BATCH},
            "learner": {"lr": 1e-3, "scheduler": "constant"},
            "train": {"num_steps": steps, "batch_size": BATCH, "checkpoint_every": CHECKPOINT_EVERY,
                      "mix": {"rollout": 0.75, "dataset": 0.25}},
            "metrics": {"log_every": max(steps // 10, 1)},
            "resources": {role: {"threads": 1} for role in ("teacher", "rollout", "learner")},
            "cluster": {"object_store_gb": 0.2},
        }
    )  # fmt: skip


def _save_model(folder: Path, words: list[str], layers: int, seed: int) -> None:
    """A random Llama of a few thousand weights, with a tokenizer of whole words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(vocab), hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
                bos_token_id=None, eos_token_id=1,
            )
        )  # fmt: skip
    model.save_pretrained(folder)
