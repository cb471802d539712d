"""Checks for `switchkd doctor` that all nodes of a cluster see the run's folder and have the same software.

In: a config and a file that was just written. Out: each node's answer. Joins the cluster and leaves it again.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import switchkd
from switchkd.actors.launch import join
from switchkd.actors.ray_futures import shut_down
from switchkd.config.errors import last_line
from switchkd.config.schema import Config

ANSWER_S = 90.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """One node's answer."""

    name: str
    sees: bool = False
    versions: str = ""
    error: str = ""


class _Quiet:
    def info(self, text: str) -> None:
        """Print nothing: the doctor prints results only."""


def look(config: Config, file: str, nonce: str) -> tuple[str, list[Look]]:
    """Return a line about the cluster's resources, and each node's answer. Raises ConfigError where the cluster cannot
    be joined or is too small."""
    joined_here = not ray.is_initialized()
    try:
        join(config, cast(Any, _Quiet()))
        total = ray.cluster_resources()
        nodes = [node for node in ray.nodes() if node["Alive"]]
        text = f"{len(nodes)} nodes, {total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs: enough for the run"
        return text, _at_nodes(nodes, file, nonce)
    finally:
        if joined_here and ray.is_initialized():
            shut_down()


def _at_nodes(nodes: list[dict[str, Any]], file: str, nonce: str) -> list[Look]:
    """Run a task on each node, all at once."""
    refs = {}
    for node in nodes:
        strategy = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
        name = f"{node['NodeManagerHostname']} ({node['NodeID'][:8]})"
        refs[name] = _look.options(scheduling_strategy=strategy).remote(file, nonce)
    return [_answer(name, ref) for name, ref in refs.items()]


def _answer(name: str, ref: Any) -> Look:
    try:  # another machine
        sees, node_versions = ray.get(ref, timeout=ANSWER_S)
    except Exception as error:
        return Look(name=name, error=last_line(error))
    return Look(name=name, sees=sees, versions=node_versions)


@ray.remote(num_cpus=0, max_retries=0)
def _look(file: str, nonce: str) -> tuple[bool, str]:
    path = Path(file)
    return path.is_file() and path.read_text() == nonce, versions()


def versions() -> str:
    """Versions that must be the same on all nodes."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "ray"))
    return f"switchkd {switchkd.__version__}, Python {platform.python_version()}, {packages}"
