"""Does a run fit the nodes of a cluster: ever, and now?

In: a config, and what each node has and has left. Out: nothing, or one line that says who lacks what. What is said here
is certain; whether processes that fit one by one also fit together is found out by setting the room aside
(`actors/placement.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from switchkd.config import resources
from switchkd.config.errors import ConfigError
from switchkd.config.schema import Config, ResourcesConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A machine of the cluster, as Ray counts it."""

    labels: Mapping[str, str]
    total: Mapping[str, float]
    free: Mapping[str, float]


def check(config: Config, nodes: Sequence[Node]) -> None:
    """Raises ConfigError when the run could not fit even if nobody else used the cluster."""
    resources.check(config, {name: sum(node.total.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")})
    for role, number in resources.counts(config).items():
        each = resources.of_role(config, role)
        suited = _suited(each, nodes)
        if each.labels and not suited:
            there = "; ".join(sorted({_listed(node.labels) or "none" for node in nodes}))
            raise ConfigError(
                f"resources.{role}.labels={_listed(each.labels)}: no node of the cluster has these (labels "
                f"there: {there}); start one with `ray start --labels=...`{_or_wait(config)}"
            )
        if (placements := sum(_places(each, node.total) for node in suited)) < number:
            raise ConfigError(
                f"{resources.key_of(role)}={number} asks for {_share(each)} on one node each{_with(each)}, and the "
                f"cluster's nodes have room for {placements} of them; lower resources.{role} or the number, add nodes"
                f"{_or_wait(config)}"
            )


def waits_for(config: Config, nodes: Sequence[Node]) -> str:
    """What others hold of what the run needs, in words; "" where the run may fit now."""
    number = resources.counts(config)
    for resource in ("CPU", "GPU"):
        asked = {role: part[resource] for role, part in resources.total(config).items()}
        needed, free = sum(asked.values()), sum(node.free.get(resource, 0.0) for node in nodes)
        if needed > free + 1e-6:
            there = sum(node.total.get(resource, 0.0) for node in nodes)
            listed = ", ".join(
                f"{num:g} for {resources.key_of(role)}={number[role]}" for role, num in asked.items() if num
            )
            needs = f"the run needs {needed:g} {resource}s ({listed})"
            return f"{needs}, and of the cluster's {there:g} only {free:g} are free"
    for role, num in number.items():
        each = resources.of_role(config, role)
        if (placements := sum(_places(each, node.free) for node in _suited(each, nodes))) < num:
            return (
                f"{resources.key_of(role)}={num} asks for {_share(each)} on one node each{_with(each)}, and there is "
                f"room for {placements} of them now"
            )
    return ""


def full(config: Config, waiting: str) -> ConfigError:
    return ConfigError(
        f"{waiting}: other runs or actors hold the rest; wait until they end, raise cluster.wait_s="
        f"{config.cluster.wait_s:g}, or ask for less"
    )


def _suited(each: ResourcesConfig, nodes: Sequence[Node]) -> list[Node]:
    return [node for node in nodes if all(node.labels.get(key) == value for key, value in each.labels.items())]


def _places(each: ResourcesConfig, there: Mapping[str, float]) -> int:
    """How many processes fit into what is there. GPUs are shared one by one: 0.6 of a GPU fits once into each."""
    fits = [10**6]
    if each.num_cpus:
        fits.append(int((there.get("CPU", 0.0) + 1e-6) / each.num_cpus))
    if each.num_gpus:
        gpus = there.get("GPU", 0.0) + 1e-6
        fits.append(int(gpus / each.num_gpus) if each.num_gpus >= 1 else int(gpus) * int(1 / each.num_gpus + 1e-6))
    return min(fits)


def _share(each: ResourcesConfig) -> str:
    parts = [f"{num:g} {name}s" for name, num in (("CPU", each.num_cpus), ("GPU", each.num_gpus)) if num]
    return " and ".join(parts) or "nothing"


def _with(each: ResourcesConfig) -> str:
    return f" with labels {_listed(each.labels)}" if each.labels else ""


def _listed(labels: Mapping[str, str]) -> str:
    """Without those that Ray gives every node."""
    own = {key: value for key, value in labels.items() if not key.startswith("ray.io/")}
    return ",".join(f"{key}={value}" for key, value in sorted(own.items()))


def _or_wait(config: Config) -> str:
    return f", or raise cluster.wait_s={config.cluster.wait_s:g}"
