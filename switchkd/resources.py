"""What each process of a run gets of the machines: CPUs and GPUs as Ray counts them, and CPU threads.

In: a config. Out: plain numbers. On a private cluster (one's own machine) the roles share the cores. Ray is asked for
no more than there are; teachers and workers divide the threads; the learner, while nobody else works
(`replay.max_staleness: 0`), has all of them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from switchkd.config import ConfigError
from switchkd.sections import Config, Resources

_KEYS = {"teacher": "teacher.replicas", "rollout": "rollout.num_workers", "learner": "learner.num_ranks"}


def counts(config: Config) -> dict[str, int]:
    """Processes of each role; no teacher where no stage needs one, no worker where rollouts were recorded."""
    workers = 0 if config.rollout.recorded else config.rollout.num_workers
    found = {"rollout": workers, "learner": config.learner.num_ranks}
    return {"teacher": config.teacher.replicas, **found} if config.needs_teacher else found


def is_private(config: Config) -> bool:
    """Does this run have the machine to itself, as far as Ray knows? Not inside a submitted job."""
    in_job = os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_ID")
    return config.run.mode == "inprocess" or not (config.cluster.address or in_job)


def of_role(config: Config, role: str, cores: int | None = None) -> Resources:
    """One process's share, with nothing left null. `cores` is for tests."""
    given: Resources = getattr(config.resources, role)
    cores = cores or os.cpu_count() or 1
    num_cpus = given.num_cpus
    if num_cpus is None:
        num_cpus = min(1.0, _even_share(config, cores)) if is_private(config) else 1.0
    threads = given.threads or _threads(config, role, num_cpus, cores)
    return Resources(num_cpus=num_cpus, num_gpus=given.num_gpus, threads=threads)


def _even_share(config: Config, cores: int) -> float:
    """Of what the roles that say how many CPUs they want leave to the processes of the others; Ray counts hundredths
    exactly."""
    left, sharing = float(cores), 0
    for role, number in counts(config).items():
        each = getattr(config.resources, role).num_cpus
        if each is None:
            sharing += number
        else:
            left -= number * each
    return max(0, int(100 * left / sharing + 1e-6)) / 100


def _threads(config: Config, role: str, num_cpus: float, cores: int) -> int:
    if not is_private(config):
        return max(1, int(num_cpus))
    if config.run.mode == "inprocess":
        return cores
    number = counts(config)
    if role == "learner":
        alone = config.replay.max_staleness == 0
        return max(1, cores // number["learner"] if alone else cores // sum(number.values()))
    writers = number["rollout"] + number.get("teacher", 0)
    return max(1, cores // max(1, writers))


def total(config: Config, cores: int | None = None) -> dict[str, dict[str, float]]:
    """CPUs and GPUs that each role asks for, all its processes together."""
    found = {}
    for role, number in counts(config).items():
        each = of_role(config, role, cores)
        found[role] = {"CPU": number * float(each.num_cpus or 0), "GPU": number * each.num_gpus}
    return found


def check(config: Config, available: Mapping[str, float]) -> None:
    """Raise ConfigError when the roles ask for more than there is, naming who asks for what.

    Roles that share a machine's cores take turns, so each may be as many processes as there are cores, no more.
    """
    cores = int(available.get("CPU", 0.0))
    asked = total(config, cores or None)
    for role, number in counts(config).items() if is_private(config) else ():
        if getattr(config.resources, role).num_cpus is None and number > cores:
            raise ConfigError(_missing(config, "CPU", number, cores, {role: {"CPU": float(number)}}))
    for resource in ("CPU", "GPU"):
        there = available.get(resource, 0.0)
        needed = sum(part[resource] for part in asked.values())
        if needed > there + 1e-6:
            raise ConfigError(_missing(config, resource, needed, there, asked))


def _missing(
    config: Config, resource: str, needed: float, there: float, asked: Mapping[str, Mapping[str, float]]
) -> str:
    number = counts(config)
    listed = ", ".join(
        f"{part[resource]:g} for {_KEYS[role]}={number[role]}" for role, part in asked.items() if part[resource]
    )
    where = "machine" if is_private(config) else "cluster"
    waiting = "" if is_private(config) else f", add nodes, or raise cluster.wait_s={config.cluster.wait_s:g}"
    return (
        f"the run needs {needed:g} {resource}s ({listed}) and the {where} has {there:g}; lower them, or "
        f"resources.*.num_{resource.lower()}s{waiting}"
    )
