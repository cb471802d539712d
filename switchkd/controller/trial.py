"""Calls a stage's rule and loss once on made-up rows, so that a mistake in them ends a run before it starts.

In: a stage. Out: nothing, or a ConfigError of one line with the file and line of the user's code.

Shapes: B = N rows, V made-up vocabulary, M the rule's memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from switchkd.algo import switching
from switchkd.algo.switching import Rule
from switchkd.config.errors import ConfigError
from switchkd.config.schema import StageConfig
from switchkd.config.user_code import describe_error, place_of_function
from switchkd.learner.build import build_loss
from switchkd.rollout.rules import build_rule

NUM_ROWS = 3
VOCAB = 1 << 18
"""At least as large as real vocabularies: the user's code may read the logit of a certain token id."""
_UNDECLARED = " (None without: logits needs_rows=True, drafted needs_draft=True, coins needs_coins=True)"


def check_stage(stage: StageConfig) -> None:
    """Build and call rule and loss, then check combinations that train on nothing. Raises ConfigError."""
    for kind, name, attempt in (("rule", stage.rule.type, _try_rule), ("loss", stage.loss.type, _try_loss)):
        try:  # the user's code, which may also call sys.exit
            attempt(stage)
        except ConfigError:
            raise
        except (Exception, SystemExit) as error:
            if ":" not in name and not isinstance(error, ValueError):
                raise  # a bug of this package, not of the user
            hint = _UNDECLARED if kind == "rule" and "NoneType" in str(error) else ""
            raise ConfigError(f"{kind} {name}: {describe_error(error)}{hint}") from None
    if stage.loss.type == "cross_entropy" and stage.mix.rollout > 0 and stage.rule.type == "student":
        raise ConfigError(
            "loss cross_entropy on tokens that the student wrote itself teaches it nothing; take a distillation loss, "
            "or mix.dataset or mix.teacher instead of mix.rollout"
        )
    if 0 < stage.steps < stage.warmup_steps and stage.scheduler != "constant":
        raise ConfigError(
            f"learner.warmup_steps={stage.warmup_steps} is above the stage's {stage.steps} steps: its learning rate "
            "would never be reached; lower it, or train longer"
        )
    if stage.loss.lm_coef > 0 and stage.mix.dataset == 0:
        raise ConfigError(f"loss.lm_coef={stage.loss.lm_coef:g} counts on data-set tokens, but mix.dataset is 0")


@torch.no_grad()
def _try_rule(stage: StageConfig) -> None:
    """Let the rule judge NUM_ROWS completions of as many tokens, with what it declares to read and None for the rest;
    then rows at different tokens, as in a batch."""
    rule, what = build_rule(stage), f"rule {stage.rule.type}"
    if rule.student_only:
        return
    statistic = _statistic(rule, what)
    steps, rows = torch.arange(NUM_ROWS), [NUM_ROWS]
    memories = [switching.init_memory(rule, NUM_ROWS)]
    for t in range(NUM_ROWS):
        threshold = rule.threshold(torch.full((NUM_ROWS,), t), steps, memories[t])
        _check(f"{what}: threshold", rule.threshold, threshold, rows)
        memory = rule.update(memories[t], statistic, threshold)
        _check(f"{what}: update", rule.update, memory, [NUM_ROWS, rule.memory_size], finds_nan=False)
        memories.append(memory)
    mixed = torch.stack([memories[t][t] for t in range(NUM_ROWS)])
    _check(f"{what}: threshold", rule.threshold, rule.threshold(torch.arange(NUM_ROWS), steps, mixed), rows)
    if rule.teacher_only is not None:
        ends = rule.teacher_only(mixed)
        _check(f"{what}: teacher_only", rule.teacher_only, ends, rows, dtypes=(torch.bool,))


def _statistic(rule: Rule, what: str) -> Tensor:
    p_logits, q_logits = _rows()
    inputs = {
        "p_logits": p_logits if rule.needs_rows else None,
        "q_logits": q_logits if rule.needs_rows else None,
        "drafted": torch.arange(NUM_ROWS) if rule.needs_draft else None,
        "coins": torch.linspace(0, 0.9, NUM_ROWS, dtype=torch.float64) if rule.needs_coins else None,
    }
    statistic = rule.statistic(**inputs)
    reads = rule.needs_rows or rule.needs_draft or rule.needs_coins
    _check(f"{what}: statistic", rule.statistic, statistic, [NUM_ROWS] if reads else [1])
    for limit in rule.bounds(**inputs) if rule.bounds is not None else ():
        _check(f"{what}: bounds", rule.bounds, limit, [NUM_ROWS])
    return statistic.double().expand(NUM_ROWS)


def _try_loss(stage: StageConfig) -> None:
    """Compute the loss of NUM_ROWS tokens and its gradient."""
    loss, what = build_loss(stage), f"loss {stage.loss.type}"
    p_logits, leaf = _rows()
    leaf.requires_grad_()
    mask = torch.ones(NUM_ROWS, dtype=torch.bool)
    hard = {} if loss.hard_frac is None else {"hard": mask}
    with torch.enable_grad():  # a loss may work in place: not on a leaf
        values = loss.per_token(p_logits, leaf.clone(), torch.arange(NUM_ROWS), mask, **hard, **loss.numbers)
    _check(what, loss.per_token, values, [NUM_ROWS])
    place = place_of_function(loss.per_token)
    (gradient,) = torch.autograd.grad(values.sum(), leaf, allow_unused=True) if values.requires_grad else (None,)
    if gradient is None:
        raise ConfigError(f"{what}: {place}it has no gradient in q_logits: nothing is learned; do not detach q_logits")
    if not gradient.isfinite().all():
        raise ConfigError(f"{what}: {place}its gradient is not finite; avoid 0 / 0 and the logarithm of 0")
    if loss.hard_frac is not None and not 0 <= loss.hard_frac <= 1:
        raise ConfigError(f"{what}: hard_frac is {loss.hard_frac}: give a share from 0 to 1")


def _rows() -> tuple[Tensor, Tensor]:
    """Logits of teacher and student, float32 [NUM_ROWS, VOCAB]."""
    logits = 4 * torch.sin(torch.arange(NUM_ROWS * VOCAB, dtype=torch.float64)).float().view(NUM_ROWS, VOCAB)
    return logits, logits.flip(1)


def _check(
    what: str,
    function: Any,
    values: Any,
    shape: list[int],
    *,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64),
    finds_nan: bool = True,
) -> None:
    what = f"{what}: {place_of_function(function)}"
    if not isinstance(values, Tensor) or list(values.shape) != shape:
        found = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        unit = "one value a token, " if len(shape) == 1 else ""
        raise ConfigError(f"{what}returned {found} for {NUM_ROWS} tokens; return {unit}{shape}")
    if values.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ConfigError(f"{what}returned {str(values.dtype).removeprefix('torch.')} values; return {names}")
    if finds_nan and values.isnan().any():
        raise ConfigError(f"{what}returned NaN for {NUM_ROWS} ordinary tokens; return numbers")
