"""Triton kernels of the divergences, their gradient, the entropy and ATKD's uncertainty.

In: logits [N, V] of any float type. Out: one number per row, as from `algo.divergence` and `algo.losses`, in float32,
or float64 for float64 inputs.

One program computes one row. The first pass finds the maximum and the sum of exponentials, of both rows at once; the
second sums the terms. A gradient needs one more pass, which writes it: with G = d value / d ln q by id, it is
G - q sum(G) in the student's logits, and the forward kernel stores sum(G).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_FLOOR = tl.constexpr(-1e4)  # in place of log 0, as in algo.divergence
_MAX_BLOCK = 4096
_KINDS = {
    "forward_kl": ("kl", False),
    "reverse_kl": ("kl", True),
    "skew_kl": ("kl", False),
    "skew_reverse_kl": ("kl", True),
    "jsd": ("jsd", False),
    "tvd": ("tvd", False),
}
"""Of a function of algo.divergence: the sum, and whether teacher and student change places."""


def row_divergence(name: str, teacher_logits: Tensor, student_logits: Tensor, number: float = 0.0) -> Tensor:
    """The divergence `name` of algo.divergence in nats, logits [..., V] each -> [...]; `number` is its alpha or beta.

    The student's logits get a gradient. A row whose value gets the gradient 0 gets zeros, whatever it contains.
    """
    vocab = student_logits.shape[-1]
    rows = (x.reshape(-1, vocab) for x in (teacher_logits.detach(), student_logits))
    values: Tensor = _RowDivergence.apply(*rows, *_KINDS[name], number)  # type: ignore[no-untyped-call]
    return values.view(student_logits.shape[:-1])


class _RowDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p_logits: Tensor, q_logits: Tensor, kind: str, reverse: bool, number: float) -> Tensor:
        p_logits, q_logits = _dense(p_logits), _dense(q_logits)
        numbers = {"KIND": kind, "REVERSE": reverse, "NUMBER": number}
        dtype = _sum_dtype(p_logits, q_logits)
        num, vocab = q_logits.shape
        values = torch.empty(num, dtype=dtype, device=q_logits.device)
        needs_grad = ctx.needs_input_grad[1]
        sums = torch.empty((num, 5) if needs_grad else 0, dtype=dtype, device=q_logits.device)
        if num:
            _forward[(num,)](
                p_logits, q_logits, values, sums, vocab, p_logits.stride(0), q_logits.stride(0), GRAD=needs_grad,
                **numbers, **_sizes(vocab, dtype),
            )  # fmt: skip
        if needs_grad:
            ctx.save_for_backward(p_logits, q_logits, sums)
            ctx.numbers = numbers
        return values

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        p_logits, q_logits, sums = ctx.saved_tensors
        num, vocab = q_logits.shape
        grad = torch.empty(num, vocab, dtype=sums.dtype, device=q_logits.device)
        if num:
            _backward[(num,)](
                p_logits, q_logits, sums, outer.contiguous(), grad, vocab, p_logits.stride(0), q_logits.stride(0),
                **ctx.numbers, **_sizes(vocab, sums.dtype),
            )  # fmt: skip
        return None, grad.to(q_logits.dtype), None, None, None


def entropy(logits: Tensor) -> Tensor:
    """-sum p ln p of rows [N, V], [N]."""
    return _of_one_row(logits, None)


def uncertainty(logits: Tensor, labels: Tensor) -> Tensor:
    """ATKD's UnC of rows [N, V]: the sum of p over all ids but the label, [N]."""
    return _of_one_row(logits, labels.to(logits.device, torch.int64).contiguous())


def _of_one_row(logits: Tensor, labels: Tensor | None) -> Tensor:
    rows, dtype = _dense(logits.detach()), _sum_dtype(logits)
    num, vocab = rows.shape
    values = torch.empty(num, dtype=dtype, device=rows.device)
    if num:
        _single[(num,)](
            rows, values if labels is None else labels, values, vocab, rows.stride(0), ENTROPY=labels is None,
            **_sizes(vocab, dtype),
        )  # fmt: skip
    return values


def check(device: torch.device) -> None:
    """Raise where the kernels do not compile on `device`, or give wrong numbers."""
    p, q = (torch.linspace(-2, top, 100, device=device).repeat(2, 1) for top in (2.0, 3.0))
    q.requires_grad_()
    log_p, log_q = p.log_softmax(-1), q.detach().log_softmax(-1)
    found = row_divergence("forward_kl", p, q)
    found.sum().backward()
    wanted = (log_p.exp() * (log_p - log_q)).sum(-1)
    pairs = [(found.detach(), wanted), (q.grad, log_q.exp() - log_p.exp())]
    pairs.append((row_divergence("jsd", p, p, 0.5), torch.zeros(2, device=device)))
    pairs.append((entropy(p), -(log_p.exp() * log_p).sum(-1)))
    pairs.append((uncertainty(p, torch.zeros(2, device=device)), 1 - log_p[:, 0].exp()))
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def _dense(rows: Tensor) -> Tensor:
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _sum_dtype(*rows: Tensor) -> torch.dtype:
    """The dtype of the sums: that of the inputs, at least float32."""
    dtype = torch.float32
    for x in rows:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def _sizes(vocab: int, dtype: torch.dtype) -> dict[str, Any]:
    most = _MAX_BLOCK if dtype == torch.float32 else _MAX_BLOCK // 2
    block = min(most, max(triton.next_power_of_2(vocab), 16))
    return {
        "SUMS": tl.float32 if dtype == torch.float32 else tl.float64,
        "BLOCK": block,
        "num_warps": min(max(block // 256, 1), 16),
        "enable_fp_fusion": False,
    }


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _load(row, start, vocab, SUMS: tl.constexpr, BLOCK: tl.constexpr):
    """A block of logits; -inf, an id of probability 0, beyond the last id."""
    ids = start + tl.arange(0, BLOCK)
    values = tl.load(row + ids, mask=ids < vocab, other=float("-inf"))
    if tl.float32 == SUMS:
        return values.to(tl.float32)
    elif values.dtype == tl.float64:
        return values
    else:
        return values.to(tl.float32).to(tl.float64)


@triton.jit
def _more(values, most, total):
    """The running maximum and sum of exponentials of each lane, with `values`. NaN and inf make the sum NaN."""
    new = tl.where(values > most, values, most)
    return new, total * tl.exp(most - new) + tl.exp(values - new)


@triton.jit
def _lanes(SUMS: tl.constexpr, BLOCK: tl.constexpr):
    return tl.full((BLOCK,), -3e38, SUMS), tl.zeros((BLOCK,), SUMS)  # finite: -inf minus itself is NaN


@triton.jit
def _joined(most, total):
    """Maximum and sum of a row from those of its lanes."""
    top = tl.max(most, 0)
    return top, tl.sum(total * tl.exp(most - top), 0)


@triton.jit
def _log(values, top, total):
    """ln p, with a finite number for ln 0 that lets NaN pass."""
    log = values - top - tl.log(total)
    return tl.where(log < _FLOOR, _FLOOR, log)


@triton.jit
def _log1p(x):
    """ln(1 + x) with the digits of a small x (Kahan)."""
    y = 1 + x
    rest = y - 1
    return tl.where(rest == 0, x, tl.log(y) * (x / tl.where(rest == 0, 1, rest)))


@triton.jit
def _jsd_terms(p, q, BETA: tl.constexpr, SUMS: tl.constexpr):
    """Terms of the JSD and G, by log1p of d = (p - q) / m as in algo.divergence.jsd."""
    EPS: tl.constexpr = 1.1920928955078125e-07 if tl.float32 == SUMS else 2.220446049250313e-16
    LEAST: tl.constexpr = 9.860761315262648e-32 if tl.float32 == SUMS else 1.0020841800044864e-292  # tiny / eps
    beta = tl.full((), BETA, SUMS)
    m = q + beta * (p - q)
    d = (p - q) / tl.where(m < LEAST, tl.full((), LEAST, SUMS), m)
    high = tl.full((), (1 - 4 * EPS) / BETA, SUMS)
    low = tl.full((), -(1 - 4 * EPS) / (1 - BETA), SUMS)
    d = tl.where(d > high, high, tl.where(d < low, low, d))
    p_terms = beta * (_log1p((1 - beta) * d) * p)
    q_terms = (1 - beta) * (_log1p(-beta * d) * q)
    return p_terms + q_terms, q_terms


@triton.jit
def _kl_terms(log_p, log_q, ALPHA: tl.constexpr, REVERSE: tl.constexpr, SUMS: tl.constexpr):
    """Terms of KL(a ‖ alpha a + (1 - alpha) b), (a, b) = (p, q), or (q, p) with REVERSE, and G."""
    log_a = log_q if REVERSE else log_p
    log_b = log_p if REVERSE else log_q
    a = tl.exp(log_a)
    if ALPHA == 0:
        log_mix = log_b - log_a
        share = tl.full(a.shape, 1, SUMS)
    else:
        shared = tl.log(tl.full((), ALPHA, SUMS))
        other = log_b - log_a + tl.log(tl.full((), 1 - ALPHA, SUMS))
        log_mix = tl.where(other > shared, other, shared) + _log1p(tl.exp(-tl.abs(other - shared)))
        share = tl.exp(other - log_mix)
    # d (-a log_mix): a and log_mix depend on ln a, log_mix alone on ln b
    slope = a * (share - log_mix) if REVERSE else -a * share
    return -a * log_mix, tl.where(log_q <= _FLOOR, 0.0, slope)


@triton.jit
def _terms(p_values, q_values, p_top, p_total, q_top, q_total, KIND: tl.constexpr, REVERSE: tl.constexpr,
           NUMBER: tl.constexpr, SUMS: tl.constexpr):  # fmt: skip
    """Terms of the divergence, G, and q of a block."""
    p = tl.exp(p_values - p_top) / p_total
    q = tl.exp(q_values - q_top) / q_total
    if KIND == "jsd":
        terms, slope = _jsd_terms(p, q, NUMBER, SUMS)
    elif KIND == "tvd":
        terms = tl.abs(p - q) / 2
        slope = tl.where(q > p, q, tl.where(q < p, -q, 0.0)) / 2
    else:
        log_p = _log(p_values, p_top, p_total)
        log_q = _log(q_values, q_top, q_total)
        terms, slope = _kl_terms(log_p, log_q, NUMBER, REVERSE, SUMS)
    return terms, slope, q


@triton.jit
def _forward(p_logits, q_logits, out, sums, vocab, p_stride, q_stride, GRAD: tl.constexpr, KIND: tl.constexpr,
             REVERSE: tl.constexpr, NUMBER: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    p_row = p_logits + n * p_stride
    q_row = q_logits + n * q_stride
    p_top, p_total = _lanes(SUMS, BLOCK)
    q_top, q_total = _lanes(SUMS, BLOCK)
    for start in range(0, vocab, BLOCK):
        p_top, p_total = _more(_load(p_row, start, vocab, SUMS, BLOCK), p_top, p_total)
        q_top, q_total = _more(_load(q_row, start, vocab, SUMS, BLOCK), q_top, q_total)
    p_most, p_sum = _joined(p_top, p_total)
    q_most, q_sum = _joined(q_top, q_total)

    terms = tl.zeros((BLOCK,), SUMS)
    slopes = tl.zeros((BLOCK,), SUMS)
    for start in range(0, vocab, BLOCK):
        p_values = _load(p_row, start, vocab, SUMS, BLOCK)
        q_values = _load(q_row, start, vocab, SUMS, BLOCK)
        term, slope, _ = _terms(p_values, q_values, p_most, p_sum, q_most, q_sum, KIND, REVERSE, NUMBER, SUMS)
        terms += term
        slopes += slope
    value = tl.sum(terms, 0)
    if KIND == "jsd":  # at most that of distributions that share no id
        beta = tl.full((), NUMBER, SUMS)
        largest = -beta * tl.log(beta) - (1 - beta) * tl.log(1 - beta)
        value = tl.where(value > largest, largest, value)
    tl.store(out + n, value)
    if GRAD:
        tl.store(sums + 5 * n, p_most)
        tl.store(sums + 5 * n + 1, p_sum)
        tl.store(sums + 5 * n + 2, q_most)
        tl.store(sums + 5 * n + 3, q_sum)
        tl.store(sums + 5 * n + 4, tl.sum(slopes, 0))


@triton.jit
def _backward(p_logits, q_logits, sums, outer, grad, vocab, p_stride, q_stride, KIND: tl.constexpr,
              REVERSE: tl.constexpr, NUMBER: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    p_row = p_logits + n * p_stride
    q_row = q_logits + n * q_stride
    p_most = tl.load(sums + 5 * n)
    p_sum = tl.load(sums + 5 * n + 1)
    q_most = tl.load(sums + 5 * n + 2)
    q_sum = tl.load(sums + 5 * n + 3)
    total = tl.load(sums + 5 * n + 4)
    factor = tl.load(outer + n).to(SUMS)
    for start in range(0, vocab, BLOCK):
        slope = tl.zeros((BLOCK,), SUMS)
        if factor != 0:  # a masked row may contain anything, and 0 times NaN is NaN
            p_values = _load(p_row, start, vocab, SUMS, BLOCK)
            q_values = _load(q_row, start, vocab, SUMS, BLOCK)
            _, slope, q = _terms(p_values, q_values, p_most, p_sum, q_most, q_sum, KIND, REVERSE, NUMBER, SUMS)
            slope = factor * (slope - q * total)
        ids = start + tl.arange(0, BLOCK)
        tl.store(grad + n * vocab + ids, slope, mask=ids < vocab)


@triton.jit
def _single(logits, labels, out, vocab, stride, ENTROPY: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr):
    """The entropy of a row, or the mass of all ids but the label's."""
    n = tl.program_id(0).to(tl.int64)
    row = logits + n * stride
    tops, totals = _lanes(SUMS, BLOCK)
    for start in range(0, vocab, BLOCK):
        tops, totals = _more(_load(row, start, vocab, SUMS, BLOCK), tops, totals)
    top, total = _joined(tops, totals)
    terms = tl.zeros((BLOCK,), SUMS)
    for start in range(0, vocab, BLOCK):
        values = _load(row, start, vocab, SUMS, BLOCK)
        if ENTROPY:
            log = _log(values, top, total)
            terms -= tl.exp(log) * log
        else:
            others = start + tl.arange(0, BLOCK) != tl.load(labels + n)
            terms += tl.where(others, tl.exp(values - top) / total, 0.0)
    tl.store(out + n, tl.sum(terms, 0))
