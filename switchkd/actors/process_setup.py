"""Prepares a Ray process: threads, tokens, secrets. Every actor's __init__ calls `prepare` first."""

from __future__ import annotations

import os
import secrets as random_tokens
import sys
from collections.abc import Mapping

from switchkd.config.errors import ConfigError

SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "COMET_API_KEY")
"""Environment variables that are passed between processes as an argument: Ray logs runtime environments."""

THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "3000"}
"""Read by a process when it loads torch. Roles share the cores: an OpenMP thread that waits for the next product of its
pass spins for microseconds (without spinning a pass takes a third longer), then it sleeps. By default it spins for
milliseconds, and two workers on two cores are hardly faster than one."""


def for_private_cluster() -> None:
    """Restrict Ray to loopback, with a token in memory, no usage report and threads that share the cores. Does nothing
    where Ray already runs. Raises ConfigError where Ray was imported before: it reads these settings then."""
    settings = {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": random_tokens.token_hex(32),
    }
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        return
    if ray is not None and not settings.keys() <= os.environ.keys():
        raise ConfigError("ray was imported before switchkd could protect it; import it later, or call ray.init first")
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    share_the_cores()


def share_the_cores() -> None:
    """Set THREADS for this process, before it loads torch, and for its children, unless the user has set any."""
    if not THREADS.keys() & os.environ.keys():
        os.environ.update(THREADS)


class Secrets:
    """Values that must not appear in a log: their repr is hidden."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = dict(values)

    @classmethod
    def of_this_process(cls) -> Secrets:
        return cls({name: os.environ[name] for name in SECRETS if name in os.environ})

    def __repr__(self) -> str:
        return "Secrets(...)"

    def apply(self) -> None:
        os.environ.update(self._values)


def prepare(secrets: Secrets, working_dir: str) -> None:
    """Apply the driver's secrets and working directory, from which a user's own rule or loss is imported."""
    secrets.apply()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if working_dir not in sys.path:
        sys.path.insert(0, working_dir)
    if os.path.isdir(working_dir):
        os.chdir(working_dir)
