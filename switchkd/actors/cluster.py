"""Joins a Ray cluster, or starts a private one and watches its processes."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from threading import Event, Thread

import ray
from ray.exceptions import RayError

from switchkd.actors.ray_futures import shut_down
from switchkd.config.errors import ConfigError, one_line
from switchkd.config.schema import Config
from switchkd.engines.models.shape import object_store_bytes, read_shape
from switchkd.engines.models.sources import looks_local, num_params

CONNECT_S = 10.0
MAX_TEMP_DIR = 25
"""Longest temporary folder: below it the path of Ray's longest socket has 82 characters, and 107 are allowed."""
VITAL = {"raylet": "raylet", "gcs_server": "GCS server"}
"""Processes without which a cluster neither works nor recovers, by Ray's names."""


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
        with _keep_sigterm():
            ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
    except (OSError, RuntimeError, RayError) as error:
        reason = one_line(error)[:300]
        raise ConfigError(
            f"the Ray cluster at cluster.address={address} cannot be joined ({reason}); start one with `ray start "
            "--head`, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN as it has them, or leave cluster.address empty for a "
            "private one"
        ) from None


def start_private(config: Config, lost: Callable[[str], None]) -> Callable[[], None]:
    """Start a cluster for this process, without a dashboard, and return the function that ends it. Call
    `process_setup.for_private_cluster` before.

    `lost` gets the end of a process of VITAL in words, in a thread, once all others of the cluster are killed. It must
    end this process: Ray neither reports such an end nor can shut down after it.
    """
    folder = private_folder() / "ray"
    try:
        with _keep_sigterm():
            ray.init(
                address="local",
                num_cpus=os.cpu_count() or 1,
                include_dashboard=False,
                object_store_memory=object_store_bytes(config, _student_params(config)),
                logging_level=logging.ERROR,
                log_to_driver=False,
                _temp_dir=str(folder),
            )
    except BaseException:  # SIGTERM and Ctrl-C too
        _kill_rest(folder)
        raise
    node = ray._private.worker._global_node
    closing = Event()

    def watch(kind: str) -> None:
        code = node.all_processes[kind][0].process.wait()
        if closing.is_set():
            return
        closing.set()
        for started in chain.from_iterable(node.all_processes.values()):
            started.process.kill()
        _kill_rest(folder)
        how = f"ended with exit code {code}"
        if code < 0:
            memory = ", as the kernel does where memory runs out" if -code == signal.SIGKILL else ""
            how = f"was killed ({signal.Signals(-code).name}{memory})"
        lost(f"Ray's {VITAL[kind]} {how}; logs: {node.get_logs_dir_path()}")

    def close() -> None:
        closing.set()
        shut_down()
        _kill_rest(folder)

    for kind in VITAL:
        Thread(target=watch, args=[kind], daemon=True).start()
    return close


def _kill_rest(folder: Path) -> None:
    """Kill what Ray leaves of this process's clusters (its agents, for up to half a minute): processes that write into
    the logs of one. Ray's folder for a cluster has the process id of its driver at the end of its name."""
    logs = re.compile(rf"{re.escape(str(folder.resolve()))}/session_[-_0-9]+_{os.getpid()}/logs/")
    package = os.path.dirname(ray.__file__).encode()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is another user's
            command = (process / "cmdline").read_bytes()
            is_rays = command.startswith(b"ray::") or package in command  # not the user's reader of a log
            if is_rays and any(logs.match(_target(file)) for file in (process / "fd").iterdir()):
                os.kill(int(process.name), signal.SIGKILL)


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:  # closed in between
        return ""


def private_folder() -> Path:
    """Return a folder that this user alone can enter, for Ray's logs and sockets: Ray lets all users write into the
    folders that it makes. Raises ConfigError where it belongs to another user."""
    parent = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    folder = Path(parent if len(parent) <= MAX_TEMP_DIR else "/tmp") / f"switchkd-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made ({error.strerror}); set RAY_TMPDIR to a folder of yours") from None
    if folder.is_symlink() or not folder.is_dir() or folder.stat().st_uid != os.getuid():
        raise ConfigError(f"{folder} is not a folder of this user; remove it, or set RAY_TMPDIR to a folder of yours")
    folder.chmod(0o700)
    return folder


@contextmanager
def _keep_sigterm() -> Iterator[None]:
    """Keep the handler of SIGTERM. That of `ray.init` kills the cluster's processes first; then Ray aborts this one."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:  # raised by Ray's handler
        if callable(handler):
            handler(signal.SIGTERM, None)
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)


def _student_params(config: Config) -> int:
    """Number of parameters; 0 for a model that cannot be built without its weights, such as remote code."""
    if config.is_fake:
        return int(config.fake.weights_mb * 2**18)
    if looks_local(config.student.path):
        return num_params(Path(config.student.path).expanduser())
    with suppress(ConfigError):
        return read_shape(config.student, "student.path").params
    return 0
