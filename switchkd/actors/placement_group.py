"""Reserves a cluster's resources for each process before any actor starts.

In: the resources of a process. Out: a `ProcessPlacement`, a placement group of one bundle (STRICT_PACK): all GPUs of a
process are on one node with the labels of its role, and a restarted process gets its placement again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.util import get_placement_group, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from switchkd.config import resources
from switchkd.config.errors import ConfigError
from switchkd.config.schema import Config, ResourcesConfig, RoleResourcesConfig


class ProcessPlacement:
    """The reserved resources of one process; no group where it needs none."""

    def __init__(
        self, each: ResourcesConfig, *, name: str = "", detached: bool = False, existing: bool = False
    ) -> None:
        """`existing`: take over the placement of this name."""
        self.amounts = {"num_cpus": float(each.num_cpus or 0), "num_gpus": float(each.num_gpus)}
        bundle = {"CPU": self.amounts["num_cpus"], "GPU": self.amounts["num_gpus"]}
        packed = {key: num for key, num in bundle.items() if num}
        self.labels = dict(each.labels)
        self.group: Any = None
        if packed and existing:
            self.group = get_placement_group(name)
        elif packed:
            self.group = placement_group(
                [packed],
                strategy="STRICT_PACK",
                name=name,
                lifetime="detached" if detached else None,
                bundle_label_selector=[self.labels] if self.labels else None,
            )

    @property
    def key(self) -> str:
        return self.group.id.hex() if self.group is not None else ""

    def alive(self) -> bool:
        """Whether it was not freed."""
        return self.group is None or self._state() != "REMOVED"

    def wait(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s`; return whether the resources are reserved."""
        if self.group is not None and timeout_s > 0:
            self.group.wait(timeout_s)
        return self.group is None or self._state() == "CREATED"

    def _state(self) -> str:
        return str(placement_group_table(self.group).get("state"))

    def options(self) -> dict[str, Any]:
        """Ray options of the actor that runs there."""
        if self.group is None:
            return {**self.amounts, "label_selector": self.labels} if self.labels else dict(self.amounts)
        strategy = PlacementGroupSchedulingStrategy(placement_group=self.group, placement_group_bundle_index=0)
        return {**self.amounts, "scheduling_strategy": strategy}

    def free(self) -> None:
        """Free the resources. Ends the process that still runs there."""
        if self.group is not None and ray.is_initialized():
            remove_placement_group(self.group)


def free_all(prefix: str) -> None:
    """Free the placements under these names of a process that died: Ray keeps them until the job ends."""
    for group in placement_group_table().values():
        if group["name"].startswith(prefix) and group["state"] != "REMOVED":
            with suppress(ValueError):  # freed in between
                remove_placement_group(get_placement_group(group["name"]))


def beside_driver() -> dict[str, Any]:
    """Ray options that place an actor without resources on the driver's node, so that the loss of another node does not
    end it. If the driver's node is lost, it restarts elsewhere."""
    here = ray.get_runtime_context().get_node_id()
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node_id=here, soft=True)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A living node of the cluster, with Ray's amounts."""

    name: str
    labels: Mapping[str, str]  # without those that Ray gives every node
    total: Mapping[str, float]
    free: Mapping[str, float]


def nodes() -> list[Node]:
    """The nodes of the cluster that was joined."""
    free = ray._private.state.available_resources_per_node()
    return [
        Node(
            name=node["NodeManagerHostname"],
            labels={key: value for key, value in node.get("Labels", {}).items() if not key.startswith("ray.io/")},
            total=node["Resources"],
            free=free.get(node["NodeID"], {}),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


RELEASE_S = 15.0
"""Time that Ray may take to release the placements of a run that has just ended."""


def check_possible(config: Config, num: Mapping[str, int], log: Callable[[str], None]) -> None:
    """Raise ConfigError where `cluster.wait_s` is 0 and no node has the labels of a role, or each is too small for one
    of its processes: the end of other runs does not help. `num`: processes by role."""
    if config.cluster.wait_s:
        return
    there = nodes()
    check_labels(config, num, there)
    if too_large := _larger_than_nodes(config, num, there):
        raise _refusal(config, num, too_large, there, log)


def wait_for_placements(
    config: Config, placements: Mapping[str, Sequence[ProcessPlacement]], log: Callable[[str], None]
) -> None:
    """Wait `cluster.wait_s`, at least RELEASE_S, until each process has its placement. Raises ConfigError that names a
    role without enough of them, after logging a table of requested and free resources."""
    wait_s = config.cluster.wait_s
    deadline = time.monotonic() + max(wait_s, RELEASE_S)
    num = {role: len(each) for role, each in placements.items()}
    first_look = min(time.monotonic() + 1.0, deadline)
    if wait_s and (lacking := _lacking(placements, first_look)):
        log(f"waiting up to {wait_s:g} s: {shortage(config, num, lacking, nodes())}")
    if lacking := _lacking(placements, deadline):
        there = nodes()
        check_labels(config, placements, there)
        raise _refusal(config, num, lacking, there, log)


def _refusal(
    config: Config,
    num: Mapping[str, int],
    lacking: Mapping[str, int],
    there: Sequence[Node],
    log: Callable[[str], None],
) -> ConfigError:
    log(table(config, num, lacking, there))
    return ConfigError(shortage(config, num, lacking, there))


def _larger_than_nodes(config: Config, num: Mapping[str, int], there: Sequence[Node]) -> dict[str, int]:
    """Numbers of processes by role, for roles of which a process fits no node that is empty."""

    def fits(role: str, node: Node) -> bool:
        each = resources.of_role(config, role)
        needs = {"CPU": each.num_cpus, "GPU": each.num_gpus}
        return each.labels.items() <= node.labels.items() and all(
            node.total.get(name, 0.0) >= (requested or 0.0) for name, requested in needs.items()
        )

    return {role: each for role, each in num.items() if not any(fits(role, node) for node in there)}


def _lacking(placements: Mapping[str, Sequence[ProcessPlacement]], deadline: float) -> dict[str, int]:
    """Numbers of processes without a placement at the deadline, by role; roles without any are left out."""
    num = {
        role: sum(not placement.wait(deadline - time.monotonic()) for placement in members)
        for role, members in placements.items()
    }
    return {role: lacking for role, lacking in num.items() if lacking}


def check_labels(config: Config, roles: Iterable[str], there: Sequence[Node]) -> None:
    """Raise ConfigError for labels that no node has."""
    for role in roles:
        labels = resources.of_role(config, role).labels
        if not any(labels.items() <= node.labels.items() for node in there):
            known = "; ".join(sorted({_listed(node.labels) or "none" for node in there}))
            raise ConfigError(
                f"resources.{role}.labels={_listed(labels)}: no node of the cluster has these (labels there: {known}); "
                f"start one with `ray start --labels=...`, or raise cluster.wait_s={config.cluster.wait_s:g}"
            )


def shortage(config: Config, num: Mapping[str, int], lacking: Mapping[str, int], there: Sequence[Node]) -> str:
    """Error text: the role that lacks placements, the needs of each process, the free resources, the remedies."""
    role, num_lacking = next(iter(lacking.items()))
    each = resources.of_role(config, role)
    suited = [node for node in there if each.labels.items() <= node.labels.items()]
    most = " and ".join(
        f"{max((node.free.get(name, 0.0) for node in suited), default=0.0):g} {name}s"
        for name, requested in (("CPU", each.num_cpus), ("GPU", each.num_gpus))
        if requested
    )
    gpus = f"{each.num_gpus:g} GPUs" if each.num_gpus >= 1 else f"{each.num_gpus:g} of one GPU"
    needs = " and ".join([f"{each.num_cpus:g} CPUs"] * bool(each.num_cpus) + [gpus] * bool(each.num_gpus))
    labels = f" with labels {_listed(each.labels)}" if each.labels else ""
    return (
        f"{resources.key_of(role)}={num[role]}: {num_lacking} cannot be placed, each needs {needs} on one node"
        f"{labels}, and beside the rest of the run at most {most} are free on one; wait until other runs end, ask for "
        f"less (resources.{role}), add nodes, or raise cluster.wait_s={config.cluster.wait_s:g}"
    )


def table(config: Config, num: Mapping[str, int], lacking: Mapping[str, int], there: Sequence[Node]) -> str:
    """Table of the resources that each role requests and lacks, and of the free ones of each node."""
    rows = [("role", "number", "CPUs each", "GPUs each", "labels", "not placed")]
    for role, num_role in num.items():
        each = resources.of_role(config, role)
        amounts = (str(num_role), f"{each.num_cpus:g}", f"{each.num_gpus:g}")
        rows.append((resources.key_of(role), *amounts, _listed(each.labels), str(lacking.get(role, 0))))
    rows.append(("node", "", "CPUs free", "GPUs free", "labels", ""))
    for node in there:
        cpus, gpus = (f"{node.free.get(name, 0.0):g} of {node.total.get(name, 0.0):g}" for name in ("CPU", "GPU"))
        rows.append((node.name, "", cpus, gpus, _listed(node.labels), ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _listed(labels: Mapping[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in sorted(labels.items()))


def resolve_resources(config: Config) -> Config:
    """Return the config with all of `resources` filled in, by the driver: an actor sees another machine and another
    environment."""
    roles = {role: resources.of_role(config, role) for role in resources.ROLES}
    each = {name: resources.of_role(config, resources.role_of(name)) for name in config.teachers}
    return config.model_copy(update={"resources": RoleResourcesConfig(**roles, teachers=each)})
