"""Evaluates the student: the rollout workers share the prompts, and their rows become scores.

In: the evaluation prompts and the workers' handles. Out: one flat dict of `eval/...` numbers; the stage's best step.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from switchkd.config.schema import EvalConfig, TrainConfig
from switchkd.controller.checkpoint import TrainState
from switchkd.controller.handles import WorkerHandle
from switchkd.controller.metrics import MetricsLog
from switchkd.controller.schedule import stage_after
from switchkd.controller.text_metrics import exact_match, rouge_l
from switchkd.controller.watchdog import Watchdog
from switchkd.types import GREEDY, EvalRow, EvalShard, Prompt, Unreachable, WeightRef, WorkerLost

WITH_TEACHER = ("agreement", "kl")
"""Metrics that compare the student with the teacher."""
LOWER_IS_BETTER = ("kl", "loss")
MAX_TRIES = 5
Value = Callable[[EvalRow], float]


class Evaluator:
    def __init__(self, settings: EvalConfig, prompts: Sequence[Prompt], *, has_teacher: bool) -> None:
        self.settings = settings
        self.prompts = list(prompts[: settings.num_prompts])
        self.has_teacher = has_teacher

    def shards(self, num_workers: int, teacher_text: bool = False) -> list[EvalShard]:
        """Give each worker every n-th prompt, so that lengths are spread evenly."""
        numbered, settings = list(enumerate(self.prompts)), self.settings
        with_teacher = self.has_teacher and any(name in WITH_TEACHER for name in settings.metrics)
        return [
            EvalShard(
                prompts=tuple(numbered[i::num_workers]),
                seeds=settings.seeds,
                temperature=settings.temperature,
                max_new_tokens=settings.max_new_tokens,
                with_teacher=with_teacher,
                with_loss="loss" in settings.metrics,
                with_teacher_text=with_teacher and teacher_text and i == 0,
            )
            for i in range(min(num_workers, len(numbered)))
        ]

    def rows(
        self,
        workers: Sequence[WorkerHandle],
        weights: WeightRef | None = None,
        wait_for: Callable[[Future[list[EvalRow]]], list[EvalRow]] = Future.result,
        *,
        teacher_text: bool = False,
    ) -> list[EvalRow]:
        """Evaluate these weights on all workers. Returns rows by seed and prompt; raises what `wait_for` does."""
        shards = self.shards(len(workers), teacher_text)
        futures = [worker.evaluate(shard, weights) for worker, shard in zip(workers, shards, strict=False)]
        rows: list[EvalRow] = [row for future in futures for row in wait_for(future)]
        return sorted(rows, key=lambda row: (row.seed, row.index))

    def sample(self, rows: Sequence[EvalRow]) -> dict[str, str]:
        """Return the texts of the first held-out prompt: question, reference, student, teacher where it wrote."""
        of_first = [row for row in rows if row.index == 0]
        prompt = self.prompts[0]
        student = next((row.text for row in of_first if row.seed != GREEDY), "")
        teacher = [row.teacher_text for row in of_first if row.teacher_text]
        texts = {"prompt": prompt.text, "reference": prompt.reference, "student": student}
        return {**texts, **({"teacher": teacher[0]} if teacher else {})}


def evaluate_with_retries(
    evaluator: Evaluator,
    workers: Sequence[WorkerHandle],
    weights: WeightRef | None,
    publish: Callable[[], WeightRef | None],
    watchdog: Watchdog,
    log: MetricsLog,
    *,
    teacher_text: bool,
) -> list[EvalRow]:
    """Return the rows. Where a worker dies or cannot reach something (such as the weights, which are then published
    again), the evaluation begins again. Raises RuntimeError after MAX_TRIES."""
    for _ in range(MAX_TRIES):
        try:
            return evaluator.rows(
                workers,
                weights,
                lambda future: watchdog.wait_for(future, "an evaluation by the rollout workers"),
                teacher_text=teacher_text,
            )
        except (WorkerLost, Unreachable) as error:
            reason = "died" if isinstance(error, WorkerLost) else f"could not go on ({error})"
            log.info(f"a rollout worker {reason}; the evaluation begins again")
            for worker in workers:
                watchdog.wait_for(worker.back(), "a rollout worker to come back")
            if isinstance(error, Unreachable):
                weights = publish()
    raise RuntimeError(f"{MAX_TRIES} evaluations lost a rollout worker; see its log")


def update_best(state: TrainState, scores: Mapping[str, float], train: TrainConfig) -> TrainState:
    """Record the best score by `train.select_by`. Each stage starts without one: its students are those of another
    method, and a fine-tuned one must not stand for a distilled one."""
    stage = stage_after(train.stages, state.step)
    if not train.select_by or not stage:
        return state
    score = scores[f"eval/{train.select_by}"]
    if state.best is None or stage != state.best_stage or _is_better(score, state.best, train.select_by):
        return replace(state, best=score, best_step=state.step, best_stage=stage, evals_since_best=0)
    state = replace(state, evals_since_best=state.evals_since_best + 1)
    return replace(state, stopped_early=stops_early(state, train))


def stops_early(state: TrainState, train: TrainConfig) -> bool:
    """Whether `train.early_stop` ends the run: only the last stage is ended."""
    last = stage_after(train.stages, sum(stage.steps for stage in train.stages))
    return train.early_stop is not None and state.best_stage == last and state.evals_since_best >= train.early_stop


def _is_better(score: float, other: float, metric: str) -> bool:
    return score < other if metric in LOWER_IS_BETTER else score > other


@dataclass(frozen=True, slots=True)
class Stat:
    """Mean and standard deviation over seeds; the deviation of a single seed is 0."""

    mean: float
    std: float
    num_seeds: int


def aggregate(rows: Sequence[EvalRow], metrics: Iterable[str], prompts: Sequence[Prompt]) -> dict[str, float]:
    """Return `stats` as `eval/rouge_l`, `eval/rouge_l_std`, ..."""
    named = stats(rows, metrics, prompts).items()
    return {f"eval/{name}{end}": value for name, stat in named for end, value in (("", stat.mean), ("_std", stat.std))}


def stats(rows: Sequence[EvalRow], metrics: Iterable[str], prompts: Sequence[Prompt]) -> dict[str, Stat]:
    """Scores by name; a score without numbers in any row is left out.

    `rouge_l` and `exact_match` are means over prompts, 0 to 100; `agreement` (0 to 1) and `kl` (nats) are means over
    the tokens of the references, `agreement_greedy` and `kl_greedy` over those of the student's greedy completions;
    `loss` (nats) is the student's cross-entropy on the references.
    """
    scored = [row for row in rows if row.seed != GREEDY]
    terms = {name: (scored if name in _OF_TEXTS else rows, *pair) for name, pair in _terms(prompts).items()}
    names = ["length", *(name for metric in metrics for name in (metric, f"{metric}_greedy"))]
    scores = {name: _over_seeds(*terms[name]) for name in names if name in terms}
    return {name: stat for name, stat in scores.items() if stat.num_seeds}


_OF_TEXTS = ("length", "rouge_l", "exact_match")
"""Scores of the completions at `eval.temperature`; the others are sums over tokens."""


def _terms(prompts: Sequence[Prompt]) -> dict[str, tuple[Value, Value]]:
    """By score: a row's numerator and denominator."""

    def rouge(row: EvalRow) -> float:
        prompt = prompts[row.index]
        return rouge_l(row.text, prompt.references or (prompt.reference,))

    def match(row: EvalRow) -> float:
        prompt = prompts[row.index]
        return 100.0 * exact_match(row.text, prompt.answer or prompt.reference)

    return {
        "length": (lambda row: row.num_tokens, lambda row: 1),
        "rouge_l": (rouge, lambda row: 1),
        "exact_match": (match, lambda row: 1),
        "agreement": (lambda row: row.reference_agree, lambda row: row.reference_tokens),
        "agreement_greedy": (lambda row: row.greedy_agree, lambda row: row.greedy_tokens),
        "kl": (lambda row: row.reference_kl, lambda row: row.reference_tokens),
        "kl_greedy": (lambda row: row.greedy_kl, lambda row: row.greedy_tokens),
        "loss": (lambda row: row.reference_loss, lambda row: row.loss_tokens),
    }


def text_rows(rows: Sequence[EvalRow], metrics: Iterable[str], prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """The scored texts, a row for each seed and prompt: its texts, and each score that is known of this row.

    `seed` is null for the greedy completion that is compared with the teacher, and where only the reference is read.
    """
    terms = _terms(prompts)
    names = ["length", *(name for metric in metrics for name in (metric, f"{metric}_greedy") if name in terms)]
    written = []
    for row in rows:
        greedy, prompt = row.seed == GREEDY, prompts[row.index]
        known = [name for name in names if not (greedy and name in _OF_TEXTS)]
        scores = {name: terms[name][0](row) / num for name in known if (num := terms[name][1](row))}
        texts = {"prompt": prompt.text, "reference": prompt.reference, "completion": row.text}
        seed = None if greedy else row.seed
        written.append({"index": row.index, "prompt_id": row.prompt_id, "seed": seed, **texts, **scores})
    return written


def _over_seeds(rows: Sequence[EvalRow], total: Value, weight: Value) -> Stat:
    """Mean and sample deviation, over the seeds with a positive weight, of the weighted mean of each seed."""
    by_seed: dict[int, list[EvalRow]] = {}
    for row in rows:
        by_seed.setdefault(row.seed, []).append(row)
    sums = [(sum(map(total, seed_rows)), sum(map(weight, seed_rows))) for seed_rows in by_seed.values()]
    means = [amount / num for amount, num in sums if num]
    if not means:
        return Stat(0.0, 0.0, 0)
    return Stat(statistics.fmean(means), statistics.stdev(means) if len(means) > 1 else 0.0, len(means))
