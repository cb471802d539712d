"""Certified intervals: where a divergence of the full rows must lie when only the teacher's top k ids travelled.

In: `TopK` rows of the teacher (p), the student's logits [N, V] (q). Out: (low, high), float64 [N] each, in nats, with
the full rows' value between them: the exact one, and the one that float32 rows give (`_SLACK` covers both roundings).

Known of p: S, the top k ids with their probabilities; c, the k-th of them, which no id of the tail T exceeds; P and H,
the tail's mass and entropy. Q = the student's mass on T. All of q is known.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from switchkd.algo.topk import TopK, place_of, tail_of

_TINY = 1e-300
_SLACK = 1e-5
"""How far rounding moves either end, absolute and relative: of what travelled (float32), of these sums, and of the
float32 statistic of full rows whose decisions must be met. The largest of them is near 2e-6."""
_BETAS = (0.6, 0.8, 1.0, 1.3, 2.0)
"""Each gives a valid bound; the best of them is taken."""

Interval = tuple[Tensor, Tensor]


def jsd_interval(row: TopK, q_logits: Tensor, *, tight: bool = True) -> Interval:
    """JSD(p, q) = 1/2 KL(p‖m) + 1/2 KL(q‖m).

    Cheap: [sum_S phi + phi(P, Q), sum_S phi + (P + Q) ln(2) / 2]. Tight: the tail's least and largest sum of phi under
    p <= c and sum p = P: least at p* = min(c, alpha q); largest with c on the ids of smallest q.
    """
    known = _known(row, q_logits)
    inside = _phi(known.log_p.exp(), known.log_q.exp()).sum(dim=1)
    if tight:
        low, high = _tail_jsd(known)
    else:
        low, high = _phi(known.P, known.Q), (known.P + known.Q) * (math.log(2) / 2)
    return _widened(inside + low, inside + high, top=math.log(2))


def forward_kl_interval(row: TopK, q_logits: Tensor) -> Interval:
    """KL(p‖q) = sum_S p ln(p / q) - H + X, X = -sum_T p ln q.

    X lies above -sum_T w ln q and max over beta of [-beta P ln sum_T q^(1/beta) + beta (H + P ln P)], below
    -sum_T v ln q and min over beta of [beta P ln sum_T q^(-1/beta) - beta (H + P ln P)]; w and v put c on the ids of
    the largest and smallest q. beta = 1 below is coarse-graining.
    """
    known = _known(row, q_logits)
    inside = (known.log_p.exp() * (known.log_p - known.log_q)).sum(dim=1)
    H = row.tail_entropy.double()
    low, high = _capped_cross(known, H)
    return _widened(inside - H + low, inside - H + high)


def reverse_kl_interval(row: TopK, q_logits: Tensor) -> Interval:
    """KL(q‖p) from below: sum_S q ln(q / p) + sum_T q ln(q / p*), p* = min(c, alpha q). No finite upper end: a tail id
    of the teacher may have any probability down to 0."""
    known = _known(row, q_logits)
    inside = (known.log_q.exp() * (known.log_q - known.log_p.clamp(min=-1e4))).sum(dim=1)
    clipped, alpha, rest = _water(known)
    c = known.c[:, None].clamp(min=_TINY)
    over = torch.where(clipped > 0, clipped * (clipped.clamp(min=_TINY) / c).log() + c / alpha[:, None], 0.0)
    low = over.sum(dim=1) + rest * (1 - alpha.log()) - known.P / alpha  # the dual, as in _tail_jsd
    low, _ = _widened(inside + torch.where(known.P > 0, low, 0.0), low)
    return low, torch.full_like(low, math.inf)


def rank_interval(row: TopK, token_ids: Tensor, vocab_size: int) -> Interval:
    """The rank of token_ids [N] in p, 1 for the first: known among the top k, above k elsewhere."""
    place = place_of(row, token_ids)
    k = row.ids.shape[1]
    low = (place + 1).double()
    return low, torch.where(place < k, low, float(vocab_size))


class _Known(NamedTuple):
    """Of the kept ids [N, K], and of the tail [N]; float64."""

    log_p: Tensor
    log_q: Tensor
    tail: Tensor  # [N, V], q_logits on T
    norm: Tensor  # [N, 1], ln sum exp(q_logits)
    P: Tensor
    Q: Tensor
    c: Tensor
    num_tail: int


def _known(row: TopK, q_logits: Tensor) -> _Known:
    norm = q_logits.logsumexp(dim=-1, keepdim=True).double()
    tail = tail_of(q_logits, row.ids)
    return _Known(
        log_p=row.logprobs.double(),
        log_q=q_logits.gather(1, row.ids).double() - norm,
        tail=tail,
        norm=norm,
        P=row.tail_mass.double(),
        Q=(tail.double() - norm).exp_().sum(dim=1),  # in float64: what is left of it after the largest counts
        c=row.logprobs[:, -1].double().exp() * (1 + 1e-6),
        num_tail=q_logits.shape[1] - row.ids.shape[1],
    )


def _phi(a: Tensor, b: Tensor) -> Tensor:
    """1/2 [a ln(2a / (a+b)) + b ln(2b / (a+b))], 0 for a = b = 0."""
    m = ((a + b) / 2).clamp(min=_TINY)
    return 0.5 * (torch.xlogy(a, a / m) + torch.xlogy(b, b / m))


def _widened(low: Tensor, high: Tensor, top: float = math.inf) -> Interval:
    return (low - _SLACK * (1 + low.abs())).clamp(min=0), (high + _SLACK * (1 + high.abs())).clamp(0, top + _SLACK)


def _num_full(known: _Known) -> Tensor:
    """How many tail ids can hold c: floor(P / c), int64 [N]."""
    return (known.P / known.c.clamp(min=_TINY)).floor().clamp(0, known.num_tail).long()


def _extremes(known: _Known, *, largest: bool) -> tuple[Tensor, Tensor]:
    """The log-probs ln q of the tail's `largest` (or smallest) ids in order, float64 [N, m], and the mass that c-sized
    pieces of P put on them [N, m]. m = the most pieces of any row, the last of each row holds the remainder."""
    num_full = _num_full(known)
    tail = known.tail
    m = min(int(num_full.max()) + 1, known.num_tail) if len(tail) else 0
    source = tail if largest else tail.masked_fill(tail == torch.finfo(tail.dtype).min, math.inf)
    values = source.topk(m, dim=1, largest=largest).values.double() - known.norm
    index = torch.arange(m, device=tail.device)[None]
    left = (known.P - num_full * known.c).clamp(min=0)[:, None]
    mass = torch.where(index < num_full[:, None], known.c[:, None], torch.where(index == num_full[:, None], left, 0.0))
    return values, mass


def _tail_jsd(known: _Known) -> Interval:
    """The least and the largest sum over T of phi(p, q)."""
    clipped, alpha, rest = _water(known)
    # the Lagrange dual at alpha: a lower bound for every alpha, so that a rounded one does no harm
    multiplier = 0.5 * (2 * alpha / (1 + alpha)).log()
    c = known.c[:, None]
    low = torch.where(clipped > 0, _phi(c, clipped) - multiplier[:, None] * c, 0.0).sum(dim=1)
    low = low + rest * 0.5 * (2 / (1 + alpha)).log() + multiplier * known.P
    log_q, mass = _extremes(known, largest=False)
    q = log_q.exp()
    high = torch.where(mass > 0, _phi(mass, q) - _phi(torch.zeros_like(q), q), 0.0).sum(dim=1)
    high = high + known.Q * (math.log(2) / 2)
    return torch.maximum(low, _phi(known.P, known.Q)), torch.minimum(high, (known.P + known.Q) * (math.log(2) / 2))


def _water(known: _Known) -> tuple[Tensor, Tensor, Tensor]:
    """p* = min(c, alpha q) on T: q where p* = c (else 0) [N, m], alpha [N], and the mass of q where p* = alpha q [N].


    The clipped ids are those of largest q. With j of them alpha = (P - j c) / (Q - their q); the least j fits that
    leaves the next id at or below c.
    """
    log_q, _ = _extremes(known, largest=True)
    q = log_q.exp()
    zero = torch.zeros(len(q), 1, dtype=q.dtype, device=q.device)
    above = torch.cat([zero, q.cumsum(dim=1)], dim=1)  # [N, m + 1]: the j largest
    j = torch.arange(above.shape[1], device=q.device)[None]
    rest = (known.Q[:, None] - above).clamp(min=0)
    alpha = (known.P[:, None] - j * known.c[:, None]).clamp(min=0) / rest.clamp(min=_TINY)
    following = torch.cat([q, zero], dim=1)
    fits = alpha * following <= known.c[:, None] * (1 + 1e-9)
    fits[:, -1] = True
    num = fits.int().argmax(dim=1, keepdim=True)
    best = alpha.gather(1, num)[:, 0].clamp(min=1e-12)
    clipped = torch.where(best[:, None] * q > known.c[:, None], q, 0.0)
    return clipped, best, (known.Q - clipped.sum(dim=1)).clamp(min=0)


def _capped_cross(known: _Known, H: Tensor) -> Interval:
    """The ends of X = -sum_T p ln q."""
    ends = []
    for largest in (True, False):
        log_q, mass = _extremes(known, largest=largest)
        ends.append(-torch.where(mass > 0, mass * log_q.clamp(min=-1e4), 0.0).sum(dim=1))
    low, high = ends
    own = H + torch.xlogy(known.P, known.P)  # P times the entropy of p on T alone
    tail = known.tail
    inside = tail == torch.finfo(tail.dtype).min
    log_q = (tail - known.norm.to(tail.dtype)).clamp(min=-1e4).masked_fill(inside, -math.inf)
    for beta in _BETAS:
        spread = (log_q / beta).logsumexp(dim=1).double()
        low = torch.maximum(low, beta * (own - known.P * spread))
        spread = (-log_q / beta).masked_fill(inside, -math.inf).logsumexp(dim=1).double()
        high = torch.minimum(high, beta * (known.P * spread - own))
    none = known.P <= 0
    return low.masked_fill(none, 0.0), high.masked_fill(none, 0.0)
