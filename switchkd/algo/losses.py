"""Losses: one number per response token, from the teacher's and the student's logits at that position.

    loss(p_logits [N, V], q_logits [N, V], labels int64 [N], mask bool [N], **numbers) -> float32 [N]

p = teacher (no gradient), q = student, natural logarithm, label = the token that stands in the sequence. A masked-out
position gives 0 and no gradient, whatever stands in its row; logits of -inf are allowed at ids shared by both. The
step's loss is sum(weights * loss) with the weights below: they hold the denominator, one for the whole step.
"""

import math

import torch
from torch import Tensor

_FLOOR = -1e4  # stands for log 0: exp gives 0, and the difference of two is 0 instead of NaN


def forward_kl(p_logits: Tensor, q_logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """KL(p‖q)."""
    return _masked(_kl(_log_p(p_logits, mask), _log_q(q_logits, mask)), mask)


def reverse_kl(p_logits: Tensor, q_logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """KL(q‖p)."""
    return _masked(_kl(_log_q(q_logits, mask), _log_p(p_logits, mask)), mask)


def jsd(p_logits: Tensor, q_logits: Tensor, labels: Tensor, mask: Tensor, *, beta: float = 0.5) -> Tensor:
    """beta KL(p‖m) + (1 - beta) KL(q‖m), m = beta p + (1 - beta) q: beta is the teacher's share (GKD, 2306.13649)."""
    if not 0 < beta < 1:
        raise ValueError(f"beta is {beta}: the JSD is zero at 0 and 1; choose between them, or forward_kl, reverse_kl")
    log_p, log_q = _log_p(p_logits, mask), _log_q(q_logits, mask)
    log_m = _log_mix(log_p, log_q, beta)
    return _masked(beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m), mask)


def skew_kl(p_logits: Tensor, q_logits: Tensor, labels: Tensor, mask: Tensor, *, alpha: float = 0.1) -> Tensor:
    """KL(p ‖ alpha p + (1 - alpha) q) (DistiLLM, arXiv 2402.03898, eq. 4)."""
    _check_alpha(alpha)
    log_p, log_q = _log_p(p_logits, mask), _log_q(q_logits, mask)
    return _masked(_kl(log_p, _log_mix(log_p, log_q, alpha)), mask)


def skew_reverse_kl(p_logits: Tensor, q_logits: Tensor, labels: Tensor, mask: Tensor, *, alpha: float = 0.1) -> Tensor:
    """KL(q ‖ (1 - alpha) p + alpha q) (DistiLLM; the loss of SWITCH's main results)."""
    _check_alpha(alpha)
    log_p, log_q = _log_p(p_logits, mask), _log_q(q_logits, mask)
    return _masked(_kl(log_q, _log_mix(log_q, log_p, alpha)), mask)


def tvd(p_logits: Tensor, q_logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Total variation distance, 1/2 sum |p - q|."""
    p, q = _log_p(p_logits, mask).exp(), _log_q(q_logits, mask).exp()
    return _masked((p - q).abs().sum(dim=-1) / 2, mask)


def cross_entropy(p_logits: Tensor | None, q_logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """-log q of the label: fine-tuning, no teacher needed (p_logits may be None)."""
    return _masked(-_at(_log_q(q_logits, mask), _valid(labels, mask)), mask)


def atkd(
    p_logits: Tensor,
    q_logits: Tensor,
    labels: Tensor,
    mask: Tensor,
    *,
    hard: Tensor,
    lam: float = 0.2,
    direction: str = "forward",
) -> Tensor:
    """ATKD (Zhong et al., ACL 2024): lam DKD for easy tokens, (1 - lam) (TKD + DKD) for hard ones (`hard` bool [N]).

    TKD = KL([p_g, 1 - p_g] ‖ [q_g, 1 - q_g]); DKD = KL(p' ‖ q'), both without the label g and renormalised;
    `reverse` swaps the roles of p and q in both. Weights: `atkd_weights`; the split: `atkd_threshold`.
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"lam is {lam}: give the weight of the easy tokens, from 0 to 1; the paper uses 0.2")
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction is {direction!r}: choose forward or reverse")
    target = _valid(labels, mask)
    p_parts = _target_and_others(_log_p(p_logits, mask), target)
    q_parts = _target_and_others(_log_q(q_logits, mask), target)
    first, second = (p_parts, q_parts) if direction == "forward" else (q_parts, p_parts)
    tkd, dkd = _kl(first[0], second[0]), _kl(first[1], second[1])
    return _masked(torch.where(hard, (1 - lam) * (tkd + dkd), lam * dkd), mask)


# --- ATKD's split and the weights ------------------------------------------------------------------------------------


@torch.no_grad()
def uncertainty(p_logits: Tensor, labels: Tensor) -> Tensor:
    """ATKD's UnC = 1 - p_g, float32 [N], summed over the other ids: 1 - p_g itself has no digits left near p_g = 1."""
    log_p = p_logits.to(_float(p_logits)).log_softmax(dim=-1)
    return log_p.scatter_(1, labels[:, None], -math.inf).exp_().sum(dim=-1).float()


def atkd_threshold(unc: Tensor, *, hard_frac: float = 0.5) -> float:
    """sorted(UnC)[floor((1 - hard_frac) (n - 1))], n valid tokens of the step: hard iff UnC >= it. 0.0 for n = 0."""
    if not 0 <= hard_frac <= 1:
        raise ValueError(f"hard_frac is {hard_frac}: give a share of the tokens, from 0 to 1; the paper uses 0.5")
    if unc.numel() == 0:
        return 0.0
    index = math.floor((1 - hard_frac) * (unc.numel() - 1) + 1e-9)  # (1 - 0.9) * 10 is 0.99..98 in floats
    return unc.flatten().kthvalue(index + 1).values.item()


def token_weights(mask: Tensor, *, num_loss_tokens: float | None = None) -> Tensor:
    """1 / num_loss_tokens for each trained token, float32 [N]; `mask` is counted unless it is given (all ranks')."""
    return mask / max(_count(mask) if num_loss_tokens is None else num_loss_tokens, 1)


def atkd_weights(mask: Tensor, hard: Tensor, *, num_easy: float | None = None, num_hard: float | None = None) -> Tensor:
    """1 / N_easy for easy tokens and 1 / N_hard for hard ones, float32 [N]; an empty group contributes 0."""
    easy_weights = token_weights(mask & ~hard, num_loss_tokens=num_easy)
    return easy_weights + token_weights(mask & hard, num_loss_tokens=num_hard)


# --- shared parts ----------------------------------------------------------------------------------------------------


def _float(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _log_q(logits: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities in at least fp32, uniform in masked rows, log 0 as a finite number."""
    # filling the logits, not the loss: a NaN or inf in a masked row would reach the gradient as 0 * NaN
    log_q = logits.to(_float(logits)).masked_fill(~mask[:, None], 0).log_softmax(dim=-1)
    return log_q.masked_fill(log_q == -math.inf, _FLOOR)


def _log_p(logits: Tensor, mask: Tensor) -> Tensor:
    return _log_q(logits.detach(), mask)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a‖b) over the last dimension."""
    return (log_a.exp() * (log_a - log_b)).sum(dim=-1)


def _log_mix(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """log(share a + (1 - share) b)."""
    if share == 0:
        return log_b
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


def _target_and_others(log_a: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of [g, not g], [N, 2], and of the ids without g, renormalised, [N, V] (g at the floor)."""
    others = log_a.scatter(1, target[:, None], _FLOOR)
    log_rest = others.logsumexp(dim=-1, keepdim=True)
    renormalised = (others - log_rest).scatter(1, target[:, None], _FLOOR)
    return torch.cat([log_a.gather(1, target[:, None]), log_rest], dim=1), renormalised


def _at(rows: Tensor, ids: Tensor) -> Tensor:
    return rows.gather(1, ids[:, None])[:, 0]


def _valid(labels: Tensor, mask: Tensor) -> Tensor:
    """Labels with 0 where masked out: padding there may be any number, -100 included."""
    return labels.masked_fill(~mask, 0)


def _masked(per_token: Tensor, mask: Tensor) -> Tensor:
    return per_token.masked_fill(~mask, 0).float()


def _count(mask: Tensor) -> float:
    return float(mask.sum())


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha is {alpha}: give a share from 0 up to, but not, 1; the papers use 0.1")
