"""Rules and rollout parameters of a config's stages.

In: a checked config. Out: rules, and parameters by stage. A user's own rule is named `my_file:my_name` and imported
from the working directory: it is the user's code and runs with the user's rights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from switchkd.algo import switching
from switchkd.algo.sampling import SamplingParams
from switchkd.algo.switching import Rule
from switchkd.config.errors import ConfigError
from switchkd.config.schema import Config, SamplingConfig, StageConfig
from switchkd.config.user_code import call_constructor, given_params, load_user_function, place_of_function
from switchkd.rollout.state import RolloutParams, StageParams
from switchkd.types import CompletionSource


def build_rule(stage: StageConfig) -> Rule:
    """The stage's switching rule. Raises ConfigError naming the parameter that it refuses."""
    constructor, what = _rule_constructor(stage.rule.type), f"rule {stage.rule.type}"
    rule = call_constructor(constructor, what, _rule_params(stage))
    if not isinstance(rule, Rule):
        place = place_of_function(constructor)
        raise ConfigError(f"{what}: {place}returned {type(rule).__name__}; return a switchkd Rule")
    schedule = stage.rule.step_schedule
    if schedule is None:
        return rule
    return switching.with_step_schedule(rule, start=schedule.start, end=schedule.end, steps=max(stage.steps, 1))


def _rule_constructor(kind: str) -> Callable[..., Any]:
    match kind:
        case "student":
            return switching.student
        case "teacher":
            return switching.teacher
        case "random":
            return switching.random
        case "mixture":
            return switching.mixture
        case "jsd_threshold":
            return switching.jsd_threshold
        case "kl_spike":
            return switching.kl_spike
        case "outside_top_k":
            return switching.outside_top_k
        case _:
            return load_user_function(kind, "rule")


_RULE_KEYS = {
    "jsd_threshold": {"tau0": "tau_0", "decay": "decay", "half_life": "half_life", "schedule": "schedule",
                      "log_base": "log_base"},
    "kl_spike": {"factor": "K", "window": "L", "divergence": "divergence", "warm_up": "warm_up",
                 "min_divergence": "min_divergence"},
    "outside_top_k": {"top_k": "k"},
    "random": {"prob": "prob"},
    "mixture": {"prob": "alpha"},
}  # fmt: skip
"""Keys of `rule` that each rule takes, and what its constructor calls them."""


def _rule_params(stage: StageConfig) -> dict[str, Any]:
    rule, names = stage.rule, _RULE_KEYS.get(stage.rule.type, {})
    params = {names.get(key, key): value for key, value in given_params(rule, _RULE_KEYS).items()}
    if rule.type == "jsd_threshold":
        params.setdefault("max_new_tokens", stage.max_new_tokens)
    return params


def sampling_params(section: SamplingConfig) -> SamplingParams:
    """A completed section (config.py fills in the rule's own values)."""
    return SamplingParams(
        temperature=1.0 if section.temperature is None else section.temperature,
        top_p=1.0 if section.top_p is None else section.top_p,
        top_k=section.top_k or 0,
    )


def build_rollout_params(config: Config) -> list[StageParams]:
    """How each stage's completions are generated, in order."""
    stage_params = []
    first_step = 0
    for stage in config.train.stages:
        stage_params.append(_stage_params(config, stage, first_step))
        first_step += stage.steps
    return stage_params


def _stage_params(config: Config, stage: StageConfig, first_step: int) -> StageParams:
    common: dict[str, Any] = {
        "student": sampling_params(stage.rule.student),
        "teacher": sampling_params(stage.rule.teacher),
        "max_new_tokens": stage.max_new_tokens,
        "horizon": stage.horizon,
        "seed": config.seed,
        "first_step": first_step,
        "wants_uncertainty": stage.loss.type == "atkd",
        "top_logprobs": config.rollout.save_top_logprobs,
    }
    rollout = RolloutParams(
        rule=build_rule(stage),
        teacher_budget=_budget(stage),
        **common,
    )
    return {
        CompletionSource.ROLLOUT: rollout,
        CompletionSource.TEACHER: RolloutParams(rule=switching.teacher(), **common),
        CompletionSource.DATASET: RolloutParams(rule=switching.student(), scored=stage.needs_teacher, **common),
    }


def _budget(stage: StageConfig) -> int | None:
    """A float is a share of max_new_tokens, an int a number of tokens."""
    budget = stage.rule.teacher_budget
    return round(budget * stage.max_new_tokens) if isinstance(budget, float) else budget
