"""Joins a Ray cluster, or starts a private one."""

from __future__ import annotations

import logging
import os
import socket
from contextlib import suppress
from pathlib import Path

import ray
from ray.exceptions import RayError

from switchkd.config.errors import ConfigError, one_line
from switchkd.config.schema import Config
from switchkd.engines.models.shape import object_store_bytes, read_shape
from switchkd.engines.models.sources import looks_local, num_params

CONNECT_S = 10.0


def connect(address: str) -> None:
    """Join the job's cluster, or the one at this address. Raises ConfigError."""
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS") or address
    # the default of Ray is a quarter of an hour
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "1")
    try:  # the network
        host, _, port = address.rpartition(":")
        if port.isdigit() and "/" not in host:
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
    except (OSError, RuntimeError, RayError) as error:
        reason = one_line(error)[:300]
        raise ConfigError(
            f"the Ray cluster at cluster.address={address} cannot be joined ({reason}); start one with `ray start "
            "--head`, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN as it has them, or leave cluster.address empty for a "
            "private one"
        ) from None


def start_private(config: Config) -> None:
    """Start a cluster for this process, without a dashboard. Call `process_setup.for_private_cluster` before."""
    ray.init(
        address="local",
        num_cpus=os.cpu_count() or 1,
        include_dashboard=False,
        object_store_memory=object_store_bytes(config, _student_params(config)),
        logging_level=logging.ERROR,
        log_to_driver=False,
    )


def _student_params(config: Config) -> int:
    """Number of parameters; 0 for a model that cannot be built without its weights, such as remote code."""
    if config.is_fake:
        return int(config.fake.weights_mb * 2**18)
    if looks_local(config.student.path):
        return num_params(Path(config.student.path).expanduser())
    with suppress(ConfigError):
        return read_shape(config.student, "student.path").params
    return 0
