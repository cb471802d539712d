"""The lines that a run prints before it starts: its data, what the config leaves to defaults, and warnings.

In: a prepared run. Out: lines.
"""

from __future__ import annotations

from collections.abc import Iterator

from switchkd.config import resources
from switchkd.config.errors import ConfigError
from switchkd.config.loader import sampling_notes
from switchkd.controller.memory_fit import memory_fit
from switchkd.controller.preflight import PreparedRun, in_flight
from switchkd.engines.cpu_dtype import slow_bfloat16


def start_lines(ready: PreparedRun) -> Iterator[str]:
    config = ready.config
    yield f"data: {config.rollout.recorded or ready.prompts.report()}"
    if ready.eval_prompts and ready.eval_prompts.num_skipped:
        yield f"evaluation: {ready.eval_prompts.report()}"
    yield from sampling_notes(config)
    if warning := slow_bfloat16(config):
        yield f"warning: {warning}"
    if resources.is_private(config) and not config.is_fake:
        try:
            fit = memory_fit(config)
        except ConfigError as error:  # a model whose shape is not known without its weights
            yield f"memory: not known ({error})"
        else:
            if not fit.fits:
                yield f"warning: memory: {fit.text}; {fit.remedy}"
    generating = [stage for stage in config.train.stages if stage.mix.rollout > 0 and stage.steps]
    if generating and not config.rollout.recorded:
        yield f"stage {generating[-1].name}: {in_flight(config, generating[-1])}"
