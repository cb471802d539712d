"""Losses from compressed teacher rows (`teacher.output: top_logprobs`): the ordinary losses of coarse-grained laws.

    loss(row TopK [N], q_logits [N, V], labels int64 [N], mask bool [N], **numbers) -> [N], at least fp32

Both laws are taken on the teacher's top k ids, S, and one bin for all the rest, T; P = the teacher's mass there. By the
data-processing inequality the value is at most that of full rows. What it does to the gradient in the student's logits,
as the L1 distance from the gradient of full rows (a_i below is the part of an id's gradient that its p carries, at most
factor * p_i in size, and the coarse gradient moves a_T within T and shifts the rest by q times the change of its sum):

    forward_kl        exact on S, off by at most 2 P on T: the full KL is larger by P KL(p_T / P ‖ q_T / Q)
    skew_kl           at most 3 P
    jsd               at most 3 beta P
    tvd               at most 3 P (not at its kinks, p_i = q_i, where a gradient is any of many)
    atkd (forward)    UnC, the split and TKD are exact for a label in S; for one in T the rollout's UnC takes the mean
                      over T as its p, and TKD is exact for that; DKD is the forward KL of the laws without the label:
                      off by at most 2 P' / UnC, P' = P less the label's part
    skew_reverse_kl   at most 0.65 (1 - alpha) / alpha P: 5.9 P at alpha = 0.1, too much to pass unasked

reverse_kl, atkd's reverse direction and losses of a user's own have no bound: a tail id's p may be any number near 0.
`BOUNDED` names those that need no consent (`learner.loss.approximate`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from switchkd.algo import losses
from switchkd.algo.topk import TopK, coarse_grain, coarse_grain_around, place_of

BOUNDED = ("forward_kl", "skew_kl", "jsd", "tvd", "cross_entropy")
"""`atkd` too, in its forward direction."""


def coarse(
    loss: Callable[..., Tensor], row: TopK, q_logits: Tensor, labels: Tensor, mask: Tensor, **numbers: object
) -> Tensor:
    """Any loss of rows, on the coarse-grained laws; a label of the tail is the bin. [N]."""
    p, q = coarse_grain(row, _clean(q_logits, mask))
    return loss(p, q, place_of(row, labels), mask, **numbers)


def atkd_tokens(
    row: TopK, q_logits: Tensor, labels: Tensor, mask: Tensor, *, unc: Tensor, hard: Tensor, **numbers: object
) -> Tensor:
    """ATKD with a bin of its own for a label of the tail; `unc` [N] is the teacher's 1 - p(label), which the rollout
    carries in float32: TKD is off by its rounding, some 1e-6."""
    labels = labels.masked_fill(~mask, 0)
    p, q, place = coarse_grain_around(row, _clean(q_logits, mask), labels, unc.masked_fill(~mask, 1.0))
    return losses.atkd_tokens(p, q, place, mask, hard=hard, **numbers)  # type: ignore[arg-type]


def _clean(q_logits: Tensor, mask: Tensor) -> Tensor:
    """With zeros in masked rows: a NaN there would reach the gradient."""
    return q_logits.to(torch.promote_types(q_logits.dtype, torch.float32)).masked_fill(~mask[:, None], 0)
