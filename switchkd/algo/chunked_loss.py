"""A loss over many positions that never holds more than one chunk of vocabulary rows.

In: the student's last hidden states [N, D], its output matrix, the teacher's rows by slice, and a per-token loss.
Out: sum(weights * per-token loss), differentiable in the hidden states and in the matrix. The gradient of a chunk is
taken as soon as its loss is known (as Liger's fused losses do, arXiv 2410.10989): nothing is computed twice, and what
is kept until the backward pass is one gradient per hidden state and one of the matrix.

Two sizes: products run over a chunk, so that the matrix is read seldom; the loss and its gradient, which are many
passes over each row, run over as few rows as stay in a cache. Of a chunk exist the teacher's rows and the student's,
which become their gradients where they stand.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from switchkd.algo.divergence import few_rows
from switchkd.algo.topk import TopK

CPU_ELEMENTS = 2**18
"""Of the rows that a loss gets at a time. Its gradient takes more passes than a rule's numbers: fewer, longer calls."""


def chunked_loss(
    student_hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits_of: Callable[[Tensor], Tensor],
    teacher_logits: Callable[[slice], Tensor | TopK | None],
    labels: Tensor,
    mask: Tensor,
    weights: Tensor,
    loss: Callable[..., Tensor],
    extras: dict[str, Tensor],
    chunk: int,
) -> Tensor:
    """sum(weights * per-token loss), a differentiable scalar.

    The student's rows are logits_of(hidden @ weight.T + bias), with weight [V, D], bias [V] and a function that goes
    through each row by itself (to float32, scale, soft-cap). `teacher_logits(slice)` gives the teacher's rows [n, V]:
    None for a loss without a teacher, compressed ones where the loss takes them; it is called once per chunk, in order.
    `loss(p_logits, q_logits, labels, mask, **extras)` gets a few rows at a time, in order and each once, with the same
    rows of each tensor of `extras` ([N, ...]).
    N = 0 gives a zero that still reaches the hidden states and the matrix, so that every rank's hooks run.
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}: give a number of positions, at least 1")

    def of_rows(rows: slice, p_logits: Tensor | TopK | None, product: Tensor) -> Tensor:
        row_extras = {name: tensor[rows] for name, tensor in extras.items()}
        q_logits = logits_of(product)
        if q_logits is product:  # a loss may work in place, and keep what it saw
            q_logits = product.clone()
        per_token = loss(p_logits, q_logits, labels[rows], mask[rows], **row_extras)
        return (weights[rows] * per_token).sum()

    total: Tensor = _GradientsAhead.apply(of_rows, teacher_logits, chunk, student_hidden, weight, bias)  # type: ignore[no-untyped-call]
    return total


class _GradientsAhead(torch.autograd.Function):
    """The sum over chunks; its gradients are ready when the forward pass ends, the backward pass scales them."""

    @staticmethod
    def forward(ctx: Any, of_rows: Callable[..., Tensor], teacher_logits: Callable[[slice], Any], chunk: int,
                hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # fmt: skip
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[3:]
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        # chunks are summed in float32
        of_hidden = torch.zeros_like(hidden) if wants_hidden else None
        of_weight = torch.zeros_like(weight, dtype=_summed(weight)) if wants_weight else None
        of_bias = torch.zeros_like(bias, dtype=_summed(bias)) if bias is not None and wants_bias else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, min(start + chunk, len(hidden)))
            states = hidden[rows].to(weight.dtype)
            product = torch.nn.functional.linear(states, weight, bias)
            total += _differentiate(of_rows, rows, teacher_logits(rows), product)
            if of_hidden is not None:
                of_hidden[rows] = product @ weight
            if of_weight is not None:
                _add_product(of_weight, product.T, states)
            if of_bias is not None:
                of_bias += product.sum(0, dtype=of_bias.dtype)
        ctx.grads = (
            of_hidden,
            None if of_weight is None else of_weight.to(weight.dtype),
            None if bias is None or of_bias is None else of_bias.to(bias.dtype),
        )
        return total.to(torch.promote_types(hidden.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Any, ...]:
        grads, ctx.grads = ctx.grads, None  # scaled in place: there is no second backward pass
        return (None, None, None, *(None if grad is None else grad.mul_(outer[0].to(grad.dtype)) for grad in grads))


def _differentiate(
    of_rows: Callable[..., Tensor], rows: slice, p_logits: Tensor | TopK | None, product: Tensor
) -> Tensor:
    """The loss of a chunk; its gradient takes the place of `product` [n, V]."""
    total, (num, vocab) = torch.zeros((), dtype=torch.float64, device=product.device), product.shape
    for few in few_rows(num, vocab, product.device, CPU_ELEMENTS):
        with torch.enable_grad():
            leaf = product[few].detach().requires_grad_()
            part = of_rows(slice(rows.start + few.start, rows.start + few.stop), _taken(p_logits, few), leaf)
        total += part.detach()
        if part.requires_grad:
            product[few] = torch.autograd.grad(part, leaf)[0]
        else:
            product[few] = 0
    return total


def _taken(p_logits: Tensor | TopK | None, few: slice) -> Tensor | TopK | None:
    if p_logits is None:
        return None
    return p_logits.of(few) if isinstance(p_logits, TopK) else p_logits[few]


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, without a second matrix of that size where the types allow it."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _summed(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
