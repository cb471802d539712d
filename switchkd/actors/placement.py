"""What a run asks of a cluster before any actor starts, and the wait for a cluster that is too small or too full.

In: a config, and a look at the nodes. Out: the config with nothing left open; a ConfigError that says who lacks what.
Knows no Ray: `place.py` sets the room aside.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from switchkd.actors import room
from switchkd.actors.room import Node
from switchkd.config import resources
from switchkd.config.loader import ConfigError
from switchkd.config.schema import Config, ResourcesOfRoles

SETTLE_S = 15.0
"""How long what a run that has just ended had may take to come back."""


def settled(config: Config) -> Config:
    """The config with nothing left open in `resources`: an actor sees another machine and another environment than the
    driver, and would work out something else."""
    roles = {role: resources.of_role(config, role) for role in resources.ROLES}
    each = {name: resources.of_role(config, resources.role_of(name)) for name in config.teachers}
    return config.model_copy(update={"resources": ResourcesOfRoles(**roles, teachers=each)})


def wait_for_room(
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
            if waited >= max(config.cluster.wait_s, SETTLE_S):
                raise room.full(config, waiting)
        except ConfigError as missing:
            if waited >= config.cluster.wait_s:
                raise
            waiting = str(missing)
        if waiting != told and waited < config.cluster.wait_s:
            told = waiting
            say(f"waiting up to {config.cluster.wait_s:g} s: {told}")
        time.sleep(poll_s)
