"""The way of a weight version: packed by the learner, put, pulled, loaded by a rollout worker that then writes with it.

In: a student's folder. Out: seconds of each part, GB/s, and how long rollouts stood still: in one process all the time,
on Ray while the worker pulls and loads.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from switchkd.tools.bench.table import Spread, Table, paired, surroundings

ALONE, ON_RAY = "one process", "Ray object store"
TOTAL = "total"
PARTS = ("pack", "put", "pull", "load")
WARMUP = 2


def run(*, student: str, smoke: bool, repeats: int, device: str, dtype: str, threads: int | None) -> Table:
    from switchkd.actors import process_setup

    process_setup.for_private_cluster()
    from switchkd.tools.bench.ray_cluster import Learner, Reader, TwoProcesses, cluster

    threads = threads or os.cpu_count() or 1
    learner, reader = Learner(student, dtype, device, threads), Reader(student, dtype, device, threads)
    num_bytes = sum(bucket.nbytes for bucket in learner.publish(0)[0].buckets)

    def alone() -> dict[str, float]:
        bundle, pack_s = learner.publish(1)
        return {"pack": pack_s, "put": 0.0, "pull": 0.0, "load": reader.load(bundle)}

    parts: dict[str, list[dict[str, float]]] = {ALONE: [], ON_RAY: []}
    with cluster(2, object_store_mb=max(100, 4 * num_bytes // 2**20)):
        on_ray = TwoProcesses(student, dtype, device, threads)
        paired(
            {ALONE: _noted(alone, parts[ALONE]), ON_RAY: _noted(on_ray.publish, parts[ON_RAY])},
            repeats,
            0 if smoke else WARMUP,
        )
    rows = [_row(name, found[-repeats:], num_bytes) for name, found in parts.items()]
    notes = surroundings(
        device, dtype, threads=threads, student=Path(student).name, megabytes=num_bytes / 1e6, repeats=repeats
    )
    remarks = (
        "GB/s: from the call to publish until the worker can write with the weights, checksums and calls included.",
    )
    return Table(title="A weight version's way", columns=tuple(rows[0]), rows=tuple(rows), notes=notes, remarks=remarks)


def _noted(function: Callable[[], dict[str, float]], notes: list[dict[str, float]]) -> Callable[[], float]:
    def side() -> float:
        start = time.perf_counter()
        parts = function()
        notes.append({**parts, TOTAL: time.perf_counter() - start})
        return notes[-1][TOTAL]

    return side


def _row(name: str, found: list[dict[str, float]], num_bytes: int) -> dict[str, Any]:
    total = Spread.of([each[TOTAL] for each in found])
    still = PARTS if name == ALONE else ("pull", "load")
    return {
        "way": name,
        **{f"{part}, s": Spread.of([each[part] for each in found]) for part in PARTS},
        "published to loaded, s": total,
        "GB/s": total.map(lambda s: num_bytes / 1e9 / s),
        "rollouts stood still, s": Spread.of([sum(each[part] for part in still) for each in found]),
    }
