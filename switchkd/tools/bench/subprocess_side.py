"""One side of a comparison in a process of its own, apart from the other sides' threads, caches and memory.

In: a function `work(repeats, *args)` that builds what it needs, then does its work once for each item of `repeats`.
Out: seconds of alternating runs, and what each side reported. While one side works the others wait.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any

from switchkd.config.errors import ConfigError
from switchkd.tools.bench.process_stats import Gauge
from switchkd.tools.bench.table import Pairs, compare, take_turns


class Repeats:
    """The measured runs, as the side's process sees them: one item each. It may `report` numbers for the table."""

    def __init__(self, connection: Connection, device: str) -> None:
        self.connection = connection
        self.device = device
        self.reported: dict[str, Any] = {}
        self.gauge = Gauge()

    def count_memory_from_here(self) -> None:
        """Start the peak that counts. Call it once, at the latest when everything is built."""
        self.gauge = Gauge(self.device)

    def report(self, **numbers: Any) -> None:
        self.reported.update(numbers)

    def __iter__(self) -> Iterator[None]:
        self.connection.send(("ready", None))
        while self.connection.recv() == "go":
            start = time.perf_counter()
            yield
            self._synchronize()
            self.connection.send(("seconds", time.perf_counter() - start))
        self.connection.send(("report", {**self.reported, "peak_mb": self.gauge.peak_mb()}))

    def _synchronize(self) -> None:
        """Wait for what a GPU still computes: it belongs to this run."""
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()


class BenchProcess:
    """The handle: `start` it, call it for the seconds of one run, `finish` it for its report."""

    def __init__(self, name: str, work: Callable[..., None], *args: Any, device: str = "cpu", threads: int = 0) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")  # no side inherits what this process has loaded
        self.connection, self._theirs = context.Pipe()
        arguments = (self._theirs, device, threads, work, args)
        self.process = context.Process(target=_main, args=arguments, name=name)

    def start(self) -> None:
        self.process.start()
        self._theirs.close()

    def wait_until_built(self) -> None:
        """Raises ConfigError as the side did, RuntimeError for anything else that went wrong in it."""
        self._receive("ready")

    def __call__(self) -> float:
        self.connection.send("go")
        return float(self._receive("seconds"))

    def finish(self) -> dict[str, Any]:
        """End it. Returns what it reported, with `peak_mb`."""
        self.connection.send("stop")
        report: dict[str, Any] = self._receive("report")
        self.process.join(60)
        return report

    def close(self) -> None:
        """End it at once, whatever it does."""
        self.connection.close()
        self.process.join(10)  # it sees the closed pipe and takes down what it started
        if self.process.is_alive():
            self.process.kill()

    def _receive(self, expected: str) -> Any:
        try:
            kind, value = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join(10)
            raise RuntimeError(
                f"{self.name}: its process ended with code {self.process.exitcode} (-9: out of memory?)"
            ) from None
        if kind == "refused":
            raise ConfigError(value)
        if kind == "failed":
            raise RuntimeError(f"{self.name}: {value}")
        assert kind == expected, f"{self.name} sent {kind}, not {expected}"
        return value


def measure_processes(
    sides: Sequence[BenchProcess], repeats: int, warmup: int = 1
) -> tuple[Pairs, dict[str, dict[str, Any]]]:
    """Build all sides at the same time, measure them in turns, and end them. Returns their seconds and reports."""
    with ExitStack() as stack:
        for side in sides:
            side.start()
            stack.callback(side.close)
        for side in sides:
            side.wait_until_built()
        pairs = compare(take_turns({side.name: side for side in sides}, repeats, warmup))
        return pairs, {side.name: side.finish() for side in sides}


def _main(connection: Connection, device: str, threads: int, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    """Run in the other process. What libraries print goes to a file, so that stdout holds the table only."""
    with tempfile.TemporaryFile() as output:
        sys.stdout.flush()
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        try:  # the process boundary
            if threads:
                import torch

                torch.set_num_threads(threads)
            work(Repeats(connection, device), *args)
        except ConfigError as error:
            connection.send(("refused", str(error)))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            pass  # the bench is gone
        except BaseException:
            connection.send(("failed", traceback.format_exc()))
