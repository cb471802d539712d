"""A rollout worker: generates rollouts for tasks, evaluates the student, loads new weights.

In: `RolloutTask`s or an `EvalShard`. Out: `Rollout`s through `put` and a `WorkReport`, or `EvalRow`s. Actors and
`controller/local.py` wrap this class.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from switchkd.rollout.request import Emit, GenerationRequest
from switchkd.types import (
    EvalRow,
    EvalShard,
    PackedWeights,
    Rollout,
    RolloutStats,
    RolloutTask,
    TokenSource,
    WeightRef,
    WorkReport,
)

if TYPE_CHECKING:
    from switchkd.rollout.state import StageParams


class RolloutWorker:
    """`generators` by teacher, all with the same student. `evaluate`: instead of `evaluate.ShardEvaluator`. `now`: the
    clock of the reports, in seconds."""

    def __init__(
        self,
        generators: Mapping[str, Any],
        stage_params: Sequence[StageParams],
        decode: Callable[[Sequence[int]], str],
        evaluate: Callable[[EvalShard], list[EvalRow]] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.generators = dict(generators)
        self.stage_params = list(stage_params)
        self.decode = decode
        self._first = next(iter(self.generators.values()))
        self.student = self._first.student
        self._evaluate = evaluate or self._evaluate_shard
        self.now = now
        self._free_since = now()

    @property
    def progress_counter(self) -> int:
        """A number that grows while the worker generates or reads."""
        return sum(generator.num_rounds + generator.calls.num_calls for generator in self.generators.values())

    @property
    def order(self) -> tuple[int, int]:
        """(incarnation, version) of the weights in use."""
        return self.student.order

    def load_weights(self, weights: WeightRef | None, fetch: Callable[[WeightRef], PackedWeights]) -> None:
        """Load a published version, unless it or a later one is in use. None allows any version."""
        if weights is not None and weights.order > self.order:
            self.student.load_weights(fetch(weights))

    def generate(self, tasks: Sequence[RolloutTask], put: Emit) -> WorkReport:
        """Generate all rollouts; each finished one goes to `put` at once."""
        started, calls, waited = self.now(), self._num_calls(), self._waited_s()
        num_rollouts, put_s, stats = 0, 0.0, RolloutStats()
        sources: Counter[int] = Counter()

        def emit(rollouts: list[Rollout]) -> None:
            nonlocal num_rollouts, put_s, stats
            since = self.now()
            put(rollouts)
            put_s += self.now() - since
            num_rollouts += len(rollouts)
            for rollout in rollouts:
                sources.update(rollout.sources.tolist())
                stats += rollout.stats

        for stage in sorted({task.stage for task in tasks}):
            params = self.stage_params[stage]
            requests = [
                GenerationRequest(task=task, params=params[task.completion_source])
                for task in tasks
                if task.stage == stage
            ]
            self._run(requests, emit)
        idle_s = started - self._free_since
        self._free_since = self.now()
        return WorkReport(
            num_rollouts=num_rollouts,
            num_tokens=sources.total(),
            num_student_tokens=sources[TokenSource.STUDENT],
            num_teacher_tokens=sources[TokenSource.TEACHER],
            num_teacher_calls=self._num_calls() - calls,
            stats=stats,
            time_s=self._free_since - started,
            idle_s=idle_s,
            wait_teacher_s=self._waited_s() - waited,
            wait_replay_s=put_s,
        )

    def evaluate(self, shard: EvalShard) -> list[EvalRow]:
        """Rows with the student's completions per seed, and with its comparison with the teacher, see
        `ShardEvaluator`."""
        rows = self._evaluate(shard)
        self._free_since = self.now()
        return rows

    def _evaluate_shard(self, shard: EvalShard) -> list[EvalRow]:
        from switchkd.rollout.evaluate import ShardEvaluator

        return ShardEvaluator(self.student, self._generator_of, self._run, self.decode).rows(shard)

    def _run(self, requests: Sequence[GenerationRequest], emit: Emit) -> None:
        """Serve each request with its teacher's generator, one teacher after the other."""
        for name in sorted({request.task.prompt.teacher for request in requests}):
            generator = self._generator_of(name)
            generator.run([request for request in requests if request.task.prompt.teacher == name], emit)

    def _generator_of(self, teacher: str) -> Any:
        return self.generators.get(teacher, self._first)

    def _num_calls(self) -> int:
        return sum(generator.calls.num_calls for generator in self.generators.values())

    def _waited_s(self) -> float:
        return sum(generator.calls.wait_s for generator in self.generators.values())
