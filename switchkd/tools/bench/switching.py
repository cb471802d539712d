"""Measures the cost of switching: tokens/s of each rule against no draft, a naive loop, on-policy sampling, the bound.

In: a teacher, a student, prompts. Out: a Table, one row per rule. All sides generate completions of the same prompts,
at temperature 1, with the same limit, batch and dtype, in turns (A B C, C B A, ...) after a warm-up.

The bound is the hindsight optimum: for every rollout the cheapest sequence of rounds (drafted by the student, by the
teacher, or without a draft), by dynamic programming over the positions at which a draft of each model is rejected. The
costs of full batches are measured before and after every turn, since a shared machine's speed drifts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from switchkd.algo import divergence, switching
from switchkd.algo.sampling import SamplingParams, draw
from switchkd.config.errors import ConfigError
from switchkd.engines.hf.student import HFStudent
from switchkd.engines.hf.teacher import HFTeacher
from switchkd.engines.models.lm_head import LMHead
from switchkd.engines.models.loading import load_model, load_tokenizer, pad_id, shared_vocab, stop_ids
from switchkd.rollout.generator import GenerationRequest, SwitchingGenerator
from switchkd.rollout.state import RolloutParams
from switchkd.rollout.teacher_logits import TeacherLogits
from switchkd.tools.bench.baseline_loop import (
    HALF_LIFE,
    AdaSwitch,
    Decide,
    NaiveSwitching,
    pack_weights,
    skd,
    switch,
)
from switchkd.tools.bench.lower_bound import StepCosts, bound_s, measure_costs, steady_s
from switchkd.tools.bench.models import prompts, resolve
from switchkd.tools.bench.table import Cell, Options, Spread, Table, compare, take_turns
from switchkd.types import CompletionSource, Prompt, Rollout, RolloutTask, TokenSource

RULES: dict[str, tuple[Callable[[], switching.Rule], Callable[[], Decide]]] = {
    "switch": (lambda: switching.jsd_threshold(half_life=HALF_LIFE), lambda: switch),
    "adaswitch": (switching.kl_spike, AdaSwitch),
    "skd": (switching.outside_top_k, lambda: skd),
}
SEED = 1
LONGER = "A reader who knows a little about it asks, and would like to learn the most useful things first. "
REMARKS = (
    "x no draft: tokens/s against one token of each model at a time in the same engine; x naive loop, x naive packed: "
    "against a plain transformers loop, with plain weights and with the engine's packed ones (CPU only); time of "
    "on-policy: against student-only sampling with one scoring pass, in this engine.",
    "share of bound: the hindsight optimum's time over ours; of steady: the time over ours of always the same draft, "
    "the best one, at the same costs of full batches. rows/round: how full the batches were that took a round.",
    "agreement: equal arg max on the generated tokens. rounds: how often each draft was taken, in the last run.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Number and size of the completions."""

    prompts: int
    batch: int  # rows at the same time
    tokens: int  # at most
    block: int  # most drafted tokens


REAL = Workload(prompts=24, batch=8, tokens=48, block=16)
SMOKE = Workload(prompts=4, batch=2, tokens=12, block=4)


class Engines:
    """A teacher and a student, as switchkd's engines and as transformers models for the naive loops."""

    def __init__(self, teacher: str, student: str, *, device: str, dtype: str, load: Workload) -> None:
        tokenizer = load_tokenizer(student)
        self.vocab_size = shared_vocab(tokenizer)
        self.load = load
        self.device = device

        def load_both() -> list[Any]:
            return [load_model(path, dtype=dtype, device=device) for path in (teacher, student)]

        naive = {"naive loop": load_both()}
        if device == "cpu":
            naive["naive packed"] = [pack_weights(model) for model in load_both()]
        self.stop_ids = frozenset().union(*(stop_ids(model, tokenizer) for model in naive["naive loop"]))
        settings: Any = {"pad_id": pad_id(tokenizer), "stop_ids": self.stop_ids, "vocab_size": self.vocab_size}
        self.naive = {name: NaiveSwitching(*models, **settings) for name, models in naive.items()}
        self.tasks = _tasks(tokenizer, load.prompts)
        max_len = max(len(task.prompt.token_ids) for task in self.tasks) + load.tokens + 64
        served, trained = load_both()
        self.student = HFStudent(trained, num_slots=load.batch, max_len=max_len, vocab_size=self.vocab_size)
        self.teacher = HFTeacher(served, vocab_size=self.vocab_size, max_sessions=3 * load.batch, max_len=max_len)
        self.head = LMHead.from_state(self.teacher.head().to_state(), device=device).prepack()

    def params(self, rule: switching.Rule) -> RolloutParams:
        plain = SamplingParams()
        return RolloutParams(rule=rule, student=plain, teacher=plain, max_new_tokens=self.load.tokens, seed=SEED)

    def generator(self, drafter: str) -> SwitchingGenerator:
        return SwitchingGenerator(
            student=self.student,
            teacher=self.teacher,
            head=self.head,
            stop_ids=self.stop_ids,
            max_draft_tokens=self.load.block,
            drafter=drafter,
        )

    def warm_up(self, generator: SwitchingGenerator, params: RolloutParams) -> None:
        """Generate one batch of short completions, so that kernels are chosen and each draft is tried."""
        short = replace(params, max_new_tokens=min(24, self.load.tokens))
        requests = [GenerationRequest(task=task, params=short) for task in self.tasks[: self.load.batch]]
        generator.run(requests, lambda _: None)

    def timed(self, generator: SwitchingGenerator, params: RolloutParams) -> tuple[float, list[Rollout]]:
        """Generate all completions. Returns the seconds per token, and the rollouts in order."""
        rollouts: list[Rollout] = []
        start = time.perf_counter()
        generator.run([GenerationRequest(task=task, params=params) for task in self.tasks], rollouts.extend)
        seconds = time.perf_counter() - start
        per_token = seconds / sum(rollout.num_tokens for rollout in rollouts)
        return per_token, sorted(rollouts, key=lambda rollout: rollout.rollout_id)

    def timed_naively(self, loop: NaiveSwitching, decide: Callable[[], Decide]) -> float:
        """Generate all completions with a naive loop. Returns the seconds per token."""
        torch.manual_seed(SEED)
        ids = [task.prompt.token_ids.tolist() for task in self.tasks]
        start = time.perf_counter()
        completions = loop.run(ids, decide, batch_size=self.load.batch, max_new_tokens=self.load.tokens)
        return (time.perf_counter() - start) / sum(map(len, completions))

    def measure_costs(self) -> StepCosts:
        prompt = self.tasks[0].prompt
        return measure_costs(self.student, self.teacher, self.head, prompt, self.load.batch, self.load.block)


def run(options: Options, teacher: str, student: str, rules: Sequence[str], num_prompts: int | None) -> Table:
    """Measure one row per rule, by default all. Raises ConfigError for a rule that is not in RULES."""
    for name in rules:
        if name not in RULES:
            raise ConfigError(f"--rule {name}: choose from {', '.join(RULES)}")
    load = SMOKE if options.smoke else REAL
    load = replace(load, prompts=num_prompts or load.prompts)
    prompts(load.prompts)  # raises for too many before a model is loaded
    folders = resolve(teacher, student)
    torch.set_num_threads(options.threads)
    engines = Engines(folders.teacher, folders.student, device=options.device, dtype=options.dtype, load=load)
    costs: list[StepCosts] = []
    rows = [_row(engines, name, options.repeats, costs) for name in rules or RULES]
    sizes = {"prompts": load.prompts, "batch": load.batch, "max_new_tokens": load.tokens}
    notes = options.notes(**asdict(folders), **sizes, costs_ms_per_row=StepCosts.mean(costs).as_ms())
    return Table(title=f"switching, {Path(folders.student).name}", rows=rows, notes=notes, remarks=REMARKS)


def _row(engines: Engines, name: str, repeats: int, all_costs: list[StepCosts]) -> dict[str, Cell]:
    """Measure all sides of one rule. Appends each turn's costs to `all_costs`."""
    rule, decide = RULES[name][0](), RULES[name][1]
    params, student_only = engines.params(rule), engines.params(switching.student())
    auto, no_draft, on_policy = (engines.generator(drafter) for drafter in ("auto", "none", "auto"))
    for generator in (auto, no_draft):
        engines.warm_up(generator, params)
    costs: list[StepCosts] = []
    rollouts: list[Rollout] = []

    def ours() -> float:
        before = engines.measure_costs()
        auto.speculation.rounds.clear()
        seconds, rollouts[:] = engines.timed(auto, params)
        costs.append(StepCosts.mean([before, engines.measure_costs()]))
        return seconds

    sides: dict[str, Callable[[], float]] = {
        "ours": ours,
        "no draft": lambda: engines.timed(no_draft, params)[0],
        **{name: partial(engines.timed_naively, loop, decide) for name, loop in engines.naive.items()},
        "on-policy": lambda: engines.timed(on_policy, student_only)[0],
    }
    pairs = compare(take_turns(sides, repeats, warmup=0))
    all_costs += costs
    reads = agreements(engines, rollouts, params)
    num_tokens = sum(rollout.num_tokens for rollout in rollouts)
    rounds = auto.speculation.rounds

    def share(least_s: Callable[..., float]) -> Spread:
        """Return the least time over ours, turn by turn."""
        turns = zip(costs, pairs.values["ours"], strict=True)
        return Spread.from_values([least_s(rollouts, reads, cost, rule) / num_tokens / ours for cost, ours in turns])

    return {
        "rule": name,
        "tokens/s": pairs.spread["ours"].map(lambda seconds: 1 / seconds),
        "x no draft": pairs.ratios["no draft"],
        **{f"x {name}": pairs.ratios[name] for name in engines.naive},
        "time of on-policy": pairs.ratios["on-policy"].map(lambda ratio: 1 / ratio),
        "share of bound": share(bound_s),
        "of steady": share(steady_s),
        "rows/round": sum(rollout.stats.num_rounds for rollout in rollouts) / sum(rounds.values()),
        **_per_token(rollouts, num_tokens),
        "agreement": float(np.concatenate([read.agree for read in reads]).mean()),
        "rounds": ", ".join(f"{plan.drafter} {plan.num_tokens}: {num}" for plan, num in sorted(rounds.items())),
    }


def _per_token(rollouts: Sequence[Rollout], num_tokens: int) -> dict[str, Cell]:
    sent = sum(rollout.stats.output_bytes for rollout in rollouts)
    by_teacher = sum(int((rollout.sources == TokenSource.TEACHER).sum()) for rollout in rollouts)
    return {
        "teacher calls/token": sum(rollout.stats.num_rounds for rollout in rollouts) / num_tokens,
        "rejections/token": sum(rollout.stats.num_rejections for rollout in rollouts) / num_tokens,
        "teacher share": by_teacher / num_tokens,
        "bytes/row": sent / sum(rollout.stats.num_scored_rows for rollout in rollouts),
        "bytes/token": sent / num_tokens,
    }


@dataclass(frozen=True, slots=True)
class Read:
    """Both models' agreement on a finished rollout of T tokens."""

    rejected: dict[str, np.ndarray]  # by drafter: whether its token of a position is not the rollout's, bool [T]
    agree: np.ndarray  # whether their most likely ids are equal, bool [T]


@torch.inference_mode()
def agreements(engines: Engines, rollouts: Sequence[Rollout], params: RolloutParams) -> list[Read]:
    """Compare both models at every position with each other, and their drafts with the rollout.

    Both draft with one noise. A model's own token is its draft, except where the teacher replaces with noise of another
    purpose (SKD); only there it is compared, so that rounding rejects nothing.
    """
    reads, reader = [], TeacherLogits(engines.head, engines.device)
    for rollout in rollouts:
        num = rollout.num_tokens
        ids = np.concatenate([rollout.prompt_ids, rollout.token_ids])[:-1].astype(np.int32)
        hidden = engines.student.extend(np.array([0]), np.array([0], np.int32), ids, np.array([len(ids)], np.int32))
        q_logits = engines.student.head.logits(hidden[-num:])
        assert rollout.teacher_output is not None
        reader.set_format(rollout.teacher_output)
        p_logits = reader.logits(rollout.teacher_output.rows.values)
        by_teacher = rollout.sources == TokenSource.TEACHER
        others = {"student": by_teacher, "teacher": ~by_teacher | (params.rule.replacement != params.purpose)}
        rejected = {}
        for drafter, logits in (("student", q_logits), ("teacher", p_logits)):
            drafted = draw(
                logits, run_seed=params.seed, rollout_ids=[rollout.rollout_id] * num, positions=range(num),
                purpose=params.purpose, sampling=getattr(params, drafter),
            )  # fmt: skip
            rejected[drafter] = others[drafter] & (drafted != rollout.token_ids)
        reads.append(Read(rejected, divergence.agreement(p_logits, q_logits).cpu().numpy()))
    return reads


def _tasks(tokenizer: Any, num: int) -> list[RolloutTask]:
    """Return prompts of mixed lengths in the tokenizer's chat template, one task each."""
    tasks = []
    for i, text in enumerate(prompts(num)):
        # short, medium and long prompts in turn, with completions of similar length
        text = (f"{text} Answer in one short sentence.", text, LONGER * 2 + text)[i % 3]
        if tokenizer.chat_template:
            chat = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = np.array(tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"], np.int32)
        prompt = Prompt(prompt_id=str(i), text=text, token_ids=ids)
        source = CompletionSource.ROLLOUT
        tasks.append(RolloutTask(rollout_id=i, batch=0, stage=0, completion_source=source, prompt=prompt))
    return tasks
