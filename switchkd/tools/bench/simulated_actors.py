"""Actors for a simulation: stated costs in place of models, beside the production classes that control them.

In: a config and costs. Out: handles (`controller/handles.py`). Production classes: rollout worker, drafting policy,
teacher router, the teachers' session table, replay. Simulated: a completion has a length, and at each position a writer
and whether both models draw the same token; these are functions of the rollout's id.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np

from switchkd.actors.replicas import SessionReports
from switchkd.actors.teacher_router import TeacherRouter
from switchkd.algo.noise import Purpose
from switchkd.config import resources
from switchkd.config.schema import Config
from switchkd.controller.handles import ActorHandles
from switchkd.controller.local import LocalHandle, completed
from switchkd.data.replay import Replay
from switchkd.rollout.request import Emit, GenerationRequest
from switchkd.rollout.rules import build_rollout_params
from switchkd.rollout.speculation import DraftPlan, LatencyModel, SpeculationPolicy
from switchkd.rollout.teacher_client import TeacherClient
from switchkd.rollout.worker import RolloutWorker
from switchkd.tools.bench.simulated_teachers import Clock, Costs, SimulatedPool, SimulatedReplica
from switchkd.types import (
    BatchAssignment,
    Blocks,
    PackedWeights,
    Ragged,
    ReplayFull,
    Rollout,
    RolloutStats,
    RolloutTask,
    StepResult,
    TeacherOutput,
    TokenSource,
    WeightRef,
    WorkReport,
    WriteRequest,
)

FULL_S = 0.2
"""Pause of a worker before it puts rollouts again that a full replay refused; that of `RolloutActor`."""


@dataclass(slots=True)
class SimulatedRow:
    """A completion that is being generated: how far it is, and what the rule would find."""

    task: RolloutTask
    params: Any
    max_new_tokens: int
    owned: np.ndarray  # bool [T]: the teacher writes the token
    differ: np.ndarray  # bool [T]: the models draw different tokens
    started: float
    t: int = 0
    versions: list[int] = field(default_factory=list)
    stats: RolloutStats = field(default_factory=RolloutStats)

    @property
    def num_read(self) -> int:
        """Tokens, with the prompt, that the teacher keeps: all but the last."""
        return len(self.task.prompt.token_ids) + self.t - 1


class SimulatedStudent:
    def __init__(self, costs: Costs, clock: Clock) -> None:
        self.costs, self.clock, self.order = costs, clock, (0, 0)

    def load_weights(self, packed: PackedWeights) -> None:
        self.clock.sleep(self.costs.weights_s)
        self.order = packed.order


class SimulatedGenerator:
    """The calls of `rollout.generator.SwitchingGenerator` that a worker makes; rounds as there, without overlap."""

    def __init__(
        self, config: Config, costs: Costs, clock: Clock, router: TeacherRouter, newer: Callable[[], Any] | None
    ) -> None:
        self.config, self.costs, self.clock, self.newer = config, costs, clock, newer
        self.student = SimulatedStudent(costs, clock)
        self.calls = TeacherClient(router, None, now=clock.now, sleep=clock.sleep)
        section = config.rollout
        self.speculation = SpeculationPolicy(section.drafter, section.max_draft_tokens, LatencyModel(clock.now))
        self.num_rounds = 0
        self.row_s = 0.0  # rows in flight, integrated over time

    def run(self, requests: Sequence[GenerationRequest], emit: Emit) -> None:
        waiting = deque(requests)
        rows: list[SimulatedRow] = []
        while waiting or rows:
            self.num_rounds += 1
            since, num = self.clock.now(), len(rows)
            if self.newer is not None and (packed := self.newer()) is not None:
                self.student.load_weights(packed)
                self.clock.sleep(self.costs.student_s)  # reads the rows' caches again
            if free := min(self.config.rollout.batch_size - len(rows), len(waiting)):
                opened = self.calls.open_some([waiting[i].task for i in range(free)])
                rows += [self._start(waiting.popleft()) for _ in range(opened)]
            self.row_s += num * (self.clock.now() - since)
            since = self.clock.now()
            t = np.array([row.t for row in rows])
            limits = np.array([row.max_new_tokens for row in rows]) - t
            self._round(rows, self.speculation.choose(rows[0].params.rule, t, limits))
            self.row_s += len(rows) * (self.clock.now() - since)
            if done := [row for row in rows if row.t == len(row.owned)]:
                self.calls.close([row.task.rollout_id for row in done])
                emit([self._rollout(row) for row in done])
            rows = [row for row in rows if row.t < len(row.owned)]

    def _start(self, request: GenerationRequest) -> SimulatedRow:
        task, costs, most = request.task, self.costs, request.params.max_new_tokens
        rng = np.random.default_rng([self.config.seed, task.rollout_id])
        num = int(np.clip(round(costs.median_len * np.exp(costs.sigma * rng.standard_normal())), 1, most))
        owned = rng.random(num) < self.config.train.stages[task.stage].rule.prob  # type: ignore[operator]
        differ = rng.random(num) < costs.reject_frac
        return SimulatedRow(task, request.params, most, owned, differ, self.clock.now())

    def _round(self, rows: list[SimulatedRow], plan: DraftPlan) -> None:
        by_teacher, num_tokens = plan.drafter == "teacher", plan.num_tokens
        counts = np.array([min(num_tokens, len(row.owned) - row.t) for row in rows], np.int32)
        if by_teacher:
            self._teacher_writes(rows, counts, plan)
        else:
            self._teacher_reads(rows, counts, plan)
        name, outcomes = rows[0].params.rule.name, []
        for row, count in zip(rows, counts.tolist(), strict=True):
            owned, differ = row.owned[row.t : row.t + count], row.differ[row.t : row.t + count]
            ends = np.flatnonzero(differ & (owned != by_teacher))  # the other model writes another token
            num = int(ends[0]) + 1 if len(ends) else count
            outcomes.append((row.t + np.arange(num), owned[:num], differ[:num]))
            row.t += num
            row.versions += [self.student.order[1]] * num
            row.stats.num_rounds += 1
            row.stats.num_drafted += count
            row.stats.num_accepted += num - bool(len(ends))
            row.stats.num_rejections += bool(len(ends))
            row.stats.block_lengths.append(num)
        if self.speculation.drafter == "auto":
            self.speculation.record_outcome(
                name, by_teacher, *(np.concatenate(part) for part in zip(*outcomes, strict=True))
            )
        self.speculation.costs.add(f"verify {'teacher' if by_teacher else 'student'}", int(counts.sum()), 0.0)

    def _teacher_reads(self, rows: list[SimulatedRow], counts: np.ndarray, plan: DraftPlan) -> None:
        """The student drafts, a pass for each token; then the teacher reads the drafts and the last token before."""
        self.clock.sleep(self.costs.student_s * int(counts.max()))
        for k in range(int(counts.max())):
            self.speculation.costs.add("student", int((counts > k).sum()), self.costs.student_s)
        since = self.clock.now()
        self.calls.score(_blocks(rows, counts + 1))
        self.speculation.observe_call(plan, "read", int(counts.sum()), self.clock.now() - since)

    def _teacher_writes(self, rows: list[SimulatedRow], counts: np.ndarray, plan: DraftPlan) -> None:
        """The teacher drafts; then the student reads the drafts in one pass."""
        ids = np.array([row.task.rollout_id for row in rows], np.int64)
        request = WriteRequest(
            blocks=_blocks(rows, np.ones_like(counts)), counts=counts, rollout_ids=ids,
            positions=np.array([row.t for row in rows], np.int32), run_seed=0, purpose=Purpose.GUMBEL,
            temperature=1.0, top_p=1.0, top_k=0, stop_ids=np.zeros(0, np.int64),
        )  # fmt: skip
        since, steps = self.clock.now(), int(counts.max())
        self.calls.num_calls += 1
        self.calls.result(self.calls.submit(self.calls.teacher.write, request))
        self.speculation.observe_call(plan, "write", len(rows), (self.clock.now() - since) / steps)
        self.clock.sleep(self.costs.student_s)
        self.speculation.costs.add("check", int(counts.sum()), self.costs.student_s)

    def _rollout(self, row: SimulatedRow) -> Rollout:
        num, task = row.t, row.task
        row.stats.time_s = self.clock.now() - row.started
        # counted in the replay's bytes, but one row in memory
        values = np.broadcast_to(np.zeros(self.costs.row_bytes, np.uint8), (num, self.costs.row_bytes))
        output = TeacherOutput(kind="hidden_states", dtype="bfloat16", rows=Ragged(values, np.array([num], np.int32)))
        sources = np.where(row.owned, TokenSource.TEACHER, TokenSource.STUDENT).astype(np.uint8)
        return Rollout(
            rollout_id=task.rollout_id, batch=task.batch, stage=task.stage, prompt_id=task.prompt.prompt_id,
            completion_source=task.completion_source, prompt_ids=task.prompt.token_ids,
            token_ids=np.arange(num, dtype=np.int32), sources=sources, weight_versions=np.array(row.versions, np.int32),
            statistic=np.zeros(num, np.float32), threshold=np.zeros(num, np.float32),
            uncertainty=np.zeros(num, np.float32), teacher_output=output,
            finish_reason="eos" if num < row.max_new_tokens else "length", stats=row.stats,
        )  # fmt: skip


def _blocks(rows: Sequence[SimulatedRow], lengths: np.ndarray) -> Blocks:
    """Blocks of `lengths` tokens from the last token on; their ids mean nothing."""
    kept = np.array([row.num_read for row in rows], np.int32)
    return Blocks(
        session_ids=np.array([row.task.rollout_id for row in rows], np.int64),
        base_lens=kept,
        first_rows=kept,
        tokens=Ragged(np.zeros(int(lengths.sum()), np.int32), lengths),
    )


class SimulatedWorkerHandle:
    """A rollout worker whose calls are processes. It does what `RolloutActor` does around a `RolloutWorker`."""

    def __init__(
        self, config: Config, costs: Costs, clock: Clock, replay: TimedReplay, pool: SimulatedPool, index: int
    ):
        router = TeacherRouter(
            cast(Any, pool), first=index, get=lambda ref: self._get(ref), now=clock.now, sleep=clock.sleep
        )
        newer = self._newer if config.rollout.on_new_weights == "reprefill" else None
        self.generator = SimulatedGenerator(config, costs, clock, router, newer)
        self.worker = RolloutWorker({"": self.generator}, build_rollout_params(config), str, now=clock.now)
        self.clock, self.replay = clock, replay
        self.pushed: PackedWeights | None = None
        self.name = f"worker {index}"

    def generate(self, tasks: list[RolloutTask], weights: WeightRef | None) -> Future[WorkReport]:
        def work() -> WorkReport:
            self.worker.load_weights(weights, _fetched)
            return self.worker.generate(tasks, self._put)

        return self.clock.call(work)

    def push_weights(self, weights: WeightRef) -> None:
        self.pushed = _fetched(weights)

    def back(self) -> Future[None]:
        return completed(lambda: None)

    def _newer(self) -> PackedWeights | None:
        pushed = self.pushed
        return pushed if pushed is not None and pushed.order > self.worker.order else None

    def _put(self, rollouts: list[Rollout]) -> None:
        while rollouts:
            try:
                self.replay.put(rollouts)
                return
            except ReplayFull as full:
                rollouts = [rollout for rollout in rollouts if rollout.rollout_id in full.refused]
                self.clock.sleep(FULL_S)

    def _get(self, ref: tuple[float, Future[Any]]) -> Any:
        """Wait for a replica's answer, in place of `ray.get`."""
        arrives, answer = ref
        self.clock.sleep(max(arrives - self.clock.now(), 0.0))
        return answer.result()


def _fetched(weights: WeightRef) -> PackedWeights:
    return replace(weights.ref, incarnation=weights.incarnation)


class TimedReplay(Replay):
    """Counts its calls and the CPU seconds that they take here."""

    def __init__(self, **options: Any) -> None:
        self.num_calls, self.cpu_s = 0, 0.0
        super().__init__(**options)

    def __getattribute__(self, name: str) -> Any:
        method = super().__getattribute__(name)
        if name not in ("put", "take", "commit", "release_before", "stats"):
            return method

        def timed(*args: Any) -> Any:
            since = time.thread_time()
            try:
                return method(*args)
            finally:
                self.num_calls += 1
                self.cpu_s += time.thread_time() - since

        return timed


class SimulatedLearner:
    """All ranks: a step takes as long as that of the rank with the most tokens."""

    def __init__(self, costs: Costs, clock: Clock, replay: Replay) -> None:
        self.costs, self.clock, self.replay = costs, clock, replay

    def step(self, assignment: BatchAssignment, lr: float) -> Future[StepResult]:
        tokens = [sum(r.num_tokens for r in self.replay.fetch(ids)) for ids in assignment.rollout_ids]
        seconds = self.costs.learner_s + self.costs.learner_token_s * max(tokens)

        def work() -> StepResult:
            self.clock.sleep(seconds)
            return StepResult(
                step=assignment.step, version=assignment.step + 1, loss=1.0, grad_norm=1.0, lr=lr,
                num_loss_tokens=assignment.num_loss_tokens, time_s=seconds,
            )  # fmt: skip

        return self.clock.call(work)

    def publish(self, version: int) -> Future[PackedWeights]:
        def work() -> PackedWeights:
            self.clock.sleep(self.costs.weights_s)
            return PackedWeights(version=version, manifest=(), buckets=(), checksum="")

        return self.clock.start(work)


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatedActors:
    handles: ActorHandles
    workers: list[SimulatedWorkerHandle]
    replicas: list[SimulatedReplica]
    replay: TimedReplay
    learner: SimulatedLearner


def start_simulated(config: Config, costs: Costs, clock: Clock) -> SimulatedActors:
    """Start all actors of a run. A replica has sessions for its share of all rows, and half as many more."""
    num = resources.counts(config)
    num_workers, num_teachers = num["rollout"], num["teacher"]
    num_rows = num_workers * config.rollout.batch_size
    max_len = config.data.max_prompt_tokens + config.rollout.max_new_tokens + config.rollout.max_draft_tokens
    slots = -(-3 * num_rows // (2 * num_teachers)) + config.rollout.batch_size
    replicas = {i: SimulatedReplica(costs, clock, slots, max_len) for i in range(num_teachers)}
    replay = TimedReplay(capacity=config.replay.capacity, policy=config.replay.policy, clock=clock.now)
    reports = SessionReports()
    workers = [
        SimulatedWorkerHandle(config, costs, clock, replay, SimulatedPool(replicas, reports, str(i), clock), i)
        for i in range(num_workers)
    ]
    learner = SimulatedLearner(costs, clock, replay)
    handles = ActorHandles(
        workers=cast(Any, workers),
        replay=cast(Any, LocalHandle(replay)),
        learner=cast(Any, learner),
        heartbeats=list,
        close=lambda: None,
    )
    return SimulatedActors(
        handles=handles, workers=workers, replicas=list(replicas.values()), replay=replay, learner=learner
    )
