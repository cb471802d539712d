"""Rows of a distribution cut to their k most likely ids and two numbers for the tail: `teacher.output: top_logprobs`.

In: logits [N, V]. Out: `TopK`, its packed form for the wire, and the distributions of the teacher and the student over
the k ids and one bin for all other ids (coarse-graining).

Shapes: N rows, V vocabulary, K ids that are kept; S = the kept ids, T = the tail, the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS_AT_ONCE = 64  # whole rows that exist at the same time in `compress_packed`


@dataclass(frozen=True, slots=True)
class TopK:
    """The part of teacher rows p that is sent. Ids are ordered by probability, equal ones by id."""

    ids: Tensor  # int64 [N, K]
    logprobs: Tensor  # [N, K], ln p, not rising; rounded to float32
    tail_mass: Tensor  # [N], P = sum_T p
    tail_entropy: Tensor  # [N], H = -sum_T p ln p

    def __len__(self) -> int:
        return len(self.ids)

    def of(self, rows: Tensor | slice) -> TopK:
        return TopK(self.ids[rows], self.logprobs[rows], self.tail_mass[rows], self.tail_entropy[rows])

    def to(self, device: torch.device) -> TopK:
        parts = (self.ids, self.logprobs, self.tail_mass, self.tail_entropy)
        return TopK(*(part.to(device) for part in parts))


@torch.no_grad()
def compress(logits: Tensor, k: int) -> TopK:
    """Float rows [N, V] to their top min(k, V). Sums are in float64, so that the tail keeps its digits."""
    k = min(k, logits.shape[1])
    ids = first_ids(logits, k)
    log_p = logits.double().log_softmax(dim=-1)
    kept = log_p.gather(1, ids)
    rest = log_p.scatter_(1, ids, -math.inf)
    p = rest.exp()
    entropy = -torch.xlogy(p, p).sum(dim=-1)
    return TopK(ids, kept.float(), p.sum(dim=-1).float(), entropy.float())


def pack(rows: TopK) -> Tensor:
    """int32 [N, 2 K + 2]: ids, then the bits of float32 numbers (an integer array crosses every wire unchanged)."""
    numbers = torch.cat([rows.logprobs, rows.tail_mass[:, None], rows.tail_entropy[:, None]], dim=1).float()
    return torch.cat([rows.ids.int(), numbers.contiguous().view(torch.int32)], dim=1)


def compress_packed(logits_of: Callable[[Tensor], Tensor], rows: Tensor, k: int) -> Tensor:
    """Packed top k of the logits that `logits_of` makes of `rows`, a few rows at a time: int32 [N, 2 K + 2]."""
    return torch.cat([pack(compress(logits_of(part), k)) for part in rows.split(_ROWS_AT_ONCE)])


def unpack(words: Tensor) -> TopK:
    """The inverse of `pack`."""
    k = (words.shape[1] - 2) // 2
    numbers = words[:, k:].contiguous().view(torch.float32)
    return TopK(words[:, :k].long(), numbers[:, :k], numbers[:, k], numbers[:, k + 1])


def concatenated(parts: list[TopK]) -> TopK:
    """Join the rows of parts that have the same K."""
    return TopK(
        torch.cat([part.ids for part in parts]),
        torch.cat([part.logprobs for part in parts]),
        torch.cat([part.tail_mass for part in parts]),
        torch.cat([part.tail_entropy for part in parts]),
    )


def place_of(rows: TopK, token_ids: Tensor) -> Tensor:
    """Index of token_ids [N] among the kept ids, int64 [N]; K for an id of the tail."""
    hit = rows.ids == token_ids[:, None]
    return torch.where(hit.any(dim=1), hit.int().argmax(dim=1), rows.ids.shape[1])


def spread(rows: TopK, vocab_size: int) -> Tensor:
    """Float32 log-probs [N, V] with the tail's mass spread evenly over its ids, each below the K-th kept one."""
    last = rows.logprobs[:, -1].double()
    level = (rows.tail_mass.double() / max(vocab_size - rows.ids.shape[1], 1)).log()
    out = torch.minimum(level, last - 1e-6).float()[:, None].repeat(1, vocab_size)
    return out.scatter(1, rows.ids, rows.logprobs.float())


def kept(rows: TopK) -> Tensor:
    """Float32 log-probs [N, largest kept id + 1], -inf outside the kept ids, for draws among the kept ids only."""
    out = rows.logprobs.new_full((len(rows), int(rows.ids.max()) + 1), -math.inf)
    return out.scatter(1, rows.ids, rows.logprobs)


def coarse_grain(rows: TopK, q_logits: Tensor) -> tuple[Tensor, Tensor]:
    """ln p and ln q on the kept ids and one bin for the tail, both [N, K + 1]; differentiable in q_logits [N, V]."""
    dtype = torch.promote_types(q_logits.dtype, torch.float32)
    q_logits = q_logits.to(dtype)
    inside = q_logits.gather(1, rows.ids)
    rest = tail_of(q_logits, rows.ids).logsumexp(dim=-1, keepdim=True)
    p = torch.cat([rows.logprobs, rows.tail_mass[:, None].log()], dim=1).to(dtype)
    return p, torch.cat([inside, rest], dim=1).log_softmax(dim=-1)


def coarse_grain_around(rows: TopK, q_logits: Tensor, token_ids: Tensor, unc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`coarse_grain` with a separate bin for a token of the tail: ln p and ln q [N, K + 2], and each token's index
    there, int64 [N]. `unc` [N] is 1 - p(token), read for tokens of the tail only."""
    dtype = torch.promote_types(q_logits.dtype, torch.float32)
    q_logits = q_logits.to(dtype)
    k = rows.ids.shape[1]
    place = place_of(rows, token_ids)
    outside = (place == k)[:, None]
    none = torch.finfo(dtype).min
    token = q_logits.gather(1, token_ids[:, None]).masked_fill(~outside, none)
    rest = tail_of(tail_of(q_logits, rows.ids), token_ids[:, None]).logsumexp(dim=-1, keepdim=True)
    q = torch.cat([q_logits.gather(1, rows.ids), token, rest], dim=1).log_softmax(dim=-1)
    p_token = torch.where(outside[:, 0], (1 - unc.double()).clamp(min=0), 0.0)
    p_rest = (rows.tail_mass.double() - p_token).clamp(min=0)
    p = torch.cat([rows.logprobs.double(), p_token[:, None].log(), p_rest[:, None].log()], dim=1).to(dtype)
    return p, q, place


def tail_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Logits with the most negative number at `ids`. It is finite, so that a row without a tail has no NaN gradient."""
    return logits.scatter(1, ids, torch.finfo(logits.dtype).min)


def first_ids(logits: Tensor, k: int) -> Tensor:
    """The first k ids of rows [N, V] by value, equal ones by id. Trap: `topk` alone takes any of the ids that tie."""
    values, ids = logits.topk(k, dim=1)
    last = values[:, -1:]
    for row in torch.nonzero((logits >= last).sum(dim=1) > k)[:, 0].tolist():
        above = torch.nonzero(logits[row] > last[row])[:, 0]
        level = torch.nonzero(logits[row] == last[row])[: k - len(above), 0]
        ids[row] = torch.cat([above, level])
    ids = ids.sort(dim=1).values
    order = logits.gather(1, ids).sort(dim=1, descending=True, stable=True).indices
    return ids.gather(1, order)
