"""Memory and CPU time of this process and its descendants.

Memory on a CPU is the peak of resident memory above the resident memory at the start. Trap: `ru_maxrss` of a started
process begins with its parent's memory; `VmHWM` is the process's own and can be reset. On CUDA it is the allocator's
peak.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path


class Gauge:
    """Measures the peak since its construction."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        if device == "cuda":
            import torch

            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            return
        with suppress(OSError, AttributeError):  # freed memory that the allocator still holds would hide new memory
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self.before = {pid: kilobytes(pid, "VmRSS") for pid in (os.getpid(), *descendants())}

    def peak_mb(self) -> float:
        """Return MiB; on a CPU the sum of all processes' own peaks, in which shared pages count once per process."""
        if self.device == "cuda":
            import torch

            return torch.cuda.max_memory_allocated() / 2**20
        peaks = {pid: kilobytes(pid, "VmHWM") for pid in (os.getpid(), *descendants())}
        return sum(max(0, peak - self.before.get(pid, 0)) for pid, peak in peaks.items()) / 2**10


def descendants() -> list[int]:
    """Return the ids of the processes that this one started, at any depth."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError, ValueError):  # the process has ended
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
    tree = {os.getpid()}
    while children := {pid for pid, parent in parents.items() if parent in tree} - tree:
        tree |= children
    return sorted(tree - {os.getpid()})


def cpu_seconds() -> float:
    """Return the CPU time of this process and its living descendants so far."""
    ticks = 0
    for pid in (os.getpid(), *descendants()):
        with suppress(OSError, IndexError, ValueError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def kilobytes(pid: int, key: str) -> int:
    """Return a line of /proc/PID/status, such as VmRSS; 0 for a process that has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1])
    return 0
