"""`switchkd plan`: memory of each process, bytes on the wire, tokens per second, and what one more process should be.

In: a checked config, and costs of calls where somebody knows them. Out: a `Plan`, plain numbers with their units in
their names, and a way to print it. No weights are read, so a model of any size is planned in seconds.

Bytes on the wire, per completion token kept: the teacher sends `rows_per_token` rows (blocks that break are sent in
vain), the rollout travels twice with one row a token (worker to replay, replay to learner). A row has D x d bytes
(`hidden`), 4 V (`full`) or 8 k + 8 (`topk`). Per step: the weights once to every worker, and among G learner ranks the
gradients, 2 (G - 1) / G x 4 T each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from switchkd.config import resources
from switchkd.config.errors import ConfigError
from switchkd.config.schema import Config, StageConfig
from switchkd.engines.models.shape import BYTES, Shape, shapes
from switchkd.tools.plan.costs import Costs
from switchkd.tools.plan.memory import GIB, Parts, memory, total
from switchkd.tools.plan.speed import Speed, bottleneck, kept, one_more, ratio, speed

RECORD_BYTES = 21
"""Of a rollout's token beside its row: id, source, version, statistic, threshold, uncertainty."""
ROLES = {"teacher": "teacher", "rollout": "rollout worker", "learner": "learner rank", "cores": "cores"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Wire:
    """Bytes that travel between processes."""

    row_bytes: float
    rows_per_token: float
    teacher_to_worker_per_token: float
    rollout_per_token: float  # worker to replay, and the same again from there to the learner
    weights_per_step: float  # to all workers
    gradients_per_step: float  # among all ranks
    head_at_start: float  # the teacher's output matrix, to every worker and rank
    per_s: dict[str, float]  # of the four, where the speed is known


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    stage: str
    numbers: dict[str, int]  # processes of each role
    shapes: dict[str, Shape]
    memory: dict[str, Parts]  # bytes of one process
    wire: Wire
    costs: Costs | None
    speed: Speed | None
    bottleneck: str
    gains: dict[str, float]  # of one more process
    ratio: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Bytes and seconds."""
        told = asdict(self)
        told["memory"] = {role: {**parts, "total": total(parts)} for role, parts in self.memory.items()}
        told["costs"] = None if self.costs is None else self.costs.model_dump(exclude_none=True)
        return told


def make_plan(config: Config, stage: StageConfig, costs: Costs | None = None) -> Plan:
    """Raises ConfigError for models whose config cannot be read."""
    if config.needs_teacher and "teacher" not in resources.counts(config):
        raise ConfigError(
            "a plan counts the run's own only teacher; this config has several, or one that is served elsewhere: plan "
            "with teachers={} teacher.attach= and the teacher in question as teacher.path"
        )
    found, numbers = shapes(config), resources.counts(config)
    now = None
    gains: dict[str, float] = {}
    balance: dict[str, float] = {}
    worst = ""
    if costs is not None:
        how: dict[str, Any] = {"overlap": overlaps(config), "cores": shared_cores(config)}
        now = speed(config, stage, costs, numbers, **how)
        gains = one_more(config, stage, costs, numbers, **how)
        worst = bottleneck(now, gains, how["cores"])
        balance = ratio(config, stage, costs, numbers, **how)
    return Plan(
        stage=stage.name, numbers=numbers, shapes=found, memory=memory(config, found),
        wire=wire(config, stage, found, numbers, costs, now), costs=costs, speed=now, bottleneck=worst, gains=gains,
        ratio=balance,
    )  # fmt: skip


def overlaps(config: Config) -> bool:
    from switchkd.rollout.build import _overlaps

    return _overlaps(config)


def shared_cores(config: Config) -> int:
    """Of this machine, where all roles compute on them; else 0."""
    import os

    roles = resources.counts(config)
    on_gpus = any(resources.of_role(config, role).num_gpus for role in roles)
    return 0 if on_gpus or not resources.is_private(config) else os.cpu_count() or 1


# --- bytes on the wire -----------------------------------------------------------------------------------------------


def row_bytes(config: Config, shape: Shape) -> float:
    section = config.teacher
    match section.output:
        case "hidden_states":
            return float(BYTES[section.dtype] * shape.head_width)
        case "logits":
            return 4.0 * shape.vocab
        case _:
            return 8.0 * section.num_top_logprobs + 8


def wire(
    config: Config, stage: StageConfig, found: Mapping[str, Shape], numbers: Mapping[str, int], costs: Costs | None,
    now: Speed | None,
) -> Wire:  # fmt: skip
    teacher, student = found.get("teacher") if stage.needs_teacher else None, found["student"]
    row = row_bytes(config, teacher) if teacher else 0.0
    rows = _rows_per_token(config, stage, costs, now) if teacher else 0.0
    ranks, trained = numbers["learner"], student.trainable or student.params
    processes = numbers["rollout"] + ranks
    parts = {
        "teacher to worker": row * rows,
        "rollouts": row + RECORD_BYTES,
        "weights": float(BYTES[config.student.dtype] * student.params * numbers["rollout"]),
        "gradients": 2.0 * (ranks - 1) * 4 * trained,
    }
    per_s = {}
    if now is not None:
        tokens = now.tokens_per_s
        per_s = {name: parts[name] * tokens * (2 if name == "rollouts" else 1) for name in list(parts)[:2]}
        per_s |= {name: parts[name] / now.step_s for name in list(parts)[2:]}
    return Wire(
        row_bytes=row,
        rows_per_token=rows,
        teacher_to_worker_per_token=parts["teacher to worker"],
        rollout_per_token=parts["rollouts"],
        weights_per_step=parts["weights"],
        gradients_per_step=parts["gradients"],
        head_at_start=4.0 * teacher.head_params * processes if teacher and config.teacher.output != "logits" else 0.0,
        per_s=per_s,
    )


def _rows_per_token(config: Config, stage: StageConfig, costs: Costs | None, now: Speed | None) -> float:
    """What was measured, else the formula: of rollouts those of the way taken, one a token of all others."""
    mix = stage.mix
    written = (mix.rollout + mix.teacher) / (mix.rollout + mix.dataset + mix.teacher)
    if costs is not None and costs.rows_per_token is not None:
        return costs.rows_per_token * written + 1 - written
    if now is not None:
        return now.way.rows_per_token * written + 1 - written
    if config.rollout.drafter == "none" or stage.rule.type in ("student", "teacher"):
        return 1.0
    block = min(config.rollout.max_draft_tokens, stage.max_new_tokens)
    rate = Costs.model_fields["rejection_rate"].default
    return (block + 1 - (1 - rate) ** block) / kept(block, rate) * written + 1 - written


# --- for people ------------------------------------------------------------------------------------------------------


def show(plan: Plan) -> None:
    """Tables and sentences on the terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(_memory_table(plan, Table))
    console.print(_wire_table(plan, Table))
    if plan.speed is not None:
        console.print(_speed_table(plan, Table))
    for line in sentences(plan):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _memory_table(plan: Plan, table: Any) -> Any:
    shown = table(title="Memory of one process", title_justify="left")
    shown.add_column("role")
    shown.add_column("processes", justify="right")
    shown.add_column("each", justify="right")
    shown.add_column("of that")
    for role, parts in plan.memory.items():
        told = ", ".join(f"{name} {_mem(value)}" for name, value in parts.items())
        shown.add_row(ROLES[role], str(plan.numbers[role]), _mem(total(parts)), told)
    return shown


def _wire_table(plan: Plan, table: Any) -> Any:
    wire = plan.wire
    shown = table(title="Bytes on the wire", title_justify="left")
    for name in ("what", "size", "MB/s"):
        shown.add_column(name, justify="left" if name == "what" else "right")
    each = f"{_size(wire.row_bytes)} a row x {wire.rows_per_token:.2f} rows a token"
    rows = (
        ("teacher to worker", each),
        ("rollouts", f"2 x {_size(wire.rollout_per_token)} a token"),
        ("weights", f"{_size(wire.weights_per_step)} a step"),
        ("gradients", f"{_size(wire.gradients_per_step)} a step"),
    )
    for name, size in rows:
        per_s = f"{wire.per_s[name] / 1e6:.3g}" if name in wire.per_s else "-"
        shown.add_row(name, size, per_s)
    shown.add_row("teacher's output matrix", f"{_size(wire.head_at_start)} at the start", "-")
    return shown


def _speed_table(plan: Plan, table: Any) -> Any:
    assert plan.speed is not None
    shown = table(title=f"Speed of stage {plan.stage}", title_justify="left")
    for name in ("role", "processes", "tokens/s they could do", "busy", "one more", "balanced"):
        shown.add_column(name, justify="left" if name == "role" else "right")
    for role, limit in plan.speed.limits.items():
        num = str(plan.numbers[role]) if role in plan.numbers else "-"
        busy = f"{plan.speed.busy[role]:.0%}" if role in plan.speed.busy else "-"
        gain = f"{plan.gains[role]:+.0%}" if role in plan.gains else "-"
        part = f"{plan.ratio[role]:.1f}" if role in plan.ratio else "-"
        shown.add_row(ROLES[role], num, f"{limit:,.4g}", busy, gain, part)
    return shown


def sentences(plan: Plan) -> list[str]:
    """What follows from it."""
    if plan.speed is None or plan.costs is None:
        return ["Speed: not known without costs; add --calibrate, --costs FILE, or --student-ms and --teacher-ms."]
    now = plan.speed
    told = [
        f"Expected: {now.tokens_per_s:,.4g} tokens/s, a step in {now.step_s:.3g} s ({now.write_s:.3g} s writing, "
        f"{now.learn_s:.3g} s learning), {_way(plan)}.",
        _advice(plan),
    ]
    if plan.costs.measured_tokens_per_s:
        told.append(f"One worker with a teacher of its own was seen to write {plan.costs.measured_tokens_per_s:.4g}.")
    return told


def _way(plan: Plan) -> str:
    assert plan.speed is not None
    way = plan.speed.way
    if way.drafter in ("none", "alone"):
        return {"none": "both models one token at a time", "alone": "one model writing alone"}[way.drafter]
    return f"the {way.drafter} leading with blocks of {way.block}, of which {way.kept:.2f} tokens stand"


def _advice(plan: Plan) -> str:
    assert plan.speed is not None
    held = f"Bottleneck: {ROLES[plan.bottleneck]}."
    best = max(plan.gains, key=lambda role: plan.gains[role])
    if plan.bottleneck == "cores":
        return f"{held} All roles share them: one more process gains nothing, one more core or a GPU does."
    if plan.bottleneck not in plan.gains or plan.gains[best] <= 0:
        return f"{held} One more process of any single role gains nothing: add one of each."
    what = "process" if "cores" in plan.speed.limits else "GPU"
    return f"{held} One more {what} should be a {ROLES[best]}: {plan.gains[best]:+.0%} tokens/s."


def _mem(value: float) -> str:
    return f"{value / GIB:.3g} GiB" if value >= GIB / 10 else f"{value / 2**20:.3g} MiB"


def _size(value: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"
