"""Locks a run folder for one live process: a lock file names its holder and carries the holder's heartbeat.

In: a folder. Out: a held lock, or a ConfigError that names the holder. A holder on this machine is dead when its
process is gone; a holder on another machine (a pod that was moved) when its heartbeat stops while this process watches.
Clocks are not compared, so machines may disagree about the time.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from switchkd.config.errors import ConfigError

LOCK = "run.lock"


class RunLock:
    """Lock held from construction to `release`. A daemon thread writes a heartbeat every `beat_s` seconds."""

    def __init__(self, folder: Path, beat_s: float = 5.0, watch_s: float = 30.0) -> None:
        self.path = folder / LOCK
        self._owner = {
            "nonce": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": os.getpid(),
            "started": _start_time(os.getpid()),
        }
        self._beat_s, self._watch_s = beat_s, watch_s
        while not self._create():
            self._take_over()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._thread.start()

    @property
    def held(self) -> bool:
        """False after another process took the folder over because this one's heartbeat stopped for `watch_s`."""
        return _read(self.path).get("nonce", self._owner["nonce"]) == self._owner["nonce"]

    def move(self, folder: Path) -> None:
        """Follow a folder that was moved together with the lock."""
        self.path = folder / LOCK

    def stop(self) -> None:
        """End the heartbeat; the lock stays."""
        self._stop.set()
        self._thread.join()

    def release(self) -> None:
        self.stop()
        if _read(self.path).get("nonce") == self._owner["nonce"]:
            self.path.unlink()

    def _create(self) -> bool:
        try:
            file = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(file, "w") as text:
            text.write(self._line(0))
        return True

    def _take_over(self) -> None:
        """Remove the lock of a dead holder. Raises ConfigError where the holder lives."""
        owner = _read(self.path)
        if owner.get("machine") == self._owner["machine"]:
            dead = _start_time(owner["pid"]) != owner["started"]
        else:
            dead = self._stands_still(owner)
        if not dead:
            raise ConfigError(
                f"{self.path.parent} is in use by process {owner.get('pid', '?')} on {owner.get('host', '?')}; wait "
                "for it, stop it, or give another run.dir"
            )
        stale = self.path.with_name(f"{LOCK}.{self._owner['nonce']}")
        try:
            os.replace(self.path, stale)
        except FileNotFoundError:  # released in between
            return
        if _read(stale).get("nonce") != owner.get("nonce"):  # a third process was faster
            os.replace(stale, self.path)
            return
        stale.unlink()

    def _stands_still(self, owner: dict[str, Any]) -> bool:
        deadline = time.monotonic() + self._watch_s
        while time.monotonic() < deadline:
            time.sleep(min(self._beat_s, self._watch_s) / 4)
            if (now := _read(self.path)) != owner:
                return not now  # empty: released in between
        return True

    def _beat(self) -> None:
        num_beats = 0
        while not self._stop.wait(self._beat_s) and self.held:
            num_beats += 1
            beside = self.path.with_name(LOCK + ".tmp")
            with suppress(OSError):  # a disk that fails for a moment: the next beat tries again
                beside.write_text(self._line(num_beats))
                os.replace(beside, self.path)

    def _line(self, num_beats: int) -> str:
        return json.dumps({**self._owner, "num_beats": num_beats}) + "\n"


def _read(path: Path) -> dict[str, Any]:
    """The lock's content; empty where there is no lock, or one that is being written."""
    try:
        owner = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _machine() -> str:
    """Identifies the scope of a process id: one boot of one host, one container."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    space = Path("/proc/self/ns/pid")
    known = (boot.read_text().strip(), os.readlink(space)) if boot.exists() and space.is_symlink() else ()
    return "/".join((socket.gethostname(), *known))


def _start_time(pid: int) -> str:
    """Distinguishes a process from a later one with the same id; empty where there is none (or a zombie)."""
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").exists():
        if not stat.exists():
            return ""
        state, *rest = stat.read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else rest[18]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "alive"
