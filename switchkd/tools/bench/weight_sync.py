"""Times a weight version: packed by the learner, put into the store, fetched and loaded by a rollout worker.

In: a student's folder. Out: seconds of each part, GB/s, and the pause of the rollouts: in one process the whole time,
on Ray while the worker fetches and loads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from switchkd.tools.bench.models import resolve
from switchkd.tools.bench.table import Options, Spread, Table, take_turns

ONE_PROCESS, ON_RAY = "one process", "Ray object store"
PARTS = ("pack", "put", "fetch", "load")
TOTAL = "total"


def run(options: Options, teacher: str, student: str) -> Table:
    from switchkd.actors import process_setup

    folder = resolve(teacher, student).student
    process_setup.for_private_cluster()
    from switchkd.tools.bench.ray_cluster import WeightReceiver, WeightSender, cluster, remote_pair

    model = (folder, options.dtype, options.device, options.threads)
    sender, receiver = WeightSender(*model), WeightReceiver(*model)
    packed, _ = sender.publish(to_store=False)
    num_bytes = sum(bucket.nbytes for bucket in packed.buckets)
    with cluster(2, object_store_mb=max(100, 4 * num_bytes // 2**20)):
        sides = {
            ONE_PROCESS: partial(_send, partial(sender.publish, to_store=False), receiver.receive),
            ON_RAY: partial(_send, *remote_pair(*model)),
        }
        seconds = take_turns(sides, options.repeats, warmup=0 if options.smoke else 2)
    return Table(
        title="A weight version's way",
        rows=[_row(name, measured, num_bytes) for name, measured in seconds.items()],
        notes=options.notes(student=Path(folder).name, megabytes=num_bytes / 1e6),
        remarks=("GB/s: from the call to publish until the worker has the weights, checksums and calls included.",),
    )


def _send(
    publish: Callable[[], tuple[Any, dict[str, float]]], receive: Callable[[Any], dict[str, float]]
) -> dict[str, float]:
    """Publish and load one version. Returns the seconds of each part and of all."""
    start = time.perf_counter()
    weights, sent = publish()
    parts = {**sent, **receive(weights)}
    return {**parts, TOTAL: time.perf_counter() - start}


def _row(name: str, seconds: Sequence[dict[str, float]], num_bytes: int) -> dict[str, Any]:
    total = Spread.from_values([parts[TOTAL] for parts in seconds])
    paused = PARTS if name == ONE_PROCESS else ("fetch", "load")
    return {
        "way": name,
        **{f"{part}, s": Spread.from_values([parts[part] for parts in seconds]) for part in PARTS},
        "published to loaded, s": total,
        "GB/s": total.map(lambda s: num_bytes / 1e9 / s),
        "rollouts paused, s": Spread.from_values([sum(parts[part] for part in paused) for parts in seconds]),
    }
