"""Room on a cluster, set aside for each process before any actor starts.

In: what a process takes. Out: a `ProcessPlacement`, a placement group of one bundle (STRICT_PACK): all GPUs of a
process lie on one node that has the labels of its role, and a process that is restarted finds its place again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.util import get_placement_group, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from switchkd.actors import room
from switchkd.actors.room import Node
from switchkd.config import resources
from switchkd.config.errors import ConfigError
from switchkd.config.schema import Config, ResourcesConfig, RoleResourcesConfig


class ProcessPlacement:
    """Room for one process. Empty where the process takes nothing and may stand anywhere."""

    def __init__(self, each: ResourcesConfig, *, name: str = "", detached: bool = False) -> None:
        self.taken = {"num_cpus": float(each.num_cpus or 0), "num_gpus": float(each.num_gpus)}
        packed = {key: num for key, num in (("CPU", self.taken["num_cpus"]), ("GPU", self.taken["num_gpus"])) if num}
        self.labels = dict(each.labels)
        self.group: Any = None
        if packed:
            self.group = placement_group(
                [packed],
                strategy="STRICT_PACK",
                name=name,
                lifetime="detached" if detached else None,
                bundle_label_selector=[self.labels] if self.labels else None,
            )

    @classmethod
    def named(cls, each: ResourcesConfig, name: str) -> ProcessPlacement:
        """One that was made under this name."""
        placement = cls(ResourcesConfig())
        placement.taken = {"num_cpus": float(each.num_cpus or 0), "num_gpus": float(each.num_gpus)}
        if any(placement.taken.values()):
            placement.group = get_placement_group(name)
        return placement

    @property
    def key(self) -> str:
        return self.group.id.hex() if self.group is not None else ""

    def alive(self) -> bool:
        """Has nobody given it back?"""
        return self.group is None or self._state() != "REMOVED"

    def wait(self, timeout_s: float) -> bool:
        """Is the room there, at the latest after so long?"""
        if self.group is not None and timeout_s > 0:
            self.group.wait(timeout_s)
        return self.group is None or self._state() == "CREATED"

    def _state(self) -> str:
        return str(placement_group_table(self.group).get("state"))

    def options(self) -> dict[str, Any]:
        """For the actor that takes the place."""
        if self.group is None:
            return {**self.taken, "label_selector": self.labels} if self.labels else dict(self.taken)
        strategy = PlacementGroupSchedulingStrategy(placement_group=self.group, placement_group_bundle_index=0)
        return {**self.taken, "scheduling_strategy": strategy}

    def free(self) -> None:
        """Who still stands there is ended."""
        if self.group is not None and ray.is_initialized():
            remove_placement_group(self.group)


def free_all(prefix: str) -> None:
    """Places under such names, made by a process that died: Ray keeps them until the job ends."""
    for each in placement_group_table().values():
        if each["name"].startswith(prefix) and each["state"] != "REMOVED":
            with suppress(ValueError):  # somebody was faster
                remove_placement_group(get_placement_group(each["name"]))


def beside_driver() -> dict[str, Any]:
    """For an actor that takes nothing and whose death would cost more than its part: where Ray would put it by chance,
    it would die with any node of the cluster; here it dies only with the driver's, and then starts elsewhere."""
    here = ray.get_runtime_context().get_node_id()
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node_id=here, soft=True)}


def nodes() -> list[Node]:
    """The living nodes of the cluster that was joined."""
    free = ray._private.state.available_resources_per_node()
    return [
        Node(labels=node.get("Labels", {}), total=node["Resources"], free=free.get(node["NodeID"], {}))
        for node in ray.nodes()
        if node["Alive"]
    ]


def wait_for_placements(config: Config, placements: Sequence[tuple[str, ProcessPlacement]]) -> None:
    """All of them, or a ConfigError that names those who found no room: processes that fit one by one need not fit
    together, and another run may have been faster."""
    deadline = time.monotonic() + max(config.cluster.wait_s, RELEASE_S)
    without = [role for role, placement in placements if not placement.wait(deadline - time.monotonic())]
    if without:
        who = ", ".join(f"{without.count(role)} of {resources.key_of(role)}" for role in dict.fromkeys(without))
        raise room.full(config, f"no node of the cluster has room for {who} beside the rest of the run")


RELEASE_S = 15.0
"""How long what a run that has just ended had may take to come back."""


def resolve_resources(config: Config) -> Config:
    """The config with nothing left open in `resources`: an actor sees another machine and another environment than the
    driver, and would work out something else."""
    roles = {role: resources.of_role(config, role) for role in resources.ROLES}
    each = {name: resources.of_role(config, resources.role_of(name)) for name in config.teachers}
    return config.model_copy(update={"resources": RoleResourcesConfig(**roles, teachers=each)})


def wait_for_capacity(
    config: Config, look: Callable[[], Sequence[Node]], say: Callable[[str], None], poll_s: float = 1.0
) -> None:
    """Wait up to `cluster.wait_s` for the cluster to grow, or for others to leave it (a moment in any case), saying who
    lacks what. Raises ConfigError."""
    started, told = time.monotonic(), ""
    while True:
        found = look()
        waited = time.monotonic() - started
        try:
            room.check(config, found)
            waiting = room.waits_for(config, found)
            if not waiting:
                return
            if waited >= max(config.cluster.wait_s, RELEASE_S):
                raise room.full(config, waiting)
        except ConfigError as missing:
            if waited >= config.cluster.wait_s:
                raise
            waiting = str(missing)
        if waiting != told and waited < config.cluster.wait_s:
            told = waiting
            say(f"waiting up to {config.cluster.wait_s:g} s: {told}")
        time.sleep(poll_s)
