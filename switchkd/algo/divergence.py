"""How far apart two next-token distributions are: one number per row of logits, without gradients.

In: teacher's and student's logits, [N, V] each, any float type, -inf allowed at the same ids of both.
Out: float64 [N], in nats unless said otherwise. Rows are worked on a few at a time, in at least fp32, so that the
memory taken beside the logits stays at a few rows.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_CPU_ELEMENTS = 2**16  # a chunk that stays in the cache of a core
_DEVICE_ELEMENTS = 2**24


def kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p‖q) = sum p ln(p / q)."""
    return _per_row(_kl, p_logits, q_logits)


def reverse_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(q‖p) = sum q ln(q / p)."""
    return _per_row(_kl, q_logits, p_logits)


def jsd(p_logits: Tensor, q_logits: Tensor, *, log_base: float = math.e) -> Tensor:
    """1/2 KL(p‖m) + 1/2 KL(q‖m), m = (p + q) / 2: the statistic of SWITCH (arXiv 2410.19503). In [0, 1] for base 2."""
    if not log_base > 1:
        raise ValueError(f"log_base is {log_base}: choose a base above 1, such as 2 (JSD in [0, 1]) or e (nats)")
    return _per_row(_jsd, p_logits, q_logits).clamp_(max=math.log(2)) / math.log(log_base)


def entropy(logits: Tensor) -> Tensor:
    """-sum p ln p."""
    return _per_row(_entropy, logits)


@torch.no_grad()
def agreement(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Whether both have the same most likely id, bool [N]; of equal logits the lowest id counts."""
    return p_logits.argmax(dim=-1) == q_logits.argmax(dim=-1)


@torch.no_grad()
def _per_row(of_chunk: Callable[..., Tensor], *logits: Tensor) -> Tensor:
    num, vocab = logits[0].shape
    out = torch.empty(num, dtype=torch.float64, device=logits[0].device)
    for rows in _chunks(num, vocab, logits[0].device):
        out[rows] = of_chunk(*(_at_least_fp32(x[rows]) for x in logits)).double()
    return out.clamp_(min=0)  # rounding, these are sums of signed terms


def _chunks(num: int, vocab: int, device: torch.device) -> Iterator[slice]:
    size = max((_CPU_ELEMENTS if device.type == "cpu" else _DEVICE_ELEMENTS) // vocab, 1)
    return (slice(start, start + size) for start in range(0, num, size))


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    log_ratio = p_logits.log_softmax(dim=-1)
    p = log_ratio.exp()
    log_ratio.sub_(q_logits.log_softmax(dim=-1))
    return log_ratio.masked_fill_(p == 0, 0).mul_(p).sum(dim=-1)  # 0 ln 0 = 0


def _jsd(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    # 2p/(p+q) = 1 + d and 2q/(p+q) = 1 - d with d = (p-q)/(p+q): log1p keeps its digits where p is close to q
    p, q = p_logits.softmax(dim=-1), q_logits.softmax(dim=-1)
    info = torch.finfo(p.dtype)
    d = (p - q).div_((p + q).clamp_(min=info.tiny))
    d.clamp_(info.eps - 1, 1 - info.eps)  # where one of them is 0 its term is 0 times a finite number
    q_terms = d.neg().log1p_().mul_(q)
    return d.log1p_().mul_(p).add_(q_terms).sum(dim=-1).div_(2)


def _entropy(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(dim=-1)
    p = log_p.exp()
    return log_p.masked_fill_(p == 0, 0).mul_(p).sum(dim=-1).neg_()
