"""Names in a config become objects: one match per choice, and nothing else in the house looks at a name.

In: checked config sections. Out: rules, losses, modes. A user's own rule or loss is named `my_file:my_name` and
imported from the working directory: it is the user's code and runs with the user's rights.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from switchkd.algo import losses, switching, topk_losses
from switchkd.algo.sampling import Purpose, Sampling
from switchkd.algo.switching import Rule
from switchkd.config.loader import ConfigError
from switchkd.config.schema import Config, Loss, Stage, Teacher
from switchkd.config.schema import Rule as RuleSection
from switchkd.config.schema import Sampling as SamplingSection
from switchkd.learner.batching import LossSpec
from switchkd.rollout.state import Mode
from switchkd.types import Origin


@dataclass(frozen=True, kw_only=True, slots=True)
class StageModes:
    """How a stage's completions are written, by origin, and whether the teacher scores them."""

    rollout: Mode
    teacher: Mode
    scored: bool

    def of(self, origin: Origin) -> Mode | None:
        """None: the data set wrote it."""
        return {Origin.ROLLOUT: self.rollout, Origin.TEACHER: self.teacher, Origin.DATASET: None}[origin]


def named(name: str, what: str) -> Callable[..., Any]:
    """`my_file:my_name` from the working directory (or PYTHONPATH). Raises ConfigError, also for a function of Python's
    or of an installed package: a config alone must not name `os:system`."""
    module, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    if _installed(module):
        raise ConfigError(f"{what} {name!r} is installed, not yours; name a file in {here}, such as my_file:my_{what}")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{what} {name!r}: no module {error.name!r} in {here}; start where {module}.py lies"
        ) from None
    except AttributeError:
        raise ConfigError(f"{what} {name!r}: {module}.py has no {attribute!r}") from None
    if not callable(found):
        raise ConfigError(f"{what} {name!r} is a {type(found).__name__}, not a function")
    return found


def _installed(module: str) -> bool:
    """Does Python or a package bring its top-level module? Decided without running any of it."""
    spec = importlib.util.find_spec(module.partition(".")[0]) if module else None
    if spec is None:
        return False
    files = [file for file in (spec.origin, *(spec.submodule_search_locations or ())) if file]
    places = {Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "platstdlib", "purelib", "platlib")}
    return not any(Path(file).exists() for file in files) or any(
        place in Path(file).resolve().parents for file in files for place in places
    )


def build_rule(stage: Stage) -> Rule:
    """The stage's switching rule. Raises ConfigError naming the parameter that it refuses."""
    rule = _called(_rule_constructor(stage.rule.type), f"rule {stage.rule.type}", _rule_params(stage))
    if not isinstance(rule, Rule):
        raise ConfigError(f"rule {stage.rule.type!r} returned {type(rule).__name__}; return a switchkd Rule")
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
            return named(kind, "rule")


_RULE_KEYS = {
    "jsd_threshold": {"tau0": "tau_0", "decay": "decay", "half_life": "half_life", "schedule": "schedule",
                      "log_base": "log_base"},
    "kl_spike": {"factor": "K", "window": "L", "divergence": "divergence", "warm_up": "warm_up"},
    "outside_top_k": {"top_k": "k"},
    "random": {"prob": "prob"},
    "mixture": {"prob": "alpha"},
}  # fmt: skip
"""Keys of `rule` that each rule takes, and what its constructor calls them."""
_LOSS_KEYS = {
    "jsd": ("beta",),
    "skew_kl": ("alpha",),
    "skew_reverse_kl": ("alpha",),
    "atkd": ("hard_frac", "lam", "direction"),
}


def _given(section: RuleSection | Loss, kind: str, known: Iterable[str], every: Iterable[str]) -> dict[str, Any]:
    """The keys that the user set. Raises ConfigError for one that this rule or loss does not know."""
    what = "rule" if isinstance(section, RuleSection) else "loss"
    takes = set(known)
    found = {key: value for key in every if (value := getattr(section, key)) is not None}
    for key, value in found.items():
        if key not in takes:
            choices = ", ".join(sorted(takes)) or ("its own, under params" if ":" in kind else "none")
            raise ConfigError(f"{what} {kind}: unknown parameter {key!r} (value {value!r}); it takes {choices}")
    return found


def _rule_params(stage: Stage) -> dict[str, Any]:
    rule, names = stage.rule, _RULE_KEYS.get(stage.rule.type, {})
    every = {key for keys in _RULE_KEYS.values() for key in keys}
    params = {names[key]: value for key, value in _given(rule, rule.type, names, sorted(every)).items()} | rule.params
    if rule.type == "jsd_threshold":
        params.setdefault("max_new_tokens", stage.max_new_tokens)
    return params


def build_loss(stage: Stage) -> LossSpec:
    """The stage's loss. Raises ConfigError naming the parameter that it refuses."""
    kind = stage.loss.type
    every = sorted({key for keys in _LOSS_KEYS.values() for key in keys})
    params = _given(stage.loss, kind, _LOSS_KEYS.get(kind, ()), every) | stage.loss.params
    hard_frac = params.pop("hard_frac", 0.5) if kind == "atkd" else None
    per_token = _loss_function(kind)
    _check_params(per_token, f"loss {kind}", params)
    return LossSpec(
        name=kind,
        per_token=per_token,
        numbers=params,
        hard_frac=hard_frac,
        lm_coef=stage.loss.lm_coef,
        needs_teacher=kind != "cross_entropy",
        tail=topk_losses.atkd_tokens if kind == "atkd" else partial(topk_losses.coarse, per_token),
    )


def check_topk(stage: Stage, teacher: Teacher) -> None:
    """Raises ConfigError for what compressed rows (`signal: topk`) can neither decide nor train."""
    if teacher.signal != "topk" or not stage.needs_teacher:
        return
    rule, loss = build_rule(stage), stage.loss
    if teacher.decide == "interval" and stage.mix.rollout > 0 and rule.needs_rows and rule.interval is None:
        what = f" (divergence {stage.rule.divergence})" if stage.rule.divergence else ""
        raise ConfigError(
            f"teacher.signal=topk cannot decide rule {stage.rule.type}{what} with certainty: it has no interval; take "
            "teacher.signal=hidden, or teacher.decide=coarse for approximate rollouts"
        )
    if not loss.approximate and not topk_losses.is_bounded(loss.type, loss.direction):
        what = f" (direction {loss.direction})" if loss.direction else ""
        raise ConfigError(
            f"teacher.signal=topk with loss {loss.type}{what}: what the tail leaves out has no small bound; take "
            "teacher.signal=hidden, another loss (forward_kl, skew_kl, jsd, tvd, atkd), or set loss.approximate=true"
        )


def _loss_function(kind: str) -> Callable[..., Any]:
    match kind:
        case "forward_kl":
            return losses.forward_kl
        case "reverse_kl":
            return losses.reverse_kl
        case "jsd":
            return losses.jsd
        case "skew_kl":
            return losses.skew_kl
        case "skew_reverse_kl":
            return losses.skew_reverse_kl
        case "tvd":
            return losses.tvd
        case "cross_entropy":
            return losses.cross_entropy
        case "atkd":
            return losses.atkd_tokens
        case _:
            return named(kind, "loss")


def _called(function: Callable[..., Any], what: str, params: dict[str, Any]) -> Any:
    _check_params(function, what, params)
    try:
        return function(**params)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{what}: {error}") from None


def _check_params(function: Callable[..., Any], what: str, params: dict[str, Any]) -> None:
    import inspect

    known = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in known.values()):
        return
    given = {"p_logits", "q_logits", "labels", "mask", "hard"}  # what the learner itself passes to a loss
    free = [name for name in known if name not in given]
    for name in params:
        if name not in free:
            choices = ", ".join(free) or "none"
            raise ConfigError(f"{what}: unknown parameter {name!r} (value {params[name]!r}); it takes {choices}")


def sampling(section: SamplingSection) -> Sampling:
    """A completed section (config.py fills in the rule's own values)."""
    return Sampling(
        temperature=1.0 if section.temperature is None else section.temperature,
        top_p=1.0 if section.top_p is None else section.top_p,
        top_k=section.top_k or 0,
    )


def build_modes(config: Config) -> list[StageModes]:
    """How each stage writes, in order."""
    modes = []
    first_step = 0
    for stage in config.train.stages:
        modes.append(_stage_modes(config, stage, first_step))
        first_step += stage.steps
    return modes


def _stage_modes(config: Config, stage: Stage, first_step: int) -> StageModes:
    common: dict[str, Any] = {
        "student": sampling(stage.rule.student),
        "teacher": sampling(stage.rule.teacher),
        "max_new_tokens": stage.max_new_tokens,
        "seed": config.seed,
        "first_step": first_step,
        "wants_uncertainty": stage.loss.type == "atkd",
        "candidates": config.rollout.save_candidates,
    }
    rollout = Mode(
        rule=build_rule(stage),
        scheduled=stage.rule.step_schedule is not None,
        teacher_budget=_budget(stage),
        **common,
    )
    return StageModes(rollout=rollout, teacher=Mode(rule=switching.teacher(), **common), scored=stage.needs_teacher)


def _budget(stage: Stage) -> int | None:
    """A float is a share of max_new_tokens, an int a number of tokens."""
    budget = stage.rule.teacher_budget
    return round(budget * stage.max_new_tokens) if isinstance(budget, float) else budget


def eval_mode(*, temperature: float, max_new_tokens: int, seed: int) -> Mode:
    """The student alone, unscored, with draws of evaluation's own purpose."""
    return Mode(
        rule=switching.student(),
        student=Sampling(temperature=temperature),
        teacher=Sampling(),
        max_new_tokens=max_new_tokens,
        seed=seed,
        purpose=Purpose.EVAL,
        scored=False,
    )
