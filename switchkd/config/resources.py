"""Computes the CPUs and GPUs of each process of a run, as Ray counts them, and its CPU threads.

In: a config. Out: plain numbers. On a private cluster (one's own machine) the roles share the cores: the run requests
no more than exist; teachers and workers divide the threads; the learner has all of them where it works alone
(`replay.max_staleness: 0`). On another cluster placement groups decide whether a run fits.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from switchkd.config.errors import ConfigError
from switchkd.config.schema import Config, ReplicaRange, ResourcesConfig

ROLES = ("teacher", "rollout", "learner")


def spans(config: Config) -> dict[str, ReplicaRange]:
    """Processes of each role that the run starts: no attached teacher, no worker where rollouts were recorded. Each of
    several teachers is a role, `teachers.NAME`."""
    teachers = {role_of(name): config.of_teacher(name).teacher for name in config.teacher_names}
    ranges = {role: ReplicaRange.of(teacher.replicas) for role, teacher in teachers.items() if not teacher.attach}
    if not config.rollout.recorded:
        ranges["rollout"] = ReplicaRange.of(config.rollout.num_workers)
    return {**ranges, "learner": ReplicaRange.of(config.learner.num_ranks)}


def role_of(teacher: str) -> str:
    return f"teachers.{teacher}" if teacher else "teacher"


def key_of(role: str) -> str:
    """The config key of a role's number of processes."""
    return {"rollout": "rollout.num_workers", "learner": "learner.num_ranks"}.get(role, f"{role}.replicas")


def counts(config: Config) -> dict[str, int]:
    """Processes of each role that must fit: the initial number; on a private cluster, whose cores are divided once, the
    largest number."""
    private = is_private(config)
    return {role: span.max if private else span.min for role, span in spans(config).items()}


def is_private(config: Config) -> bool:
    """Whether the run uses no Ray, or a Ray cluster of its own: no address, and not inside a submitted job."""
    in_job = os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_ID")
    return config.run.mode == "inprocess" or not (config.cluster.address or in_job)


def of_role(config: Config, role: str, cores: int | None = None) -> ResourcesConfig:
    """The resources of one process of a role, with all keys filled in. `cores` is for tests."""
    section = _section(config, role)
    cores = cores or os.cpu_count() or 1
    num_cpus = section.num_cpus
    if num_cpus is None:
        num_cpus = min(1.0, _even_share(config, cores)) if is_private(config) else 1.0
    threads = section.threads or _threads(config, role, num_cpus, cores)
    return ResourcesConfig(num_cpus=num_cpus, num_gpus=section.num_gpus, threads=threads, labels=section.labels)


def _section(config: Config, role: str) -> ResourcesConfig:
    if role in ROLES:
        return getattr(config.resources, role)
    return config.of_teacher(role.removeprefix("teachers.")).resources.teacher


def _even_share(config: Config, cores: int) -> float:
    """CPUs of each process without `num_cpus`: the rest, divided evenly, in hundredths, which Ray counts exactly."""
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
    """CPUs and GPUs that all processes of each role request together."""
    shares = {}
    for role, number in counts(config).items():
        each = of_role(config, role, cores)
        shares[role] = {"CPU": number * float(each.num_cpus or 0), "GPU": number * each.num_gpus}
    return shares


def check_private(config: Config) -> None:
    """Raise ConfigError for settings that need a joined cluster."""
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
    """Raise ConfigError where the roles request more than this machine has, naming each role's share. A role that
    shares the cores may have as many processes as there are cores."""
    cores = int(available.get("CPU", 0.0))
    requested = total(config, cores or None)
    for role, number in counts(config).items():
        if _section(config, role).num_cpus is None and number > cores:
            _check_sum(config, "CPU", {role: float(number)}, cores)
    for resource in ("CPU", "GPU"):
        shares = {role: share[resource] for role, share in requested.items()}
        _check_sum(config, resource, shares, available.get(resource, 0.0))


def _check_sum(config: Config, resource: str, requested: Mapping[str, float], available: float) -> None:
    needed = sum(requested.values())
    if needed > available + 1e-6:
        number = counts(config)
        listed = ", ".join(f"{num:g} for {key_of(role)}={number[role]}" for role, num in requested.items() if num)
        raise ConfigError(
            f"the run needs {needed:g} {resource}s ({listed}) and the machine has {available:g}; lower them, or "
            f"resources.*.num_{resource.lower()}s"
        )
