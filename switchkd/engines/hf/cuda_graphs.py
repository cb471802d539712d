"""One captured CUDA graph per shape of forward pass: a short step costs one launch instead of several hundred.

In: the numbers of one forward pass, copied into a buffer that stays where it is, and a step that computes from that
buffer. Out: what the step returns, computed by the step itself or by the replay of its recording. A recording repeats
kernels and addresses, nothing else: whatever differs between two calls of one shape must lie in the buffer, in the
cache or in the weights, and all three are only ever written in place.

How a step is recorded is handed in: `CudaCapture` here, a tape of operations in the tests.
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
"""Records a step. The replay it returns fills the same output tensor each time."""

CAPTURE_AT = 3  # uses of a shape: rare ones are not worth a recording
MAX_GRAPHS = 128
# How far a replay may lie from the step itself, as a share: the same kernels, perhaps summed in another order.
_TOLERANCE = {torch.float32: 1e-3}

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Graph:
    replay: Step
    trusted: bool = False


class StepGraphs:
    """The recordings of one model's steps, by shape, and the buffer that they all read.

    A shape is recorded when it has come `capture_at` times. The first replay is held against the step itself, on other
    inputs than those of the recording. A recording that fails ends all recording, with one line in the log: those that
    exist stay in use, other shapes are computed step by step.
    """

    def __init__(self, capture: Capture, *, num_inputs: int, device: torch.device, capture_at: int = CAPTURE_AT,
                 max_graphs: int = MAX_GRAPHS) -> None:  # fmt: skip
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
        """What `step` returns now. To be read before the next call: a replay overwrites it.

        Equal shapes must mean equal steps: of two calls with one shape the first one's step may be replayed.
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
        except Exception as error:  # the step itself has just worked, so this is the recording's own trouble
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
            # thread_local: what other threads do meanwhile (a teacher or a learner in this process) is their business
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                out = step()
        finally:
            torch.cuda.set_stream(current)  # a recording that fails leaves its stream behind as the current one
        return graph, out


def capture_for(
    model: Any, switch: Literal["auto", "on", "off"], *, key: str, whole_rows: bool = False
) -> Capture | None:
    """How the steps of a model are recorded; None: not at all. `key` is where the user said what is `wanted`,
    `whole_rows` a model that answers with logits.

    Raises ConfigError where graphs are demanded and cannot be.
    """
    if switch == "off":
        return None
    if (why := _why_not(model, whole_rows)) is None:
        return CudaCapture(model.device)
    if switch == "on":
        raise ConfigError(f"{key}=on, but {why}; set {key}: auto")
    return None


def _why_not(model: Any, whole_rows: bool) -> str | None:
    devices = {str(tensor.device) for tensor in model.parameters()}
    if not all(device.startswith("cuda") for device in devices):
        return f"the model is on {', '.join(sorted(devices))} and only a CUDA device has graphs"
    if len(devices) > 1:
        return f"the model is spread over {', '.join(sorted(devices))} and a graph has one device"
    if whole_rows:
        return "teacher.output is logits and only hidden states are recorded"
    return None


def _checked(shape: Hashable, replay: Step, step: Step) -> torch.Tensor:
    """The step's own answer, which the replay must give too. Both write the same into the cache."""
    replayed = replay().clone()
    eager = step()
    error = float((replayed.float() - eager.float()).norm() / eager.float().norm())
    if not error <= _TOLERANCE.get(eager.dtype, 0.1):
        raise RuntimeError(
            f"the CUDA graph of forward pass {shape} does not repeat the model (relative error {error:.2g}); set "
            f"student.graphs and teacher.graphs to off"
        )
    return eager


# --- shapes that repeat ----------------------------------------------------------------------------------------------

MAX_WIDTH = 65  # tokens per row; what is longer (a prompt) keeps a GPU busy without a recording


def few_rows(num: int) -> int:
    """1, 2, 4, 8, ..."""
    return 1 << (num - 1).bit_length()


def few_widths(num: int) -> int:
    """1, 2, 3, 4, 5, 8, 9, 16, 17, ...: a block of K tokens, and one with the token before it."""
    power = few_rows(num)
    return power // 2 + 1 if num == power // 2 + 1 else power


def few_lengths(num: int) -> int:
    """64, 96, 128, 192, 256, 384, ...: multiples of slot_cache.ROUND, at most half as much again."""
    power = max(few_rows(num), 64)
    return power * 3 // 4 if power > 64 and num <= power * 3 // 4 else power
