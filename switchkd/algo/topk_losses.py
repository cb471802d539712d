"""Losses of compressed teacher rows (`teacher.output: top_logprobs`): ordinary losses of coarse-grained distributions.

    loss(row TopK [N], q_logits [N, V], labels int64 [N], mask bool [N], **numbers) -> [N], at least fp32

Both distributions are over the teacher's top k ids, S, and one bin for all other ids, T; P = the teacher's mass in T.
By the data-processing inequality the loss is at most that of full rows. The error of the gradient in the student's
logits, as the L1 distance from the gradient of full rows (an id's gradient has a part a_i due to p_i, at most
factor * p_i in size; the coarse gradient moves a_T within T and shifts the rest by q times the change of its sum):

    forward_kl        exact on S, off by at most 2 P on T: the full KL is larger by P KL(p_T / P ‖ q_T / Q)
    skew_kl           at most 3 P
    jsd               at most 3 beta P
    tvd               at most 3 P (not at its kinks, p_i = q_i, where a gradient is any of many)
    atkd (forward)    UnC, the split and TKD are exact for a label in S; for one in T the rollout's UnC takes the mean
                      over T as its p, and TKD is exact for that; DKD is the forward KL of the distributions without
                      the label: off by at most 2 P' / UnC, P' = P without the label's part
    skew_reverse_kl   at most 0.65 (1 - alpha) / alpha P: 5.9 P at alpha = 0.1, so it needs the user's consent

reverse_kl, atkd's reverse direction and a user's losses have no bound: a tail id's p may be any number near 0.
`BOUNDED` names the losses that need no consent (`learner.loss.approximate`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from switchkd.algo import losses
from switchkd.algo.topk import TopK, coarse_grain, coarse_grain_around, place_of

BOUNDED = ("forward_kl", "skew_kl", "jsd", "tvd", "cross_entropy")  # and `atkd` in its forward direction


def coarse(
    loss: Callable[..., Tensor], row: TopK, q_logits: Tensor, labels: Tensor, mask: Tensor, **numbers: object
) -> Tensor:
    """Any loss of rows, of the coarse-grained distributions, [N]; the bin is the label of a token in the tail."""
    p, q = coarse_grain(row, _clean(q_logits, mask))
    return loss(p, q, place_of(row, labels), mask, **numbers)


def atkd_tokens(
    row: TopK, q_logits: Tensor, labels: Tensor, mask: Tensor, *, unc: Tensor, hard: Tensor, **numbers: object
) -> Tensor:
    """ATKD with a separate bin for a label of the tail; `unc` [N] is the teacher's 1 - p(label). The rollout has it in
    float32, whose rounding changes TKD by about 1e-6."""
    labels = labels.masked_fill(~mask, 0)
    p, q, place = coarse_grain_around(row, _clean(q_logits, mask), labels, unc.masked_fill(~mask, 1.0))
    return losses.atkd_tokens(p, q, place, mask, hard=hard, **numbers)  # type: ignore[arg-type]


def _clean(q_logits: Tensor, mask: Tensor) -> Tensor:
    """Zero masked rows: a NaN there would reach the gradient."""
    return q_logits.to(torch.promote_types(q_logits.dtype, torch.float32)).masked_fill(~mask[:, None], 0)
