"""One side of a comparison, in a process of its own: no side meets another's threads, caches or memory.

In: a function `work(turns, *args)` that builds what it needs, then does its work once for each item of `turns`. Out: a
callable for `table.paired`; while one side works the others wait.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any

from switchkd.config.errors import ConfigError
from switchkd.tools.bench.process_stats import Gauge


class Turns:
    """What a side's process sees of the bench: one item per turn. It may `tell` numbers for the table."""

    def __init__(self, connection: Connection, device: str) -> None:
        self.connection, self.device = connection, device
        self.told: dict[str, Any] = {}
        self.gauge = Gauge()

    def count_memory_from_here(self) -> None:
        """Peak memory is what comes on top of the present. Call it once, at the latest when everything is built."""
        self.gauge = Gauge(self.device)

    def tell(self, **numbers: Any) -> None:
        self.told.update(numbers)

    def __iter__(self) -> Iterator[None]:
        self.connection.send(("ready", None))
        while self.connection.recv() == "go":
            start = time.perf_counter()
            yield
            self._settle()
            self.connection.send(("took", time.perf_counter() - start))
        self.connection.send(("told", {**self.told, "peak_mb": self.gauge.peak_mb()}))

    def _settle(self) -> None:
        """What a GPU still computes belongs to this turn."""
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()


class BenchProcess:
    """The handle: call it for a turn's seconds, `finish` it for what it told."""

    def __init__(self, name: str, work: Callable[..., None], *args: Any, device: str = "cpu", threads: int = 0) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_live, args=(theirs, device, threads, work, args), name=name)
        self.process.start()
        theirs.close()
        self.is_ready = False

    def wait_until_ready(self) -> None:
        """Built, that is. Raises ConfigError as the side did, RuntimeError for anything else that went wrong in it."""
        if not self.is_ready:
            self._answer("ready")
            self.is_ready = True

    def __call__(self) -> float:
        self.wait_until_ready()
        self.connection.send("go")
        return float(self._answer("took"))

    def finish(self) -> dict[str, Any]:
        """End it. What it told, with `peak_mb`."""
        self.wait_until_ready()
        self.connection.send("stop")
        told: dict[str, Any] = self._answer("told")
        self.process.join(60)
        self.close()
        return told

    def close(self) -> None:
        """End it at once, whatever it does."""
        self.connection.close()
        self.process.join(10)  # it sees the closed pipe and takes down what it started
        if self.process.is_alive():
            self.process.kill()

    def _answer(self, wanted: str) -> Any:
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
        assert kind == wanted, f"{self.name} said {kind}, not {wanted}"
        return value


class BenchProcesses(ExitStack):
    """Several of them, by name; none outlives the block."""

    def start(self, sides: Mapping[str, Callable[[], BenchProcess]]) -> dict[str, BenchProcess]:
        """All of them, built side by side: only their turns are measured. A side's memory is its own process's."""
        made = {}
        for name, make in sides.items():
            made[name] = make()
            self.callback(made[name].close)
        for side in made.values():
            side.wait_until_ready()
        return made


def _live(connection: Connection, device: str, threads: int, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    """The other process's whole life. Its chatter goes to a file, so that stdout holds the table only."""
    with tempfile.TemporaryFile() as chatter:
        sys.stdout.flush()
        os.dup2(chatter.fileno(), 1)
        os.dup2(chatter.fileno(), 2)
        try:  # the process boundary
            if threads:
                import torch

                torch.set_num_threads(threads)
            work(Turns(connection, device), *args)
        except ConfigError as error:
            connection.send(("refused", str(error)))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            pass  # the bench is gone
        except BaseException:
            connection.send(("failed", traceback.format_exc()))
