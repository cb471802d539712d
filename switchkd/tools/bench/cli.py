"""The benches: `switchkd bench switching|overhead|trainer|learner|weights|scale|overlap|simulate|soak|quality`.

In: a command line. Out: one table on stdout, and as JSON with --json. A missing device, model or peer is a ConfigError
of one line (exit code 2). Imports nothing heavy until a command runs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from switchkd.config.errors import ConfigError

if TYPE_CHECKING:
    from switchkd.tools.bench.table import Options, Table

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)

Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the table as JSON.")]
Smoke = Annotated[
    bool, typer.Option("--smoke", help="Smallest sizes, to check that it runs: the numbers mean nothing.")
]
NumRepeats = Annotated[int | None, typer.Option("--repeats", min=1, help="Measured runs per side.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="float32 or bfloat16.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads of every side. Default: all cores.")]
Teacher = Annotated[str, typer.Option(help="Model folder, hub name, or `demo`.")]
Student = Annotated[str, typer.Option(help="Model folder or hub name; a number of layers cuts it out of the teacher.")]
StudentMs = Annotated[float, typer.Option(min=0, help="Sleep of one student call.")]
TeacherMs = Annotated[float, typer.Option(min=0, help="Sleep of one teacher call.")]


@app.callback()
def _root() -> None:
    """Measure switchkd, and compare it with others, on this machine."""


@app.command()
def switching(
    smoke: Smoke = False,
    repeats: NumRepeats = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    threads: Threads = None,
    teacher: Teacher = "demo",
    student: Student = "12",
    rule: Annotated[list[str] | None, typer.Option(help="switch, adaswitch or skd; may be repeated.")] = None,
    prompts: Annotated[int | None, typer.Option(min=1, help="Default: 24; with more, batches run empty less.")] = None,
    json: Json = None,
) -> None:
    """Tokens per second of each rule against no draft, a naive loop, on-policy sampling, and the bound."""
    options = _options(smoke, repeats, 3, json, device, dtype, threads)
    # the sides take turns in this one process, so that a thread that spins while it waits delays no other
    os.environ.setdefault("OMP_WAIT_POLICY", "ACTIVE")
    from switchkd.tools.bench.switching import run

    _finish(run(options, teacher, student, rule or (), prompts), json)


@app.command()
def overhead(
    smoke: Smoke = False,
    repeats: NumRepeats = None,
    threads: Threads = 1,
    rule: Annotated[
        list[str] | None, typer.Option(help="switch, adaswitch, skd, random or on-policy; may be repeated.")
    ] = None,
    json: Json = None,
) -> None:
    """Host time, operations, bytes and waits of generation, with engines that cost nothing."""
    options = _options(smoke, repeats, 3, json, threads=threads)
    from switchkd.tools.bench.overhead import RULES, run

    if unknown := set(rule or ()) - set(RULES):
        raise ConfigError(f"--rule {min(unknown)}: choose {', '.join(RULES)}")
    _finish(run(options, rule or ()), json)


@app.command()
def trainer(
    smoke: Smoke = False,
    repeats: NumRepeats = None,
    device: Device = "cpu",
    dtype: Annotated[
        str, typer.Option(help="float32 or bfloat16 for all sides; best: each side's faster one.")
    ] = "best",
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
    options = _options(smoke, repeats, 5, json, device, dtype, threads, dtypes=("float32", "bfloat16", "best"))
    from switchkd.tools.bench.trainer import run

    _finish(run(options, teacher, student, batch=batch, new_tokens=new_tokens, loss=loss, on_ray=ray), json)


@app.command()
def learner(
    smoke: Smoke = False,
    repeats: NumRepeats = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    threads: Threads = None,
    json: Json = None,
) -> None:
    """Step time and peak memory of the loss, ours, naive and TRL's, for growing completions and vocabularies."""
    options = _options(smoke, repeats, 3, json, device, dtype, threads)
    from switchkd.tools.bench.loss_memory import run

    _finish(run(options), json)


@app.command()
def weights(
    smoke: Smoke = False,
    repeats: NumRepeats = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    threads: Threads = None,
    teacher: Teacher = "demo",
    student: Student = "12",
    json: Json = None,
) -> None:
    """Time a weight version from the learner to a rollout worker, in one process and through Ray."""
    options = _options(smoke, repeats, 7, json, device, dtype, threads)
    from switchkd.tools.bench.weight_sync import run

    _finish(run(options, teacher, student), json)


@app.command()
def scale(
    smoke: Smoke = False,
    repeats: NumRepeats = None,
    student_ms: StudentMs = 10.0,
    teacher_ms: TeacherMs = 20.0,
    json: Json = None,
) -> None:
    """Throughput by number of rollout workers and teachers: the real actors, with models that sleep."""
    options = _options(smoke, repeats, 3, json)
    from switchkd.tools.bench.scaling import run

    _finish(run(options, student_s=student_ms / 1e3, teacher_s=teacher_ms / 1e3), json)


@app.command()
def overlap(
    smoke: Smoke = False,
    repeats: NumRepeats = None,
    student_ms: StudentMs = 10.0,
    teacher_ms: TeacherMs = 20.0,
    learner_ms: Annotated[float, typer.Option(min=0, help="Sleep of one optimizer step.")] = 600.0,
    json: Json = None,
) -> None:
    """Steps per second of the whole loop by replay.max_staleness: the real program, with models that sleep."""
    options = _options(smoke, repeats, 3, json)
    from switchkd.tools.bench.async_overlap import run

    seconds = {"student_s": student_ms / 1e3, "teacher_s": teacher_ms / 1e3, "learner_s": learner_ms / 1e3}
    _finish(run(options, **seconds), json)


@app.command()
def simulate(
    smoke: Smoke = False,
    workers: Annotated[int, typer.Option(min=1, help="Rollout workers.")] = 64,
    teachers: Annotated[int, typer.Option(min=1, help="Teacher replicas.")] = 16,
    ranks: Annotated[int, typer.Option(min=1, help="Learner ranks.")] = 8,
    slots: Annotated[int, typer.Option(min=1, help="Completions that a worker generates at a time.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Measured optimizer steps.")] = 4,
    times: Annotated[int, typer.Option(min=1, help="Also one step with so many times as many processes.")] = 1,
    student_ms: Annotated[float, typer.Option(min=0, help="A student pass.")] = 2.0,
    teacher_ms: Annotated[float, typer.Option(min=0, help="A teacher call, or a token that it writes.")] = 10.0,
    teacher_token_us: Annotated[float, typer.Option(min=0, help="Each token that a teacher reads.")] = 25.0,
    learner_ms: Annotated[float, typer.Option(min=0, help="An optimizer step.")] = 50.0,
    learner_token_us: Annotated[float, typer.Option(min=0, help="Each token of a rank.")] = 30.0,
    weights_ms: Annotated[float, typer.Option(min=0, help="Publishing a version, and loading it.")] = 300.0,
    row_bytes: Annotated[int, typer.Option(min=1, help="Teacher output of a token.")] = 7168,
    median_len: Annotated[float, typer.Option(min=1, help="Median completion length, tokens.")] = 96.0,
    sigma: Annotated[float, typer.Option(min=0, help="Deviation of the log-normal length's logarithm.")] = 0.8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Limit of a completion.")] = 512,
    teacher_frac: Annotated[float, typer.Option(min=0, max=1, help="Tokens that the teacher writes.")] = 0.3,
    reject_frac: Annotated[float, typer.Option(min=0, max=1, help="Positions where the draws differ.")] = 0.1,
    json: Json = None,
) -> None:
    """Occupancy, staleness, waits and what is full first with many processes: the real control code in virtual time."""
    options = _options(smoke, 1, 1, json)
    from switchkd.tools.bench.simulate import Size, run
    from switchkd.tools.bench.simulated_teachers import Costs

    size = Size(
        workers=workers, teachers=teachers, ranks=ranks, slots=slots, max_new_tokens=max_new_tokens,
        teacher_frac=teacher_frac,
    )  # fmt: skip
    costs = Costs(
        student_s=student_ms / 1e3, teacher_s=teacher_ms / 1e3, teacher_token_s=teacher_token_us / 1e6,
        learner_s=learner_ms / 1e3, learner_token_s=learner_token_us / 1e6, weights_s=weights_ms / 1e3,
        row_bytes=row_bytes, median_len=median_len, sigma=sigma, reject_frac=reject_frac,
    )  # fmt: skip
    _finish(run(options, size, costs, num_steps=steps, times=times), json)


@app.command()
def soak(
    steps: Annotated[int, typer.Option(min=2, help="Optimizer steps.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the models, and of what is killed when.")] = 0,
    every: Annotated[int, typer.Option(min=2, help="Steps between two killed processes, on average.")] = 20,
    json: Json = None,
) -> None:
    """A long run whose processes are killed at random: rollouts lost, seconds to recover, memory."""
    options = _options(False, 1, 1, json)
    from switchkd.tools.bench.soak import run

    _finish(run(options, steps=steps, seed=seed, every=every), json)


@app.command()
def quality(
    study: Annotated[Path, typer.Option(metavar="FILE", help="Such as configs/study/arithmetic.yaml.")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The study's folder; the same command goes on in it.")
    ] = None,
    methods: Annotated[list[str] | None, typer.Option(help="Run this method only; may be repeated.")] = None,
    cells: Annotated[list[str] | None, typer.Option(help="Run this cell (NAME-seed1) only; may be repeated.")] = None,
    only_table: Annotated[
        bool,
        typer.Option("--only-table", help="Run nothing, make table and plot; without --out of FILE's shipped cells."),
    ] = False,
) -> None:
    """Compare methods on equal terms: a study's grid of methods and seeds, its table and its plot."""
    from switchkd.tools.bench.study.run import run

    if not run(study, out, methods=methods or (), cell_names=cells or (), only_table=only_table):
        raise typer.Exit(1)


def _options(
    smoke: bool,
    repeats: int | None,
    default_repeats: int,
    json: Path | None,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int | None = None,
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
) -> Options:
    """Check the options before a model is loaded. Raises ConfigError."""
    from switchkd.tools.bench.table import Options, check_device

    if dtype not in dtypes:
        raise ConfigError(f"--dtype {dtype}: choose {' or '.join(dtypes)}")
    if json is not None and not json.resolve().parent.is_dir():
        raise ConfigError(f"--json {json}: the folder {json.resolve().parent} does not exist; make it first")
    check_device(device)
    repeats = repeats or (1 if smoke else default_repeats)
    return Options(smoke=smoke, repeats=repeats, device=device, dtype=dtype, threads=threads or os.cpu_count() or 1)


def _finish(table: Table, json: Path | None) -> None:
    table.show()
    if json is not None:
        table.write(json)
