"""Switching rules: which model writes token t, the student or the teacher.

A rule is three small functions, and the teacher writes token t iff statistic > threshold (strictly):

    statistic(p_logits=[N, V], q_logits=[N, V], drafted=int64 [N], coins=float64 [N]) -> float64 [N]
    threshold(t int64 [B], step int64 [B], memory float64 [B, M]) -> float64 [B]
    update(memory [B, M], statistic [B], threshold [B]) -> the memory [B, M] after this token

p = teacher, q = student, temperature 1, not truncated; t = index of the completion token, 0 for the first; step =
training step of each row's rollout, 0 for the first of its stage. The statistic's arguments are passed by name (None
where the rule does not declare to read them: `needs_rows`, `needs_draft`, `needs_coins`), the others by position.
`threshold` depends on the tokens before t only. A user's rule is any function that returns a Rule:

    def entropy_limit(*, nats: float = 2.0) -> Rule:
        '''The teacher writes where the student's entropy exceeds `nats`.'''
        return Rule(
            name="entropy_limit",
            statistic=lambda *, p_logits, q_logits, drafted, coins: divergence.entropy(q_logits),
            threshold=lambda t, step, memory: torch.full(t.shape, nats, dtype=torch.float64),
        )
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from switchkd.algo import divergence
from switchkd.algo.noise import Purpose
from switchkd.algo.sampling import NEAR_TIE

_DIVERGENCES = {"kl": divergence.forward_kl, "reverse_kl": divergence.reverse_kl, "jsd": divergence.jsd}
_SCHEDULES = ("exponential", "linear", "constant", "exponential_growth")
_WARM_UPS = ("full_window", "available")
SKD_TOP_K = 25
MIN_DIVERGENCE = 1e-6  # nats: where both rows agree to the last bits of float32, a divergence is about 1e-8


def no_update(memory: Tensor, statistic: Tensor, threshold: Tensor) -> Tensor:
    """The update of a rule without memory."""
    return memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Three functions (see the module) and the properties that the verification of a drafted block uses."""

    name: str
    statistic: Callable[..., Tensor]
    threshold: Callable[..., Tensor]
    update: Callable[..., Tensor] = no_update
    memory_size: int = 0  # M; memory starts at zero
    replacement: Purpose = Purpose.GUMBEL  # noise of the teacher's token
    needs_rows: bool = True  # False: p_logits and q_logits are None
    needs_draft: bool = False  # True: the statistic depends on the drafted id; False: drafted is None
    needs_coins: bool = False  # True: the statistic reads `coins`; False: they are None
    student_only: bool = False  # True: the teacher writes no token; the statistic is not computed
    bounds: Callable[..., tuple[Tensor, Tensor]] | None = None
    """The statistic's smallest and largest value where log-probs are off by less than NEAR_TIE, float64 [N] each, from
    the statistic's arguments; None: statistic -+ NEAR_TIE. Only near ties are counted by it."""
    teacher_only: Callable[[Tensor], Tensor] | None = None
    """memory [B, M] -> bool [B]: the teacher writes all further tokens; the statistic is not computed."""


def init_memory(rule: Rule, num: int) -> Tensor:
    """The memory of `num` rollouts before their first token, float64 [num, M]."""
    return torch.zeros(num, rule.memory_size, dtype=torch.float64)


# --- rules that read no distribution ---------------------------------------------------------------------------------


def student() -> Rule:
    """The student writes everything: on-policy distillation (GKD with lambda = 1, arXiv 2306.13649)."""
    return Rule(
        name="student", statistic=_zero, threshold=partial(_fixed, value=math.inf), needs_rows=False, student_only=True
    )


def teacher() -> Rule:
    """The teacher writes everything: sequence-level distillation (SeqKD, arXiv 1606.07947)."""
    return Rule(
        name="teacher",
        statistic=_zero,
        threshold=partial(_fixed, value=-math.inf),
        needs_rows=False,
        teacher_only=lambda memory: torch.ones(len(memory), dtype=torch.bool),
    )


def random(*, prob: float = 0.5) -> Rule:
    """The teacher writes a token with probability `prob` (the random switch of SWITCH's ablation, ATKD's mix_token).

    The statistic is 1 - coin and the threshold 1 - prob, so that a smaller threshold gives the teacher more tokens, as
    in every rule.
    """
    _check_share("prob", prob)
    return Rule(
        name="random", statistic=_coin, threshold=partial(_fixed, value=1 - prob), needs_rows=False, needs_coins=True
    )


def mixture(*, alpha: float = 0.2) -> Rule:
    """The token is drawn from alpha p + (1 - alpha) q (teacher-mixed sampling of MiniLLM, arXiv 2306.08543).

    A draw from a mixture is a coin for the component and a draw from it, so this is computed as `random(prob=alpha)`.
    """
    _check_share("alpha", alpha)
    return replace(random(prob=alpha), name="mixture")


def _zero(**inputs: Tensor | None) -> Tensor:
    return torch.zeros(1, dtype=torch.float64)


def _coin(*, p_logits: Tensor | None, q_logits: Tensor | None, drafted: Tensor | None, coins: Tensor) -> Tensor:
    return 1 - coins


def _fixed(t: Tensor, step: Tensor, memory: Tensor, *, value: float) -> Tensor:
    return torch.full(t.shape, value, dtype=torch.float64, device=t.device)


# --- SWITCH ----------------------------------------------------------------------------------------------------------


def jsd_threshold(
    *,
    schedule: str = "exponential",
    tau_0: float | None = None,
    decay: float = 0.1,
    half_life: float | None = None,
    log_base: float = 2,
    max_new_tokens: int | None = None,
) -> Rule:
    """SWITCH (Koo et al., arXiv 2410.19503): the teacher writes token t where JSD(p, q) > tau(t).

    exponential: tau_0 exp(-decay t); linear: tau_0 (1 - t / T); constant: tau_0; exponential_growth:
    tau_0 exp(-decay (T - t)), T = max_new_tokens. tau_0 is 1, for `constant` 0.2. `half_life` (tokens) sets the decay
    to ln 2 / half_life and overrides `decay`.
    """
    if schedule not in _SCHEDULES:
        raise ValueError(f"schedule is {schedule!r}: choose one of {', '.join(_SCHEDULES)}")
    if tau_0 is None:
        tau_0 = 0.2 if schedule == "constant" else 1.0
    _check_at_least("tau_0", tau_0, 0)
    _check_at_least("decay", decay, 0)
    if half_life is not None:
        if not half_life > 0:
            raise ValueError(f"half_life is {half_life}: give a number of tokens above 0, or None to use decay")
        decay = math.log(2) / half_life
    if not log_base > 1:
        raise ValueError(f"log_base is {log_base}: choose a base above 1, such as 2 (JSD in [0, 1]) or e (nats)")
    if schedule in ("linear", "exponential_growth") and (max_new_tokens is None or max_new_tokens < 1):
        raise ValueError(f"schedule {schedule!r} has max_new_tokens {max_new_tokens}: give the longest response length")
    return Rule(
        name="jsd_threshold",
        statistic=partial(_jsd, log_base=log_base),
        threshold=partial(_tau, schedule=schedule, tau_0=tau_0, decay=decay, max_new_tokens=max_new_tokens or 0),
    )


def _jsd(*, p_logits: Tensor, q_logits: Tensor, drafted: None, coins: Tensor, log_base: float) -> Tensor:
    return divergence.per_row(divergence.jsd, p_logits, q_logits, log_base=log_base)


def _tau(
    t: Tensor, step: Tensor, memory: Tensor, *, schedule: str, tau_0: float, decay: float, max_new_tokens: int
) -> Tensor:
    index = t.double()
    if schedule == "exponential":
        return tau_0 * torch.exp(-decay * index)
    if schedule == "exponential_growth":
        return tau_0 * torch.exp(-decay * (max_new_tokens - index))
    if schedule == "linear":
        return (tau_0 * (1 - index / max_new_tokens)).clamp(min=0)
    return torch.full_like(index, tau_0)


# --- AdaSwitch -------------------------------------------------------------------------------------------------------


def kl_spike(
    *,
    K: float = 3.0,
    L: int = 10,
    divergence: str = "kl",
    warm_up: str = "full_window",
    min_divergence: float = MIN_DIVERGENCE,
) -> Rule:
    """AdaSwitch (Peng et al., arXiv 2510.07842): one permanent switch where D(p, q) > K mean(last L values of D).

    A D of at most `min_divergence` (nats) is no spike: a window in which the models agree holds rounding errors only,
    and a multiple of them says nothing. The paper has no such limit (0 turns it off).
    The teacher writes the token at the spike and all later ones. There is no switch before L values are known, or one
    value with warm_up `available`. Memory: the last L values, oldest first, their number, and the switched flag. After
    the switch the threshold is -inf and the memory constant, so the statistic may be any number but NaN.
    """
    if not (math.isfinite(K) and K > 0):
        raise ValueError(f"K is {K}: give a finite factor above 0; the paper uses 3")
    if L < 1 or int(L) != L:
        raise ValueError(f"L is {L}: give a window of at least 1 token; the paper uses 10")
    if divergence not in _DIVERGENCES:
        raise ValueError(f"divergence is {divergence!r}: choose one of {', '.join(_DIVERGENCES)}")
    _check_at_least("min_divergence", min_divergence, 0)
    if warm_up not in _WARM_UPS:
        raise ValueError(f"warm_up is {warm_up!r}: choose one of {', '.join(_WARM_UPS)}")
    return Rule(
        name="kl_spike",
        statistic=partial(_divergence, name=divergence),
        threshold=partial(_spike, K=K, num_needed=L if warm_up == "full_window" else 1, floor=min_divergence),
        update=_remember,
        memory_size=L + 2,
        teacher_only=lambda memory: memory[:, -1].bool(),
    )


def _divergence(*, p_logits: Tensor, q_logits: Tensor, drafted: None, coins: Tensor, name: str) -> Tensor:
    return divergence.per_row(_DIVERGENCES[name], p_logits, q_logits)


def _spike(t: Tensor, step: Tensor, memory: Tensor, *, K: float, num_needed: int, floor: float) -> Tensor:
    values, known, switched = memory[:, :-2], memory[:, -2], memory[:, -1].bool()
    limit = (K * values.sum(dim=-1) / known.clamp(min=1)).clamp(min=floor)  # unknown values are zero
    return limit.masked_fill(known < num_needed, math.inf).masked_fill(switched, -math.inf)


def _remember(memory: Tensor, statistic: Tensor, threshold: Tensor) -> Tensor:
    values, known, switched = memory[:, :-2], memory[:, -2:-1], memory[:, -1:]
    now = (statistic > threshold).to(memory.dtype)[:, None]
    known = (known + 1).clamp(max=values.shape[1])
    updated = torch.cat([values[:, 1:], statistic.to(memory.dtype)[:, None], known, now], dim=1)
    return torch.where(switched.bool(), memory, updated)


# --- SKD -------------------------------------------------------------------------------------------------------------


def outside_top_k(*, k: int = SKD_TOP_K) -> Rule:
    """SKD (Xu et al., arXiv 2410.11325): the teacher writes where the drafted id is not among its k most likely.

    The statistic is the id's rank in p, 1 for the first, equal logits ordered by id. It depends on the drafted id and
    hence on its noise: the replacement needs separate noise (Purpose.SKD) to follow the teacher's distribution.
    """
    if k < 1 or int(k) != k:
        raise ValueError(f"k is {k}: give at least 1 id; the paper uses 25")
    return Rule(
        name="outside_top_k",
        statistic=_rank,
        threshold=partial(_fixed, value=float(k)),
        replacement=Purpose.SKD,
        needs_draft=True,
        bounds=_rank_bounds,
    )


@torch.no_grad()
def _rank(*, p_logits: Tensor, q_logits: Tensor | None, drafted: Tensor, coins: Tensor) -> Tensor:
    drafted = drafted.to(p_logits.device)[:, None]
    logit = p_logits.gather(1, drafted)
    lower_id = torch.arange(p_logits.shape[1], device=p_logits.device) < drafted
    before = (p_logits > logit) | ((p_logits == logit) & lower_id)
    return 1 + before.sum(dim=-1).double()


@torch.no_grad()
def _rank_bounds(*, p_logits: Tensor, q_logits: Tensor | None, drafted: Tensor, coins: Tensor) -> tuple[Tensor, Tensor]:
    """A rank says nothing of how near the next one is: count the ids that come first surely, and possibly."""
    lead = p_logits - p_logits.gather(1, drafted.to(p_logits.device)[:, None])
    surely, possibly = (lead >= NEAR_TIE).sum(dim=-1), (lead > -NEAR_TIE).sum(dim=-1)  # with the drafted id itself
    return 1 + surely.double(), possibly.double()


# --- over the training -----------------------------------------------------------------------------------------------


def with_step_schedule(rule: Rule, *, start: float, end: float, steps: int) -> Rule:
    """The rule with every finite threshold times a factor that goes from `start` to `end` in `steps` steps.

    A factor below 1 gives the teacher more tokens in every rule, `random` included (its threshold is 1 - prob).
    """
    _check_at_least("start", start, 0)
    _check_at_least("end", end, 0)
    if steps < 1:
        raise ValueError(f"steps is {steps}: give the number of training steps, at least 1")
    return replace(rule, threshold=partial(_scaled, base=rule.threshold, start=start, end=end, steps=steps))


def _scaled(
    t: Tensor, step: Tensor, memory: Tensor, *, base: Callable[..., Tensor], start: float, end: float, steps: int
) -> Tensor:
    threshold = base(t, step, memory)
    factor = start + (end - start) * (step.double() / steps).clamp(0, 1)
    return torch.where(threshold.isfinite(), threshold * factor, threshold)


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}: give a probability from 0 to 1")


def _check_at_least(name: str, value: float, limit: float) -> None:
    if not (math.isfinite(value) and value >= limit):
        raise ValueError(f"{name} is {value}: give a finite number, {limit} or more")
