"""What a run needs of a cluster, and whether the cluster has it.

In: a config. Out: resources per actor and in total; a ConfigError that says what is missing before anything starts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

from switchkd.config import ConfigError
from switchkd.sections import Config


def bundles(config: Config) -> dict[str, list[dict[str, float]]]:
    """Resources of every actor by role, as Ray counts them."""
    wanted = {
        "learner": [{"CPU": config.learner.num_cpus, "GPU": config.learner.num_gpus}] * config.learner.num_ranks,
        "rollout": [{"CPU": config.student.num_cpus, "GPU": config.student.num_gpus}] * config.rollout.num_workers,
        "teacher": [{"CPU": config.teacher.num_cpus, "GPU": config.teacher.num_gpus}] * config.teacher.replicas,
    }
    return wanted if config.needs_teacher else {role: wanted[role] for role in ("learner", "rollout")}


def totals(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Sum of resources, without those that nobody asks for."""
    found: dict[str, float] = {}
    for part in parts:
        for name, amount in part.items():
            found[name] = found.get(name, 0.0) + amount
    return {name: amount for name, amount in found.items() if amount}


def lacking(config: Config, available: Mapping[str, float]) -> str:
    """ "" when the cluster is large enough, else what it lacks and who asks for it."""
    roles = bundles(config)
    needed = totals(part for parts in roles.values() for part in parts)
    for name, amount in needed.items():
        if amount > available.get(name, 0.0) + 1e-6:
            asks = ", ".join(
                f"{len(parts)} {role} x {parts[0].get(name, 0.0):g}"
                for role, parts in roles.items()
                if parts[0].get(name, 0.0)
            )
            return f"the run needs {amount:g} {name} ({asks}) and the cluster has {available.get(name, 0.0):g}"
    return ""


def wait_for_resources(
    config: Config, available: Callable[[], Mapping[str, float]], say: Callable[[str], None]
) -> None:
    """Wait up to `cluster.wait_s` for the cluster to grow. Raises ConfigError naming what is missing."""
    deadline = time.monotonic() + config.cluster.wait_s
    told = ""
    while missing := lacking(config, available()):
        if time.monotonic() >= deadline:
            raise ConfigError(
                f"{missing}; lower learner.num_ranks, rollout.num_workers or teacher.replicas (or their num_cpus, "
                f"num_gpus), add nodes, or raise cluster.wait_s={config.cluster.wait_s:g}"
            )
        if missing != told:
            say(f"waiting up to {config.cluster.wait_s:g} s: {missing}")
            told = missing
        time.sleep(1.0)
