"""A loss over many positions with the vocabulary rows of one chunk in memory.

In: the student's last hidden states [N, D], its output matrix, the teacher's rows by slice, and a per-token loss.
Out: sum(weights * per-token loss), differentiable in the hidden states and in the matrix. The gradient of a chunk is
computed right after its loss (as in Liger's fused losses, arXiv 2410.10989): nothing is computed twice, and the forward
pass keeps one gradient per hidden state and one of the matrix.

There are two sizes. Products run over a chunk, so that the matrix is read rarely. The loss and its gradient make many
passes over each row, so they run over as few rows as fit a cache. A chunk has the teacher's rows and the student's,
which the gradients overwrite in place.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from switchkd.algo.divergence import few_rows
from switchkd.algo.topk import TopK

CPU_ELEMENTS = 2**18
"""Elements of the rows that a loss gets at a time on a CPU, more than for a rule: its gradient has more passes."""


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

    The student's rows are logits_of(hidden @ weight.T + bias), with weight [V, D], bias [V] and a function of single
    rows (to float32, scale, soft-cap). `teacher_logits(slice)` gives the teacher's rows [n, V], compressed rows where
    the loss takes them, None for a loss without a teacher; it is called once per chunk, in order.
    `loss(p_logits, q_logits, labels, mask, **extras)` gets a few rows at a time, in order and each once, with the same
    rows of each tensor of `extras` ([N, ...]).
    N = 0 gives a zero with gradients for the hidden states and the matrix, so that every rank's hooks run.
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}: give a number of positions, at least 1")

    def of_rows(rows: slice, p_logits: Tensor | TopK | None, product: Tensor) -> Tensor:
        row_extras = {name: tensor[rows] for name, tensor in extras.items()}
        q_logits = logits_of(product)
        if q_logits is product:  # a loss may work in place, or keep its input
            q_logits = product.clone()
        per_token = loss(p_logits, q_logits, labels[rows], mask[rows], **row_extras)
        return (weights[rows] * per_token).sum()

    total: Tensor = _GradientsAhead.apply(of_rows, teacher_logits, chunk, student_hidden, weight, bias)  # type: ignore[no-untyped-call]
    return total


class _GradientsAhead(torch.autograd.Function):
    """The sum over chunks. The forward pass computes the gradients, the backward pass scales them."""

    @staticmethod
    def forward(ctx: Any, of_rows: Callable[..., Tensor], teacher_logits: Callable[[slice], Any], chunk: int,
                hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # fmt: skip
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[3:]
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        hidden_grad = torch.zeros_like(hidden) if needs_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=_sum_dtype(weight)) if needs_weight else None
        bias_grad = torch.zeros_like(bias, dtype=_sum_dtype(bias)) if bias is not None and needs_bias else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, min(start + chunk, len(hidden)))
            states = hidden[rows].to(weight.dtype)
            product = torch.nn.functional.linear(states, weight, bias)
            total += _differentiate(of_rows, rows, teacher_logits(rows), product)
            if hidden_grad is not None:
                hidden_grad[rows] = product @ weight
            if weight_grad is not None:
                _add_product(weight_grad, product.T, states)
            if bias_grad is not None:
                bias_grad += product.sum(0, dtype=bias_grad.dtype)
        ctx.grads = (
            hidden_grad,
            None if weight_grad is None else weight_grad.to(weight.dtype),
            None if bias is None or bias_grad is None else bias_grad.to(bias.dtype),
        )
        return total.to(torch.promote_types(hidden.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Any, ...]:
        grads, ctx.grads = ctx.grads, None  # scaled in place: there is no second backward pass
        return (None, None, None, *(None if grad is None else grad.mul_(outer[0].to(grad.dtype)) for grad in grads))


def _differentiate(
    of_rows: Callable[..., Tensor], rows: slice, p_logits: Tensor | TopK | None, product: Tensor
) -> Tensor:
    """The loss of a chunk; its gradient overwrites `product` [n, V]."""
    total, (num, vocab) = torch.zeros((), dtype=torch.float64, device=product.device), product.shape
    for few in few_rows(num, vocab, product.device, CPU_ELEMENTS):
        with torch.enable_grad():
            leaf = product[few].detach().requires_grad_()
            teacher_rows = p_logits.of(few) if isinstance(p_logits, TopK) else p_logits
            if isinstance(teacher_rows, Tensor):
                teacher_rows = teacher_rows[few]
            part = of_rows(slice(rows.start + few.start, rows.start + few.stop), teacher_rows, leaf)
        total += part.detach()
        product[few] = torch.autograd.grad(part, leaf)[0] if part.requires_grad else torch.zeros_like(leaf)
    return total


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, without a second matrix of that size where the types allow it."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which chunks are summed, at least float32."""
    return torch.promote_types(tensor.dtype, torch.float32)
