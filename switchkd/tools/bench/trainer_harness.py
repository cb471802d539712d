"""The real program, step by step: `train.Trainer` on a house of real rooms, with somebody who watches each step end.

In: a config, prompts, a house. Out: nothing but the calls of `on_step`; the run ends when it raises `Enough`, without a
checkpoint and without a student.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from switchkd.config.schema import Config

if TYPE_CHECKING:
    from switchkd.controller.handles import ActorHandles
    from switchkd.types import Prompt

NUM_STEPS = 10_000
"""More than any bench waits for."""


class Enough(Exception):
    """The watcher has seen all it wants."""


class StepLog:
    """In the place of `metrics.MetricsLog`: no files, no console, one call per step."""

    def __init__(self, on_step: Callable[[Mapping[str, Any]], None]) -> None:
        self.on_step = on_step

    def info(self, text: str) -> None:
        """A bench says nothing on the way."""

    def now(self, **doing: str) -> None:
        """Nobody watches."""

    def export(self, sink: Any) -> None:
        """The numbers go to `on_step` alone."""

    def step(self, step: int, row: Mapping[str, Any]) -> None:
        self.on_step(row)


def config_of(sections: Mapping[str, Mapping[str, Any]]) -> Config:
    """A config of one endless stage that writes nothing but its folder. Raises ConfigError."""
    from switchkd.config.loader import parse

    base: dict[str, dict[str, Any]] = {
        "run": {"dir": "unused"},
        "rollout": {"save": False},
        "learner": {"scheduler": "constant"},
        "train": {"num_steps": NUM_STEPS, "checkpoint_every": 0},
    }
    return parse({key: {**base.get(key, {}), **sections.get(key, {})} for key in {*base, *sections}})


def run(
    config: Config,
    prompts: Sequence[Prompt],
    build: Callable[[Config, Path, Any], ActorHandles],
    on_step: Callable[[Mapping[str, Any]], None],
) -> None:
    """Build a house in a folder that is removed again, and train until `on_step` raises Enough."""
    from switchkd.controller.checkpoint import open_run
    from switchkd.controller.evaluation import Evaluator
    from switchkd.controller.schedule import Schedule
    from switchkd.controller.watchdog import Watchdog
    from switchkd.data.prompts import PromptStream
    from switchkd.train import Trainer

    log = cast(Any, StepLog(on_step))
    plan = Schedule(config.train.stages, PromptStream(prompts, seed=0, shuffle=False), seed=config.seed)
    with tempfile.TemporaryDirectory(prefix="switchkd-bench-") as place:
        config = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(Path(place) / "run")})})
        with open_run(config) as folder:
            handles = build(config, folder.path, log)
            try:
                evaluator = Evaluator(config.eval, (), has_teacher=False)
                watchdog = Watchdog(
                    config.run.watchdog_s, folder.path, log.info
                )  # it does not watch: a bench may sleep
                Trainer(config, plan, handles, folder, log, evaluator, watchdog).run()
            except Enough:
                pass
            finally:
                handles.close()
