"""One captured CUDA graph per shape of forward pass: a short step costs one launch instead of several hundred.

In: the numbers of one forward pass, copied into a buffer with a fixed address, and a step that computes from that
buffer. Out: the result of the step, computed by the step itself or by the replay of its graph. A graph repeats kernels
and addresses only: whatever differs between two calls of one shape must lie in the buffer, in the cache or in the
weights, and all three are only written in place.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from switchkd.config.errors import ConfigError

Step = Callable[[], torch.Tensor]
Capture = Callable[[Step], Step]
"""Records a step and returns its replay, which fills the same output tensor each time. The tests pass another one."""


_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Graph:
    replay: Step
    trusted: bool = False


class StepGraphs:
    """The graphs of one model's steps, by shape, and the buffer that they all read.

    A shape is recorded at its `capture_at`-th use; rarer shapes are not worth a graph. The first replay is compared
    with the step, on other inputs than those of the recording. A failed recording stops all further recordings, with
    one line in the log: existing graphs stay in use, other shapes run without one.
    """

    def __init__(self, capture: Capture, *, num_inputs: int, device: torch.device, capture_at: int = 3,
                 max_graphs: int = 128) -> None:  # fmt: skip
        self.inputs = torch.zeros(num_inputs, dtype=torch.int64, device=device)
        self._capture, self._capture_at, self._max_graphs = capture, capture_at, max_graphs
        self._graphs: dict[Hashable, _Graph] = {}
        self._uses: Counter[Hashable] = Counter()
        self._recording = True

    def load(self, numbers: np.ndarray) -> torch.Tensor:
        """Copy int64 numbers to the start of the buffer. Returns that part of it."""
        part = self.inputs[: len(numbers)]
        host = torch.from_numpy(numbers)
        part.copy_(host.pin_memory() if part.is_cuda else host, non_blocking=True)
        return part

    def run(self, shape: Hashable, step: Step) -> torch.Tensor:
        """Return the result of `step`. Read it before the next call: a replay overwrites it.

        Equal shapes must mean equal steps: a call may replay the step of an earlier call with its shape.
        """
        graph = self._graphs.get(shape)
        if graph is None:
            out = step()
            self._maybe_record(shape, step)
            return out
        if not graph.trusted:
            out = _checked(shape, graph.replay, step)
            graph.trusted = True
            return out
        return graph.replay()

    def _maybe_record(self, shape: Hashable, step: Step) -> None:
        self._uses[shape] += 1
        if not self._recording or self._uses[shape] < self._capture_at:
            return
        try:
            self._graphs[shape] = _Graph(self._capture(step))
        except Exception as error:  # the step has just succeeded, so only the recording fails
            self._stop(f"forward pass {shape} cannot be recorded ({type(error).__name__}: {error})")
        if len(self._graphs) == self._max_graphs:
            self._stop(f"{self._max_graphs} shapes are recorded")

    def _stop(self, why: str) -> None:
        self._recording = False
        _log.warning("CUDA graphs: %s; other shapes run without from here on", " ".join(why.split()))


class CudaCapture:
    """Records steps as CUDA graphs that share one memory pool. They must be replayed one after the other."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        with torch.cuda.device(self.device):
            graph, out = self._record(step)

        def replay() -> torch.Tensor:
            graph.replay()
            return out

        return replay

    def _record(self, step: Step) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        current = torch.cuda.current_stream()
        graph = torch.cuda.CUDAGraph()
        try:
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):  # libraries allocate on their first call of a kind: not in a graph
                for _ in range(2):
                    step()
            current.wait_stream(self._stream)
            # thread_local: other threads (a teacher or a learner in this process) may use CUDA during the capture
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                out = step()
        finally:
            torch.cuda.set_stream(current)  # a failed recording leaves its own stream as the current one
        return graph, out


def capture_for(
    model: Any, switch: Literal["auto", "on", "off"], *, key: str, whole_rows: bool = False
) -> Capture | None:
    """Return how to record the steps of a model, None for no recording. `key` names `switch` in the config,
    `whole_rows` says that the model returns logits. Raises ConfigError for `on` where the model allows no graphs."""
    if switch == "off":
        return None
    if (obstacle := _obstacle(model, whole_rows)) is None:
        return CudaCapture(model.device)
    if switch == "on":
        raise ConfigError(f"{key}=on, but {obstacle}; set {key}: auto")
    return None


def _obstacle(model: Any, whole_rows: bool) -> str | None:
    devices = {str(tensor.device) for tensor in model.parameters()}
    if not all(device.startswith("cuda") for device in devices):
        return f"the model is on {', '.join(sorted(devices))} and only a CUDA device has graphs"
    if len(devices) > 1:
        return f"the model is spread over {', '.join(sorted(devices))} and a graph has one device"
    if whole_rows:
        return "teacher.output is logits and only hidden states are recorded"
    return None


def _checked(shape: Hashable, replay: Step, step: Step) -> torch.Tensor:
    """Return the step's result, which the replay must equal. Both write the same values into the cache."""
    replayed = replay().clone()
    eager = step()
    error = float((replayed.float() - eager.float()).norm() / eager.float().norm())
    if not error <= (1e-3 if eager.dtype == torch.float32 else 0.1):  # equal kernels may sum in another order
        raise RuntimeError(
            f"the CUDA graph of forward pass {shape} does not repeat the model (relative error {error:.2g}); set "
            f"student.graphs and teacher.graphs to off"
        )
    return eager


# --- shapes that repeat ----------------------------------------------------------------------------------------------

MAX_WIDTH = 65  # tokens per row; a longer row (a prompt) keeps a GPU busy without a graph


def few_rows(num: int) -> int:
    """1, 2, 4, 8, ..."""
    return 1 << (num - 1).bit_length()


def few_widths(num: int) -> int:
    """1, 2, 3, 4, 5, 8, 9, 16, 17, ...: blocks of K tokens, and of K + 1."""
    power = few_rows(num)
    return power // 2 + 1 if num == power // 2 + 1 else power


def few_lengths(num: int) -> int:
    """64, 96, 128, 192, 256, 384, ...: multiples of kv_cache.ROUND, at most half as much again."""
    power = max(few_rows(num), 64)
    return power * 3 // 4 if power > 64 and num <= power * 3 // 4 else power
