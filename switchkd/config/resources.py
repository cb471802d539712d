"""The CPUs and GPUs of each process of a run, as Ray counts them, and its CPU threads.

In: a config. Out: plain numbers. On a private cluster (one's own machine) the roles share the cores. Ray is asked for
no more than there are; teachers and workers divide the threads; the learner, while it works alone
(`replay.max_staleness: 0`), has all of them. On another cluster placement groups answer whether a run fits.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from switchkd.config.errors import ConfigError
from switchkd.config.schema import Config, ReplicaRange, ResourcesConfig

ROLES = ("teacher", "rollout", "learner")


def spans(config: Config) -> dict[str, ReplicaRange]:
    """Processes of each role that the run starts itself: none of a teacher that runs already (`teacher.attach`) or that
    no stage needs, no worker where rollouts were recorded. One of several teachers is a role of its own,
    `teachers.NAME`."""
    ranges = {}
    for name in config.teacher_names:
        teacher = config.of_teacher(name).teacher
        if not teacher.attach:
            ranges[role_of(name)] = ReplicaRange.of(teacher.replicas)
    if not config.rollout.recorded:
        ranges["rollout"] = ReplicaRange.of(config.rollout.num_workers)
    return {**ranges, "learner": ReplicaRange.of(config.learner.num_ranks)}


def role_of(teacher: str) -> str:
    return f"teachers.{teacher}" if teacher else "teacher"


def key_of(role: str) -> str:
    """The key that says how many processes a role has."""
    return {"rollout": "rollout.num_workers", "learner": "learner.num_ranks"}.get(role, f"{role}.replicas")


def counts(config: Config) -> dict[str, int]:
    """Processes of each role that have to fit: as many as it starts with; on a private cluster, whose cores are shared
    out once, as many as it may become."""
    private = is_private(config)
    return {role: span.max if private else span.min for role, span in spans(config).items()}


def is_private(config: Config) -> bool:
    """Returns whether this run has the machine to itself, as far as Ray knows: not inside a submitted job."""
    in_job = os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_ID")
    return config.run.mode == "inprocess" or not (config.cluster.address or in_job)


def of_role(config: Config, role: str, cores: int | None = None) -> ResourcesConfig:
    """One process's share, with nothing left null. `cores` is for tests."""
    section = _section(config, role)
    cores = cores or os.cpu_count() or 1
    num_cpus = section.num_cpus
    if num_cpus is None:
        num_cpus = min(1.0, _even_share(config, cores)) if is_private(config) else 1.0
    threads = section.threads or _threads(config, role, num_cpus, cores)
    return ResourcesConfig(num_cpus=num_cpus, num_gpus=section.num_gpus, threads=threads, labels=section.labels)


def _section(config: Config, role: str) -> ResourcesConfig:
    if role in ROLES:
        section: ResourcesConfig = getattr(config.resources, role)
        return section
    return config.of_teacher(role.removeprefix("teachers.")).resources.teacher


def _even_share(config: Config, cores: int) -> float:
    """What the roles with a number of CPUs of their own leave to each process of the others; Ray counts hundredths
    exactly."""
    left, sharing = float(cores), 0
    for role, number in counts(config).items():
        num_cpus = _section(config, role).num_cpus
        if num_cpus is None:
            sharing += number
        else:
            left -= number * num_cpus
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
    return max(1, cores // max(1, sum(number.values()) - number["learner"]))


def total(config: Config, cores: int | None = None) -> dict[str, dict[str, float]]:
    """CPUs and GPUs that each role asks for, all its processes together."""
    shares = {}
    for role, number in counts(config).items():
        each = of_role(config, role, cores)
        shares[role] = {"CPU": number * float(each.num_cpus or 0), "GPU": number * each.num_gpus}
    return shares


def check_private(config: Config) -> None:
    """Raise ConfigError for what only a joined cluster has."""
    for role in counts(config):
        if labels := of_role(config, role).labels:
            raise ConfigError(
                f"resources.{role}.labels={labels}: nodes of a joined cluster have labels, a private cluster has none; "
                "set cluster.address or remove them"
            )
    for name in config.teacher_names:
        if namespace := config.of_teacher(name).teacher.attach:
            raise ConfigError(
                f"{role_of(name)}.attach={namespace} needs the cluster on which that teacher is served: set "
                "cluster.address (auto, host:port) or start the run there as a job"
            )


def check(config: Config, available: Mapping[str, float]) -> None:
    """Raise ConfigError when the roles ask for more than this machine has, naming each role's share.

    Roles that share its cores take turns, so each may be as many processes as there are cores, no more.
    """
    cores = int(available.get("CPU", 0.0))
    asked = total(config, cores or None)
    for role, number in counts(config).items():
        if _section(config, role).num_cpus is None and number > cores:
            _check_sum(config, "CPU", {role: float(number)}, cores)
    for resource in ("CPU", "GPU"):
        shares = {role: share[resource] for role, share in asked.items()}
        _check_sum(config, resource, shares, available.get(resource, 0.0))


def _check_sum(config: Config, resource: str, asked: Mapping[str, float], available: float) -> None:
    needed = sum(asked.values())
    if needed > available + 1e-6:
        number = counts(config)
        listed = ", ".join(f"{num:g} for {key_of(role)}={number[role]}" for role, num in asked.items() if num)
        raise ConfigError(
            f"the run needs {needed:g} {resource}s ({listed}) and the machine has {available:g}; lower them, or "
            f"resources.*.num_{resource.lower()}s"
        )
