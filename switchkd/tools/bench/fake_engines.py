"""Models that only sleep, in the real actors: what remains is the program itself, its calls and its waiting.

In: a config, and `FakeLatency`. What `install_fakes` returns runs in every process of a bench's cluster and puts these
engines where the real actors would load models; all else there (actors, router, replay, rollout worker, train loop) is
what a run uses. Student and teacher agree on every token, so that each round emits a whole block.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from switchkd.config.schema import Config
from switchkd.data.replay import Replay
from switchkd.engines.models.lm_head import LMHead, LMHeadState
from switchkd.engines.weights import pack
from switchkd.learner.rank import Fetch, RankInfo
from switchkd.rollout.build import Teachers, build_rollout_params
from switchkd.rollout.generator import SwitchingGenerator
from switchkd.rollout.worker import RolloutWorker
from switchkd.types import (
    BatchAssignment,
    Blocks,
    PackedWeights,
    Ragged,
    Sessions,
    StepResult,
    TeacherOutput,
    WriteRequest,
    Written,
)

WIDTH, VOCAB = 16, 64


@dataclass(frozen=True, kw_only=True, slots=True)
class FakeLatency:
    """Seconds of one call, whatever its size."""

    student: float
    teacher: float
    learner: float = 0.0
    weights_mb: float = 8.0  # of a published version


def install_fakes(latency: FakeLatency) -> Callable[[], None]:
    """A function that every process of the cluster calls once, before its actor is built. A name that is not there any
    more fails here, in the driver: Ray would start a process that fails there again for ever."""
    _replacements(latency)

    def replace_names() -> None:
        for module, name, fake in _replacements(latency):
            setattr(module, name, fake)

    return replace_names


def _replacements(latency: FakeLatency) -> list[tuple[Any, str, Any]]:
    """Modules, names in them, and their replacements: the actors import them from there, later."""
    from switchkd.data import build as data_build
    from switchkd.engines import build as engines_build
    from switchkd.learner import rank as learner_rank
    from switchkd.rollout import build as rollout_build

    replacements: list[tuple[Any, str, Any]] = [
        (engines_build, "make_teacher", lambda config: FakeTeacher(latency.teacher)),
        (rollout_build, "make_worker", partial(make_worker, latency)),
        (data_build, "make_replay", make_replay),
        (learner_rank, "LearnerRank", partial(FakeRank, latency)),
    ]
    for module, name, _ in replacements:
        assert hasattr(module, name), f"{module.__name__} has no {name} any more"
    return replacements


def head() -> LMHead:
    """The output head of both models."""
    generator = torch.Generator().manual_seed(0)
    return LMHead(torch.randn(VOCAB, WIDTH, generator=generator))


class FakeStudent:
    """A StudentEngine."""

    def __init__(self, sleep_s: float, num_slots: int, max_len: int) -> None:
        self.sleep_s, self.num_slots, self.max_len = sleep_s, num_slots, max_len
        self.head = head()
        self.order = (0, 0)

    def extend(self, slots: np.ndarray, starts: np.ndarray, token_ids: np.ndarray, lengths: np.ndarray) -> torch.Tensor:
        time.sleep(self.sleep_s)
        return torch.ones(len(token_ids), WIDTH)

    def load_weights(self, bundle: PackedWeights) -> None:
        from switchkd.engines.weights import unpack

        for _ in unpack(bundle):  # the checksum is read
            pass
        self.order = bundle.order


class FakeTeacher:
    """A Teacher without sessions."""

    def __init__(self, sleep_s: float) -> None:
        self.sleep_s = sleep_s

    def lm_head_state(self) -> LMHeadState:
        return head().to_state()

    def open(self, sessions: Sessions) -> None:
        pass

    def score(self, blocks: Blocks) -> TeacherOutput:
        time.sleep(self.sleep_s)
        rows = blocks.base_lens + blocks.tokens.lengths - blocks.first_rows
        values = np.ones((int(rows.sum()), WIDTH), np.float32)
        return TeacherOutput(kind="hidden_states", dtype="float32", rows=Ragged(values, rows.astype(np.int32)))

    def write(self, request: WriteRequest) -> Written:
        raise NotImplementedError("with fake engines the student drafts")

    def close(self, session_ids: np.ndarray) -> None:
        pass


def make_worker(
    latency: FakeLatency,
    config: Config,
    teachers: Teachers,
    stop_ids: frozenset[int],
    new_weights: Callable[[], PackedWeights | None] | None = None,
) -> RolloutWorker:
    """Like `rollout.build.make_worker`, with a student that sleeps."""
    torch.set_num_threads(1)
    teacher, arrays = teachers[""]
    assert arrays is not None
    rollouts = SwitchingGenerator(
        student=FakeStudent(latency.student, config.rollout.batch_size, 10_000),
        teacher=teacher,
        head=LMHead.from_state(arrays),
        stop_ids=stop_ids,
        max_draft_tokens=config.rollout.max_draft_tokens,
        drafter=config.rollout.drafter,
        overlap=bool(config.rollout.overlap),
    )
    return RolloutWorker({"": rollouts}, build_rollout_params(config), str)


def make_replay(config: Config, run_dir: Path) -> Replay:
    """Like `data.build.make_replay`, without a tokenizer: nothing is written to rollouts.jsonl."""
    section = config.replay
    return Replay(capacity=section.capacity, policy=section.policy, lease_s=section.lease_s)


class FakeRank:
    """A `LearnerRank` that fetches its rollouts, sleeps, and publishes real bytes."""

    def __init__(self, latency: FakeLatency, config: Config, rank_info: RankInfo, lm_heads: Any, fetch: Fetch) -> None:
        self.latency = latency
        self.rank = rank_info.rank
        self.fetch = fetch
        self.weights = torch.zeros(int(latency.weights_mb * 2**18))

    def step(self, plan: BatchAssignment, lr: float) -> StepResult:
        start = time.monotonic()
        self.fetch(list(plan.rollout_ids[self.rank]))
        time.sleep(self.latency.learner)
        return StepResult(
            step=plan.step,
            version=plan.step + 1,
            loss=0.0,
            grad_norm=0.0,
            lr=lr,
            num_loss_tokens=plan.num_loss_tokens,
            time_s=time.monotonic() - start,
        )

    def publish(self, version: int) -> PackedWeights | None:
        return pack([("weights", self.weights)], version)
