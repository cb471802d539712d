"""Autoscaling decisions on made-up measurements and on a simulated queue."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from switchkd.actors.autoscaling import ADD_LOOKS, DRAIN_LOOKS, Load, decide
from switchkd.config.errors import ConfigError
from switchkd.config.loader import parse
from switchkd.config.schema import ReplicaRange

SPAN = ReplicaRange(min=1, max=4)


def load(num: int = 2, busy: float = 0.9, queue: float = 1.0, wait: float = 0.5) -> Load:
    return Load(num=num, busy_frac=busy, queue=queue, wait_frac=wait)


CROWDED, IDLE, FAIR = load(), load(busy=0.2, queue=0.0, wait=0.0), load(busy=0.7, queue=0.2, wait=0.15)


def test_adds_after_three_crowded_looks():
    """A process is added after ADD_LOOKS crowded looks in a row, unless the pool has its largest size."""
    assert [decide([CROWDED] * n, SPAN) for n in range(ADD_LOOKS + 1)] == [0] * ADD_LOOKS + [1]
    assert decide([CROWDED, FAIR, *[CROWDED] * (ADD_LOOKS - 1)], SPAN) == 0
    assert decide([load(num=4)] * 9, SPAN) == 0


def test_drains_after_ten_idle_looks():
    """A process is drained after DRAIN_LOOKS idle looks in a row, unless the pool has its smallest size."""
    assert [decide([IDLE] * n, SPAN) for n in (0, DRAIN_LOOKS - 1, DRAIN_LOOKS)] == [0, 0, -1]
    assert decide([IDLE] * 4 + [FAIR] + [IDLE] * (DRAIN_LOOKS - 1), SPAN) == 0
    assert decide([load(num=1, busy=0.0, queue=0, wait=0)] * 20, SPAN) == 0


@pytest.mark.parametrize(
    ("one", "step"),
    [
        (load(queue=0.4), 0),  # a short queue
        (load(wait=0.2), 0),  # short waits
        (load(busy=0.31, queue=0.05, wait=0.05), 0),  # one alone would be busy 62% of the time
        (load(busy=0.29, queue=0.05, wait=0.05), -1),
        (load(busy=0.1, queue=0.2, wait=0.05), 0),  # a queue although idle
        (load(num=5), -1),  # above the largest size
        (load(num=0, busy=0, queue=0, wait=0), 1),
    ],
)
def test_thresholds_and_limits_decide(one: Load, step: int):
    """Adding takes a queue and waits, draining a load that the others can carry; the limits override both."""
    assert decide([one] * DRAIN_LOOKS, SPAN) == step


def test_loads_from_calls_and_tasks():
    """Calls queue by Little's law, tasks queue beyond the rows, and no work is no load."""
    calls = Load.from_calls(num=2, elapsed_s=10.0, busy_s=18.0, calls=36, wait_s=0.25)
    assert calls == Load(num=2, busy_frac=0.9, queue=0.25 * 36 / 10 / 2, wait_frac=1 / 3)
    assert Load.from_calls(num=2, elapsed_s=10.0, busy_s=0.0, calls=0, wait_s=0.0) == Load(
        num=2, busy_frac=0.0, queue=0.0, wait_frac=0.0
    )
    tasks = Load.from_tasks(num=2, elapsed_s=4.0, busy_s=4.0, waited_s=3.0, tasks=[12, 4, 8], rows=8)
    assert tasks == Load(num=2, busy_frac=0.5, queue=0.5 / 3, wait_frac=0.75)
    assert Load.from_tasks(num=1, elapsed_s=1.0, busy_s=0.0, waited_s=0.0, tasks=[], rows=8).queue == 0.0


def queue(rate: float, num: int, elapsed: float, rng: np.random.Generator, service: float = 0.1) -> Load:
    """Simulate Poisson calls to `num` replicas; each call goes to the replica that is free first."""
    arrivals = np.sort(rng.uniform(0, elapsed, rng.poisson(rate * elapsed)))
    free, waits = [0.0] * num, []
    for arrival in arrivals:
        i = int(np.argmin(free))
        start = max(arrival, free[i])
        waits.append(start - arrival)
        free[i] = start + service
    return Load.from_calls(
        num=num, elapsed_s=elapsed, busy_s=min(len(arrivals) * service, num * elapsed), calls=len(arrivals),
        wait_s=float(np.mean(waits)) if waits else 0.0,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_the_size_settles_without_oscillation(seed: int):
    """A pool only grows under a steady load (2.4 busy replicas), and only shrinks, to one, when the load drops."""
    rng = np.random.default_rng(seed)
    num, sizes, loads = 1, [], []
    for look in range(200):
        loads = [*loads, queue(24.0 if look < 120 else 1.0, num, 20.0, rng)]
        if step := decide(loads, SPAN):
            num, loads = num + step, []
        sizes.append(num)
    changes = [b - a for a, b in pairwise(sizes)]
    assert sizes[40] >= 3 and sizes[-1] == 1
    assert set(changes[:119]) == {0, 1} and set(changes[119:]) == {0, -1}


def test_pool_sizes_are_numbers_or_ranges():
    """`replicas` and `num_workers` are numbers or ranges; an error names the key."""
    base = {"run": {"dir": "x"}, "train": {"num_steps": 1}}
    wanted = parse({**base, "teacher": {"replicas": {"max": 3}}, "rollout": {"num_workers": 2}})
    assert wanted.teacher.replicas == ReplicaRange(min=1, max=3) and ReplicaRange.of(
        wanted.rollout.num_workers
    ) == ReplicaRange(min=2, max=2)
    for given, expected in (
        ({"min": 3, "max": 2}, r"teacher.replicas={'min': 3, 'max': 2}: min=3 is above max=2; swap them"),
        ({"min": 0, "max": 2}, r"teacher.replicas.min=0: input should be greater than 0"),
        ({"min": 1}, r"teacher.replicas.max: this key is required"),
        ({"max": 1, "most": 2}, r"teacher.replicas.most: unknown key .* known here: min, max"),
        (0, r"teacher.replicas=0: input should be greater than 0"),
    ):
        with pytest.raises(ConfigError, match=expected):
            parse({**base, "teacher": {"replicas": given}})
