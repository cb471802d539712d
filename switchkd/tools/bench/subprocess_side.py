"""Runs each side of a comparison in its own process, apart from the other sides' threads, caches and memory.

In: a function `work(repeats, *args)` that prepares itself, then does its work once for each item of `repeats`.
Out: seconds of alternating runs, and each side's report. Only one side works at a time.
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
    """Iterates over the runs in the side's process. `report` adds numbers to the table."""

    def __init__(self, connection: Connection, device: str) -> None:
        self.connection = connection
        self.device = device
        self.reported: dict[str, Any] = {}
        self.gauge = Gauge()

    def count_memory_from_here(self) -> None:
        """Restart the measurement of peak memory; without a call it starts with the process."""
        self.gauge = Gauge(self.device)

    def report(self, **numbers: Any) -> None:
        self.reported.update(numbers)

    def __iter__(self) -> Iterator[None]:
        self.connection.send(("ready", None))
        while self.connection.recv() == "go":
            start = time.perf_counter()
            yield
            if self.device == "cuda":  # kernels that still run belong to this run
                import torch

                torch.cuda.synchronize()
            self.connection.send(("seconds", time.perf_counter() - start))
        self.connection.send(("report", {**self.reported, "peak_mb": self.gauge.peak_mb()}))


class BenchProcess:
    """Handle of a side's process. `start` it, call it for the seconds of one run, `finish` it for its report."""

    def __init__(self, name: str, work: Callable[..., None], *args: Any, device: str = "cpu", threads: int = 0) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")  # a side inherits no loaded module or memory
        self.connection, self._child_connection = context.Pipe()
        arguments = (self._child_connection, device, threads, work, args)
        self.process = context.Process(target=_main, args=arguments, name=name)

    def start(self) -> None:
        self.process.start()
        self._child_connection.close()

    def __call__(self) -> float:
        self.connection.send("go")
        return float(self.receive("seconds"))

    def finish(self) -> dict[str, Any]:
        """End the process. Returns its report, with `peak_mb`."""
        self.connection.send("stop")
        report: dict[str, Any] = self.receive("report")
        self.process.join(60)
        return report

    def close(self) -> None:
        """End the process without its report."""
        self.connection.close()
        self.process.join(10)  # time to notice the closed pipe and to end its own children
        if self.process.is_alive():
            self.process.kill()

    def receive(self, expected: str) -> Any:
        """Wait for a message: `ready`, `seconds` or `report`. Raises the side's ConfigError, else RuntimeError."""
        try:
            kind, value = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join(10)
            code = self.process.exitcode
            raise RuntimeError(f"{self.name}: its process ended with code {code} (-9: out of memory?)") from None
        if kind == "refused":
            raise ConfigError(value)
        if kind == "failed":
            raise RuntimeError(f"{self.name}: {value}")
        assert kind == expected, f"{self.name} sent {kind}, not {expected}"
        return value


def measure_processes(
    sides: Sequence[BenchProcess], repeats: int, warmup: int = 1
) -> tuple[Pairs, dict[str, dict[str, Any]]]:
    """Start all sides concurrently, measure them in turns, and end them. Returns their seconds and reports."""
    with ExitStack() as stack:
        for side in sides:
            side.start()
            stack.callback(side.close)
        for side in sides:
            side.receive("ready")
        pairs = compare(take_turns({side.name: side for side in sides}, repeats, warmup))
        return pairs, {side.name: side.finish() for side in sides}


def _main(connection: Connection, device: str, threads: int, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    """Run a side in its process. Libraries print to a file, so that stdout only has the table."""
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
            pass  # the bench has ended
        except BaseException:
            connection.send(("failed", traceback.format_exc()))
