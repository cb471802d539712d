"""What switching costs: tokens per second of each rule against lockstep, an afternoon's loop, plain on-policy sampling,
and the bound.

In: a teacher, a student, prompts. Out: a Table, one row per rule. All sides write completions of the same prompts, at
temperature 1, with the same limit, batch and dtype, in turns (A B C, C B A, ...) after a warm-up.

The bound is the hindsight optimum: for every rollout the cheapest sequence of student-led, teacher-led and lockstep
rounds, found by dynamic programming over the recorded owners and agreements, at the costs of full batches. These are
measured before and after every turn that is compared with them: a shared machine is half as fast again a minute later.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from switchkd.algo import divergence, switching
from switchkd.algo.sampling import Purpose, SamplingParams, draw
from switchkd.config.errors import ConfigError
from switchkd.engines.hf.student import HFStudent
from switchkd.engines.hf.teacher import HFTeacher
from switchkd.engines.models.lm_head import LMHead
from switchkd.engines.models.loading import load_model, load_tokenizer, pad_id, shared_vocab, stop_ids
from switchkd.rollout.generator import GenerationRequest, SwitchingGenerator
from switchkd.rollout.speculation import DraftPlan
from switchkd.rollout.state import RolloutParams
from switchkd.rollout.teacher_logits import TeacherLogits
from switchkd.tools.bench.baseline_loop import AdaSwitch, Decide, NaiveSwitching, skd, switch
from switchkd.tools.bench.lower_bound import StepCosts, bound_s, measure_costs, steady_s
from switchkd.tools.bench.models import prompts
from switchkd.tools.bench.table import Cell, Pairs, Spread, Table, paired, surroundings
from switchkd.types import CompletionSource, Prompt, Rollout, RolloutTask, TokenSource

HALF_LIFE = 16.0
RULES: dict[str, tuple[Callable[[], switching.Rule], Callable[[], Decide]]] = {
    "switch": (lambda: switching.jsd_threshold(half_life=HALF_LIFE), lambda: switch(half_life=HALF_LIFE)),
    "adaswitch": (switching.kl_spike, AdaSwitch),
    "skd": (switching.outside_top_k, skd),
}
SEED = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """What is written: prompts, rows at the same time, tokens at most, block size at most."""

    prompts: int
    batch: int
    tokens: int
    block: int


REAL = Size(prompts=24, batch=8, tokens=48, block=16)
SMOKE = Size(prompts=4, batch=2, tokens=12, block=4)


class Pair:
    """A teacher and a student, twice: behind the engine, and as plain transformers models for the afternoon's loop."""

    def __init__(self, teacher: str, student: str, *, device: str, dtype: str, size: Size) -> None:
        tokenizer = load_tokenizer(student)
        self.vocab_size = shared_vocab(tokenizer)
        self.size, self.device = size, device
        plain = [load_model(path, dtype=dtype, device=device) for path in (teacher, student)]
        self.stop_ids = frozenset().union(*(stop_ids(model, tokenizer) for model in plain))
        self.afternoon = NaiveSwitching(
            *plain, pad_id=pad_id(tokenizer), stop_ids=self.stop_ids, vocab_size=self.vocab_size
        )
        self.tasks = _tasks(tokenizer, size.prompts)
        longest = max(len(task.prompt.token_ids) for task in self.tasks) + size.tokens
        served, own = (load_model(path, dtype=dtype, device=device) for path in (teacher, student))
        self.student = HFStudent(own, num_slots=size.batch, max_len=longest + 64, vocab_size=self.vocab_size)
        self.teacher = HFTeacher(served, vocab_size=self.vocab_size, max_sessions=3 * size.batch, max_len=longest + 64)
        self.head = LMHead.from_arrays(self.teacher.head().to_arrays(), device=device).prepack()

    def params(self, rule: switching.Rule) -> RolloutParams:
        return RolloutParams(
            rule=rule, student=SamplingParams(), teacher=SamplingParams(), max_new_tokens=self.size.tokens, seed=SEED
        )

    def worker(self, drafter: str) -> SwitchingGenerator:
        return SwitchingGenerator(
            student=self.student,
            teacher=self.teacher,
            head=self.head,
            stop_ids=self.stop_ids,
            max_draft_tokens=self.size.block,
            drafter=drafter,
        )

    def write(self, worker: SwitchingGenerator, params: RolloutParams) -> list[Rollout]:
        found: list[Rollout] = []
        worker.run([GenerationRequest(task=task, params=params) for task in self.tasks], found.extend)
        return sorted(found, key=lambda rollout: rollout.rollout_id)

    def warm_up(self, worker: SwitchingGenerator, params: RolloutParams) -> None:
        """One batch of short completions: kernels are chosen, and the ways to lead have been tried."""
        short = replace(params, max_new_tokens=min(24, self.size.tokens))
        worker.run(
            [GenerationRequest(task=task, params=short) for task in self.tasks[: self.size.batch]], lambda _: None
        )

    def write_in_the_afternoon(self, decide: Callable[[], Decide]) -> int:
        prompts = [task.prompt.token_ids.tolist() for task in self.tasks]
        texts = self.afternoon.run(prompts, decide, batch_size=self.size.batch, max_new_tokens=self.size.tokens)
        return sum(map(len, texts))


COLUMNS = (
    "rule", "tokens/s", "x lockstep", "x afternoon", "time of on-policy", "share of bound", "of steady",
    "rows/round", "teacher calls/token", "breaks/token", "teacher share", "agreement", "bytes/row",
    "bytes/token", "rounds",
)  # fmt: skip
REMARKS = (
    "x lockstep, x afternoon: tokens/s against one token of each model at a time in the same engine, and against a "
    "plain transformers loop; time of on-policy: against student-only sampling with one scoring pass, in this engine.",
    "share of bound: the hindsight optimum's time over ours; of steady: the time over ours of always the same way to "
    "lead, the best one, at the same costs of full batches. rows/round: how full the batches were that took a round.",
    "agreement: equal arg max on the written tokens. rounds: how often each way was taken, in the last run.",
)


def run(
    *,
    smoke: bool,
    repeats: int,
    device: str,
    dtype: str,
    teacher: str,
    student: str,
    rules: Sequence[str] = (),
    num_prompts: int | None = None,
) -> Table:
    """One row per rule (all by default)."""
    check_rules(rules)
    size = SMOKE if smoke else REAL
    size = replace(size, prompts=num_prompts or size.prompts)
    pair = Pair(teacher, student, device=device, dtype=dtype, size=size)
    around: list[StepCosts] = []
    rows = tuple(_row(pair, name, around, repeats) for name in rules or RULES)
    return Table(
        title=f"switching, {Path(student).name or student}",
        columns=COLUMNS,
        rows=rows,
        notes=surroundings(
            device, dtype, threads=torch.get_num_threads(), teacher=teacher, student=student, prompts=size.prompts,
            batch=size.batch, max_new_tokens=size.tokens, repeats=repeats,
            costs_ms_per_row=StepCosts.mean(around).as_ms(),
        ),
        remarks=REMARKS,
    )  # fmt: skip


def check_rules(rules: Sequence[str]) -> None:
    """ConfigError for one that is not measured here."""
    for name in rules:
        if name not in RULES:
            raise ConfigError(f"--rule {name}: choose from {', '.join(RULES)}")


@dataclass(frozen=True, slots=True)
class _Measured:
    """All sides' turns of one rule: the pace and the rollouts are those of our last one, the costs of each of ours."""

    result: Pairs
    costs: Sequence[StepCosts]
    rounds: Mapping[DraftPlan, int]
    rollouts: Sequence[Rollout]


def _measure(pair: Pair, params: RolloutParams, decide: Callable[[], Decide], repeats: int) -> _Measured:
    alone, auto, lockstep = pair.params(switching.student()), pair.worker("auto"), pair.worker("none")
    last: dict[str, list[Rollout]] = {}
    around: list[StepCosts] = []

    def engine(side: str, worker: SwitchingGenerator, a_mode: RolloutParams) -> Callable[[], float]:
        def seconds_per_token() -> float:
            worker.speculation.rounds.clear()
            start = time.perf_counter()
            last[side] = pair.write(worker, a_mode)
            return (time.perf_counter() - start) / sum(r.num_tokens for r in last[side])

        return seconds_per_token

    def costs() -> StepCosts:
        return measure_costs(pair.student, pair.teacher, pair.head, pair.tasks[0].prompt, pair.size.batch,
                             pair.size.block, repeats=3)  # fmt: skip

    write = engine("auto", auto, params)

    def between_costs() -> float:
        before, seconds = costs(), write()
        around.append(StepCosts.mean([before, costs()]))
        return seconds

    def afternoon() -> float:
        torch.manual_seed(SEED)
        start = time.perf_counter()
        num = pair.write_in_the_afternoon(decide)
        return (time.perf_counter() - start) / num

    for worker in (auto, lockstep):
        pair.warm_up(worker, params)
    result = paired(
        {
            "auto": between_costs,
            "lockstep": engine("lockstep", lockstep, params),
            "afternoon": afternoon,
            "on-policy": engine("on-policy", pair.worker("auto"), alone),
        },
        repeats=repeats,
        warmup=0,
    )
    return _Measured(result, around, auto.speculation.rounds, last["auto"])


def _row(pair: Pair, name: str, around: list[StepCosts], repeats: int) -> dict[str, Cell]:
    """Adds each turn's costs to `around`."""
    rule, decide = RULES[name][0](), RULES[name][1]
    params = pair.params(rule)
    found = _measure(pair, params, decide, repeats)
    around += found.costs
    result, rollouts, rounds = found.result, found.rollouts, found.rounds
    reads = agreements(pair, rollouts, params)
    num_tokens = sum(rollout.num_tokens for rollout in rollouts)

    def share(least_s: Callable[..., float]) -> Spread:
        """Of our time, turn by turn."""
        turns = zip(found.costs, result.values["auto"], strict=True)
        return Spread.of([least_s(rollouts, reads, costs, rule) / num_tokens / seconds for costs, seconds in turns])

    return {
        "rule": name,
        "tokens/s": result.spread["auto"].map(lambda seconds: 1 / seconds),
        "x lockstep": result.ratios["lockstep"],
        "x afternoon": result.ratios["afternoon"],
        "time of on-policy": result.ratios["on-policy"].map(lambda ratio: 1 / ratio),
        "share of bound": share(bound_s),
        "of steady": share(steady_s),
        "rows/round": sum(r.stats.num_rounds for r in rollouts) / sum(rounds.values()),
        "agreement": float(np.concatenate([read.agree for read in reads]).mean()),
        **_counted(rollouts),
        "rounds": ", ".join(f"{who} {size}: {num}" for (who, size), num in sorted(rounds.items())),
    }


def _counted(rollouts: Sequence[Rollout]) -> dict[str, Cell]:
    tokens = sum(r.num_tokens for r in rollouts)
    sent = sum(r.stats.output_bytes for r in rollouts)
    return {
        "teacher calls/token": sum(r.stats.num_rounds for r in rollouts) / tokens,
        "breaks/token": sum(r.stats.num_rejections for r in rollouts) / tokens,
        "teacher share": sum(int((r.sources == TokenSource.TEACHER).sum()) for r in rollouts) / tokens,
        "bytes/row": sent / sum(r.stats.num_scored_rows for r in rollouts),
        "bytes/token": sent / tokens,
    }


@dataclass(frozen=True, slots=True)
class Read:
    """Both models beside a finished rollout of T tokens: do their keyed draws differ, is their most likely id equal;
    bool [T] each."""

    differ: np.ndarray
    agree: np.ndarray


@torch.inference_mode()
def agreements(pair: Pair, rollouts: Sequence[Rollout], params: RolloutParams) -> list[Read]:
    """What either proposer would have met at every position. SKD's replacement never equals the draft by sharing."""
    found, reader = [], TeacherLogits(pair.head, pair.device)
    for rollout in rollouts:
        num = rollout.num_tokens
        ids = np.concatenate([rollout.prompt_ids, rollout.token_ids])[:-1].astype(np.int32)
        hidden = pair.student.extend(np.array([0]), np.array([0], np.int32), ids, np.array([len(ids)], np.int32))
        q_logits = pair.student.head.logits(hidden[-num:])
        assert rollout.teacher_output is not None
        reader.set_format(rollout.teacher_output)
        p_logits = reader.logits(rollout.teacher_output.values)
        key = {"run_seed": params.seed, "rollout_ids": [rollout.rollout_id] * num, "positions": range(num)}
        purposes = (params.rule.replacement, Purpose.GUMBEL)
        teachers, students = (
            draw(logits, purpose=purpose, sampling=SamplingParams(), **key)  # type: ignore[call-overload]
            for logits, purpose in zip((p_logits, q_logits), purposes, strict=True)
        )
        found.append(Read(teachers != students, divergence.agreement(p_logits, q_logits).cpu().numpy()))
    return found


def _tasks(tokenizer: Any, num: int) -> list[RolloutTask]:
    """Prompts of mixed lengths under the tokenizer's chat template, each a rollout of its own."""
    texts = [_varied(i, text) for i, text in enumerate(prompts(num))]
    tasks = []
    for i, text in enumerate(texts):
        if tokenizer.chat_template:
            chat = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = np.array(tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"], np.int32)
        prompt = Prompt(prompt_id=str(i), text=text, token_ids=ids)
        tasks.append(
            RolloutTask(rollout_id=i, batch=0, stage=0, completion_source=CompletionSource.ROLLOUT, prompt=prompt)
        )
    return tasks


def _varied(index: int, text: str) -> str:
    """Short, middling and long ones in turn, and answers to match."""
    longer = "Somebody who has read a little about it asks, and would like to hear the most useful things first. "
    return (f"{text} Answer in one short sentence.", text, longer * 2 + text)[index % 3]
