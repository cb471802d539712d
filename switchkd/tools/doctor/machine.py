"""Checks that need no model: packages, processors, ports, tokens, memory, disk, the run's folder.

In: a config. Out: check results. The only file written is a probe in or above `run.dir`, which is removed.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import socket
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from switchkd.config import resources
from switchkd.config.schema import Config
from switchkd.controller.local import check_single, this_machine
from switchkd.controller.memory import GIB, checkpoint_bytes
from switchkd.controller.memory_fit import memory_fit
from switchkd.controller.run_lock import LOCK, _read
from switchkd.data.atomic_files import CONFIG
from switchkd.engines.cpu_dtype import slow_bfloat16
from switchkd.engines.models.shape import Shape, object_store_bytes
from switchkd.engines.models.sources import looks_local
from switchkd.tools.doctor.check import CheckResult, fail, ok, warn

PROBE = ".switchkd-doctor-"
DASHBOARD_PORT = 8265


def versions() -> Iterator[CheckResult]:
    """Compare installed packages with the ranges that switchkd was published with."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        requirements, python = metadata.requires("switchkd") or [], metadata.metadata("switchkd")["Requires-Python"]
    except metadata.PackageNotFoundError:
        yield warn("versions", "switchkd is not installed, its ranges are not known", "pip install it")
        return
    if python and platform.python_version() not in SpecifierSet(python, prereleases=True):
        yield fail("versions", f"Python {platform.python_version()} is outside {python}", "take another Python")
    needed = [Requirement(line) for line in requirements]
    needed = [package for package in needed if package.marker is None or package.marker.evaluate({"extra": ""})]
    passed = True
    for package in needed:
        installed = _installed(package.name)
        if installed is None or not package.specifier.contains(installed, prereleases=True):
            passed = False
            state = "is not installed" if installed is None else f"{installed} is outside {package.specifier}"
            yield fail("versions", f"{package.name} {state}", f"pip install '{package.name}{package.specifier}'")
    if passed:
        main = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "ray", "deepspeed"))
        yield ok("versions", f"{len(needed)} packages within their ranges ({main})")


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def processors(config: Config) -> Iterator[CheckResult]:
    """Compare the roles' CPUs and GPUs with this machine's; a cluster's are compared by `actors/node_check.py`."""
    here = this_machine()
    if config.run.mode == "inprocess":
        check_single(config)
    if resources.is_private(config):
        resources.check(config, here)
        asked = resources.total(config)
        shares = ", ".join(f"{role} {share['CPU']:g} CPUs {share['GPU']:g} GPUs" for role, share in asked.items())
        yield ok("processors", f"{shares}, of {here['CPU']:g} and {here['GPU']:g}")
        if here["GPU"] and not any(share["GPU"] for share in asked.values()) and config.run.mode == "ray":
            yield warn("processors", f"{here['GPU']:g} GPUs here and no role asks for one", "set resources.*.num_gpus")
    for role, section in (("teacher", config.teacher), ("student", config.student)):
        if section.device.startswith("cuda") and not here["GPU"] and resources.is_private(config):
            yield fail("processors", f"{role}.device={section.device}, torch sees no CUDA device", "take device: auto")


def dtypes(config: Config) -> Iterator[CheckResult]:
    """Warn of bfloat16 where this machine's CPU is slow in it."""
    text, _, remedy = slow_bfloat16(config).partition("; ")
    if text:
        yield warn("dtype", text, remedy)


def ports(config: Config) -> Iterator[CheckResult]:
    """Connect to the named cluster, or bind a port on loopback for a private one."""
    address = os.environ.get("RAY_ADDRESS") or config.cluster.address
    if resources.is_private(config):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
        yield ok("ports", "a private cluster finds free ones on loopback")
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit() or not host:
        yield ok("ports", f"cluster.address={address}: Ray finds them")
        return
    host = host.strip("[]")
    if not _reached(host, int(port)):
        yield fail("ports", f"no answer at cluster.address={address}", "start it with `ray start --head`")
        return
    yield ok("ports", f"{host}:{port} answers")
    if not _reached(host, DASHBOARD_PORT):
        remedy = "`ray job submit` needs it: start the head with --dashboard-port"
        yield warn("ports", f"the dashboard at {host}:{DASHBOARD_PORT} does not answer", remedy)


def _reached(host: str, port: int) -> bool:
    try:  # the network
        socket.create_connection((host, port), timeout=3.0).close()
    except OSError:
        return False
    return True


def tokens(config: Config) -> Iterator[CheckResult]:
    """Check that Ray's token exists and that only its owner may read it. The file's content is never read."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token").expanduser()
    private = resources.is_private(config)
    mode = stat.S_IMODE(path.stat().st_mode) if path.is_file() else None
    if mode is not None and mode & 0o077:
        result = warn if private else fail
        yield result("tokens", f"{path} has mode {mode:04o}: others can read Ray's token", f"chmod 600 {path}")
    elif mode is not None:
        yield ok("tokens", f"{path} is its owner's alone ({mode:04o})")
    if private:
        yield ok("tokens", "a private cluster has a token of its own, in memory")
        return
    if os.environ.get("RAY_AUTH_MODE") != "token":
        yield warn("tokens", "RAY_AUTH_MODE is not token", "export RAY_AUTH_MODE=token, here and on the cluster")
    if mode is None and not os.environ.get("RAY_AUTH_TOKEN"):
        yield warn("tokens", f"neither RAY_AUTH_TOKEN nor {path}", "give this process the cluster's token")


def secrets(config: Config) -> Iterator[CheckResult]:
    """Check that tokens are set where the config names the hub or W&B. Their values are never read."""
    names = {"teacher.path": config.teacher.path if config.needs_teacher else "", "student.path": config.student.path}
    names |= {"data.path": config.data.path, "eval.data": config.eval.data}
    if config.student.prune is not None:
        names["student.path"] = ""
    hub = [
        f"{key}={name}"
        for key, name in names.items()
        if name and name != "demo" and not looks_local(name) and not Path(name).exists()
    ]
    if hub and not os.environ.get("HF_TOKEN"):
        yield warn("secrets", f"HF_TOKEN is not set, {', '.join(hub)} is the hub's", "set it for gated or private ones")
    if config.metrics.wandb:
        yield from _wandb(config.metrics.wandb)
    if not hub and not config.metrics.wandb:
        yield ok("secrets", "none is needed")
    elif hub and os.environ.get("HF_TOKEN"):
        yield ok("secrets", f"HF_TOKEN is set, for {', '.join(hub)}")


def _wandb(project: str) -> Iterator[CheckResult]:
    key = f"metrics.wandb={project}"
    if importlib.util.find_spec("wandb") is None:
        yield fail("secrets", f"{key}, wandb is not installed", "pip install 'switchkd[wandb]'")
    elif os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        yield ok("secrets", f"{key}, WANDB_MODE={os.environ['WANDB_MODE']}: no key is needed")
    elif not os.environ.get("WANDB_API_KEY") and not (Path.home() / ".netrc").is_file():
        yield fail("secrets", f"{key}, WANDB_API_KEY is not set", "set it, or WANDB_MODE=offline")
    else:
        yield ok("secrets", f"{key}, W&B's key is there")


# --- the run's folder ------------------------------------------------------------------------------------------------


def run_dir(config: Config) -> Iterator[CheckResult]:
    """Check that the folder is absolute where other machines need it, holds no other run, and is writable."""
    path = Path(config.run.dir).expanduser()
    if not resources.is_private(config) and not path.is_absolute():
        yield fail("run.dir", f"run.dir={config.run.dir} is relative", "give an absolute path on shared storage")
    if (path / LOCK).exists():
        owner = _read(path / LOCK)
        yield warn(
            "run.dir",
            f"{path} is held by process {owner.get('pid', '?')} on {owner.get('host', '?')}",
            "wait for it, or give another run.dir (the lock of an ended process does not count)",
        )
    if (path / CONFIG).exists():
        yield warn("run.dir", f"{path} holds a run", "go on with --resume, or give run.overwrite=true or another one")
    try:  # the disk
        with probe(config) as (file, _):
            yield ok("run.dir", f"{file.parent} can be written to")
    except OSError as error:
        yield fail("run.dir", f"{_nearest(path)} cannot be written to ({error.strerror})", "give another run.dir")


@contextmanager
def probe(config: Config) -> Iterator[tuple[Path, str]]:
    """Write a file in `run.dir` or the nearest existing folder above; yield its path and content, then remove it."""
    nonce = uuid.uuid4().hex
    file = _nearest(Path(config.run.dir).expanduser().resolve()) / f"{PROBE}{nonce}"
    try:
        file.write_text(nonce)
        yield file, nonce
    finally:
        file.unlink(missing_ok=True)


def _nearest(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())


def disk(config: Config, shapes: dict[str, Shape]) -> Iterator[CheckResult]:
    """Compare the free space with the kept checkpoints, the one being written, and two students."""
    one = checkpoint_bytes(config, shapes["student"])
    student = shapes["student"].params * 4.0
    needed = one * (config.checkpoint.keep_last + 1) + 2 * student
    folder = _nearest(Path(config.run.dir).expanduser())
    free = shutil.disk_usage(folder).free
    text = f"{free / GIB:.3g} GiB free at {folder}, checkpoints need {needed / GIB:.3g} ({one / GIB:.3g} each)"
    if free < needed:
        yield fail("disk", text, "free some, lower checkpoint.keep_last, or give another run.dir")
    elif free < 2 * needed:
        yield warn("disk", text, "rollouts and metrics come on top: free some")
    else:
        yield ok("disk", text)


def host_memory(config: Config, force: bool = False) -> Iterator[CheckResult]:
    """Compare the memory of a private cluster's processes with this machine's."""
    if not resources.is_private(config):
        return
    fit = memory_fit(config)
    if fit.fits:
        yield ok("memory", fit.text)
    else:
        yield (warn if force else fail)("memory", fit.text, fit.remedy)


def object_store(config: Config, shapes: dict[str, Shape]) -> Iterator[CheckResult]:
    """Compare the size of a private cluster's object store with the free shared memory."""
    shm = Path("/dev/shm")
    if not resources.is_private(config) or config.run.mode == "inprocess" or not shm.is_dir():
        return
    needed, free = object_store_bytes(config, shapes["student"].params) / 1e9, shutil.disk_usage(shm).free / 1e9
    key = "cluster.object_store_gb" + (" by default" if config.cluster.object_store_gb is None else "")
    text = f"{free:.3g} GB free in {shm}, {key}={needed:.3g}"
    remedy = "Ray would use the disk: enlarge it (docker run --shm-size), or lower cluster.object_store_gb"
    yield ok("object store", text) if free >= needed else warn("object store", text, remedy)
