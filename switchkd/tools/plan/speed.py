"""How fast a run will be, and which of its roles holds it up: closed formulas over costs, no simulation.

In: a stage of a config, numbers of processes, `Costs`. Out: a `Speed`. Symbols: R rows of a worker, K block size, b the
rate at which blocks break per token, W workers, M teachers, G learner ranks, n rollouts of a step, L tokens of each.

    kept(K, b)    = (1 - (1 - b)^K) / b                       tokens of a block that stand, b = 0: K
    round         = K student + block(K) + R kept settle + call          the student leads
                    K step + check(K) + R kept settle + call             the teacher leads
                    (two half-batches that take turns: the longest of 2 x worker's, 2 x teacher's, both parts;
                    a call is taken to last as long for half as many rows)
    rounds        = ceil(n / W / R) L / kept                  of one worker in one step
    workers' time = rounds round + prompts
    teachers' time= W rounds teacher's part / M + references
    learn         = learner / G + publish
    step          = writing + learn, or with replay.max_staleness > 0 the longer of the two
    writing       = the longer of workers' and teachers' time

Where all roles share one machine's cores, each part also takes at least its core-seconds divided by the cores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from switchkd.config import resources
from switchkd.config.schema import Config, StageConfig
from switchkd.tools.plan.costs import Costs

WORTH = 0.01
"""A gain below this share is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """A way to take the next tokens: seconds of one round of one worker, by who computes, and what it settles."""

    drafter: str  # student, teacher, lockstep, alone
    block: int
    worker_s: float
    teacher_s: float
    kept: float  # tokens a row
    rows_per_token: float  # rows that the teacher sends

    def round_s(self, halves: int) -> float:
        """Of all rows, in one part or in two halves, of which one drafts while the teacher reads the other."""
        both = self.worker_s + self.teacher_s
        return both if halves == 1 else max(2 * self.worker_s, both, 2 * self.teacher_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """Of one stage with some number of processes."""

    step_s: float
    write_s: float  # until one step's rollouts are written
    learn_s: float
    tokens_per_s: float  # of the whole run: completion tokens trained on
    limits: dict[str, float]  # tokens/s that each role could do if the others were free
    busy: dict[str, float]  # the share of a step in which a role's processes compute
    way: Way


def kept(block: int, rate: float) -> float:
    """Tokens of a block that stand: the one at which it breaks is settled too."""
    return float(block) if rate == 0 else (1 - (1 - rate) ** block) / rate


def ways(config: Config, stage: StageConfig, costs: Costs, rows: int) -> list[Way]:
    """All that `rollout.drafter` and the rule allow and the costs tell of."""
    return [*_ways(config, stage, costs, rows)]


def _ways(config: Config, stage: StageConfig, costs: Costs, rows: int) -> Iterator[Way]:
    drafter, call, settle = config.rollout.drafter, costs.call_ms / 1e3, costs.settle_ms * rows / 1e3
    student, most = costs.student_ms / 1e3, min(config.rollout.max_draft_tokens, stage.max_new_tokens)
    smallest = min(costs.teacher_ms)
    blocks = {size: ms / 1e3 for size, ms in sorted(costs.teacher_ms.items()) if size <= max(most, smallest)}
    longest = max(costs.teacher_ms)
    per_token = costs.teacher_ms[longest] / longest / 1e3
    if not stage.needs_teacher or stage.rule.type == "student":
        read = per_token if stage.needs_teacher else 0.0
        yield Way(drafter="alone", block=1, worker_s=student + call, teacher_s=read, kept=1, rows_per_token=bool(read))
        return
    step = costs.teacher_step_ms and costs.teacher_step_ms / 1e3
    if stage.rule.type == "teacher" and step:
        yield Way(drafter="alone", block=1, worker_s=call, teacher_s=step, kept=1, rows_per_token=1)
        return
    if drafter in ("auto", "none") or most == 1:
        own = student + settle + call
        yield Way(drafter="none", block=1, worker_s=own, teacher_s=blocks[smallest], kept=1, rows_per_token=1)
    if drafter in ("auto", "student"):
        for size, read_s in blocks.items():
            num = kept(size, costs.rejection_rate)
            sent = (size + 1 - (1 - costs.rejection_rate) ** size) / num
            own = size * student + settle * num + call
            yield Way(drafter="student", block=size, worker_s=own, teacher_s=read_s, kept=num, rows_per_token=sent)
    if drafter in ("auto", "teacher") and step and stage.rule.type != "outside_top_k":
        rate = costs.rejection_rate if costs.teacher_rejection_rate is None else costs.teacher_rejection_rate
        for size, check in sorted(costs.student_block_ms.items()):
            if size <= most:
                num = kept(size, rate)
                own = check / 1e3 + settle * num + call
                yield Way(drafter="teacher", block=size, worker_s=own, teacher_s=size * step, kept=num,
                          rows_per_token=size / num)  # fmt: skip


def speed(
    config: Config,
    stage: StageConfig,
    costs: Costs,
    numbers: Mapping[str, int],
    *,
    overlap: bool = False,
    cores: int = 0,
) -> Speed:
    """`numbers`: processes by role; `cores` > 0: that all of them share. The way with the shortest step is taken."""
    share = -(-stage.batch_size // numbers["rollout"])
    rows = min(config.rollout.batch_size, share)
    found = [
        _speed(config, stage, costs, numbers, way, rows, overlap, cores) for way in ways(config, stage, costs, rows)
    ]
    return min(found, key=lambda each: each.step_s)


def _speed(config: Config, stage: StageConfig, costs: Costs, numbers: Mapping[str, int], way: Way, rows: int,
           overlap: bool, cores: int) -> Speed:  # fmt: skip
    halves = 2 if overlap and rows > 1 else 1
    workers, teachers, ranks = numbers["rollout"], numbers.get("teacher", 0), numbers["learner"]
    length = costs.tokens or float(stage.max_new_tokens)
    mix = stage.mix
    data = mix.dataset / (mix.rollout + mix.dataset + mix.teacher)
    written = stage.batch_size * (1 - data)
    waves = math.ceil(math.ceil(written / workers - 1e-9) / rows)
    rounds = waves * length / way.kept
    prompts, references = _reading(costs, stage, written, data, length, rows)
    worker_s = rounds * way.round_s(halves) + prompts / workers + references / workers
    drafting_s, reading_s = rounds * way.worker_s * halves, rounds * way.teacher_s * halves
    teacher_s = (workers * reading_s + references) / teachers if teachers else 0.0
    write_s = max(worker_s, teacher_s)
    learn_s = costs.learner_ms / ranks / 1e3 + costs.publish_ms / 1e3
    core_s = {
        "rollout": (workers * drafting_s + prompts) * _threads(config, "rollout"),
        "teacher": (workers * reading_s + references) * _threads(config, "teacher"),
        "learner": learn_s * ranks * _threads(config, "learner"),
    }
    writing_cores = (core_s["rollout"] + core_s["teacher"]) / cores if cores else 0.0
    write_s = max(write_s, writing_cores)
    learn_s = max(learn_s, core_s["learner"] / cores if cores else 0.0)
    behind = config.replay.max_staleness > 0
    step_s = max(write_s, learn_s) if behind else write_s + learn_s
    if cores:
        step_s = max(step_s, sum(core_s.values()) / cores)
    tokens = stage.batch_size * length
    limits = {"rollout": tokens / worker_s if worker_s else math.inf}
    limits["teacher"] = tokens / teacher_s if teacher_s else math.inf
    limits["learner"] = tokens / learn_s if learn_s else math.inf
    if cores:
        limits["cores"] = tokens * cores / sum(core_s.values())
    busy = {
        "teacher": min(teacher_s / step_s, 1.0),
        "rollout": min((drafting_s + prompts / workers) / step_s, 1.0),
        "learner": learn_s / step_s,
    }
    there = {name: value for name, value in limits.items() if name not in numbers or numbers[name]}
    return Speed(
        step_s=step_s,
        write_s=write_s,
        learn_s=learn_s,
        tokens_per_s=tokens / step_s,
        limits={name: value for name, value in there.items() if name != "teacher" or teachers},
        busy={name: value for name, value in busy.items() if numbers.get(name)},
        way=way,
    )


def _reading(
    costs: Costs, stage: StageConfig, written: float, data: float, length: float, rows: int
) -> tuple[float, float]:
    """Seconds of one step, over all workers: reading prompts, and scoring the data set's completions."""
    longest = max(costs.teacher_ms)
    per_row = costs.teacher_ms[longest] / longest / rows / 1e3
    references = stage.batch_size * data * (length * per_row + costs.prompt_ms / 1e3) if stage.needs_teacher else 0.0
    return written * costs.prompt_ms / 1e3, references


def _threads(config: Config, role: str) -> int:
    return resources.of_role(config, role).threads or 1


# --- what to change --------------------------------------------------------------------------------------------------


def one_more(
    config: Config, stage: StageConfig, costs: Costs, numbers: Mapping[str, int], **how: Any
) -> dict[str, float]:
    """By role: the run's tokens/s with one more process of it, over those of now, minus 1."""
    now = speed(config, stage, costs, numbers, **how).tokens_per_s
    found = {}
    for role in numbers:
        more = {**numbers, role: numbers[role] + 1}
        found[role] = speed(config, stage, costs, more, **how).tokens_per_s / now - 1
    return found


def bottleneck(now: Speed, gains: Mapping[str, float], cores: int) -> str:
    """The role of which one more helps most. None helps: what they share, or who takes longest."""
    best = max(gains, key=lambda role: gains[role])
    if gains[best] >= WORTH:
        return best
    if cores:
        return "cores"
    return min(now.limits, key=lambda role: now.limits[role])


def ratio(config: Config, stage: StageConfig, costs: Costs, numbers: Mapping[str, int], **how: Any) -> dict[str, float]:
    """Processes of each role that keep each other exactly busy, the smallest number 1. A role that costs no time is
    left out."""
    alone = speed(config, stage, costs, dict.fromkeys(numbers, 1), **{**how, "cores": 0})
    one = {role: value for role, value in alone.limits.items() if math.isfinite(value)}
    if not one:
        return {}
    most = max(one.values())
    return {role: most / value for role, value in one.items()}
