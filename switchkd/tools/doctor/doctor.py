"""`switchkd doctor`: check everything that a run needs, one line each, every failure with its remedy.

In: a checked config. Out: check results, the cheap checks first. A check that fails only stops those that depend on it.
Nothing is written into `run.dir` but a probe that is removed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict

from switchkd.config import resources
from switchkd.config.schema import Config
from switchkd.controller.memory_fit import in_one_process, memory_fit
from switchkd.controller.preflight import PreparedRun, check, prepare
from switchkd.engines.models.demo import NAME, cache_dir
from switchkd.engines.models.resolve import reads_teacher, without_pruning
from switchkd.tools.doctor import machine
from switchkd.tools.doctor.check import CheckResult, fail, ok, run_check, warn
from switchkd.tools.offline import stage_index


def run_checks(config: Config, *, quick: bool = False, force: bool = False) -> Iterator[CheckResult]:
    """Yield each result as soon as its check has ended. `quick` leaves out the checks that load models; what does not
    fit into this machine's memory is left out too, unless `force`."""
    yield from run_check("versions", machine.versions)
    config_passed = yield from run_check("config", lambda: _config(config))
    processors_passed = yield from run_check("processors", lambda: machine.processors(config))
    yield from run_check("dtype", lambda: machine.dtypes(config))
    ports_passed = yield from run_check("ports", lambda: machine.ports(config))
    yield from run_check("tokens", lambda: machine.tokens(config))
    yield from run_check("secrets", lambda: machine.secrets(config))
    run_dir_passed = yield from run_check("run.dir", lambda: machine.run_dir(config))
    if not resources.is_private(config):
        if ports_passed and run_dir_passed:
            yield from run_check("cluster", lambda: _cluster(config))
        else:
            yield _left_out("cluster", "ports and run.dir")
    if not config_passed:
        yield _left_out("models", "config")
    elif config.is_fake:
        yield from run_check("data", lambda: _data_for_fakes(config))
    elif quick and _is_demo_missing(config):
        yield warn("models", f"{NAME} is not fetched yet: models are not checked", "switchkd fetch-demo")
    else:
        yield from _check_models(config, quick, force, processors_passed)


def _check_models(config: Config, quick: bool, force: bool, processors_passed: bool) -> Iterator[CheckResult]:
    from switchkd.tools.doctor import models

    prepared: list[PreparedRun] = []
    too_large: list[CheckResult] = []

    def sizes() -> Iterator[CheckResult]:
        yield from _sizes(config, force)
        if not quick and not force and not (fit := memory_fit(in_one_process(config))).fits:
            too_large.append(warn("dry pass", f"not tried, it needs {fit.text}", "`doctor --force` tries it"))

    def tokenizers_and_data() -> Iterator[CheckResult]:
        # ranking the layers of a pruned student loads the teacher
        prepared.append(prepare(without_pruning(config) if quick or too_large else config))
        yield from models.tokenizers(prepared[0])
        yield from models.data(prepared[0])

    yield from run_check("disk", sizes)
    models_passed = yield from run_check("models", tokenizers_and_data)
    if not models_passed:
        return
    yield from run_check("chat templates", lambda: models.chat_templates(prepared[0].config))
    if quick:
        return
    if not processors_passed:
        yield _left_out("dry pass", "processors")
    elif too_large:
        yield from too_large
    else:
        yield from run_check("dry pass", lambda: models.with_weights(prepared[0], stage_index(config, None)))


def _data_for_fakes(config: Config) -> Iterator[CheckResult]:
    from switchkd.tools.doctor import models

    yield from models.data(prepare(config))


def _left_out(name: str, needed: str) -> CheckResult:
    return warn(name, "not checked", f"correct {needed} first")


def _config(config: Config) -> Iterator[CheckResult]:
    """Check rules, losses, folders and files as `train` does at its start."""
    check(config)
    stages = ", ".join(f"{stage.name} ({stage.steps} steps)" for stage in config.train.stages)
    yield ok("config", f"rules, losses and files are there; stages {stages}")


def _sizes(config: Config, force: bool) -> Iterator[CheckResult]:
    from switchkd.engines.models.shape import shapes

    sizes = shapes(config)
    yield from machine.disk(config, sizes)
    yield from machine.host_memory(config, force)
    yield from machine.object_store(config, sizes)


def _is_demo_missing(config: Config) -> bool:
    """Return whether the demo model is needed and is not in the cache."""
    paths = [config.student.path] if config.student.prune is None else []
    paths += [config.teacher.path] if reads_teacher(config) else []
    return "demo" in paths and not (cache_dir() / NAME).is_dir()


def _cluster(config: Config) -> Iterator[CheckResult]:
    """Check that Ray answers, is large enough and has the same software, and that every node sees the run's folder."""
    from switchkd.actors import node_check

    with machine.probe(config) as (file, nonce):
        text, nodes = node_check.look(config, str(file), nonce)
    yield ok("cluster", text)
    for node in nodes:
        if node.error:
            yield fail("cluster", f"node {node.name}: {node.error}", "install the same switchkd there as here")
        elif node.versions != node_check.versions():
            text = f"node {node.name} has {node.versions}, here is {node_check.versions()}"
            yield warn("cluster", text, "install the same there")
    without = [node.name for node in nodes if not node.error and not node.sees]
    if without:
        text = f"{len(without)} of {len(nodes)} nodes do not see {file.parent}: {', '.join(without[:5])}"
        remedy = "mount the same storage at the same path on every node, or give another run.dir"
        yield fail("shared run.dir", text, remedy)
    elif nodes:
        yield ok("shared run.dir", f"all {len(nodes)} nodes see {file.parent}")


def show(results: Iterable[CheckResult], as_json: bool) -> bool:
    """Print each result as its check ends, or all of them as one JSON object. Returns whether none failed."""
    from rich.console import Console
    from rich.text import Text

    printed = []
    for result in results:
        printed.append(result)
        text = Text(result.line)
        text.stylize({"ok": "green", "warn": "yellow", "fail": "red"}[result.status], 0, 5)
        if not as_json:
            Console().print(text, highlight=False, soft_wrap=True)
    passed = all(result.status != "fail" for result in printed)
    if as_json:
        print(json.dumps({"ok": passed, "checks": [asdict(result) for result in printed]}))
    return passed
