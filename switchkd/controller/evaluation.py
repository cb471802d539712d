"""An evaluation is shared out to the rollout workers and put together again.

In: the evaluation prompts and the workers' handles. Out: one flat dict of `eval/...` numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future

from switchkd.config.schema import Eval
from switchkd.controller.handles import Weights, WorkerHandle
from switchkd.controller.text_metrics import EvalRow, aggregate
from switchkd.types import Exam, Prompt

WITH_TEACHER = ("agreement", "kl")
"""Metrics that need the teacher beside the student."""


class Examiner:
    def __init__(self, settings: Eval, prompts: Sequence[Prompt], *, has_teacher: bool) -> None:
        self.settings = settings
        self.prompts = list(prompts[: settings.num_prompts])
        self.has_teacher = has_teacher

    def shares(self, num_workers: int) -> list[Exam]:
        """Every n-th prompt for each worker, so that lengths are spread evenly."""
        numbered = list(enumerate(self.prompts))
        settings = self.settings
        return [
            Exam(
                prompts=tuple(numbered[i::num_workers]),
                seeds=settings.seeds,
                temperature=settings.temperature,
                max_new_tokens=settings.max_new_tokens,
                with_teacher=self.has_teacher and any(name in WITH_TEACHER for name in settings.metrics),
                with_loss="loss" in settings.metrics,
            )
            for i in range(min(num_workers, len(numbered)))
        ]

    def examine(
        self,
        workers: Sequence[WorkerHandle],
        weights: Weights | None = None,
        answer: Callable[[Future[list[EvalRow]]], list[EvalRow]] = Future.result,
    ) -> dict[str, float]:
        """Scores of these weights. Waits for all workers, with `answer`; raises WorkerLost when one died."""
        return aggregate(self.rows(workers, weights, answer), self.settings.metrics, self.prompts)

    def rows(
        self,
        workers: Sequence[WorkerHandle],
        weights: Weights | None = None,
        answer: Callable[[Future[list[EvalRow]]], list[EvalRow]] = Future.result,
    ) -> list[EvalRow]:
        """As `examine`, text by text, by seed and prompt."""
        shares = self.shares(len(workers))
        futures = [worker.examine(exam, weights) for worker, exam in zip(workers, shares, strict=False)]
        rows: list[EvalRow] = [row for future in futures for row in answer(future)]
        return sorted(rows, key=lambda row: (row.seed, row.index))
