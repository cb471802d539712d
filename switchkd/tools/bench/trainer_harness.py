"""Runs `train.Trainer` on the caller's actors, with a call at each step's end.

In: a config, prompts, a function that starts the actors. Out: the calls of `on_step`. The run ends without a checkpoint
and without a student when `on_step` raises `StopTraining`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from switchkd.config.schema import Config

if TYPE_CHECKING:
    from switchkd.controller.handles import ActorHandles
    from switchkd.controller.watchdog import Watchdog
    from switchkd.types import Prompt

NUM_STEPS = 10_000
"""More steps than any bench runs."""


class StopTraining(Exception):
    """Raised by `on_step` when it has measured enough."""


class StepLog:
    """Replaces `MetricsLog`: no files, no console, one call per step."""

    def __init__(self, on_step: Callable[[Mapping[str, Any]], None]) -> None:
        self.on_step = on_step

    def info(self, text: str) -> None:
        """Print nothing."""

    def now(self, **doing: str) -> None:
        """Show nothing."""

    def export(self, sink: Any) -> None:
        """Export nothing."""

    def step(self, step: int, row: Mapping[str, Any]) -> None:
        self.on_step(row)


def endless_config(sections: Mapping[str, Mapping[str, Any]]) -> Config:
    """Return the config of a run of one long stage that only writes its folder. Raises ConfigError."""
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
    start_actors: Callable[[Config, Path, frozenset[int], Any], ActorHandles],
    on_step: Callable[[Mapping[str, Any]], None],
    *,
    watchdog: Watchdog | None = None,
    now: Callable[[], float] = time.monotonic,
) -> None:
    """Train in a temporary folder until `on_step` raises StopTraining. Without stop ids completions are full-length.
    `watchdog` and `now` replace those of the wall clock."""
    from switchkd.controller import watchdog as watching
    from switchkd.controller.checkpoint import open_run
    from switchkd.controller.evaluation import Evaluator
    from switchkd.controller.schedule import Schedule
    from switchkd.data.prompts import PromptStream
    from switchkd.train import Trainer

    log = cast(Any, StepLog(on_step))
    schedule = Schedule(config.train.stages, PromptStream(prompts, seed=0, shuffle=False), seed=config.seed)
    with tempfile.TemporaryDirectory(prefix="switchkd-bench-") as parent:
        config = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(Path(parent) / "run")})})
        with open_run(config) as folder:
            handles = start_actors(config, folder.path, frozenset(), log)
            try:
                evaluator = Evaluator(config.eval, (), has_teacher=False)
                # not started: a bench may sleep
                watchdog = watchdog or watching.Watchdog(config.run.watchdog_s, folder.path, log.info)
                Trainer(config, schedule, handles, folder, log, evaluator, watchdog, now).run()
            except StopTraining:
                pass
            finally:
                handles.close()
