"""The door of the benches: `switchkd bench switching|trainer|learner|weights|scale|overlap|soak|quality`.

In: a command line. Out: one table on stdout, and as JSON where asked for. A bench that lacks the device, a model or a
peer says so in one line (ConfigError, exit code 2). Imports nothing heavy until a command runs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from switchkd.tools.bench.table import Table

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)

Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the table as JSON.")]
Smoke = Annotated[bool, typer.Option("--smoke", help="As small as it goes: does it work? The numbers mean nothing.")]
Repeats = Annotated[int | None, typer.Option(min=1, help="Measured runs per side.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="float32 or bfloat16.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads of every side. Default: all cores.")]
Teacher = Annotated[str, typer.Option(help="Model folder, hub name, or `demo`.")]
Student = Annotated[str, typer.Option(help="Model folder or hub name; a number of layers cuts it out of the teacher.")]


@app.callback()
def _root() -> None:
    """Measure switchkd, and hold it against others, on this machine."""


@app.command()
def switching(
    smoke: Smoke = False,
    repeats: Repeats = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    threads: Threads = None,
    teacher: Teacher = "demo",
    student: Student = "12",
    rule: Annotated[list[str] | None, typer.Option(help="switch, adaswitch or skd; may be repeated.")] = None,
    prompts: Annotated[
        int | None, typer.Option(min=1, help="Prompts to write for (24): with more, batches run empty less.")
    ] = None,
    json: Json = None,
) -> None:
    """Tokens per second of each rule against lockstep, a plain loop, on-policy sampling, and the bound."""
    _check(device, dtype, json)
    # all sides take turns in this one process: a waiting thread holds nobody up
    os.environ.setdefault("OMP_WAIT_POLICY", "ACTIVE")
    import torch

    from switchkd.tools.bench.models import check_prompts, resolve
    from switchkd.tools.bench.switching import check_rules, run

    check_rules(rule or ())
    check_prompts(prompts or 1)
    pair = resolve(teacher, student)
    torch.set_num_threads(threads or os.cpu_count() or 1)
    table = run(
        smoke=smoke, repeats=_turns(repeats, smoke, 3), device=device, dtype=dtype,
        teacher=pair.teacher, student=pair.student, rules=rule or (), num_prompts=prompts,
    )  # fmt: skip
    _finish(table, json)


@app.command()
def trainer(
    smoke: Smoke = False,
    repeats: Repeats = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    threads: Threads = None,
    teacher: Teacher = "demo",
    student: Student = "12",
    batch: Annotated[int, typer.Option(min=1, help="Samples of one step.")] = 8,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each completion.")] = 64,
    loss: Annotated[str, typer.Option(help="forward_kl, reverse_kl or jsd.")] = "forward_kl",
    ray: Annotated[bool, typer.Option("--ray/--no-ray", help="Measure switchkd on a private Ray cluster too.")] = True,
    json: Json = None,
) -> None:
    """A whole on-policy step of switchkd and of TRL's DistillationTrainer: samples/s and peak memory."""
    _check(device, dtype, json)
    from switchkd.tools.bench.models import resolve
    from switchkd.tools.bench.trainer import run

    table = run(
        pair=resolve(teacher, student), smoke=smoke, repeats=_turns(repeats, smoke, 5), device=device, dtype=dtype,
        threads=threads, batch=batch, new_tokens=new_tokens, loss=loss, on_ray=ray,
    )  # fmt: skip
    _finish(table, json)


@app.command()
def learner(
    smoke: Smoke = False,
    repeats: Repeats = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    threads: Threads = None,
    json: Json = None,
) -> None:
    """Step time and peak memory of the loss, ours, naive and TRL's, for growing completions and vocabularies."""
    _check(device, dtype, json)
    from switchkd.tools.bench.loss_memory import run

    _finish(run(smoke=smoke, repeats=_turns(repeats, smoke, 3), device=device, dtype=dtype, threads=threads), json)


@app.command()
def weights(
    smoke: Smoke = False,
    repeats: Repeats = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    threads: Threads = None,
    teacher: Teacher = "demo",
    student: Student = "12",
    json: Json = None,
) -> None:
    """From the learner's weights to a rollout worker that writes with them, in one process and through Ray."""
    _check(device, dtype, json)
    from switchkd.tools.bench.models import resolve
    from switchkd.tools.bench.weight_sync import run

    pair = resolve(teacher, student)
    table = run(
        student=pair.student, smoke=smoke, repeats=_turns(repeats, smoke, 7), device=device, dtype=dtype,
        threads=threads,
    )  # fmt: skip
    _finish(table, json)


@app.command()
def scale(
    smoke: Smoke = False,
    repeats: Repeats = None,
    student_ms: Annotated[float, typer.Option(min=0, help="Sleep of one student call.")] = 10.0,
    teacher_ms: Annotated[float, typer.Option(min=0, help="Sleep of one teacher call.")] = 20.0,
    json: Json = None,
) -> None:
    """Throughput by number of rollout workers and teachers: the real actors, with models that sleep."""
    _check("cpu", "float32", json)
    from switchkd.tools.bench.scaling import run

    table = run(smoke=smoke, repeats=_turns(repeats, smoke, 3), student_s=student_ms / 1e3, teacher_s=teacher_ms / 1e3)
    _finish(table, json)


@app.command()
def overlap(
    smoke: Smoke = False,
    repeats: Repeats = None,
    student_ms: Annotated[float, typer.Option(min=0, help="Sleep of one student call.")] = 10.0,
    teacher_ms: Annotated[float, typer.Option(min=0, help="Sleep of one teacher call.")] = 20.0,
    learner_ms: Annotated[float, typer.Option(min=0, help="Sleep of one optimizer step.")] = 600.0,
    json: Json = None,
) -> None:
    """Steps per second of the whole loop by replay.max_staleness: the real program, with models that sleep."""
    _check("cpu", "float32", json)
    from switchkd.tools.bench.async_overlap import run

    table = run(
        smoke=smoke, repeats=_turns(repeats, smoke, 3), student_s=student_ms / 1e3, teacher_s=teacher_ms / 1e3,
        learner_s=learner_ms / 1e3,
    )  # fmt: skip
    _finish(table, json)


@app.command()
def soak(
    steps: Annotated[int, typer.Option(min=2, help="Optimizer steps.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the models, and of what dies when.")] = 0,
    every: Annotated[int, typer.Option(min=2, help="Steps between two killed processes, on average.")] = 20,
    json: Json = None,
) -> None:
    """A long run whose processes are killed at random: rollouts lost, seconds to recover, memory."""
    _check("cpu", "float32", json)
    from switchkd.tools.bench.soak import run

    _finish(run(steps=steps, seed=seed, every=every), json)


@app.command()
def quality(
    study: Annotated[Path, typer.Option(metavar="FILE", help="Such as configs/study/arithmetic.yaml.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The study's folder; the same command goes on in it.")],
    methods: Annotated[list[str] | None, typer.Option(help="Run this method only; may be repeated.")] = None,
    cells: Annotated[list[str] | None, typer.Option(help="Run this cell (NAME-seed1) only; may be repeated.")] = None,
    only_table: Annotated[
        bool, typer.Option("--only-table", help="Run nothing; table and plot of what is there.")
    ] = False,
) -> None:
    """Which method teaches better: a study's grid of methods and seeds on equal terms, its table and its plot."""
    from switchkd.tools.bench.study.grid import Failed, Stopped
    from switchkd.tools.bench.study.run import run

    try:
        table = run(
            study, out, methods=methods or (), wanted=cells or (), only_table=only_table,
            say=lambda text: print(text, flush=True),
        )  # fmt: skip
    except Stopped as stopped:
        print(f"stopped at {stopped}; the same command goes on", flush=True)
        raise typer.Exit(1) from None
    except Failed as failed:
        print(f"without a result: {failed}; the same command tries them again", flush=True)
        raise typer.Exit(1) from None
    print(table.markdown())


def _check(device: str, dtype: str, json: Path | None) -> None:
    """What can be refused before minutes are spent."""
    from switchkd.config.errors import ConfigError
    from switchkd.tools.bench.table import check_device

    if dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"--dtype {dtype}: choose float32 or bfloat16")
    if json is not None and not json.resolve().parent.is_dir():
        raise ConfigError(f"--json {json}: the folder {json.resolve().parent} does not exist; make it first")
    check_device(device)


def _turns(repeats: int | None, smoke: bool, usual: int) -> int:
    return repeats or (1 if smoke else usual)


def _finish(table: Table, json: Path | None) -> None:
    table.show()
    if json is not None:
        table.write(json)
