"""Memory and CPU time of this process and of those that it started.

Memory on a CPU: the kernel's high-water mark of resident memory above what was resident before. Trap: `ru_maxrss` is no
such mark in a process that another one started, since it begins with what its parent held; `VmHWM` is the process's
own, and can be set back. On CUDA it is the allocator's own peak.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path


class Gauge:
    """Counts from the moment it is made."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        if device == "cuda":
            import torch

            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            return
        _give_back()
        Path("/proc/self/clear_refs").write_text("5")
        self.before = {pid: kilobytes(pid, "VmRSS") for pid in (os.getpid(), *descendants())}

    def peak_mb(self) -> float:
        """MiB. On a CPU over all processes, each at its own peak: shared pages count once per process."""
        if self.device == "cuda":
            import torch

            return torch.cuda.max_memory_allocated() / 2**20
        peaks = {pid: kilobytes(pid, "VmHWM") for pid in (os.getpid(), *descendants())}
        return sum(max(0, peak - self.before.get(pid, 0)) for pid, peak in peaks.items()) / 2**10


def descendants() -> list[int]:
    """Processes that this one started, at any depth."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError, ValueError):  # it ended meanwhile
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found - {os.getpid()})


def cpu_seconds() -> float:
    """CPU time that the living ones have used so far."""
    ticks = 0
    for pid in (os.getpid(), *descendants()):
        with suppress(OSError, IndexError, ValueError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def kilobytes(pid: int, key: str) -> int:
    """A line of /proc/PID/status, such as VmRSS; 0 for a process that has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1])
    return 0


def _give_back() -> None:
    """What was freed before goes back to the kernel, so that it cannot hide what is taken afterwards."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
