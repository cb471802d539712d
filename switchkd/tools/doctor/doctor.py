"""`switchkd doctor`: everything that a run needs is looked at, one line each, every failure with its remedy.

In: a checked config. Out: findings, ok, warn or fail. Cheap checks come first, what loads models last; one that fails
does not stop the others, only those that need what it looked for. Nothing is written into `run.dir` but a probe that is
removed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout

from switchkd.config import resources
from switchkd.config.schema import Config
from switchkd.controller.preflight import check, prepare
from switchkd.engines.models.demo import NAME, cache_dir
from switchkd.engines.models.resolve import reads_teacher
from switchkd.tools.doctor import machine
from switchkd.tools.doctor.check import CheckResult, fail, ok, run_check, warn

OnResult = Callable[[CheckResult], None]


def run_checks(config: Config, *, quick: bool = False, tell: OnResult | None = None) -> list[CheckResult]:
    """All findings; `tell` hears each as soon as it is made. `quick` leaves out what loads models."""
    found: list[CheckResult] = []
    out = sys.stdout

    def look(name: str, act: Callable[[], Iterable[CheckResult]]) -> bool:
        """False where it failed."""
        with redirect_stdout(sys.stderr):  # libraries say things
            new = run_check(name, act)
        found.extend(new)
        for finding in new if tell else ():
            with redirect_stdout(out):
                tell(finding)  # type: ignore[misc]
        return all(finding.status != "fail" for finding in new)

    look("versions", machine.versions)
    whole = look("config", lambda: _config(config))
    fits = look("processors", lambda: machine.processors(config))
    reached = look("ports", lambda: machine.ports(config))
    look("tokens", lambda: machine.tokens(config))
    look("secrets", lambda: machine.secrets(config))
    writable = look("run.dir", lambda: machine.run_dir(config))
    if not resources.is_private(config):
        if reached and writable:
            look("cluster", lambda: _cluster(config))
        else:
            look("cluster", lambda: [_left_out("cluster", "ports and run.dir")])
    if not whole:
        look("models", lambda: [_left_out("models", "config")])
        return found
    _look_at_models(config, quick, fits, look)
    return found


def _look_at_models(
    config: Config, quick: bool, fits: bool, look: Callable[[str, Callable[[], Iterable[CheckResult]]], bool]
) -> None:
    if quick and (waiting := _waiting(config)):
        look("models", lambda: [waiting])
        return
    look("disk", lambda: _sizes(config))
    if quick:
        config = _uncut(config)
    holder = []

    def tokenizers_and_data() -> Iterator[CheckResult]:
        from switchkd.tools.doctor import models

        ready = prepare(config)
        holder.append(ready)
        yield from models.tokenizers(ready.config, len(ready.tokenizer))
        yield from models.data(ready)

    if not look("models", tokenizers_and_data):
        return
    from switchkd.tools.doctor import models

    ready = holder[0]
    look("chat templates", lambda: models.chat_templates(ready.config))
    if quick:
        return
    if not fits:
        look("dry pass", lambda: [_left_out("dry pass", "processors")])
        return
    stages = config.train.stages
    index = max((i for i, stage in enumerate(stages) if stage.mix.rollout > 0), default=len(stages) - 1)
    look("dry pass", lambda: models.with_weights(ready, index))


def _left_out(name: str, why: str) -> CheckResult:
    return warn(name, "not looked at", f"mend {why} first")


def _config(config: Config) -> Iterator[CheckResult]:
    """Rules, losses, folders and files, as `train` checks them first."""
    check(config)
    stages = ", ".join(f"{stage.name} ({stage.steps} steps)" for stage in config.train.stages)
    yield ok("config", f"rules, losses and files are there; stages {stages}")


def _sizes(config: Config) -> Iterator[CheckResult]:
    from switchkd.engines.models.shape import shapes

    found = shapes(config)
    yield from machine.disk(config, found)
    yield from machine.room(config, found)
    yield from machine.object_store(config, found)


def _waiting(config: Config) -> CheckResult | None:
    """A model that would have to be fetched first."""
    used = [config.student.path] if config.student.prune is None else []
    used += [config.teacher.path] if reads_teacher(config) else []
    if "demo" in used and not (cache_dir() / NAME).is_dir():
        return warn("models", f"{NAME} is not fetched yet: models are not looked at", "switchkd fetch-demo")
    return None


def _uncut(config: Config) -> Config:
    """Cutting a student loads its teacher: looked at instead is the teacher's folder, whose tokenizer it will have."""
    if config.student.prune is None:
        return config
    student = config.student.model_copy(update={"path": config.teacher.path, "prune": None})
    return config.model_copy(update={"student": student})


def _cluster(config: Config) -> Iterator[CheckResult]:
    """Joined, large enough, the same software everywhere, and every node sees the run's folder."""
    from switchkd.actors import node_check

    with machine.probe(config) as (file, nonce):
        told, looks = node_check.look(config, str(file), nonce)
    yield ok("cluster", told)
    for each in looks:
        if each.error:
            yield fail("cluster", f"node {each.name}: {each.error}", "install the same switchkd there as here")
        elif each.versions != node_check.versions():
            text = f"node {each.name} has {each.versions}, here is {node_check.versions()}"
            yield warn("cluster", text, "install the same there")
    blind = [each.name for each in looks if not each.error and not each.sees]
    if blind:
        yield fail(
            "shared run.dir",
            f"{len(blind)} of {len(looks)} nodes do not see {file.parent}: {', '.join(blind[:5])}",
            "mount the same storage at the same path on every node, or give another run.dir",
        )
    elif looks:
        yield ok("shared run.dir", f"all {len(looks)} nodes see {file.parent}")


def show(finding: CheckResult) -> None:
    """One line on the terminal."""
    from rich.console import Console
    from rich.text import Text

    colour = {"ok": "green", "warn": "yellow", "fail": "red"}[finding.status]
    text = Text(finding.line)
    text.stylize(colour, 0, 5)
    Console().print(text, highlight=False, soft_wrap=True)
