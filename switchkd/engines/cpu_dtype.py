"""Warns of bfloat16 on a CPU without instructions for it, where products take up to 50 times as long as in float32.

In: a config. Out: one line with the keys, the measured ratio and the remedy; empty where nothing is slow. Products are
measured, because virtual machines hide the flags of their CPUs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from time import perf_counter

import torch
from torch.nn.functional import linear

from switchkd.config import resources
from switchkd.config.schema import Config
from switchkd.engines.build import device_of

SLOW = 2.0
"""Smallest ratio that is warned of. oneDNN limited to AVX-512 has about 1.3, to AVX2 more than 3."""
BUDGET_S = 0.1
_ROWS, _WIDTH = 32, 512


def slow_bfloat16(config: Config) -> str:
    """Return the warning for roles that this machine's CPU runs in bfloat16. Measures only where there are any; nodes
    of another cluster are not measured."""
    measured = resources.is_private(config) and not config.is_fake
    keys = list(_bfloat16_keys(config)) if measured else []
    ratio = bfloat16_slowdown() if keys else 0.0
    if ratio < SLOW:
        return ""
    return (
        f"{', '.join(f'{key}=bfloat16' for key in keys)}: on this CPU a product takes {ratio:.3g} times as long in "
        "bfloat16 as in float32; set dtype: float32"
    )


def _bfloat16_keys(config: Config) -> Iterator[str]:
    student = config.student
    for role in resources.spans(config):
        match role:
            case "rollout":
                key, dtype, device = "student.dtype", student.dtype, student.device
            case "learner":
                key, dtype, device = "learner.dtype", config.learner.dtype, student.device
            case _:
                teacher = config.of_teacher(role.removeprefix("teachers.")).teacher
                key, dtype, device = f"{role}.dtype", teacher.dtype, teacher.device
        on_gpu = resources.of_role(config, role).num_gpus or device_of(device) != "cpu"
        if dtype == "bfloat16" and not on_gpu:
            yield key


def bfloat16_slowdown() -> float:
    """Return the time of a bfloat16 product over that of the same float32 product on this CPU, within about BUDGET_S.

    One thread, the shortest of all repeats: with more threads other processes change the ratio a hundredfold.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        operands = {
            dtype: (torch.ones(_ROWS, _WIDTH, dtype=dtype), torch.ones(_WIDTH, _WIDTH, dtype=dtype))
            for dtype in (torch.float32, torch.bfloat16)
        }
        shortest = dict.fromkeys(operands, math.inf)
        end = perf_counter() + BUDGET_S
        while perf_counter() < end:
            for dtype, (x, weight) in operands.items():
                started = perf_counter()
                linear(x, weight)
                shortest[dtype] = min(shortest[dtype], perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    return shortest[torch.bfloat16] / shortest[torch.float32]
