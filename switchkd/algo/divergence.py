"""Divergences of two next-token distributions: one number per row of logits.

In: teacher's and student's logits, [..., V] each, any float type, -inf allowed at the same ids of both. Out: [...] in
nats by default, computed and returned in fp32, or in fp64 for fp64 inputs. The student's logits get a gradient, the
teacher's none. p = softmax(teacher_logits), q = softmax(student_logits).

`per_row` computes the numbers for switching rules, without gradients and a few rows at a time.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from switchkd.algo import kernels

_FLOOR = -1e4  # in place of log 0: exp gives 0, and the difference of two is 0 instead of NaN
_CPU_ELEMENTS = 2**16  # of a chunk that fits the cache of a core
DEVICE_ELEMENTS = 2**24


def forward_kl(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """KL(p‖q) = sum p ln(p / q)."""
    if fused := _kernel(student_logits):
        return fused("forward_kl", teacher_logits, student_logits)
    return _kl(*_logs(teacher_logits, student_logits))


def reverse_kl(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """KL(q‖p) = sum q ln(q / p)."""
    if fused := _kernel(student_logits):
        return fused("reverse_kl", teacher_logits, student_logits)
    log_p, log_q = _logs(teacher_logits, student_logits)
    return _kl(log_q, log_p)


def jsd(teacher_logits: Tensor, student_logits: Tensor, *, beta: float = 0.5, log_base: float = math.e) -> Tensor:
    """beta KL(p‖m) + (1 - beta) KL(q‖m), m = beta p + (1 - beta) q: beta is the teacher's share (GKD, 2306.13649).

    In base 2 with beta 1/2 it is in [0, 1] and the statistic of SWITCH (arXiv 2410.19503).
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta is {beta}: the JSD is zero at 0 and 1; choose between them, or forward_kl, reverse_kl")
    if not log_base > 1:
        raise ValueError(f"log_base is {log_base}: choose a base above 1, such as 2 (JSD in [0, 1]) or e (nats)")
    if fused := _kernel(student_logits):
        return fused("jsd", teacher_logits, student_logits, beta) / math.log(log_base)
    p, q = (x.softmax(dim=-1) for x in _inputs(teacher_logits, student_logits))
    # p/m = 1 + (1 - beta) d and q/m = 1 - beta d with d = (p-q)/m: log1p keeps its digits where p is close to q, if
    # both terms of an id are added before the ids are. In place where autograd allows it, since rules wait for this.
    info = torch.finfo(p.dtype)
    most = 1 - 4 * info.eps  # where p or q is 0 its term is then 0 times a finite number
    d = (p - q).div_(torch.lerp(q, p, beta).clamp_(min=info.tiny / info.eps)).clamp_(-most / (1 - beta), most / beta)
    q_terms = (-beta * d).log1p_().mul_(q)
    nats = d.mul_(1 - beta).log1p_().mul_(p).lerp_(q_terms, 1 - beta).sum(dim=-1)
    largest = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)  # of distributions that share no id
    return nats.clamp(max=largest) / math.log(log_base)


def skew_kl(teacher_logits: Tensor, student_logits: Tensor, *, alpha: float = 0.1) -> Tensor:
    """KL(p ‖ alpha p + (1 - alpha) q) (DistiLLM, arXiv 2402.03898, eq. 4)."""
    _check_alpha(alpha)
    if fused := _kernel(student_logits):
        return fused("skew_kl", teacher_logits, student_logits, alpha)
    return _skewed(*_logs(teacher_logits, student_logits), alpha)


def skew_reverse_kl(teacher_logits: Tensor, student_logits: Tensor, *, alpha: float = 0.1) -> Tensor:
    """KL(q ‖ (1 - alpha) p + alpha q) (DistiLLM; the loss of SWITCH's main results)."""
    _check_alpha(alpha)
    if fused := _kernel(student_logits):
        return fused("skew_reverse_kl", teacher_logits, student_logits, alpha)
    log_p, log_q = _logs(teacher_logits, student_logits)
    return _skewed(log_q, log_p, alpha)


def tvd(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Total variation distance, 1/2 sum |p - q|."""
    if fused := _kernel(student_logits):
        return fused("tvd", teacher_logits, student_logits)
    p, q = (x.softmax(dim=-1) for x in _inputs(teacher_logits, student_logits))
    return (p - q).abs().sum(dim=-1) / 2


# --- numbers for rules, without gradients ----------------------------------------------------------------------------


@torch.no_grad()
def per_row(function: Callable[..., Tensor], *logits: Tensor, **numbers: float) -> Tensor:
    """`function` of rows [N, V], at least zero, float64 [N]. It needs the memory of a few rows beside the logits."""
    num, vocab = logits[0].shape
    out = torch.empty(num, dtype=torch.float64, device=logits[0].device)
    for rows in few_rows(num, vocab, logits[0].device):
        out[rows] = function(*(x[rows] for x in logits), **numbers).double()
    return out.clamp_(min=0)  # sums of signed terms may round to below zero


def entropy(logits: Tensor) -> Tensor:
    """-sum p ln p of rows [N, V], float64 [N]."""
    return per_row(_entropy, logits)


@torch.no_grad()
def agreement(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Whether both have the same most likely id, bool [N]; among equal logits the lowest id counts."""
    return p_logits.argmax(dim=-1) == q_logits.argmax(dim=-1)


# --- shared parts ----------------------------------------------------------------------------------------------------


def _kernel(logits: Tensor) -> Callable[..., Tensor] | None:
    """The Triton kernels of all divergences and their gradients where the logits' device runs them."""
    module = kernels.find("divergence", logits)
    return module.row_divergence if module else None


def _inputs(teacher_logits: Tensor, student_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype, at least fp32, the teacher's without a gradient."""
    dtype = torch.promote_types(torch.promote_types(teacher_logits.dtype, student_logits.dtype), torch.float32)
    return teacher_logits.detach().to(dtype), student_logits.to(dtype)


def _logs(teacher_logits: Tensor, student_logits: Tensor) -> tuple[Tensor, Tensor]:
    """ln p and ln q, with a finite number for ln 0."""
    p_logits, q_logits = _inputs(teacher_logits, student_logits)
    return p_logits.log_softmax(dim=-1).clamp(min=_FLOOR), q_logits.log_softmax(dim=-1).clamp(min=_FLOOR)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(dim=-1)


def _skewed(log_a: Tensor, log_b: Tensor, alpha: float) -> Tensor:
    """KL(a ‖ alpha a + (1 - alpha) b) = -sum a ln(alpha + (1 - alpha) b / a)."""
    if alpha == 0:
        return _kl(log_a, log_b)
    share = log_a.new_full((), math.log(alpha))
    return -(log_a.exp() * torch.logaddexp(share, log_b - log_a + math.log1p(-alpha))).sum(dim=-1)


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha is {alpha}: give a share from 0 up to, but not, 1; the papers use 0.1")


def _entropy(logits: Tensor) -> Tensor:
    if module := kernels.find("divergence", logits):
        found: Tensor = module.entropy(logits)
        return found
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1).clamp(min=_FLOOR)
    return -(log_p.exp() * log_p).sum(dim=-1)


def few_rows(num: int, vocab: int, device: torch.device, on_cpu: int | None = None) -> Iterator[slice]:
    """Slices of `num` rows, each of about `on_cpu` elements (a core's cache) on a CPU, DEVICE_ELEMENTS elsewhere."""
    size = max(((on_cpu or _CPU_ELEMENTS) if device.type == "cpu" else DEVICE_ELEMENTS) // vocab, 1)
    return (slice(start, min(start + size, num)) for start in range(0, num, size))
