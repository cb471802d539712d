"""Counts what generation costs beside the models: host time, operations, bytes and waits for the device.

In: rules, numbers of rows R and drafted tokens K. Out: a table with one row per case. The engines return prepared
arrays; the time inside them is subtracted, nothing else is. Time is the process's CPU time, so that other processes on
the machine change it little. Draws are either prepared ones too, or real.

Shapes: R rows, K drafted tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from switchkd.algo import divergence, sampling, switching
from switchkd.algo.noise import Purpose
from switchkd.algo.sampling import SamplingParams
from switchkd.rollout.generator import GenerationRequest, SwitchingGenerator
from switchkd.rollout.state import RolloutParams
from switchkd.tools.bench.table import Options, Spread, Table
from switchkd.types import (
    Blocks,
    CompletionSource,
    Prompt,
    Ragged,
    Rollout,
    RolloutTask,
    Sessions,
    TeacherOutput,
    WriteRequest,
    Written,
)

VOCAB, WIDTH, PROMPT = 64, 8, 64
LARGE_VOCAB, LARGE_ROWS = 151_936, 64  # of the counted draws and divergences, on `meta` tensors
_DIFFERENT = 0.15  # share of prepared draws in which the two models differ
RULES = {
    "switch": switching.jsd_threshold(schedule="constant", tau_0=0.12),
    "adaswitch": switching.kl_spike(),
    "skd": switching.outside_top_k(k=50),
    "random": switching.random(prob=0.2),
    "on-policy": switching.student(),
}
_VIEWS = frozenset(
    [
        "view",
        "_unsafe_view",
        "expand",
        "unsqueeze",
        "squeeze",
        "slice",
        "select",
        "t",
        "transpose",
        "permute",
        "detach",
        "alias",
        "unbind",
        "split",
        "as_strided",
        "_reshape_alias",
        "lift_fresh",
        "narrow",
        "chunk",
        "split_with_sizes",
    ]
)
_WAITS = frozenset(["cpu", "item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero"])


class Operations(TorchDispatchMode):
    """Counts operations and the bytes that they read and write; views cost neither."""

    def __init__(self) -> None:
        super().__init__()
        self.num = 0
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in _VIEWS:
            self.num += 1
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
            self.num_bytes += sum(map(_stored_bytes, tensors))
        return out


def _stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes that reading a tensor moves: an expanded dimension comes from the cache."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return int(np.prod([*sizes, tensor.element_size()]))


class HostWaits(TorchFunctionMode):
    """Counts the calls that would wait for a device if the tensors were on one."""

    def __init__(self) -> None:
        super().__init__()
        self.num = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += getattr(func, "__name__", "") in _WAITS
        return func(*args, **(kwargs or {}))


@dataclass(slots=True)
class Spent:
    """Seconds inside the fakes, and what they were called for."""

    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def timed(self) -> Iterator[None]:
        start = time.process_time()
        yield
        self.seconds += time.process_time() - start


class FreeHead:
    """A small LM head whose rows are counted."""

    def __init__(self, spent: Spent) -> None:
        self.vocab_size, self._spent = VOCAB, spent
        self._weight = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(0))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        self._spent.counts["head products"] += 1
        self._spent.counts["head rows"] += len(hidden)
        with self._spent.timed():
            return hidden.float() @ self._weight.T


class FreeStudent:
    """A student whose hidden states are prepared."""

    def __init__(self, num_slots: int, spent: Spent) -> None:
        self.num_slots, self.max_len, self.order, self.head = num_slots, 10**6, (0, 0), FreeHead(spent)
        self._spent = spent
        self._hidden = 1 + 0.05 * torch.randn(num_slots * 100, WIDTH, generator=torch.Generator().manual_seed(1))

    def extend(self, slots: np.ndarray, starts: np.ndarray, token_ids: np.ndarray, lengths: np.ndarray) -> torch.Tensor:
        with self._spent.timed():
            return self._hidden[: len(token_ids)]

    def load_weights(self, packed: Any) -> None:
        raise NotImplementedError("a bench has one weight version")


class FreeTeacher:
    """A teacher whose hidden states and tokens are prepared."""

    def __init__(self, num_slots: int, spent: Spent) -> None:
        self._spent = spent
        rng = np.random.default_rng(2)
        self._rows = (1 + 0.3 * rng.standard_normal((num_slots * 300, WIDTH))).astype(np.float32)

    def open(self, sessions: Sessions) -> None: ...

    def close(self, session_ids: np.ndarray) -> None: ...

    def score(self, blocks: Blocks) -> TeacherOutput:
        with self._spent.timed():
            return self._output(blocks.base_lens + blocks.tokens.lengths - blocks.first_rows)

    def write(self, request: WriteRequest) -> Written:
        with self._spent.timed():
            counts = request.counts
            num = int(counts.sum())
            tokens = Ragged(np.arange(num, dtype=np.int32) % (VOCAB - 2) + 2, counts)
            return Written(
                tokens=tokens, margins=Ragged(np.ones(num, np.float32), counts), teacher_output=self._output(counts)
            )

    def _output(self, lengths: np.ndarray) -> TeacherOutput:
        rows = Ragged(self._rows[: int(lengths.sum())], lengths.astype(np.int32))
        return TeacherOutput(kind="hidden_states", dtype="float32", rows=rows)


class FreeDraw:
    """`algo.sampling.draw` with prepared tokens: a function of the position, in a share of the calls another one."""

    def __init__(self, spent: Spent) -> None:
        self._spent, self._rng = spent, np.random.default_rng(3)

    def __call__(self, logits: torch.Tensor, *, rollout_ids: Any, positions: Any, **_: Any) -> Any:
        with self._spent.timed():
            tokens = (np.asarray(rollout_ids) * 31 + np.asarray(positions) * 17) % (VOCAB - 2) + 2
            other = self._rng.random(len(tokens)) < _DIFFERENT
            return np.where(other, 2 + (tokens - 1) % (VOCAB - 2), tokens).astype(np.int64), np.ones(len(tokens))


def device_draw(logits: torch.Tensor, *, run_seed: int, rollout_ids: Any, positions: Any, **how: Any) -> Any:
    """`algo.sampling.draw` as on a device, with its copies."""
    del how["return_margin"]
    return sampling.draw_there(logits, run_seed, rollout_ids, positions, **how)


@dataclass(frozen=True, slots=True)
class Case:
    """One measured case: real draws, or prepared ones."""

    rule: str
    num_rows: int
    num_drafted: int
    real_draws: bool = False

    def run(self, num_tokens: int, draw: Callable[..., Any] | None, mode: Any = None) -> dict[str, float]:
        """Generate one completion per row, with `draw` instead of the case's own. Returns sums over the run."""
        spent = Spent()
        generator = SwitchingGenerator(
            student=FreeStudent(self.num_rows, spent),
            teacher=FreeTeacher(self.num_rows, spent),
            head=FreeHead(spent),
            stop_ids=frozenset({0}),
            max_draft_tokens=self.num_drafted,
            draw=draw or (sampling.draw if self.real_draws else FreeDraw(spent)),
        )
        params = RolloutParams(
            rule=RULES[self.rule],
            student=SamplingParams(),
            teacher=SamplingParams(),
            max_new_tokens=num_tokens,
            seed=0,
        )
        generator.drafter.on_device = draw is device_draw
        requests = [GenerationRequest(task=_task(i), params=params) for i in range(self.num_rows)]
        rollouts: list[Rollout] = []
        with mode or nullcontext():
            start = time.process_time()
            generator.run(requests, rollouts.extend)
            seconds = time.process_time() - start - spent.seconds
        kept = sum(rollout.num_tokens for rollout in rollouts)
        return {
            "seconds": seconds,
            "tokens": kept,
            "rounds": generator.num_rounds,
            "teacher tokens": sum(int(rollout.sources.sum()) for rollout in rollouts),
            "bytes": sum(rollout.stats.output_bytes for rollout in rollouts),
            **spent.counts,
        }


def _task(rollout_id: int) -> RolloutTask:
    prompt = Prompt(prompt_id="", text="", token_ids=np.ones(PROMPT, np.int32))
    return RolloutTask(
        rollout_id=rollout_id, batch=0, stage=0, completion_source=CompletionSource.ROLLOUT, prompt=prompt
    )


def run(options: Options, rules: Sequence[str] = ()) -> Table:
    """Measure every case. `rules`: of RULES, all without."""
    torch.set_num_threads(options.threads)
    sizes = (64,) if options.smoke else (64, 256)
    cases = [Case(rule, num, k) for rule in rules or RULES for num in sizes for k in (4, 8)]
    cases.append(Case("switch", 64, 4, real_draws=True))
    rows = [_row(case, options) for case in cases]
    return Table(
        title="Host work of generation, with engines that cost nothing",
        rows=[*rows, *_device_rows()],
        notes=options.notes(vocabulary=VOCAB, width=WIDTH, prompt=PROMPT),
        remarks=(
            "us/token: the host's CPU time per kept token. ops, waits: torch operations and waits for the device in a "
            "round, with the draws of a device. draws and divergences: one call on rows of "
            f"{LARGE_VOCAB:,} ids, in plain torch.",
        ),
    )


def _row(case: Case, options: Options) -> dict[str, Any]:
    num_tokens = 24 if options.smoke else 128
    case.run(8, None)
    runs = [case.run(num_tokens, None) for _ in range(options.repeats)]
    operations, waits = Operations(), HostWaits()
    rounds = case.run(24, device_draw, operations)["rounds"], case.run(24, device_draw, waits)["rounds"]
    last = runs[-1]
    return {
        "case": f"{case.rule}, R {case.num_rows}, K {case.num_drafted}" + ", real draws" * case.real_draws,
        "us/token": Spread.from_values([1e6 * each["seconds"] / each["tokens"] for each in runs]),
        "ms/round": Spread.from_values([1e3 * each["seconds"] / each["rounds"] for each in runs]),
        "ops/round": operations.num / rounds[0],
        "waits/round": waits.num / rounds[1],
        "tokens/row and round": last["tokens"] / last["rounds"] / case.num_rows,
        "teacher's share": last["teacher tokens"] / last["tokens"],
        "LM head rows/token": last["head rows"] / last["tokens"],
        "teacher bytes/token": last["bytes"] / last["tokens"],
    }


def _device_rows() -> list[dict[str, Any]]:
    """Operations and bytes of one draw and one divergence of LARGE_ROWS rows."""
    p, q = (torch.empty(LARGE_ROWS, LARGE_VOCAB, device="meta") for _ in range(2))
    ids = torch.empty(LARGE_ROWS, dtype=torch.int64, device="meta")
    draws = {"draw": SamplingParams(), "draw, top_p 0.5": SamplingParams(temperature=0.5, top_p=0.5)}
    calls: dict[str, Callable[[], Any]] = {
        name: partial(sampling.draw_on_device, p, 0, ids, ids, purpose=Purpose.GUMBEL, sampling=how)
        for name, how in draws.items()
    }
    calls["jsd"] = lambda: divergence.per_row(divergence.jsd, p, q, log_base=2)
    calls["kl"] = lambda: divergence.per_row(divergence.forward_kl, p, q)
    rows = []
    for name, call in calls.items():
        with Operations() as operations:
            call()
        passes = operations.num_bytes / (4.0 * LARGE_ROWS * LARGE_VOCAB)
        counts = {"ops": operations.num, "GB": operations.num_bytes / 1e9, "float32 passes": passes}
        rows.append({"case": f"{name}, R {LARGE_ROWS}", **counts})
    return rows
