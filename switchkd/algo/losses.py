"""Losses: one number per completion token, from the teacher's and the student's logits at that position.

    loss(p_logits [N, V], q_logits [N, V], labels int64 [N], mask bool [N], **numbers) -> [N], at least fp32

p = teacher (no gradient), q = student, natural logarithm, label = the sequence's token. A masked-out position gives 0
and no gradient for any content of its row; logits of -inf are allowed at ids shared by both. The step's loss is
sum(weights * loss) with the weights below, which have one denominator for the whole step.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from switchkd.algo import divergence, kernels


def forward_kl(p_logits: Tensor, q_logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """KL(p‖q)."""
    return _masked(divergence.forward_kl, p_logits, q_logits, mask)


def reverse_kl(p_logits: Tensor, q_logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """KL(q‖p)."""
    return _masked(divergence.reverse_kl, p_logits, q_logits, mask)


def jsd(p_logits: Tensor, q_logits: Tensor, labels: Tensor, mask: Tensor, *, beta: float = 0.5) -> Tensor:
    """beta KL(p‖m) + (1 - beta) KL(q‖m), m = beta p + (1 - beta) q."""
    return _masked(divergence.jsd, p_logits, q_logits, mask, beta=beta)


def skew_kl(p_logits: Tensor, q_logits: Tensor, labels: Tensor, mask: Tensor, *, alpha: float = 0.1) -> Tensor:
    """KL(p ‖ alpha p + (1 - alpha) q)."""
    return _masked(divergence.skew_kl, p_logits, q_logits, mask, alpha=alpha)


def skew_reverse_kl(p_logits: Tensor, q_logits: Tensor, labels: Tensor, mask: Tensor, *, alpha: float = 0.1) -> Tensor:
    """KL(q ‖ (1 - alpha) p + alpha q)."""
    return _masked(divergence.skew_reverse_kl, p_logits, q_logits, mask, alpha=alpha)


def tvd(p_logits: Tensor, q_logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Total variation distance, 1/2 sum |p - q|."""
    return _masked(divergence.tvd, p_logits, q_logits, mask)


def cross_entropy(p_logits: Tensor | None, q_logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """-log q of the label: fine-tuning without a teacher (p_logits may be None)."""
    per_token = F.cross_entropy(_clean(q_logits, mask), _valid(labels, mask), reduction="none")
    return per_token.masked_fill(~mask, 0)


# --- ATKD (Zhong et al., ACL 2024) -----------------------------------------------------------------------------------


def atkd_tokens(
    p_logits: Tensor,
    q_logits: Tensor,
    labels: Tensor,
    mask: Tensor,
    *,
    hard: Tensor,
    lam: float = 0.2,
    direction: str = "forward",
) -> Tensor:
    """lam DKD for easy tokens, (1 - lam) (TKD + DKD) for hard ones (`hard` bool [N]).

    TKD = KL([p_g, 1 - p_g] ‖ [q_g, 1 - q_g]); DKD = KL(p' ‖ q'), both without the label g and renormalised;
    `reverse` swaps the roles of p and q in both. Weights: `atkd_weights`; the split: `atkd_threshold`.
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"lam is {lam}: give the weight of the easy tokens, from 0 to 1; the paper uses 0.2")
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction is {direction!r}: choose forward or reverse")
    kl = divergence.forward_kl if direction == "forward" else divergence.reverse_kl
    target = _valid(labels, mask)[:, None]
    p_pair, p_others = _target_and_others(_clean(p_logits.detach(), mask), target)
    q_pair, q_others = _target_and_others(_clean(q_logits, mask), target)
    tkd, dkd = kl(p_pair, q_pair), kl(p_others, q_others)
    return torch.where(hard, (1 - lam) * (tkd + dkd), lam * dkd).masked_fill(~mask, 0)


@torch.no_grad()
def uncertainty(p_logits: Tensor, labels: Tensor) -> Tensor:
    """ATKD's UnC = 1 - p_g, [N], summed over the other ids: the difference 1 - p_g loses all digits near p_g = 1."""
    if fused := kernels.find("divergence", p_logits):
        found: Tensor = fused.uncertainty(p_logits, labels)
        return found
    log_p = _at_least_fp32(p_logits).log_softmax(dim=-1)
    return log_p.scatter_(1, labels[:, None].to(log_p.device), -math.inf).exp_().sum(dim=-1)


def atkd_threshold(unc: Tensor, *, hard_frac: float = 0.5) -> float:
    """sorted(UnC)[floor((1 - hard_frac) (n - 1))], n valid tokens of the step: hard iff UnC >= it. 0.0 for n = 0."""
    if not 0 <= hard_frac <= 1:
        raise ValueError(f"hard_frac is {hard_frac}: give a share of the tokens, from 0 to 1; the paper uses 0.5")
    if unc.numel() == 0:
        return 0.0
    index = math.floor((1 - hard_frac) * (unc.numel() - 1) + 1e-9)  # (1 - 0.9) * 10 is 0.99..98 in floats
    return unc.flatten().kthvalue(index + 1).values.item()


# --- the weights of a step -------------------------------------------------------------------------------------------


def token_weights(mask: Tensor, *, num_loss_tokens: float | None = None) -> Tensor:
    """1 / num_loss_tokens for each trained token, float32 [N]; by default the number of tokens in `mask`."""
    return mask / max(float(mask.sum()) if num_loss_tokens is None else num_loss_tokens, 1)


def atkd_weights(mask: Tensor, hard: Tensor, *, num_easy: float | None = None, num_hard: float | None = None) -> Tensor:
    """1 / N_easy for easy tokens and 1 / N_hard for hard ones, float32 [N]; an empty group contributes 0."""
    easy_weights = token_weights(mask & ~hard, num_loss_tokens=num_easy)
    return easy_weights + token_weights(mask & hard, num_loss_tokens=num_hard)


# --- shared parts ----------------------------------------------------------------------------------------------------


def _masked(
    function: Callable[..., Tensor], p_logits: Tensor, q_logits: Tensor, mask: Tensor, **numbers: float
) -> Tensor:
    if not kernels.find("divergence", q_logits):  # a kernel's gradient of a masked row is 0 for any content
        p_logits, q_logits = _clean(p_logits, mask), _clean(q_logits, mask)
    return function(p_logits, q_logits, **numbers).masked_fill(~mask, 0)


def _clean(logits: Tensor, mask: Tensor) -> Tensor:
    """Zero masked rows. Trap: masking the loss alone would let a NaN there reach the gradient as 0 * NaN."""
    return _at_least_fp32(logits).masked_fill(~mask[:, None], 0)


def _valid(labels: Tensor, mask: Tensor) -> Tensor:
    """Labels with 0 where masked out: padding may be any number there, such as -100."""
    return labels.masked_fill(~mask, 0)


def _at_least_fp32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _target_and_others(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of [g, not g], [N, 2], and of the ids without g, [N, V]: a softmax renormalises each."""
    others = logits.scatter(1, target, torch.finfo(logits.dtype).min)  # finite: g may be the only id that is not -inf
    return torch.cat([logits.gather(1, target), others.logsumexp(dim=-1, keepdim=True)], dim=1), others
