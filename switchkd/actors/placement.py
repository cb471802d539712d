"""How much of a cluster the run's actors take, and the wait for a cluster that is still too small.

In: a config. Out: Ray's options per role; a ConfigError that says what is missing before any actor starts.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from switchkd import resources
from switchkd.config import ConfigError
from switchkd.sections import Config, ResourcesOfRoles


def settled(config: Config) -> Config:
    """The config with nothing left open in `resources`: an actor sees another machine and another environment than the
    driver, and would work out something else."""
    roles = {role: resources.of_role(config, role) for role in ResourcesOfRoles.model_fields}
    return config.model_copy(update={"resources": ResourcesOfRoles(**roles)})


def options(config: Config, role: str) -> dict[str, float]:
    """What Ray sets aside for one actor of a role."""
    each = resources.of_role(config, role)
    return {"num_cpus": float(each.num_cpus or 0), "num_gpus": each.num_gpus}


def wait_for_resources(
    config: Config, available: Callable[[], dict[str, float]], say: Callable[[str], None], poll_s: float = 1.0
) -> None:
    """Wait up to `cluster.wait_s` for the cluster to grow, saying what is missing. Raises ConfigError."""
    deadline = time.monotonic() + config.cluster.wait_s
    told = ""
    while True:
        try:
            return resources.check(config, available())
        except ConfigError as missing:
            if time.monotonic() >= deadline:
                raise
            if str(missing) != told:
                told = str(missing)
                say(f"waiting up to {config.cluster.wait_s:g} s: {told}")
        time.sleep(poll_s)
