"""`switchkd plan`: memory of each process, bytes on the wire, and each role's share of the machines.

In: a checked config. Out: a `Plan`, printed as tables or as JSON. No weights are read. Speed is not estimated: it
depends on how many drafted tokens are rejected (`from_run.py` reads what a run measured). Only a dtype that is slow on
this machine's CPU is warned of.

Bytes on the wire, with D = the teacher's hidden width, d = bytes of its dtype, V = shared vocabulary: the teacher sends
one row for every drafted token, D x d bytes (`hidden_states`), 4 V (`logits`) or 8 k + 8 (`top_logprobs`). A rollout
is sent twice, worker to replay and replay to learner, with one row a token. Per step the weights are sent once to every
worker, and the gradients of T trainable parameters among G learner ranks, 2 (G - 1) / G x 4 T each.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from switchkd.config import resources
from switchkd.config.errors import ConfigError
from switchkd.config.schema import Config, StageConfig
from switchkd.controller.dispatcher import PREFETCH
from switchkd.controller.memory import GIB, Parts, memory
from switchkd.controller.preflight import InFlight, in_flight
from switchkd.engines.cpu_dtype import slow_bfloat16
from switchkd.engines.models.shape import BYTES, Shape, object_store_bytes, shapes
from switchkd.tools.offline import stage_index

RECORD_BYTES = 21
"""One token of a rollout without its row: id, source, version, statistic, threshold, uncertainty."""
ROLES = {"teacher": "teacher", "rollout": "rollout worker", "learner": "learner rank"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Wire:
    """Bytes sent between processes."""

    teacher_row: float  # teacher to worker, for each drafted token
    rollout_token: float  # worker to replay, and again replay to learner
    weights_per_step: float  # to all workers
    gradients_per_step: float  # among all ranks
    lm_head_at_start: float  # the teacher's output matrix, to every worker and rank


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """Processes of a role, and the resources of each."""

    num_processes: int
    num_cpus: float
    num_gpus: float
    threads: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    stage: str
    shapes: dict[str, Shape]
    shares: dict[str, Share]
    rows_per_worker: int  # completions that a worker generates at the same time
    in_flight: InFlight | None  # None where the stage generates no rollouts
    memory: dict[str, Parts]  # bytes of one process
    wire: Wire
    replay_rollouts: int  # at most
    replay_bytes: float  # if all have the stage's full length
    object_store_bytes: int
    warning: str  # of a dtype that is slow on this machine, or empty

    def to_json(self) -> dict[str, Any]:
        totals = {role: {**parts, "total": sum(parts.values())} for role, parts in self.memory.items()}
        return {**asdict(self), "memory": totals}


def make_plan(config: Config, stage_name: str | None = None) -> Plan:
    """Plan a stage, by default the last that generates rollouts. Raises ConfigError."""
    if config.is_fake:
        raise ConfigError("student.backend=fake: a plan is about models, and this config has none; plan with real ones")
    stage = config.train.stages[stage_index(config, stage_name)]
    num_processes = resources.counts(config)
    if config.needs_teacher and "teacher" not in num_processes:
        raise ConfigError(
            "a plan counts the run's own only teacher; this config has several, or one that is served elsewhere: plan "
            "with teachers={} teacher.attach= and the teacher in question as teacher.path"
        )
    sizes = shapes(config)
    bytes_on_wire = wire(config, stage, sizes, num_processes)
    num_rollouts = replay_rollouts(config, stage)
    return Plan(
        stage=stage.name,
        shapes=sizes,
        shares={role: _share(config, role, num) for role, num in num_processes.items()},
        rows_per_worker=min(config.rollout.batch_size, -(-stage.batch_size // num_processes.get("rollout", 1))),
        in_flight=in_flight(config, stage) if stage.mix.rollout and "rollout" in num_processes else None,
        memory=memory(config, sizes),
        wire=bytes_on_wire,
        replay_rollouts=num_rollouts,
        replay_bytes=num_rollouts * stage.max_new_tokens * bytes_on_wire.rollout_token,
        object_store_bytes=object_store_bytes(config, sizes["student"].params),
        warning=slow_bfloat16(config),
    )


def _share(config: Config, role: str, num_processes: int) -> Share:
    each = resources.of_role(config, role)
    return Share(
        num_processes=num_processes, num_cpus=each.num_cpus or 0.0, num_gpus=each.num_gpus, threads=each.threads or 1
    )


def wire(config: Config, stage: StageConfig, sizes: dict[str, Shape], num_processes: dict[str, int]) -> Wire:
    student = sizes["student"]
    teacher = sizes["teacher"] if stage.needs_teacher else None
    row = row_bytes(config, teacher) if teacher else 0.0
    num_workers, num_ranks = num_processes.get("rollout", 0), num_processes["learner"]
    head_params = teacher.head_params if teacher and config.teacher.output == "hidden_states" else 0
    return Wire(
        teacher_row=row,
        rollout_token=row + RECORD_BYTES,
        weights_per_step=float(BYTES[config.student.dtype] * student.params * num_workers),
        gradients_per_step=2.0 * (num_ranks - 1) * 4 * (student.trainable or student.params),
        lm_head_at_start=4.0 * head_params * (num_workers + num_ranks),
    )


def row_bytes(config: Config, teacher: Shape) -> float:
    match config.teacher.output:
        case "hidden_states":
            return float(BYTES[config.teacher.dtype] * teacher.head_width)
        case "logits":
            return 4.0 * teacher.vocab
        case _:
            return 8.0 * config.teacher.num_top_logprobs + 8


def replay_rollouts(config: Config, stage: StageConfig) -> int:
    """Return the most rollouts in the replay's memory: admitted, of the last trained step, and kept to draw again."""
    ahead = max(config.replay.max_staleness, PREFETCH if stage.mix.dataset + stage.mix.teacher else 0)
    untrained = min(config.replay.capacity, (1 + ahead) * stage.batch_size)
    return untrained + stage.batch_size + (config.replay.capacity if config.replay.policy == "adaptive" else 0)


def show(plan: Plan, as_json: bool) -> None:
    """Print one JSON object, or the tables."""
    if as_json:
        print(json.dumps(plan.to_json()))
        return
    from rich.console import Console

    console = Console()
    console.print(_shares_table(plan))
    console.print(f"In stage {plan.stage} a rollout worker generates {plan.rows_per_worker} completions at a time.")
    if plan.in_flight is not None:
        console.print(f"{str(plan.in_flight).capitalize()}.", highlight=False, markup=False, soft_wrap=True)
    console.print()
    console.print(_memory_table(plan))
    console.print(_wire_table(plan))
    if plan.warning:
        console.print(f"warning: {plan.warning}", highlight=False, markup=False, soft_wrap=True)


def _shares_table(plan: Plan) -> Any:
    table = _table("What each process gets", "role", "processes", "CPUs", "GPUs", "threads")
    for role, share in plan.shares.items():
        numbers = (share.num_processes, share.num_cpus, share.num_gpus, share.threads)
        table.add_row(ROLES[role], *(f"{number:g}" for number in numbers))
    return table


def _memory_table(plan: Plan) -> Any:
    table = _table("Memory of one process", "role", "each")
    table.add_column("of that")
    for role, parts in plan.memory.items():
        listed = ", ".join(f"{name} {_mem(size)}" for name, size in parts.items())
        table.add_row(ROLES[role], _mem(sum(parts.values())), listed)
    table.add_row("replay", _mem(plan.replay_bytes), f"at most {plan.replay_rollouts} rollouts, all of full length")
    content = "two versions of the weights, and rollouts on their way"
    table.add_row("object store", _mem(plan.object_store_bytes), content)
    return table


def _wire_table(plan: Plan) -> Any:
    table = _table("Bytes on the wire", "what", "size")
    table.add_row("teacher to worker", f"{_size(plan.wire.teacher_row)} a drafted token")
    table.add_row("rollouts", f"2 x {_size(plan.wire.rollout_token)} a token")
    table.add_row("weights", f"{_size(plan.wire.weights_per_step)} a step")
    table.add_row("gradients", f"{_size(plan.wire.gradients_per_step)} a step")
    table.add_row("teacher's output matrix", f"{_size(plan.wire.lm_head_at_start)} at the start")
    return table


def _table(title: str, first: str, *numbers: str) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _mem(size: float) -> str:
    return f"{size / GIB:.3g} GiB" if size >= GIB / 10 else f"{size / 2**20:.3g} MiB"


def _size(size: float) -> str:
    for unit, one in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if size >= one:
            return f"{size / one:.3g} {unit}"
    return f"{size:.0f} B"
